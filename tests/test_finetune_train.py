"""The training loop: gradients, overfitting, resuming, two processes, averaged weights, schedules, output files."""

import csv
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm import CheckpointError, CSMError, Generator, read_audio
from csm.__main__ import main, parse_arguments
from csm.finetune import checkpoint
from csm.finetune.batches import collate
from csm.finetune.initial import initial_state
from csm.finetune.loss import Trainee, combine, count
from csm.finetune.optimizer import learning_rate_at
from csm.finetune.options import RENAMED, TrainOptions
from csm.finetune.train import Trainer
from csm.lora import Lora, LoraConfig
from csm.model import CSM
from csm.weights import open_checkpoint, read_codec
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import mimi_table
from micro import MICRO, SENTENCES, random_examples, write_config, write_data
from noise import CODEC, NOISE, random_state

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


@pytest.mark.parametrize("mode", ["full", "lora", "lora, activation checkpointing"])
def test_gradients_match_finite_differences(mode):
    """For every trained tensor, in float64: along a random direction and for its two largest gradient entries."""
    model = micro_model(torch.float64)
    lora = None
    if mode == "full":
        model.requires_grad_(True)
    else:
        lora = Lora(MICRO, LoraConfig(rank=3, alpha=3)).double()
        generator = torch.Generator().manual_seed(1)
        for b in lora.b.values():  # with the initial B of zeros, the gradient of A is zero
            b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
    trainee = Trainee(model, lora, activation_checkpointing="activation checkpointing" in mode)
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
    """Run the command in this process."""
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", out, "--steps", steps, *options]
    assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0
    return out


def test_eight_utterances_are_overfitted(data, config, tmp_path):
    """Loss below 0.1; then Generator gives exactly the codes of each recording, including its end."""
    options = ["--learning-rate", 4e-3, "--warmup", 10, "--batch-size", 8, "--depth-share", 1, "--valid-share", 0]
    out = finetune(data, config, tmp_path / "run", *options, "--min-lr-ratio", 0.05, "--weight-decay", 0, steps=160)
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
    """Step, loss, codebook 0's loss and gradient norm of every step, as written."""
    return [(row["step"], row["loss"], row["codebook0"], row["gradient_norm"]) for row in rows(out / "train.csv")]


WHOLE = ["--batch-size", 4, "--valid-share", 0.2, "--eval-every", 4, "--warmup", 3, "--learning-rate", 3e-3]


