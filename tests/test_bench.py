"""bench.py: what it prints, what it counts, what it refuses."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch

import csm.model
from csm import Generator
from csm.bench import cpu, cpu_worker, llama_cpp_row, rows
from csm.bench.command import main
from csm.bench.machine_code import (
    GPU_ARCHS,
    Compiled,
    Instruction,
    allocated_registers,
    instructions,
    used_before_trigger,
)
from csm.bench.model_setup import load, small_setup
from csm.bench.rows import Configuration, frame_bytes
from csm.bench.stepping import eager
from csm.config import CSM_1B
from noise import NOISE

ROOT = Path(csm.__file__).parent.parent
SMALL = ["--model", NOISE, "--device", "cpu", "--quiet", "--frames", "2", "--max-seconds", "0.16"]
SETUP = load(NOISE, "cpu", None)


def run(capsys, *args):
    assert main([*args]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def test_the_last_line_is_json(capsys, tmp_path):
    lines, result = run(capsys, *SMALL, "--batch", "1", "2", "--profile", "--out", str(tmp_path))
    assert [(row["name"], row["batch"]) for row in result["rows"]] == [
        ("eager", 1),
        ("eager", 2),
        ("text to audio", 1),
        ("text to audio", 2),
        ("transformers", 1),
        ("transformers", 2),
    ]
    for row in result["rows"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["audio_per_second"] == pytest.approx(row["batch"] * 80 / row["median_ms"])
    assert result["not_timed"] == []
    assert result["first_audio"]["cached_ms"] > 0
    assert len(result["sentences"]) == 11
    assert result["profile_reference"][0]["ms"] > 0
    assert sum(line.startswith("| eager") for line in lines) == 2
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert (tmp_path / "bench.md").read_text().splitlines() == lines[:-1]


def test_kernels_are_not_counted_without_triton(capsys, monkeypatch):
    monkeypatch.setattr("csm.bench.model_setup.triton", None)
    assert main(["--count"]) == 2
    assert "CSM_TRITON=1" in capsys.readouterr().err


TRITON_IMPORTED = "import sys, csm.kernels.launch as l; print('triton' in sys.modules, l.triton is None)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(("choice", "imported"), [({}, "False True"), ({"CSM_TRITON": "1"}, "True False")])
def test_triton_is_imported_where_it_is_of_use(choice, imported):
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CSM_OPS")}
    command = [sys.executable, "-c", TRITON_IMPORTED]
    done = subprocess.run(command, cwd=ROOT, env=environment | choice, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == imported


def test_the_embedded_voice_is_measured_though_it_ends_its_sentence(capsys):
    """HF Transformers' row too: it would stop at the frame of zeros."""
    asked = ["--rows", "eager", "text to audio", "transformers", "--frames", "24"]
    _, result = run(capsys, "--model", "tiny", "--device", "cpu", "--quiet", "--max-seconds", "0.16", *asked)
    eager_row, with_codec, theirs = result["rows"]
    assert [row["name"] for row in (eager_row, with_codec, theirs)] == ["eager", "text to audio", "transformers"]
    assert with_codec["median_ms"] > 0.5 * eager_row["median_ms"]  # chunks that come together are not free
    assert result["not_timed"] == []


def test_what_cannot_be_timed_is_a_row_with_its_reason(capsys, monkeypatch):
    def wrong(setup, batch):
        generate = eager(setup, batch)
        return lambda frames: [(ms, codes ^ 1) for ms, codes in generate(frames)]

    def short(setup, batch):
        generate = eager(setup, batch)
        return lambda frames: generate(frames)[:4]

    def broken(setup, batch):
        raise RuntimeError("not on this machine")

    unchecked = Configuration(short, check=lambda setup, batch: None)
    made = {"wrong": Configuration(wrong), "short": unchecked, "broken": Configuration(broken)}
    monkeypatch.setattr(rows, "CONFIGURATIONS", {**made, "eager": Configuration(eager)})
    lines, result = run(capsys, *SMALL, "--rows", "wrong", "short", "broken", "eager")
    assert [row["name"] for row in result["rows"]] == ["eager"]
    assert {row["name"]: row["not_timed_because"] for row in result["not_timed"]} == {
        "wrong": "its greedy codes differ from the eager step's from frame 0 on",
        "short": "generation ended after 4 of 5 frames; give fewer --frames",
        "broken": "RuntimeError: not on this machine",
    }
    for row in result["not_timed"]:
        assert any(line.startswith(f"| {row['name']} |") and row["not_timed_because"] in line for line in lines)


