"""The training loop: batches, optimizer steps, evaluation, samples and checkpoints.

Every random number is derived from (seed, epoch, example) or (seed, step, rank). A checkpoint therefore needs only the
weights, the optimizer state and the index of the next batch, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from csm.errors import CSMError
from csm.finetune import checkpoint
from csm.finetune.batches import Batch, Example, collate, plan_epoch, split_batches
from csm.finetune.checkpoint import RunIdentity, TrainerState
from csm.finetune.distributed import Processes
from csm.finetune.loss import Counts, Sums, Trainee, combine, count
from csm.finetune.monitor import MetricsLog, Samples, draw_curves
from csm.finetune.optimizer import WeightEMA, adamw, learning_rate_at
from csm.finetune.options import TrainOptions


class Trainer:
    """Trains ``trainee`` on ``train``, evaluates it on ``valid``, and writes everything into ``folder``."""

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
        self.state = TrainerState()
        self.trained = {name: p for name, p in trainee.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, options)
        self.ema = WeightEMA(self.trained, options.ema) if options.ema else None
        self._wrapped = self.processes.wrap(trainee)
        self._lengths = [example.num_positions for example in train]
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._signalled = False  # this process received SIGINT or SIGTERM
        self._stop = False  # some process did; equal on all ranks

    def run(self) -> bool:
        """Train until ``options.steps``. Returns False if a signal ended the run early, after a checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        is_main = self.processes.is_main
        log = MetricsLog(self.folder / "train.csv", self.state.step) if is_main else None
        valid_log = MetricsLog(self.folder / "valid.csv", self.state.step) if is_main else None
        bar = tqdm(
            desc="training",
            total=self.options.steps,
            initial=self.state.step,
            unit="step",
            disable=None if self.progress and is_main else True,
        )
        with bar, self._stop_on_signal():
            if self.state.step == 0:
                self._validate(valid_log, bar)
            while self.state.step < self.options.steps and not self._stop:
                row = self._step()
                if log is not None:
                    log.append(row)
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                self._after_step(valid_log, bar)
        return self.state.step >= self.options.steps

    def _after_step(self, valid_log: MetricsLog | None, bar: tqdm) -> None:
        """Evaluate, sample and save where this step's number asks for it."""
        step, options = self.state.step, self.options
        finished = step >= options.steps
        if _is_due(step, options.eval_every, finished):
            self._validate(valid_log, bar)
        if self.samples is not None and _is_due(step, options.sample_every, finished):
            if self.processes.is_main:
                with self.inference_weights():
                    self.samples.write(step)
            self.processes.barrier()
        if _is_due(step, options.save_every, finished or self._stop):
            if self.processes.is_main:
                self.save()
            self.processes.barrier()

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        began, options, step, epoch = time.perf_counter(), self.options, self.state.step, self.state.epoch
        batches = [self._next_batch() for _ in range(options.grad_accum_steps)]
        counts, self._stop = self._reduce_counts(batches)
        learning_rate = learning_rate_at(options, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(random.Random(f"step/{options.seed}/{step}/{self.processes.rank}").getrandbits(63))
        sums = self._backward(batches, counts)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), options.max_grad_norm or float("inf"))
        if not torch.isfinite(norm):  # checked before the weights change, so that the last checkpoint stays usable
            raise CSMError(f"step {step + 1}: the gradient is not finite; lower --learning-rate or raise --warmup")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = replace(self.state, step=step + 1)
        if self.ema is not None:
            self.ema.update(self.trained, step + 1)
        row = self._metrics(counts, self.processes.all_reduce_sum(sums.tolist()), epoch)
        seconds = time.perf_counter() - began
        row |= {"gradient_norm": norm.item(), "learning_rate": learning_rate, "seconds": round(seconds, 4)}
        return row | {"frames_per_second": round(counts.frames / seconds, 1)}

    def _backward(self, batches: Sequence[Batch], counts: Counts) -> Tensor:
        """Accumulate the gradients of ``batches``; returns this process's loss sums: codebook 0, other codebooks."""
        total = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        for index, batch in enumerate(batches):
            with self.processes.gradient_sync(self._wrapped, last_batch=index == len(batches) - 1):
                with self._autocast():
                    sums: Sums = self._wrapped(batch.to(self.processes.device))
                    loss = combine(sums, counts, self.options.depth_weight)
                (loss * self.processes.world_size).backward()  # DDP averages gradients over the processes
            total += torch.stack((sums.codebook0.detach(), sums.depth_J.detach().sum())).double()
        return total

    def _metrics(self, counts: Counts, sums: list[float], epoch: int) -> dict[str, Any]:
        codebook0, others = sums[0] / counts.frames, sums[1] / counts.depth_codes
        loss = codebook0 + self.options.depth_weight * others
        return {"step": self.state.step, "epoch": epoch, "loss": loss, "codebook0": codebook0, "codebooks_1_up": others}

    def _reduce_counts(self, batches: Sequence[Batch]) -> tuple[Counts, bool]:
        """The step's target counts over all processes, and whether any process received a signal."""
        own = [count(batch) for batch in batches]
        values = (sum(c.frames for c in own), sum(c.depth_codes for c in own), float(self._signalled))
        frames, depth_codes, signalled = self.processes.all_reduce_sum(values)
        return Counts(frames, depth_codes), signalled > 0

    def _next_batch(self) -> Batch:
        """This process's part of the next batch; a dummy sequence without loss where there is none for it."""
        options, state = self.options, self.state
        if self._plan[0] != state.epoch:
            limits = (options.batch_size, options.batch_rows)
            self._plan = state.epoch, plan_epoch(self._lengths, *limits, options.seed, state.epoch)
        batches = self._plan[1]
        indices = batches[state.batch]
        ended = state.batch + 1 == len(batches)
        self.state = replace(state, epoch=state.epoch + ended, batch=0 if ended else state.batch + 1)
        own = indices[self.processes.rank :: self.processes.world_size]
        examples = [self.train[index] for index in own or indices[:1]]
        keys = [f"frames/{options.seed}/{state.epoch}/{index}" for index in own or indices[:1]]
        return collate(examples, keys, options.depth_share, has_loss=bool(own), code_noise=options.code_noise)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.options.precision != "bfloat16":
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Mean cross-entropy of each codebook over all held-out frames, with the averaged weights if there are any."""
        self.trainee.eval()
        totals = [0.0] * (1 + self.trainee.model.config.num_codebooks)
        with self.ema_weights(), self._autocast():
            for batch in self._valid_batches():
                sums = self.trainee(batch.to(self.processes.device))
                values = [float(batch.target_N.shape[0]), sums.codebook0.item(), *sums.depth_J.tolist()]
                totals = [total + value for total, value in zip(totals, values, strict=True)]
        self.trainee.train()
        frames, *losses = self.processes.all_reduce_sum(totals)
        return [loss / frames for loss in losses]

    def _valid_batches(self) -> Iterator[Batch]:
        """This process's part of up to ``eval_batches`` held-out batches, the same ones in every evaluation."""
        options = self.options
        lengths = [example.num_positions for example in self.valid]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        batches = split_batches(order, lengths, options.batch_size, options.batch_rows)
        stride = -(-len(batches) // options.eval_batches) if options.eval_batches else 1
        for indices in batches[::stride][self.processes.rank :: self.processes.world_size]:
            yield collate([self.valid[index] for index in indices], [""] * len(indices), depth_share=1.0)

    def _validate(self, log: MetricsLog | None, bar: tqdm) -> None:
        """Evaluate, and on the main process log the result and redraw the curves."""
        if not self.valid or not self.options.eval_every:
            return
        losses = self.evaluate()
        loss = losses[0] + self.options.depth_weight * sum(losses[1:]) / len(losses[1:])
        if log is not None:
            log.append({"step": self.state.step, "loss": loss} | {f"codebook{k}": v for k, v in enumerate(losses)})
            if self.progress:
                bar.write(f"step {self.state.step}: held-out loss {loss:.4f}, codebook 0 {losses[0]:.4f}")
            draw_curves(self.folder / "train.csv", log.path, self.folder / "curves.png")

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, within the context."""
        with self.ema.applied(self.trained) if self.ema is not None else nullcontext():
            yield

    @contextmanager
    def inference_weights(self) -> Iterator[None]:
        """Prepare the model for generation within the context: averaged, adapters merged, depth embedding updated."""
        model, lora = self.trainee.model, self.trainee.lora
        with self.ema_weights(), lora.merged(model) if lora is not None else nullcontext():
            if lora is None:
                model.precompute_depth_embedding()
            yield

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        ema = None if self.ema is None else self.ema.shadow
        return checkpoint.save(
            self.folder, self.state, self._identity, self.trained, self.optimizer, ema, self.options.keep
        )

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint. Raises CheckpointError where it is of another run."""
        ema = None if self.ema is None else self.ema.shadow
        self.state = checkpoint.load(path, self._identity, self.trained, self.optimizer, ema)

    @cached_property
    def _identity(self) -> RunIdentity:
        lora = self.trainee.lora
        adapters = None if lora is None else lora.config
        return RunIdentity.of(self.options, adapters, self.trainee.model, self.train)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one ends it at once."""

        def stop(number: int, _: object) -> None:
            self._signalled = True
            signal.signal(number, previous[number])

        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _is_due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
