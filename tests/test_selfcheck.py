"""The self-check: every rung is made to fail, and generates the codes of the reference all the same.

On a CPU kernels run in Triton's interpreter, and the fixture ``captures`` stands in for CUDA graphs.
"""

import json
import shutil
import sys
import warnings

import pytest
import torch

import csm.selfcheck
from csm import FallbackWarning
from csm.config import CSMConfig, TransformerConfig
from csm.frame import FrameState, decode_frame
from csm.graph import Graph
from csm.kernels.launch import enable_kernels, launches, use_kernels
from csm.model import CSM
from csm.opchecks import op_checks, relative_error
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams
from csm.selfcheck import Rung, choose_rung, default_dtype, fall_back
from csm.weights.layouts import sesame_table
from noise import random_state

CPU = torch.device("cpu")
KERNELS, OPS, EAGER = Rung(True, True), Rung(False, True), Rung(False, False)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path, one_thread):
    """No result of another test, kernels on, and a cache folder of its own."""
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(csm.selfcheck, "_chosen", {})
    monkeypatch.setattr(csm.selfcheck, "_without_graphs", set())
    yield
    enable_kernels(CPU, True)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("CSM_OPS", "triton")


def codes(model, rung, frames=2):
    """Codes of a sampled request, computed on a rung: (frames, K)."""
    state = FrameState.allocate(model.config, 1, CPU, model.dtype)
    rows = text_rows([256, *b"Hi.", 257], model.config.num_codebooks)[:2]
    Prefill(model).start(state, 0, *rows, SamplingParams(seed=5))
    step = lambda: decode_frame(model, state, 256)  # noqa: E731
    run = Graph(step, state.buffers, CPU).replay if rung.graph else step
    generated = []
    for _ in range(frames):
        run()
        generated.append(state.codes_BK[0].clone())
    return torch.stack(generated)


@pytest.fixture(scope="module")
def model():
    """As small as it can be, because the interpreter is slow."""
    sizes = dict(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=32)
    config = CSMConfig(
        backbone=TransformerConfig(dim=32, max_positions=256, **sizes),
        depth_decoder=TransformerConfig(dim=16, max_positions=4, **sizes),
        text_vocab_size=258,
        audio_vocab_size=67,
        num_codebooks=3,
        codebook_size=64,
    )
    return CSM.from_state_dict(config, random_state(sesame_table(config), seed=1), CPU)


@pytest.fixture(scope="module")
def expected(model):
    return codes(model, EAGER)


def warned(model, batch_sizes=(1,)):
    """The rung and the messages of its FallbackWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rung = choose_rung(model, batch_sizes)
    return rung, [str(w.message) for w in caught if w.category is FallbackWarning]


def test_everything_passes(model, expected, kernels, captures):
    rung, messages = warned(model)
    assert (rung, messages) == (KERNELS, [])
    assert len(captures) == 1
    with launches() as seen:
        assert torch.equal(codes(model, rung), expected)
    assert seen


def test_checks_launch_every_kernel_of_a_frame(model, kernels):
    """With the same constants, so that nothing is left to compile afterwards."""
    state = FrameState.allocate(model.config, 1, CPU, model.dtype)

    def shapes(seen):
        ignored = {"CHUNKS", "C"}  # of attention: depend on the context bucket
        return {(x.name, *sorted((k, v) for k, v in x.constants.items() if k not in ignored)) for x in seen}

    with launches() as of_frame:
        model.depth_qkv = None
        model.precompute_depth_qkv()
        decode_frame(model, state)
    with launches() as of_checks:
        for check in op_checks(model, [1]):
            check.run()
    assert shapes(of_frame) <= shapes(of_checks)


def wrong_launch(real):
    """A launch of a kernel that uses another epsilon in RMSNorm."""
    return lambda *args, **options: real(*args, **{**options, "EPS": 10.0})


@pytest.fixture
def wrong_kernel(monkeypatch, kernels):
    module = sys.modules["csm.kernels.norm_swiglu"]
    monkeypatch.setattr(module, "launch", wrong_launch(module.launch))


def test_a_wrong_kernel_falls_back_to_pytorch_ops(model, expected, wrong_kernel, captures):
    rung, messages = warned(model)
    assert rung == OPS
    assert len(messages) == 1
    pattern = "the kernel of norm_swiglu of the backbone at batch 1 differs from its reference by"
    assert pattern in messages[0] and "tolerance 0.002" in messages[0] and "PyTorch ops in a CUDA graph" in messages[0]
    assert torch.equal(codes(model, rung), expected)


def test_a_kernel_that_raises_falls_back(model, expected, kernels, captures, monkeypatch):
    def launch(*args, **options):
        raise RuntimeError("PTX JIT\n compilation failed")

    monkeypatch.setattr(sys.modules["csm.kernels.embed_rows"], "launch", launch)
    rung, messages = warned(model)
    assert rung == OPS and "embed_rows at batch 1 raises RuntimeError: PTX JIT compilation failed" in messages[0]
    assert torch.equal(codes(model, rung), expected)


def test_a_missing_compiler_falls_back(model, expected, kernels, captures, monkeypatch):
    """Triton's own error, with PATH emptied: the interpreter compiles nothing, so the probe asks its compiler."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert shutil.which("gcc") is None

    def probe(device, dtype):
        build._build("probe", "probe.c", ".", [], [], [], [])

    monkeypatch.setattr("csm.selfcheck.probe", probe)
    rung, messages = warned(model)
    assert rung == OPS and len(messages) == 1
    assert "Failed to find C compiler" in messages[0] and "install gcc or clang, or set CC" in messages[0]
    assert torch.equal(codes(model, rung), expected)


