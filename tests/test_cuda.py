"""What only a GPU can show: ``make gpu``. Float32 on the embedded checkpoint, bit for bit."""

from dataclasses import replace

import pytest
import torch

from csm import Generator, Segment, SpeechRequest
from csm.__main__ import main
from csm.bench.accuracy import compare
from csm.bench.model_setup import Setup, random_weights
from csm.bench.report import table
from csm.config import CSM_1B, MIMI
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, Pool
from csm.guards import NO_GUARDS
from csm.kernels.sample import gumbel_noise
from csm.model import CSM
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams
from micro import write_data
from noise import CODEC, CONFIG, NOISE

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

REQUESTS = [
    dict(text="Hello.", speaker=0, max_audio_length_ms=2400, seed=1),
    dict(text="A longer sentence, by somebody else.", speaker=3, max_audio_length_ms=2400, seed=2, temperature=0.6),
    dict(text="Three.", speaker=1, max_audio_length_ms=800, seed=3, topk=10),
]


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    """No TF32: the CPU's codes are to come out."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before


def generator(dtype=torch.float32, batches=(1, 2, 4)):
    made = Generator.from_pretrained(NOISE, device="cuda", dtype=dtype)
    if batches:
        made.warmup(batches)
    return made


@pytest.fixture(scope="module")
def captured():
    return generator()


@pytest.fixture(scope="module")
def plain():
    return generator(batches=())


def started(model, batch):
    state = FrameState.allocate(model.config, batch, model.device, model.dtype)
    return state, lambda: restart(model, state)


def restart(model, state, temperature=0.9):
    prefill = Prefill(model)
    for slot in range(state.batch):
        row_TC, mask_TC, _ = text_rows([256, *b"[0]Hello.", 257], model.config.num_codebooks)
        prefill.start(state, slot, row_TC, mask_TC, SamplingParams(temperature, seed=slot + 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_graph_equals_eager_bit_for_bit(plain, dtype, batch):
    model = plain.model if dtype == torch.float32 else generator(dtype, batches=()).model
    eager, restart_eager = started(model, batch)
    graphed, restart_graphed = started(model, batch)
    graph = Graph(lambda: decode_frame(model, graphed, 256), graphed.buffers, model.device)
    assert graph.is_captured
    restart_eager(), restart_graphed()
    for _ in range(100):
        decode_frame(model, eager, 256)
        graph.replay()
        assert torch.equal(graphed.codes_BK, eager.codes_BK)
    assert torch.equal(graphed.backbone_cache.k_LBGSd, eager.backbone_cache.k_LBGSd)


@pytest.mark.parametrize("num_rows", [2, 33, 300, 2000])
def test_captured_chunks_equal_eager_bit_for_bit(plain, num_rows):
    model, params = plain.model, SamplingParams(temperature=0)
    eager, graphed = Prefill(model), Prefill(model)
    graphed.capture(Pool(model.device))
    rows = text_rows([i % 256 for i in range(num_rows)], model.config.num_codebooks)[:2]
    states = [FrameState.allocate(model.config, 2, model.device, model.dtype) for _ in range(2)]
    for prefill, state in zip((eager, graphed), states, strict=True):
        prefill.start(state, 1, *rows, params)
    for name, buffer in states[0].buffers().items():
        assert torch.equal(buffer, states[1].buffers()[name]), name


@pytest.mark.parametrize("batch", [1, 2, 12])
def test_kernels_speak_the_references_codes(plain, monkeypatch, batch):
    """Greedy, float32; the kernels' graph beside PyTorch's ops. A difference is reported with the logits' error."""
    model, frames = plain.model, []
    for ops in ("reference", "triton"):
        monkeypatch.setenv("CSM_OPS", ops)
        state, _ = started(model, batch)
        graph = Graph(lambda state=state: decode_frame(model, state, 512), state.buffers, model.device)
        restart(model, state, temperature=0)
        spoken = []
        for _ in range(20):
            graph.replay()
            spoken.append(state.codes_BK.clone())
        frames.append(torch.stack(spoken))
    differing = (frames[0] != frames[1]).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if differing:
        rows = compare(Setup(CONFIG, CODEC, dict(model.state_dict()), "small"), 20)
        pytest.fail(f"the codes differ from frame {differing[0]} on\n{table(rows)}")


