"""bench.py: what it prints, what it counts, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from csm.config import CSM_1B
from noise import NOISE

ROOT = Path(bench.__file__).parent
SMALL = ["--model", NOISE, "--device", "cpu", "--quiet", "--frames", "2", "--max-seconds", "0.16"]
SETUP = bench.load(bench.parse_arguments(SMALL))


def run(capsys, *args):
    assert bench.main([*args]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def test_the_last_line_is_json(capsys, tmp_path):
    lines, result = run(capsys, *SMALL, "--batch", "1", "2", "--profile", "--out", str(tmp_path))
    assert [(row["name"], row["batch"]) for row in result["rows"]] == [
        ("eager", 1),
        ("eager", 2),
        ("transformers", 1),
        ("transformers", 2),
    ]
    for row in result["rows"]:
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["audio_per_second"] == pytest.approx(row["batch"] * 80 / row["median_ms"])
    assert result["refused"] == []
    assert result["first_audio"]["cached_ms"] > 0
    assert len(result["sentences"]) == 11
    assert result["profile_reference"][0]["ms"] > 0
    assert sum(line.startswith("| eager") for line in lines) == 2
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert (tmp_path / "bench.md").read_text().splitlines() == lines[:-1]


def test_the_embedded_checkpoint_is_measured_though_it_ends(capsys):
    _, result = run(capsys, "--model", "tiny", "--device", "cpu", "--quiet", "--frames", "2", "--rows", "eager")
    assert [row["name"] for row in result["rows"]] == ["eager"]


def test_what_does_not_pass_its_check_is_not_timed(capsys, monkeypatch):
    def wrong(setup, batch):
        speak = bench.eager(setup, batch)
        return lambda frames: [(ms, codes ^ 1) for ms, codes in speak(frames)]

    def broken(setup, batch):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(
        bench, "configurations", lambda names, device: {"eager": bench.eager, "wrong": wrong, "broken": broken}
    )
    _, result = run(capsys, *SMALL)
    assert [row["name"] for row in result["rows"]] == ["eager"]
    assert result["refused"] == [
        "wrong, batch 1: not timed, its codes differ from frame 0 on",
        "broken, batch 1: not timed, RuntimeError: not on this machine",
    ]


def test_a_speakers_frames_are_its_own(capsys):
    """Each frame's codes are kept, not the buffer that the last frame stands in."""
    codes = [codes_BK for _, codes_BK in bench.eager(bench.small_setup(SETUP), 1)(4)]
    assert len({tuple(frame.flatten().tolist()) for frame in codes}) == 4


def test_count(capsys):
    _, result = run(capsys, "--count")
    counts = {row["op"]: row for row in result["ops"]}
    assert all(result["launches"][ops] == sum(row[ops] for row in counts.values()) for ops in ("reference", "triton"))
    assert counts["linear"]["reference"] == 140 * 4 + 32 + 1  # 16 + 31 x 4 blocks, the heads, one projection
    assert counts["sample_slot"]["triton"] == 32
    assert result["launches"]["triton"] <= 700 < result["launches"]["reference"] < 3200


COMPILE = """
import sys, torch, bench
from csm.config import CSM_1B
bench.GPU_ARCHS = tuple(map(int, sys.argv[3].split()))
kernels = bench.compiled_kernels(CSM_1B, [int(sys.argv[1])], bench.DTYPES[sys.argv[2]], quiet=True)
for kernel in kernels:
    assert kernel.spilled_bytes == 0, kernel
    assert kernel.load_bits >= 64, kernel
    if kernel.kernel.endswith("_rows") and kernel.gpu_arch >= 90:  # its weights are on their way before it waits
        sizes = dict(pair.split("=") for pair in kernel.constants.split())
        tile = int(sizes["BLOCK_N"]) * int(sizes["BLOCK_K"]) * bench.DTYPES[sys.argv[2]].itemsize
        assert kernel.early_bytes >= tile * (2 if "swiglu" in kernel.kernel else 1), kernel
print(len({kernel.kernel for kernel in kernels}), *sorted({kernel.gpu_arch for kernel in kernels}))
"""


def compile_kernels(batch, dtype, families):
    """In a process of its own: in this one kernels are interpreted."""
    command = [sys.executable, "-c", COMPILE, str(batch), dtype, families]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kernels_compile_for_a_gpu_that_is_not_here():
    assert compile_kernels(1, "bfloat16", "90") == "9 90\n"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_kernels_compile_for_every_family(batch, dtype):
    assert compile_kernels(batch, dtype, "80 89 90 120").endswith("80 89 90 120\n")


def test_bytes_of_a_frame():
    """The figure of the roofline: 8.98 GB in bfloat16."""
    assert round(bench.frame_bytes(CSM_1B, torch.bfloat16) / 1e9, 2) == 8.98


@pytest.mark.parametrize("args", [["--rows", "abacus"], ["--rows", "graph, kernels"], ["--model", "nowhere"]])
def test_bad_inputs(capsys, args):
    assert bench.main([*SMALL, *args]) == 2
    assert capsys.readouterr().err.startswith("bench.py: error: ")