def test_a_row_that_needs_a_gpu_says_so(capsys):
    _, result = run(capsys, *SMALL, "--rows", "graph, kernels", "eager, kernels", "eager")
    assert [row["name"] for row in result["rows"]] == ["eager"]
    assert all("cpu" in row["not_timed_because"] for row in result["not_timed"])


def test_each_frame_has_codes_of_its_own():
    """A copy of each frame's codes is kept, not the buffer that the last frame overwrites."""
    codes = [codes_BK for _, codes_BK in eager(small_setup(SETUP), 1)(4)]
    assert len({tuple(frame.flatten().tolist()) for frame in codes}) == 4


def test_count(capsys):
    _, result = run(capsys, "--count")
    counts = {row["op"]: row for row in result["ops"]}
    assert all(result["launches"][ops] == sum(row[ops] for row in counts.values()) for ops in ("reference", "triton"))
    assert counts["linear"]["reference"] == 140 * 4 + 32 + 1  # 16 + 31 x 4 blocks, the heads, one projection
    assert counts["sample_slot"]["triton"] == 32
    assert counts["norm_rope_cache_rows"]["triton"] == 16 + 4 * 31 - 30  # a table replaces layer 0's in 30 depth passes
    assert result["launches"]["triton"] <= 640 < result["launches"]["reference"] < 3200


COMPILE = """
import json, sys
from csm.bench.machine_code import compiled_kernels
from csm.bench.model_setup import DTYPES
from csm.config import CSM_1B
batch, dtype, gpu_arch, scheme = int(sys.argv[1]), DTYPES[sys.argv[2]], int(sys.argv[3]), sys.argv[4] or None
kernels = compiled_kernels(CSM_1B, [batch], dtype, True, [gpu_arch], scheme)
print(json.dumps([kernel._asdict() for kernel in kernels]))
"""


def compile_kernels(batch, dtype, gpu_arch, scheme=""):
    """A frame's kernels, compiled in another process: in this one they are interpreted."""
    command = [sys.executable, "-c", COMPILE, str(batch), dtype, str(gpu_arch), scheme]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CSM_TRITON"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Compiled(**kernel) for kernel in json.loads(done.stdout)]


def check_machine_code(kernels, batch):
    """What a fast kernel must not do, of every kernel of a frame; one list of all that do."""
    faults = [f"{kernel.spills} spills: {kernel}" for kernel in kernels if kernel.spills]
    faults += [f"loads of {kernel.load_bits} bits: {kernel}" for kernel in kernels if kernel.load_bits < 64]
    for kernel in kernels:
        fused = kernel.kernel.startswith("attention_linear_add")
        if fused and kernel.registers > 96:
            faults.append(f"{kernel.registers} registers: {kernel}")
        product = fused or kernel.kernel.endswith("_rows")
        if batch == 1 and product and kernel.used_before_trigger:
            faults.append(f"the next kernel waits for {kernel.used_before_trigger} registers: {kernel}")
        if batch == 1 and product and kernel.gpu_arch >= 90 and kernel.early_bytes < weight_bytes(kernel):
            faults.append(f"its weights are not loaded before the wait: {kernel}")
    assert not faults, "\n".join(faults)


WEIGHT_SIZES = {"dense": 2, "int8": 1, "fp8": 1, "int4": 0.5}  # bytes a weight, without its scale


def weight_bytes(kernel):
    """Of a program's tile in bfloat16, or quantised."""
    sizes = dict(pair.split("=") for pair in kernel.constants.split())
    inputs = int(sizes["H"]) * int(sizes["d"]) if "K" not in sizes else int(sizes["K"])
    return WEIGHT_SIZES[sizes["KIND"]] * int(sizes["BLOCK_N"]) * inputs * (2 if "swiglu" in kernel.kernel else 1)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here():
    kernels = compile_kernels(1, "bfloat16", 90)
    assert {"norm_swiglu_rows", "linear_add_rows", "sample_slot"} <= {kernel.kernel for kernel in kernels}
    check_machine_code(kernels, 1)