@pytest.mark.parametrize("size", ["small", "CSM-1B"])
def test_kernels_are_as_accurate_as_pytorchs_ops(size):
    """Logits under teacher forcing, not codes: one rounding may change a greedy code, and with it all that follow."""
    weights = random_weights(CSM_1B if size == "CSM-1B" else CONFIG, torch.device("cuda"), torch.bfloat16)
    rows = compare(Setup(CSM_1B, MIMI, weights, size) if size == "CSM-1B" else Setup(CONFIG, CODEC, weights, size), 20)
    print(table(rows))
    errors = {(row["ops"], row["dtype"]): row["rms_logit_error"] for row in rows}
    assert errors["triton", "float32"] < 1e-4, table(rows)
    assert errors["triton", "bfloat16"] < 1.25 * errors["reference", "bfloat16"], table(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dependent_launch_changes_no_bit(plain, monkeypatch, dtype):
    model = plain.model if dtype == torch.float32 else generator(dtype, batches=()).model
    caches = []
    for pdl in ("0", "1"):
        monkeypatch.setenv("CSM_PDL", pdl)
        state, restart_state = started(model, 1)
        graph = Graph(lambda state=state: decode_frame(model, state, 256), state.buffers, model.device)
        restart_state()
        for _ in range(100):
            graph.replay()
        caches.append((state.codes_BK.clone(), state.backbone_cache.k_LBGSd.clone()))
    assert torch.equal(caches[0][0], caches[1][0]) and torch.equal(caches[0][1], caches[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_a_frame_with_the_qkv_table_equals_one_without(dtype, batch):
    """At CSM-1B's shape, whose kernels the compiler may order differently for different numbers of rows."""
    small = replace(CSM_1B, backbone=replace(CSM_1B.backbone, num_layers=1), text_vocab_size=256)
    device = torch.device("cuda")
    model, states = CSM.from_state_dict(small, random_weights(small, device, dtype), device), []
    for with_table in (False, True):
        if with_table:
            model.precompute_depth_qkv()
            assert model.depth_qkv is not None
        state = FrameState.allocate(small, batch, device, dtype, 256)
        state.temperature_B.fill_(0.9)
        state.top_k_B.fill_(50)
        for _ in range(3):
            decode_frame(model, state, 256)
        states.append(state.buffers())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_captured_twice_gives_the_same(captured):
    again = generator()
    for request in REQUESTS:
        assert torch.equal(again.generate_codes(**request), captured.generate_codes(**request))


def test_generator_with_graphs_equals_without(captured, plain):
    for request in REQUESTS:
        assert torch.equal(captured.generate_codes(**request), plain.generate_codes(**request))
        assert (captured.generate(**request) - plain.generate(**request)).abs().max() <= 1e-4


def test_stream_is_generate(captured):
    chunks = list(captured.stream(**REQUESTS[0]))
    assert len(chunks) == 30
    assert torch.equal(torch.cat(chunks), captured.generate(**REQUESTS[0]))
    codes = captured.generate_codes(**REQUESTS[0])
    assert (captured.decode(codes) - torch.cat(chunks)).abs().max() <= 1e-4


def test_batch_is_alone(captured):
    for request, audio in zip(REQUESTS, captured.generate_batch(REQUESTS), strict=True):
        alone = captured.generate(**request)
        assert audio.shape == alone.shape
        assert (audio - alone).abs().max() <= 1e-4


def test_seeds_equal_the_cpus(captured, noisy):
    codes = torch.randint(256, (40, 8), generator=torch.Generator().manual_seed(0))
    for request in REQUESTS:
        request = {**request, "context": [Segment(0, "Before.", codes=codes)]}
        assert torch.equal(captured.generate_codes(**request), noisy.generate_codes(**request))


def test_noise_equals_the_cpus():
    seed, frame = torch.tensor([3, 2**60]), torch.tensor([0, 999])
    ours = gumbel_noise(seed.cuda(), frame.cuda(), 32, 2048).cpu()
    torch.testing.assert_close(ours, gumbel_noise(seed, frame, 32, 2048), atol=1e-5, rtol=1e-5)


def test_ten_thousand_replays_take_no_memory(plain):
    state, restart_state = started(plain.model, 2)
    graph = Graph(lambda: decode_frame(plain.model, state, 2048), state.buffers, plain.device)
    restart_state()
    graph.replay()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10_000):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert state.frame_B.tolist() == [10_001, 10_001]


def test_the_step_waits_for_nothing(plain):
    """PyTorch's own watch over synchronising calls."""
    state, restart_state = started(plain.model, 2)
    restart_state()
    decode_frame(plain.model, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_frame(plain.model, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_codec_and_the_step_do_not_disturb_each_other(captured):
    """They run at the same time: many frames of a full batch, twice, bit for bit."""
    requests = [dict(text=f"Number {i}.", seed=i, max_audio_length_ms=16_000) for i in range(4)]
    first, again = captured.generate_batch(requests), captured.generate_batch(requests)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_an_abandoned_batch_does_not_disturb_the_next_request(captured):
    expected = captured.generate(**REQUESTS[0])
    for _ in range(20):
        frames = captured._run([captured._opener(SpeechRequest("Something else.", seed=9), NO_GUARDS)] * 4)
        next(frames)
        frames.close()
        assert torch.equal(captured.generate(**REQUESTS[0]), expected)


@pytest.mark.parametrize("mode", [["--lora", "--rank", "2"], ["--checkpointing", "--ema", "0.9"]], ids=["lora", "full"])
def test_training_takes_steps_and_goes_on(tmp_path, mode):
    """bfloat16 on the device: steps, a checkpoint, more steps from it, and what was learned speaks there."""
    data = write_data(tmp_path / "data")
    options = ["--data", data, "--model", NOISE, "--out", tmp_path / "run", "--device", "cuda", "--quiet", *mode]
    options += ["--precision", "bfloat16", "--batch-size", 4, "--save-every", 2, "--eval-every", 2]
    for steps in (2, 4):
        assert main(["finetune", *map(str, [*options, "--steps", steps, *(["--resume"] if steps > 2 else [])])]) == 0
    result = dict(lora=tmp_path / "run" / "adapter") if "--lora" in mode else {}
    name = NOISE if result else tmp_path / "run" / "model"
    spoken = Generator.from_pretrained(name, device="cuda", dtype=torch.bfloat16, **result)
    assert spoken.generate(**REQUESTS[0]).isfinite().all()