@pytest.mark.parametrize(
    "mode", [[], ["--ema", 0.9, "--grad-accum-steps", 2, "--activation-checkpointing"]], ids=["plain", "ema"]
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(data, config, tmp_path, mode):
    """A run in another process gets SIGKILL and is resumed: every digit equals those of an uninterrupted run."""
    options = [*WHOLE, *mode, "--save-every", 3]
    whole = finetune(data, config, tmp_path / "whole", *options, steps=14)
    killed = tmp_path / "killed"
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", killed, "--steps", 14, *options]
    command = [sys.executable, "-m", "csm", "finetune", *map(str, arguments), "--device", "cpu", "--quiet"]
    log = killed / "train.csv"
    process = subprocess.Popen(command, env=ONE_THREAD)
    kill_at = 4 + int.from_bytes(os.urandom(1), "little") % 6
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > kill_at):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert not (killed / "model").exists()
    done = len(rows(log))
    finetune(data, config, killed, *options, "--resume", steps=14)
    assert losses_of(killed) == losses_of(whole)
    assert rows(killed / "valid.csv") == rows(whole / "valid.csv")
    first, second = (load_file(out / "model" / "model.safetensors") for out in (whole, killed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    print(f"\nkilled after step {done} of 14: the same {len(losses_of(whole))} losses, the same weights")


def test_resuming_repeats_dropout(data, tmp_path):
    """Adapters with dropout, stopped and resumed in one process."""
    options = ["--lora", "--rank", 2, "--dropout", 0.3, *WHOLE, "--save-every", 2, "--data", data, "--model", NOISE]

    def run(out, steps, *more):
        arguments = [*options, "--out", tmp_path / out, "--steps", steps, *more]
        assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0

    constant = ["--schedule", "constant"]
    run("whole", 5, *constant)
    run("parts", 2, *constant)
    run("parts", 5, *constant, "--resume")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"), [("alpha", "adapters"), ("dropout", "adapters"), ("model", "other weights")]
)
def test_resuming_with_other_adapters_or_weights_is_refused(data, tmp_path, capsys, change, message):
    base = tmp_path / "base"
    shutil.copytree(open_checkpoint(NOISE).folder, base)
    options = ["--lora", "--rank", 2, *WHOLE, "--data", data, "--out", tmp_path / "run", "--device", "cpu", "--quiet"]
    assert main(["finetune", *map(str, [*options, "--model", base, "--steps", 1])]) == 0
    if change == "model":
        tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
        tensors["lm_head.weight"] += 0.01
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    more = {"alpha": ["--alpha", 320], "dropout": ["--dropout", 0.5], "model": []}[change]
    capsys.readouterr()
    assert main(["finetune", *map(str, [*options, "--model", base, "--steps", 2, "--resume", *more])]) == 2
    assert message in capsys.readouterr().err


def test_sigterm_saves_a_checkpoint_and_says_how_to_continue(data, config, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", out, "--steps", 10_000, *WHOLE]
    command = [sys.executable, "-m", "csm", "finetune", *map(str, arguments), "--device", "cpu", "--quiet"]
    process = subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, text=True)
    log = out / "train.csv"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message, _ = process.communicate(timeout=60)
    steps = int(rows(log)[-1]["step"])
    assert f"stopped after {steps} of 10000 steps; add --resume to continue" in message
    assert (out / f"checkpoint-{steps:08d}.pt").is_file()


@pytest.mark.slow
def test_two_processes_equal_one(data, config, tmp_path):
    """torchrun with gloo splits each batch over two processes. Batch sizes are odd, so the parts differ in size."""
    options = [
        *WHOLE,
        "--batch-size",
        3,
        "--grad-accum-steps",
        2,
        "--depth-share",
        0.3,
        "--seed",
        3,
        "--precision",
        "float64",
    ]
    one = finetune(data, config, tmp_path / "one", *options, steps=8)
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", tmp_path / "two", "--steps", 8]
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


def test_a_batch_without_loss_has_zero_gradients():
    """Ranks without data run a dummy sequence with zero loss: every parameter has a gradient, and it is zero."""
    model = micro_model()
    model.requires_grad_(True)
    trainee = Trainee(model)
    batch = collate(random_examples(1), "a", 1.0, has_loss=False)
    sums = trainee(batch)
    assert count(batch) == (0, 0)
    (sums.codebook0 + sums.depth_J.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_learning_rate_schedules():
    options = TrainOptions(steps=100, warmup=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate_at(options, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[9] == 1
    assert rates[10] == 1 and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.02)
    linear = TrainOptions(steps=12, warmup=0, learning_rate=1.0, min_lr_ratio=0, schedule="linear")
    assert [learning_rate_at(linear, step) for step in (0, 11)] == [1, 0]
    assert learning_rate_at(TrainOptions(warmup=0, schedule="constant"), 10**6) == TrainOptions().learning_rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"depth_share": 0.0}, "--depth-share must be above 0"),
        ({"schedule": "sine"}, "--schedule must be one of cosine, linear, constant, not sine"),
        ({"precision": "int8"}, "--precision must be one of"),
        ({"ema": 1.0}, "--ema must be at least 0 and below 1, not 1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number of at least 0, not nan"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(CSMError, match=message):
        TrainOptions(**change)


def trainer(folder, examples=None, **options):
    model = micro_model()
    model.requires_grad_(True)
    values = {
        "steps": 4,
        "batch_size": 4,
        "warmup": 0,
        "learning_rate": 1e-2,
        "save_every": 0,
        "eval_every": 0,
    } | options
    examples = examples or random_examples(8)
    return Trainer(Trainee(model), examples, examples[:2], TrainOptions(**values), folder, progress=False)


def test_weight_averages(tmp_path):
    """Equal to averages computed in the test; using them does not change the trained weights."""
    run = trainer(tmp_path, ema=0.5, steps=6)
    name = "model.projection"
    expected, history = run.trained[name].detach().clone().double(), []
    step = run._step

    def observed():
        row = step()
        history.append(run.trained[name].detach().clone())
        return row

    run._step = observed
    run.run()
    for done, weights in enumerate(history, start=1):
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * weights.double()
    torch.testing.assert_close(run.ema.shadow[name].double(), expected, atol=1e-6, rtol=0)
    with run.inference_weights():
        torch.testing.assert_close(run.trained[name].double(), expected, atol=1e-6, rtol=0)
        precomputed = run.trainee.model.depth_embedding.clone()
        run.trainee.model.precompute_depth_embedding()
        assert torch.equal(run.trainee.model.depth_embedding, precomputed)
    assert torch.equal(run.trained[name], history[-1])


def test_gradient_accumulation_equals_a_large_batch(tmp_path):
    """Four batches of two sequences of different lengths give the loss and gradient norm of one batch of eight."""
    examples = random_examples(8)
    runs = [
        trainer(tmp_path / "one", examples, steps=1, batch_size=8, max_grad_norm=0.0),
        trainer(tmp_path / "four", examples, steps=1, batch_size=2, grad_accum_steps=4, max_grad_norm=0.0),
    ]
    for run in runs:
        run.run()
    one, four = (rows(run.folder / "train.csv")[0] for run in runs)
    assert float(one["loss"]) == pytest.approx(float(four["loss"]), abs=1e-5)
    assert float(one["gradient_norm"]) == pytest.approx(float(four["gradient_norm"]), rel=1e-5)


def test_gradients_are_clipped(tmp_path):
    run = trainer(tmp_path, steps=1, max_grad_norm=0.01)
    seen = []
    step = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.append(torch.stack([p.grad.norm() for p in run.trained.values()]).norm().item()) or step()
    )
    run.run()
    assert seen == [pytest.approx(0.01, rel=1e-3)]
    assert float(rows(tmp_path / "train.csv")[0]["gradient_norm"]) > 1


def test_a_non_finite_gradient_ends_the_run_before_the_weights_change(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.trained["model.projection"][0, 0] = float("inf")
    others = {name: p.clone() for name, p in run.trained.items() if name != "model.projection"}
    with pytest.raises(CSMError, match="step 1: the gradient is not finite; lower --learning-rate"):
        run.run()
    assert all(torch.equal(run.trained[name], before) for name, before in others.items())


@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_and_activation_checkpointing(lora):
    """Autocast is close to float32; activation checkpointing gives identical gradients."""
    batch = collate(random_examples(4), "abcd", 1.0)

    def gradients(precision, activation_checkpointing):
        model = micro_model()
        adapters = Lora(MICRO, LoraConfig(rank=2)) if lora else None
        model.requires_grad_(not lora)
        if adapters is not None:
            for b in adapters.b.values():
                b.data.fill_(0.02)
        trainee = Trainee(model, adapters, activation_checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = combine(trainee(batch), count(batch), 1.0)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainee.parameters() if p.requires_grad])

    exact, near, again = gradients("float32", False), gradients("bfloat16", False), gradients("float32", True)
    assert near[0] == pytest.approx(exact[0], rel=5e-3)
    assert torch.cosine_similarity(near[1], exact[1], dim=0) > 0.99
    assert again[0] == exact[0] and torch.equal(again[1], exact[1])


def test_evaluation_gives_the_loss_of_every_codebook(tmp_path):
    run = trainer(tmp_path)
    losses = run.evaluate()
    batch = collate(run.valid, ["", ""], 1.0)
    with torch.no_grad():
        sums = run.trainee(batch)
    expected = torch.cat((sums.codebook0.view(1), sums.depth_J)) / count(batch).frames
    assert losses == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(losses) == MICRO.num_codebooks


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    whole = trainer(tmp_path / "run")
    whole.run()
    path = whole.save()
    for change, message in (
        ({"learning_rate": 3e-3}, "--learning-rate 0.01, not 0.003; repeat its options"),
        ({"batch_size": 3}, "--batch-size 4, not 3"),
        ({"examples": random_examples(8, seed=1)}, "on other data"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path / "other", **change).resume(path)
    trainer(tmp_path / "other", eval_every=7, steps=9).resume(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable training checkpoint"):
        trainer(tmp_path / "other").resume(path)


def test_former_option_names_are_accepted():
    """On the command line each sets the renamed option, and the help does not list it."""
    base = ["finetune", "--data", "d"]
    former = ["--accumulate", "3", "--final-rate", "0.5", "--clip", "2", "--checkpointing"]
    current = ["--grad-accum-steps", "3", "--min-lr-ratio", "0.5", "--max-grad-norm", "2", "--activation-checkpointing"]
    arguments = vars(parse_arguments([*base, *former]))
    assert arguments == vars(parse_arguments([*base, *current])) != vars(parse_arguments(base))
    assert {name: arguments[name] for name in RENAMED.values()} == {
        "grad_accum_steps": 3,
        "min_lr_ratio": 0.5,
        "max_grad_norm": 2.0,
        "activation_checkpointing": True,
    }
    assert not RENAMED.keys() & arguments.keys()


def test_a_run_saved_under_former_names_resumes(tmp_path):
    """A checkpoint in the form of earlier versions continues as the run that wrote it; its options are compared."""
    options = {"ema": 0.5, "grad_accum_steps": 2, "max_grad_norm": 0.3, "schedule": "constant"}
    whole, first = trainer(tmp_path / "whole", **options), trainer(tmp_path / "first", steps=2, **options)
    whole.run()
    first.run()
    path = first.save()
    state = torch.load(path, weights_only=True)
    former = {name: old for old, name in RENAMED.items()}
    state["options"] = {former.get(name, name): value for name, value in state["options"].items()}
    assert state["options"].keys() >= {"clip", "accumulate", "checkpointing", "final_rate"}
    state["place"], state["average"] = state.pop("trainer_state"), state.pop("ema")
    torch.save(state, path)

    resumed = trainer(tmp_path / "first", **options)
    resumed.resume(path)
    assert resumed.run()
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "whole")
    assert all(torch.equal(resumed.ema.shadow[name], average) for name, average in whole.ema.shadow.items())
    with pytest.raises(CheckpointError, match="started with --max-grad-norm 0.3, not 0.5"):
        trainer(tmp_path / "first", **options | {"max_grad_norm": 0.5}).resume(path)


def test_old_checkpoints_are_deleted_and_incomplete_ones_ignored(tmp_path):
    run = trainer(tmp_path, steps=5, save_every=1, keep=2)
    run.run()
    (tmp_path / "checkpoint-00000009.part").write_bytes(b"incomplete")
    assert [path.name for path in sorted(tmp_path.glob("*.pt"))] == ["checkpoint-00000004.pt", "checkpoint-00000005.pt"]
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000005.pt"


def test_a_run_is_not_overwritten(data, config, tmp_path, capsys):
    out = finetune(data, config, tmp_path / "run", steps=1)
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", out, "--steps", 2, "--quiet"]
    assert main(["finetune", *map(str, arguments)]) == 2
    assert "holds a run (checkpoint-00000001.pt); add --resume to continue it" in capsys.readouterr().err


def test_output_files_of_a_run(data, config, tmp_path, capsys):
    options = ["--sample-every", 2, "--sample-seconds", 0.4, "--sample-text", "Hello.", "--eval-every", 2]
    out = finetune(data, config, tmp_path / "run", *options, "--valid-share", 0.3, steps=4)
    assert f"generate with: python generate.py --model {out / 'model'}" in capsys.readouterr().out
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"train.csv", "valid.csv", "options.json", "checkpoint-00000004.pt", "model/model.safetensors"} <= names
    assert {"samples/step-00000002-0.wav", "samples/step-00000004-0.wav"} <= names
    assert [row["step"] for row in rows(out / "valid.csv")] == ["0", "2", "4"]
    assert set(rows(out / "valid.csv")[0]) == {"step", "loss", *(f"codebook{k}" for k in range(4))}
    audio, rate = read_audio(out / "samples" / "step-00000004-0.wav")
    assert rate == 24_000 and 0 < audio.shape[-1] <= 0.4 * 24_000
    if importlib.util.find_spec("matplotlib"):
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    options = json.loads((out / "options.json").read_text())
    assert (options["steps"], options["model"], options["data"]) == (4, NOISE, str(data))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory_errors_give_advice(data, config, tmp_path, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainee, "forward", fail)
    arguments = ["--data", data, "--model", NOISE, "--config", config, "--out", tmp_path / "run", "--batch-rows", 512]
    assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet", "--eval-every", "0"]) == 2
    message = capsys.readouterr().err
    assert "out of memory" in message and "Traceback" not in message
    for advice in (
        "--batch-rows 256 --grad-accum-steps 2 (",
        "--activation-checkpointing",
        "--precision bfloat16",
        "--lora",
    ):
        assert advice in message


def test_other_errors_pass_unchanged(data, config, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainee, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        finetune(data, config, tmp_path / "run")


def test_a_configuration_that_does_not_fit_the_codec_is_refused(data, tmp_path, capsys):
    odd = dataclasses.replace(
        MICRO, num_codebooks=9, depth_decoder=dataclasses.replace(MICRO.depth_decoder, max_positions=9)
    )
    values = json.loads(write_config(tmp_path / "config.json", odd).read_text())
    values["codec_config"]["num_quantizers"] = 9
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments = ["--data", data, "--model", NOISE, "--config", tmp_path / "config.json", "--out", tmp_path / "run"]
    assert main(["finetune", *map(str, arguments), "--device", "cpu"]) == 2
    assert f"9 codebooks of 256; the codec of {NOISE} has 8 of 256" in capsys.readouterr().err


def test_help_lists_commands_and_options(capsys):
    for arguments, words in ((["--help"], ("finetune", "eval")), (["finetune", "--help"], ("--depth-share", "--lora"))):
        with pytest.raises(SystemExit):
            main(arguments)
        message = capsys.readouterr().out
        assert all(word in message for word in words)


def test_a_codec_in_a_separate_file(data, tmp_path):
    """In Kyutai's layout, with its own configuration in config.json. The exported model includes it."""
    codec = dataclasses.replace(CODEC, num_filters=4, dim=32, codebook_dim=16, hidden_dim=64)
    save_file(random_state(mimi_table(codec), seed=7), tmp_path / "mimi.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_hf_config(MICRO, codec)))
    out = finetune(data, tmp_path / "config.json", tmp_path / "run", "--codec", tmp_path / "mimi.safetensors", steps=1)
    generator = Generator.from_pretrained(out / "model", device="cpu")
    assert generator._checkpoint.codec_config == codec
    stored = load_file(tmp_path / "mimi.safetensors")
    loaded = read_codec(generator._checkpoint, None, CPU)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