@pytest.mark.slow
@pytest.mark.parametrize("gpu_arch", [80, 89, 90, 120])
@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_machine_code(batch, gpu_arch):
    check_machine_code(compile_kernels(batch, "bfloat16", gpu_arch), batch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_other_dtypes_do_not_spill(batch, dtype):
    kernels = [kernel for gpu_arch in GPU_ARCHS for kernel in compile_kernels(batch, dtype, gpu_arch)]
    assert {kernel.gpu_arch for kernel in kernels} == set(GPU_ARCHS)
    assert [kernel for kernel in kernels if kernel.spills or kernel.load_bits < 64] == []


@pytest.mark.slow
@pytest.mark.parametrize("gpu_arch", [80, 89, 90, 120])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4-depth", "int4"])
@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_machine_code_of_quantised_weights(batch, scheme, gpu_arch):
    """Nothing spills; a thread loads 16 bytes of weights at once."""
    if scheme == "fp8" and gpu_arch < 89:
        pytest.skip("no fp8 there")
    kernels = compile_kernels(batch, "bfloat16", gpu_arch, scheme)
    check_machine_code(kernels, batch)
    quantised = [kernel for kernel in kernels if "KIND=" in kernel.constants and "KIND=dense" not in kernel.constants]
    narrow = [kernel for kernel in quantised if not kernel.kernel.endswith("_matmul") and kernel.load_bits < 128]
    assert quantised and not narrow, narrow


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR6][R6.64] ;
        /*0020*/                   LDG.E.64 R4, desc[UR8][R2.64]                    &wr=0x0       ?trans1;
        /*0030*/                   PRMT R44, R11, 0x7632, R44 ;
        /*0040*/                   IMAD.WIDE.U32 R6, R42, 0x2, R16 ;
        /*0050*/                   PREEXIT ;
        /*0060*/                   ACQBULK ;
        /*0070*/                   LDG.E.U16 R20, desc[UR6][R6.64] ;
        /*0080*/                   FFMA R8, R9, R10, R5 ;
        /*0090*/                   STL [R1], R8 ;
        /*00a0*/                   EXIT ;