def test_an_old_gpu_falls_back(model, kernels, captures, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (7, 5))
    failure = csm.selfcheck.launch_failure(torch.device("cuda:0"), torch.float16)
    assert failure == "the GPU has compute capability 7.5, and the kernels need 8.0"


def test_a_capture_that_raises_falls_back_twice(model, expected, kernels, captures, monkeypatch):
    def capture(step, device, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("csm.graph.capture", capture)
    rung, messages = warned(model)
    assert rung == EAGER and len(messages) == 2
    assert all("a frame of batch 1 cannot be captured: RuntimeError: operation not permitted" in m for m in messages)
    assert "PyTorch ops in a CUDA graph instead" in messages[0]
    assert "PyTorch ops without a CUDA graph instead" in messages[1]
    assert torch.equal(codes(model, rung), expected)


def test_a_capture_that_fails_with_kernels_only(model, expected, kernels, captures, monkeypatch):
    stand_in = csm.graph.capture

    def capture(step, device, pool):
        if use_kernels(model.codebook0_head, 1):
            raise RuntimeError("no kernels here")
        return stand_in(step, device, pool)

    monkeypatch.setattr("csm.graph.capture", capture)
    rung, messages = warned(model)
    assert rung == OPS and len(messages) == 1
    assert torch.equal(codes(model, rung), expected)


def test_a_replay_that_computes_something_else_falls_back(model, expected, captures, monkeypatch):
    class Nothing:
        def replay(self):
            pass

    monkeypatch.setattr("csm.graph.capture", lambda step, device, pool: Nothing())
    rung, messages = warned(model)
    assert rung == EAGER and len(messages) == 1
    assert "a captured frame of batch 1 at temperature 0 differs from the eager one in " in messages[0]
    assert torch.equal(codes(model, rung), expected)


def test_the_result_is_kept_for_the_process(model, wrong_kernel, captures, monkeypatch):
    assert warned(model)[0] == OPS
    monkeypatch.setattr("csm.selfcheck._check", lambda *_: pytest.fail("checked again"))
    assert warned(model) == (OPS, [])
    enable_kernels(CPU, True)
    assert warned(model) == (OPS, [])


def test_a_failed_capture_is_not_tried_again(model, captures, monkeypatch):
    monkeypatch.setattr("csm.graph.capture", lambda *_: 1 / 0)
    assert len(warned(model)[1]) == 1
    assert warned(model) == (EAGER, [])
    assert warned(model, (1, 2)) == (EAGER, [])


def test_a_passed_check_is_kept_in_a_file(model, captures, monkeypatch):
    assert choose_rung(model) == OPS
    assert len(captures) == 1
    monkeypatch.setattr(csm.selfcheck, "_chosen", {})  # another process
    assert choose_rung(model) == OPS
    assert len(captures) == 1
    assert choose_rung(model, (1, 2)) == OPS  # other shapes
    assert len(captures) == 3


def test_a_failed_check_is_saved_and_repeated(model, wrong_kernel, captures, monkeypatch):
    assert len(warned(model)[1]) == 1
    (result,) = json.loads(csm.selfcheck.results_path().read_text()).values()
    assert result["rung"] == {"kernels": False, "graph": True} and "norm_swiglu" in result["failures"][0]
    monkeypatch.setattr(csm.selfcheck, "_chosen", {})  # another process
    enable_kernels(CPU, True)
    assert len(warned(model)[1]) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_damaged_file_is_replaced(model, captures, content):
    path = csm.selfcheck.results_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choose_rung(model) == OPS
    assert {"kernels": False, "graph": True} in [r["rung"] for r in json.loads(path.read_text()).values() if r != 1]


def test_a_folder_that_cannot_be_written_gives_a_warning(model, captures, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot save the result of the self-check"):
        assert choose_rung(model) == OPS


def test_the_key_names_what_a_result_depends_on(model):
    key = csm.selfcheck._key(model, (4, 1), KERNELS)
    for part in (f"torch {torch.__version__}", "triton ", "csm ", "torch.float32", "batch 1,4", "Triton kernels"):
        assert part in key
    assert key != csm.selfcheck._key(model, (1,), KERNELS)


def test_nothing_is_checked_where_nothing_is_fast(model, monkeypatch):
    monkeypatch.setattr("csm.selfcheck._check", lambda *_: pytest.fail("checked"))
    assert choose_rung(model) == EAGER
    assert not csm.selfcheck.results_path().exists()


def test_checks_can_be_skipped(model, wrong_kernel, captures, monkeypatch):
    monkeypatch.setenv("CSM_SELFCHECK", "0")
    assert warned(model) == (KERNELS, [])
    assert captures == []


def test_falling_back_later(model, kernels):
    with pytest.warns(FallbackWarning, match=r"no memory\. Frames on cpu are computed by PyTorch ops in a CUDA graph"):
        assert fall_back(CPU, KERNELS, "no memory") == OPS
    assert not use_kernels(model.codebook0_head, 1)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_bfloat16_only_where_the_gpu_has_it(monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    assert default_dtype(torch.device("cuda")) == dtype
    assert default_dtype(CPU) == torch.float32


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 3]), torch.tensor([1, 2])) == float("inf")
