"""The loop: batches, losses, steps; evaluation, samples and checkpoints on the way.

Whatever is random comes from (seed, epoch, example) or (seed, step, process): a run that is resumed from a checkpoint,
which holds weights, optimiser and place alone, goes on as if it had not stopped.
"""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from csm.errors import CheckpointError, CSMError
from csm.finetune import checkpoint
from csm.finetune.batches import Batch, Example, collate, cut, plan_epoch
from csm.finetune.logs import Log, draw_curves
from csm.finetune.loss import Counts, Sums, Trainee, combine, count
from csm.finetune.optimise import Average, adamw
from csm.finetune.options import TrainOptions
from csm.finetune.processes import Processes
from csm.finetune.samples import Samples

# What may be another when a run goes on: it changes no step, or is asked for on purpose.
FREE = {"steps", "eval_every", "eval_batches", "save_every", "keep", "sample_every", "sample_seconds", "checkpointing"}


@dataclass(frozen=True)
class Place:
    """Steps done, and the batch that comes next: which of which epoch's."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Trainer:
    """A run in ``folder``: ``trainee`` learns ``train`` and is measured on ``valid``."""

    def __init__(
        self,
        trainee: Trainee,
        train: Sequence[Example],
        valid: Sequence[Example],
        options: TrainOptions,
        folder: Path,
        processes: Processes | None = None,
        progress: bool = True,
    ):
        self.trainee = trainee
        self.options = options
        self.folder = folder
        self.processes = processes or Processes(0, 1, trainee.model.device)
        self.progress = progress
        self.train, self.valid = train, valid
        self.samples: Samples | None = None
        self.place = Place()
        self.trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, options)
        self.average = Average(self.trained, options.ema) if options.ema else None
        self._wrapped = self.processes.wrap(trainee)
        self._lengths = [example.num_positions for example in train]
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._told = self._stop = False  # by a signal, here; and by agreement, everywhere

    def run(self) -> bool:
        """Train until ``options.steps``; False if a signal ended it before, with a checkpoint of where it was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = Log(self.folder / "train.csv", self.place.step) if self.processes.first else None
        valid_log = Log(self.folder / "valid.csv", self.place.step) if self.processes.first else None
        bar = tqdm(
            desc="training",
            total=self.options.steps,
            initial=self.place.step,
            unit="step",
            disable=None if self.progress and self.processes.first else True,
        )
        with bar, self._signals():
            if self.place.step == 0:
                self._measure(valid_log, bar)
            while self.place.step < self.options.steps and not self._stop:
                row = self._step()
                if log is not None:
                    log.add(row)
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                self._on_the_way(valid_log, bar)
        return self.place.step >= self.options.steps

    def _on_the_way(self, valid_log: Log | None, bar: tqdm) -> None:
        """What is due after this step."""
        step, options = self.place.step, self.options
        last = step >= options.steps or self._stop
        if _due(step, options.eval_every, step >= options.steps):
            self._measure(valid_log, bar)
        if self.samples is not None and _due(step, options.sample_every, step >= options.steps):
            if self.processes.first:
                with self.speaking():
                    self.samples.speak(step)
            self.processes.wait()
        if _due(step, options.save_every, last):
            if self.processes.first:
                self.save()
            self.processes.wait()

    def _step(self) -> dict[str, Any]:
        """One step of the optimiser; the numbers of its row in the log."""
        began, options, step = time.perf_counter(), self.options, self.place.step
        epoch = self.place.epoch
        batches = [self._next_batch() for _ in range(options.accumulate)]
        counts, self._stop = self._counts(batches)
        rate = options.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(random.Random(f"step/{options.seed}/{step}/{self.processes.rank}").getrandbits(63))
        parts = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for index, batch in enumerate(batches):
            with self.processes.last_of(self._wrapped, index == len(batches) - 1):
                with self._autocast():
                    sums: Sums = self._wrapped(batch.to(self.processes.device))
                    loss = combine(sums, counts, options.depth_weight)
                (loss * self.processes.count).backward()  # DDP takes the mean of the processes' gradients
            parts += torch.stack((sums.codebook0.detach(), sums.depth_J.detach().sum())).double()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), options.clip or float("inf"))
        if not torch.isfinite(norm):  # before it is in the weights: the last checkpoint is sound
            raise CSMError(f"step {step + 1}: the gradient is not finite; lower --learning-rate or raise --warmup")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.place = replace(self.place, step=step + 1)
        if self.average is not None:
            self.average.update(self.trained, step + 1)
        row = self._row(counts, self.processes.total(parts.tolist()), epoch)
        seconds = time.perf_counter() - began
        row |= {"gradient_norm": norm.item(), "learning_rate": rate, "seconds": round(seconds, 4)}
        return row | {"frames_per_second": round(counts.frames / seconds, 1)}

    def _row(self, counts: Counts, parts: list[float], epoch: int) -> dict[str, Any]:
        codebook0, others = parts[0] / counts.frames, parts[1] / counts.depth_codes
        loss = codebook0 + self.options.depth_weight * others
        return {"step": self.place.step, "epoch": epoch, "loss": loss, "codebook0": codebook0, "codebooks_1_up": others}

    def _counts(self, batches: Sequence[Batch]) -> tuple[Counts, bool]:
        """What the losses of a step are divided by, over all processes; and whether one was told to stop."""
        own = [count(batch) for batch in batches]
        sums = (sum(c.frames for c in own), sum(c.depth_codes for c in own), float(self._told))
        frames, depth_codes, stop = self.processes.total(sums)
        return Counts(frames, depth_codes), stop > 0

    def _next_batch(self) -> Batch:
        """This process's share of the next batch."""
        options, place = self.options, self.place
        if self._plan[0] != place.epoch:
            limits = (options.batch_size, options.batch_rows)
            self._plan = place.epoch, plan_epoch(self._lengths, *limits, options.seed, place.epoch)
        batches = self._plan[1]
        indices = batches[place.batch]
        ended = place.batch + 1 == len(batches)
        self.place = replace(place, epoch=place.epoch + ended, batch=0 if ended else place.batch + 1)
        share = indices[self.processes.rank :: self.processes.count]
        examples = [self.train[index] for index in share or indices[:1]]
        keys = [f"frames/{options.seed}/{place.epoch}/{index}" for index in share or indices[:1]]
        return collate(examples, keys, options.depth_share, bool(share), options.code_noise)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.options.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Mean cross-entropy of each codebook over all frames of what is held out; of the averaged weights, if any."""
        self.trainee.eval()
        totals = [0.0] * (1 + self.trainee.model.config.num_codebooks)
        with self.averaged(), self._autocast():
            for batch in self._valid_batches():
                sums = self.trainee(batch.to(self.processes.device))
                values = [float(batch.target_N.shape[0]), sums.codebook0.item(), *sums.depth_J.tolist()]
                totals = [total + value for total, value in zip(totals, values, strict=True)]
        self.trainee.train()
        frames, *losses = self.processes.total(totals)
        return [loss / frames for loss in losses]

    def _valid_batches(self) -> Iterator[Batch]:
        """Up to ``eval_batches`` batches of like length, the same every time, shared among the processes."""
        options = self.options
        lengths = [example.num_positions for example in self.valid]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        batches = cut(order, lengths, options.batch_size, options.batch_rows)
        stride = -(-len(batches) // options.eval_batches) if options.eval_batches else 1
        for indices in batches[::stride][self.processes.rank :: self.processes.count]:
            yield collate([self.valid[index] for index in indices], [""] * len(indices), depth_share=1.0)

    def _measure(self, log: Log | None, bar: tqdm) -> None:
        if not self.valid or not self.options.eval_every:
            return
        losses = self.evaluate()
        loss = losses[0] + self.options.depth_weight * sum(losses[1:]) / len(losses[1:])
        if log is not None:
            log.add({"step": self.place.step, "loss": loss} | {f"codebook{k}": v for k, v in enumerate(losses)})
            if self.progress:
                bar.write(f"step {self.place.step}: held-out loss {loss:.4f}, codebook 0 {losses[0]:.4f}")
            draw_curves(self.folder / "train.csv", log.path, self.folder / "curves.png")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights, if there are any, for the time."""
        with self.average.applied(self.trained) if self.average is not None else nullcontext():
            yield

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """The model as it is to be heard: averaged, with its adapters merged, folded; for the time."""
        model, lora = self.trainee.model, self.trainee.lora
        with self.averaged(), lora.merged(model) if lora is not None else nullcontext():
            if lora is None:
                model.precompute_depth_embedding()
            yield

    def save(self) -> Path:
        """Write a checkpoint."""
        state = {
            "place": asdict(self.place),
            "options": asdict(self.options),
            "data": self._data_hash,
            "adapters": self._adapters,
            "frozen": self._frozen_hash,
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.shadow,
        }
        return checkpoint.write(self.folder, self.place.step, state, self.options.keep)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError where it is of another run: model, data or options."""
        state = checkpoint.read(path)
        before, now = state["options"], asdict(self.options)
        for name in now.keys() - FREE:
            if before.get(name) != now[name]:
                raise CheckpointError(f"{path}: this run has {name} {before.get(name)!r}, not {now[name]!r}")
        if state["adapters"] != self._adapters:
            raise CheckpointError(f"{path}: this run has adapters {state['adapters']}, not {self._adapters}")
        if state["frozen"] != self._frozen_hash:
            raise CheckpointError(f"{path}: this run starts from a model with other weights")
        if state["data"] != self._data_hash:
            raise CheckpointError(f"{path}: this run is on other data: turns were added, removed or changed")
        shapes = {name: tuple(tensor.shape) for name, tensor in state["trained"].items()}
        mine = {name: tuple(tensor.shape) for name, tensor in self.trained.items()}
        for name in sorted(shapes.keys() | mine.keys()):
            if shapes.get(name) != mine.get(name):
                raise CheckpointError(f"{path}: this run trains {name} as {shapes.get(name)}, not {mine.get(name)}")
        with torch.no_grad():
            _copy(state["trained"], self.trained)
            if self.average is not None:
                _copy(state["average"], self.average.shadow)
        self.optimizer.load_state_dict(state["optimizer"])
        self.place = Place(**state["place"])

    @property
    def _adapters(self) -> dict[str, Any] | None:
        return None if self.trainee.lora is None else asdict(self.trainee.lora.config)

    @cached_property
    def _frozen_hash(self) -> str:
        """Of some values of every weight that is not trained: they are in no checkpoint."""
        digest = hashlib.sha256()
        for name, parameter in self.trainee.model.named_parameters():
            if not parameter.requires_grad:
                values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
                digest.update(f"{name} {tuple(parameter.shape)} {values.double().tolist()}".encode())
        return digest.hexdigest()

    @cached_property
    def _data_hash(self) -> str:
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(repr((example.first_trained, [turn.text_ids for turn in example.turns])).encode())
            for turn in example.turns:
                digest.update(turn.codes_TK.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step in hand, with a checkpoint; a second one ends it at once."""

        def stop(number: int, _: object) -> None:
            self._told = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # which alone may
            before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _copy(source: dict[str, Tensor], target: dict[str, Any]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


def check_started(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises CSMError where a folder holds a run that nobody asked to resume."""
    newest = checkpoint.newest(folder)
    if newest is not None and not resume:
        raise CSMError(f"{folder} holds a run ({newest.name}): --resume goes on with it, or give another folder")
    return newest