.L_x_0:
        /*00b0*/                   BRA `(.L_x_0);
        /*00c0*/                   NOP;
"""


def test_products_on_tensor_cores_take_the_cycles_of_their_rate():
    """From the data sheets: 1,979 TOPS of int8 and 989 TFLOPS of bfloat16 on an H200, half of them assumed."""
    h200 = 0.5 * 1979e12 / 2 / (4 * 132 * 1.83e9)  # multiply-adds of a quarter of a multiprocessor in a cycle
    assert Instruction("IMMA.16832.S8.S8.SAT", ()).issue_slots(90) == round(16 * 8 * 32 / h200)
    assert Instruction("HMMA.16816.F32.BF16", ()).issue_slots(90) == round(16 * 8 * 16 / (h200 / 2))
    assert [Instruction("HMMA.16816.F32.BF16", ()).issue_slots(gpu_arch) for gpu_arch in GPU_ARCHS] == [8, 32, 8, 32]
    assert Instruction("FFMA", ()).issue_slots(90) == 1


def test_machine_code_is_read():
    code = instructions(SASS)
    assert [one.opcode for one in code][:2] == ["LDC", "LDG.E.128"] and code[-1].opcode == "EXIT"
    assert [one.bits for one in code if one.is_load] == [128, 64, 16]
    assert code[1].loaded_registers == {8, 9, 10, 11} and code[2].loaded_registers == {4, 5}
    assert used_before_trigger(code) == 1  # R11
    assert used_before_trigger([code[5], *code[:5]]) == 0
    assert used_before_trigger([one for one in code if one.opcode != "PREEXIT"]) == 0
    assert used_before_trigger([*code[:3], Instruction("CS2R", ("R4", "SRZ")), *code[4:]]) == 1  # overwritten


def test_registers_are_allocated_by_the_warp():
    assert allocated_registers(128, 16) == 65536
    assert allocated_registers(33, 4) == 4 * 40 * 32


def test_bytes_of_a_frame():
    """The figure of the roofline: 8.98 GB in bfloat16."""
    assert round(frame_bytes(CSM_1B, torch.bfloat16) / 1e9, 2) == 8.98


@pytest.mark.parametrize("args", [["--rows", "abacus"], ["--model", "nowhere"]])
def test_bad_inputs(capsys, args):
    assert main([*SMALL, *args]) == 2
    assert capsys.readouterr().err.startswith("bench.py: error: ")


@pytest.mark.slow
def test_weights_on_a_cpu_beside_transformers(capsys):
    rows = ["transformers", "bfloat16", "int8", "int4"]
    options = ["--model", "tiny", "--threads", "1", "--busy", "0", "1", "--frames", "4", "--quiet"]
    _, result = run(capsys, "--cpu", *options, "--rows", *rows)
    assert [(row["weights"], row["busy_loops"]) for row in result["cpu"]] == [(w, b) for b in (0, 1) for w in rows]
    for row in result["cpu"]:
        assert 0 < row["best_ms"] <= row["frame_ms"] < row["first_frame_ms"]
        assert row["frame_ms"] < row["with_codec_ms"] == pytest.approx(80 * row["rtf_with_codec"])
        assert 0.3 < row["peak_gb"] <= row["peak_gb_with_codec"] < 2
    sizes = [row["gb_s"] * row["frame_ms"] for row in result["cpu"][1:4]]
    assert sizes[1] / sizes[0] == pytest.approx(8.5 / 16, rel=0.05)  # int8: 8 bits, and 16 for the scale of 32 weights


@pytest.mark.parametrize(
    ("error", "choice", "reason"),
    [
        (0.5, 0.0, "its logits differ by 50.0 % from those of PyTorch's ops"),
        (math.nan, 0.0, "its logits differ by nan % from those of PyTorch's ops"),
        (0.01, 3.5, "the logit of one of its greedy codes is 3.5 standard deviations below PyTorch's largest"),
    ],
)
def test_a_wrong_row_on_a_cpu_is_not_timed(error, choice, reason, capsys, monkeypatch):
    checked = {"error": error, "worst_choice": choice}
    monkeypatch.setattr(cpu.Worker, "ask", lambda *_: checked | {"peak_bytes": 1})
    _, result = run(capsys, "--cpu", "--model", "tiny", "--threads", "1", "--rows", "bfloat16", "--quiet")
    row = {"weights": "bfloat16", "threads": 1, "busy_loops": 0}
    assert result["cpu"] == [row | {"not_timed_because": reason}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_of_a_cpu_row_sees_an_op_that_is_wrong_on_single_rows(dtype, monkeypatch):
    """Blocks are wrong for one row only, as in all passes of a frame but the first; many rows at once hide that."""
    model = Generator.from_pretrained("tiny", "cpu", dtype, progress=False).model
    assert cpu_worker.worst_choice(model, 4) <= 0.05
    right = csm.model.blocks

    def wrong(**arguments):
        out_BTD = right(**arguments)
        single = arguments["x_BTD"].shape[:2] == (1, 1) and not os.environ.get("CSM_OPS")
        return out_BTD * torch.linspace(0.5, 1.5, out_BTD.shape[-1], dtype=dtype) if single else out_BTD

    monkeypatch.setattr(csm.model, "blocks", wrong)
    assert cpu_worker.worst_choice(model, 4) > 1
    assert cpu_worker.logit_error(model, 4) < 0.02


def test_llama_cpp_gets_matrices_of_the_same_shapes(tmp_path):
    config = load("tiny", "cpu", None).config
    llama_cpp_row.write_models(config, tmp_path)
    for name, transformer in zip(llama_cpp_row.NAMES, (config.backbone, config.depth_decoder), strict=True):
        reader = gguf.GGUFReader(tmp_path / name)
        matrices = [t for t in reader.tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
        layer = transformer.qkv_dim + 3 * transformer.hidden_dim  # outputs of inputs D, down counted by its transpose
        attention = transformer.num_heads * transformer.head_dim
        per_layer = transformer.dim * (layer + attention)
        head = config.audio_vocab_size * transformer.dim
        assert sum(int(t.n_elements) for t in matrices) == transformer.num_layers * per_layer + head
        num_bytes = transformer.num_layers * (per_layer * 18 // 32 + 8 * transformer.dim) + 4 * transformer.dim
        assert reader.fields["csm.weight_bytes"].contents() == num_bytes + head * 34 // 32
        values = gguf.quants.dequantize(matrices[0].data, matrices[0].tensor_type)
        assert 0.5 < values.std() * transformer.dim**0.5 < 2  # so that activations stay numbers


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="no llama-cpp-python")
def test_the_row_of_llama_cpp(capsys):
    rows = ["int4", "llama.cpp"]
    _, result = run(capsys, "--cpu", "--model", "tiny", "--threads", "1", "--frames", "4", "--quiet", "--rows", *rows)
    ours, theirs = result["cpu"]
    assert 0 < theirs["best_ms"] <= theirs["frame_ms"] < theirs["first_frame_ms"] < 500
    assert theirs["rtf_with_codec"] is None
    assert theirs["gb_s"] * theirs["frame_ms"] == pytest.approx(ours["gb_s"] * ours["frame_ms"], rel=0.1)


@pytest.mark.parametrize(
    "options", [["--threads", "2"], ["--cpu", "--threads", "0"], ["--cpu", "--busy", "-1"], ["--busy", "1"]]
)
def test_options_of_a_cpu_alone(options, capsys):
    assert main(options) == 2
    assert "--threads and --busy go with --cpu" in capsys.readouterr().err


def test_an_unknown_row_on_a_cpu(capsys):
    assert main(["--cpu", "--rows", "int3"]) == 2
    assert "no row 'int3'; choose from: transformers, bfloat16, int8, int4, llama.cpp" in capsys.readouterr().err
