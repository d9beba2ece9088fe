"""The loop: gradients, overfitting, killed runs, two processes, averages, schedules, what a run leaves behind."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from micro import MICRO, SENTENCES, random_examples, write_config, write_data
from safetensors.torch import load_file

from csm import Generator, read_audio
from csm.__main__ import main
from csm.finetune.batches import collate
from csm.finetune.initial import initial_state
from csm.finetune.loss import Trainee, combine, count
from csm.lora import Lora, LoraConfig
from csm.model import CSM

CPU = torch.device("cpu")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "config.json")


def micro_model(dtype=torch.float32, seed=0):
    state = {name: tensor.to(dtype) for name, tensor in initial_state(MICRO, seed).items()}
    return CSM.from_state_dict(MICRO, state, CPU)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("mode", ["full", "lora", "lora, checkpointing"])
def test_gradients_match_finite_differences(mode):
    """Of every trained tensor, in float64: along a random direction through all of it, and of two entries alone."""
    model = micro_model(torch.float64)
    lora = None
    if mode == "full":
        model.requires_grad_(True)
    else:
        lora = Lora(MICRO, LoraConfig(rank=3, alpha=3)).double()
        generator = torch.Generator().manual_seed(1)
        for b in lora.b.values():  # as they begin, zero, the gradient of A would be zero too
            b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
    trainee = Trainee(model, lora, checkpointing="checkpointing" in mode)
    batch = collate(random_examples(5), "abcde", depth_share=0.5)

    def loss():
        return combine(trainee(batch), count(batch), 0.7)

    trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
    assert len(trained) == (3 * 6 + 2 + 5 if mode == "full" else 3 * 7 * 2)
    loss().backward()
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for name, parameter in trained.items():
        gradient = parameter.grad
        assert gradient is not None and gradient.abs().max() > 0, name
        directions = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64)]
        for index in gradient.abs().flatten().topk(2).indices:
            directions.append(torch.zeros_like(gradient))
            directions[-1].view(-1)[index] = 1
        for direction in directions:
            step = 1e-4 / direction.norm()
            with torch.no_grad():
                parameter += step * direction
                above = loss()
                parameter -= 2 * step * direction
                below = loss()
                parameter += step * direction
            numeric, exact = (above - below) / (2 * step), (gradient * direction).sum()
            error = (numeric - exact).abs() / (direction.norm() * gradient.norm())
            assert error < 1e-6, (name, numeric.item(), exact.item())
            worst = max(worst, error.item())
    print(f"\n{mode}: {len(trained)} tensors, largest relative error {worst:.1e}")


def finetune(data, config, out, *options, steps=12):
    """The command, in this process."""
    arguments = ["--data", data, "--model", "tiny", "--config", config, "--out", out, "--steps", steps, *options]
    assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0
    return out


def test_eight_utterances_are_learned_by_heart(data, config, tmp_path):
    """Loss below 0.1, and then the very codes of each recording through Generator, their end included."""
    options = ["--learning-rate", 4e-3, "--warmup", 10, "--batch-size", 8, "--depth-share", 1, "--valid-share", 0]
    out = finetune(data, config, tmp_path / "run", *options, "--final-rate", 0.05, "--weight-decay", 0, steps=160)
    losses = [float(row["loss"]) for row in rows(out / "train.csv")]
    print(f"\nloss {losses[0]:.2f} to {losses[-1]:.4f}")
    assert losses[0] > 10
    assert losses[-1] < 0.1
    generator = Generator.from_pretrained(out / "model", device="cpu")
    for index, text in enumerate(SENTENCES):
        expected = generator.encode(*read_audio(data / f"{index}.wav"))
        codes = generator.generate_codes(text, index % 2, max_audio_length_ms=2000, temperature=0)
        assert torch.equal(codes, expected), text


def losses_of(out):
    """(step, loss, gradient norm) of every step, digit for digit."""
    return [(row["step"], row["loss"], row["codebook0"], row["gradient_norm"]) for row in rows(out / "train.csv")]


WHOLE = ["--batch-size", 4, "--valid-share", 0.2, "--eval-every", 4, "--warmup", 3, "--learning-rate", 3e-3]


@pytest.mark.parametrize("mode", [[], ["--ema", 0.9, "--accumulate", 2, "--checkpointing"]], ids=["plain", "ema"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, config, tmp_path, mode):
    """SIGKILL in the middle of a run in a process of its own; then --resume, and every digit is that of a whole run."""
    options = [*WHOLE, *mode, "--save-every", 3]
    whole = finetune(data, config, tmp_path / "whole", *options, steps=14)
    killed = tmp_path / "killed"
    arguments = ["--data", data, "--model", "tiny", "--config", config, "--out", killed, "--steps", 14, *options]
    command = [sys.executable, "-m", "csm", "finetune", *map(str, arguments), "--device", "cpu", "--quiet"]
    log = killed / "train.csv"
    process = subprocess.Popen(command, env=ONE_THREAD)
    kill_at = 4 + int.from_bytes(os.urandom(1), "little") % 6
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > kill_at):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
    assert not (killed / "model").exists()
    done = len(rows(log))
    finetune(data, config, killed, *options, "--resume", steps=14)
    assert losses_of(killed) == losses_of(whole)
    assert rows(killed / "valid.csv") == rows(whole / "valid.csv")
    first, second = (load_file(out / "model" / "model.safetensors") for out in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    print(f"\nkilled after step {done} of 14: the same {len(losses_of(whole))} losses, the same weights")


def test_dropout_is_resumed_too(data, tmp_path):
    """Adapters with dropout, stopped and gone on with in one process."""
    options = ["--lora", "--rank", 2, "--dropout", 0.3, *WHOLE, "--save-every", 2, "--data", data, "--model", "tiny"]

    def run(out, steps, *more):
        arguments = [*options, "--out", tmp_path / out, "--steps", steps, *more]
        assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0

    constant = ["--schedule", "constant"]
    run("whole", 5, *constant)
    run("parts", 2, *constant)
    run("parts", 5, *constant, "--resume")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_sigterm_saves_and_says_so(data, config, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--data", data, "--model", "tiny", "--config", config, "--out", out, "--steps", 10_000, *WHOLE]
    command = [sys.executable, "-m", "csm", "finetune", *map(str, arguments), "--device", "cpu", "--quiet"]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, text=True)
    log = out / "train.csv"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    steps = int(rows(log)[-1]["step"])
    assert f"stopped after {steps} of 10000 steps; --resume goes on" in said
    assert (out / f"checkpoint-{steps:08d}.pt").is_file()


def test_two_processes_on_half_batches_equal_one(data, config, tmp_path):
    """torchrun with gloo: the same batches, shared out. Batches of odd size, so that the shares differ."""
    options = [
        *WHOLE,
        "--batch-size",
        3,
        "--accumulate",
        2,
        "--depth-share",
        0.3,
        "--seed",
        3,
        "--precision",
        "float64",
    ]
    one = finetune(data, config, tmp_path / "one", *options, steps=8)
    arguments = ["--data", data, "--model", "tiny", "--config", config, "--out", tmp_path / "two", "--steps", 8]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "csm"]
    command += ["finetune", *map(str, [*arguments, *options]), "--device", "cpu", "--quiet"]
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD, timeout=120)
    largest = 0.0
    for name in ("train.csv", "valid.csv"):
        ours, theirs = rows(tmp_path / "two" / name), rows(one / name)
        assert len(ours) == len(theirs) > 1
        for mine, expected in zip(ours, theirs, strict=True):
            for column in ("loss", "codebook0", *(["codebooks_1_up"] if name == "train.csv" else ["codebook3"])):
                difference = abs(float(mine[column]) - float(expected[column]))
                assert difference < 1e-6, (name, mine["step"], column)
                largest = max(largest, difference)
    print(f"\nlargest difference of a loss over 8 steps: {largest:.1e}")


def test_a_share_of_nothing_counts_for_nothing():
    """A process without a sequence of a batch computes one that does not count, with gradients for all, of zero."""
    model = micro_model()
    model.requires_grad_(True)
    trainee = Trainee(model)
    batch = collate(random_examples(1), "a", 1.0, counts=False)
    sums = trainee(batch)
    assert count(batch) == (0, 0)
    (sums.codebook0 + sums.depth_J.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
