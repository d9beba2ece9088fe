"""The run of ``make gpu`` without a GPU: its parts are stand-ins, and accuracy is measured in Triton's interpreter."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csm.bench import accuracy, gpu
from csm.bench.accuracy import compare, first_difference
from csm.bench.command import parse_arguments
from csm.bench.gpu import Part, run_all
from csm.bench.model_setup import load
from csm.errors import CSMError
from csm.kernels import sample
from noise import NOISE

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


def stand_in(name, code, seconds=20.0):
    return Part(name, [sys.executable, "-c", code], seconds)


def test_every_part_runs_whatever_became_of_the_others(tmp_path):
    parts = [
        stand_in("tests", "print('one failed'); raise SystemExit(3)"),
        stand_in("stuck", "import time; print('begun', flush=True); time.sleep(60)", 1.0),
        stand_in("rows", "print('a table')"),
    ]
    started = time.perf_counter()
    outcomes = run_all(parts, tmp_path)
    assert [outcome.result for outcome in outcomes] == ["failed (3)", "stopped at its limit", "passed"]
    assert time.perf_counter() - started < 50
    assert [(tmp_path / f"{part.name}.txt").read_text() for part in parts] == ["one failed\n", "begun\n", "a table\n"]
    assert [row["result"] for row in json.loads((tmp_path / "summary.json").read_text())] == [
        o.result for o in outcomes
    ]


def test_what_ignores_the_request_to_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    assert run_all([stand_in("stubborn", code, 3.0)], tmp_path)[0].result == "stopped at its limit"


def test_the_whole_run_has_a_limit(tmp_path):
    outcomes = run_all([stand_in("one", "pass"), stand_in("two", "pass")], tmp_path, total_seconds=1.0)
    assert [outcome.result for outcome in outcomes] == ["no time left"] * 2


def test_the_real_parts_have_options_that_exist(tmp_path):
    parts = gpu.parts(tmp_path)
    for part in parts:
        if "bench.py" in part.command:
            parse_arguments(part.command[part.command.index("bench.py") + 1 :])
    assert [part.name for part in parts][:3] == ["rows", "accuracy", "tests"]
    assert {part.seconds < gpu.TOTAL_SECONDS for part in parts} == {True}
    assert sum(part.seconds for part in parts[:-1]) <= gpu.TOTAL_SECONDS - gpu.GRACE_SECONDS  # all but the peers
    assert (Path(__file__).parent.parent / "bench.py").is_file()


def test_unknown_parts_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "abacus"])
    assert "abacus" in capsys.readouterr().err


def setup(dtype=torch.float32):
    made = load(NOISE, "cpu", None)
    return replace(made, weights={name: tensor.to(dtype) for name, tensor in made.weights.items()})


@needs_interpreter
@pytest.mark.slow
def test_kernels_are_as_accurate_as_pytorchs_ops():
    rows = {(row["ops"], row["dtype"]): row for row in compare(setup(torch.bfloat16), 1)}
    assert rows["triton", "float32"]["largest_logit_error"] < 1e-4
    assert rows["triton", "float32"]["first_differing_frame"] is None
    assert rows["triton", "float32"]["codes_changed"] == 0
    plain, kernels = rows["reference", "bfloat16"], rows["triton", "bfloat16"]
    assert 1e-4 < kernels["rms_logit_error"] < 1.5 * plain["rms_logit_error"]
    assert plain["codes"] == 8


@needs_interpreter
def test_a_wrong_kernel_shows_in_the_logits(monkeypatch):
    """Under forced codes the error of a draw is that draw's own, however many codes have changed before it."""
    model, right = setup(), accuracy.run

    def wrong(made, ops, frames, forced_FK=None):
        if ops == "triton":
            name = "depth_decoder.layers.0.mlp.down"
            made = replace(made, weights={**made.weights, name: made.weights[name] * 1.05})
        return right(made, "reference", frames, forced_FK)

    monkeypatch.setattr(accuracy, "run", wrong)
    row = compare(model, 3)[0]
    assert 1e-3 < row["rms_logit_error"] < 0.2
    assert row["largest_logit_error"] > row["rms_logit_error"]


def test_forced_codes_are_the_ones_that_the_next_draw_reads():
    model = setup()
    free = accuracy.run(model, "reference", 3)
    forced = accuracy.run(model, "reference", 3, free.codes_FK)
    assert torch.equal(forced.logits_NV, free.logits_NV) and torch.equal(forced.codes_FK, free.codes_FK)
    other_FK = (free.codes_FK + 1) % model.config.codebook_size
    other = accuracy.run(model, "reference", 3, other_FK)
    assert torch.equal(other.logits_NV[0], free.logits_NV[0]) and not torch.equal(other.logits_NV[1], free.logits_NV[1])
    assert accuracy.csm.frame.sample is sample


def test_first_difference():
    codes = torch.zeros(3, 2, dtype=torch.int64)
    assert first_difference(codes, codes) is None
    assert first_difference(codes, codes + torch.tensor([[0, 0], [0, 1], [1, 1]])) == 1


def test_accuracy_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(accuracy, "triton", None)
    with pytest.raises(CSMError, match="GPU"):
        compare(setup(), 1)
