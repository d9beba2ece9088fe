"""Training options, their checks, and which of them reduce memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from csm.errors import CSMError

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16", "float64")
# Former names of options: still accepted on the command line and in checkpoints.
RENAMED = {
    "accumulate": "grad_accum_steps",
    "final_rate": "min_lr_ratio",
    "clip": "max_grad_norm",
    "checkpointing": "activation_checkpointing",
}
# Options that may change on resume.
RESUMABLE = frozenset(
    {
        "steps",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep",
        "sample_every",
        "sample_seconds",
        "activation_checkpointing",
    }
)
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class OutOfMemoryError(CSMError):
    """A run does not fit in memory. The message lists the options that reduce memory."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train. An interval of 0 steps disables what it controls; shares are between 0 and 1.

    One optimizer step processes ``grad_accum_steps`` batches. ``batch_size`` and ``batch_rows`` limit a batch over all
    processes, so that neither depends on the world size. ``ema`` is the decay of the averaged weights; 0 disables them.
    ``precision`` is the precision of matrix products; bfloat16 means autocast, with trained weights in float32.
    """

    steps: int = 1000
    batch_size: int = 8
    batch_rows: int = 4096
    grad_accum_steps: int = 1
    learning_rate: float = 1e-4
    warmup: int = 100
    schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    depth_share: float = 1 / 16
    depth_weight: float = 1.0
    code_noise: float = 0.0
    precision: str = "float32"
    activation_checkpointing: bool = False
    ema: float = 0.0
    seed: int = 0
    eval_every: int = 200
    eval_batches: int = 16
    save_every: int = 200
    keep: int = 2
    sample_every: int = 0
    sample_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "batch_rows", "grad_accum_steps", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "eval_every", "eval_batches", "save_every", "sample_every"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "depth_weight", "min_lr_ratio"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "a finite number of at least 0")
        for name in ("beta1", "beta2", "ema", "code_noise"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("depth_share", 0 < self.depth_share <= 1, "above 0 and at most 1")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def _require(self, name: str, condition: bool, limit: str) -> None:
        if not condition:
            raise CSMError(f"--{name.replace('_', '-')} must be {limit}, not {getattr(self, name)}")


@contextmanager
def out_of_memory_advice(options: TrainOptions, lora: bool) -> Iterator[None]:
    """Replace an out-of-memory error by OutOfMemoryError with advice; let other errors pass."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        typed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not typed and not any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutOfMemoryError(f"out of memory ({reason}). {_memory_advice(options, lora)}") from error


def _memory_advice(options: TrainOptions, lora: bool) -> str:
    """Options that reduce memory and are not in use yet, the cheapest first."""
    rows, size = max(1, options.batch_rows // 2), max(1, options.batch_size // 2)
    smaller = f"--batch-size {size} --batch-rows {rows} --grad-accum-steps {2 * options.grad_accum_steps}"
    steps = [
        f"{smaller} (smaller batches, as much data a step)",
        "" if options.activation_checkpointing else "--activation-checkpointing (recomputes activations)",
        "" if options.precision == "bfloat16" else "--precision bfloat16",
        "" if options.depth_share <= 1 / 16 else "--depth-share 0.0625 (fewer frames for the depth decoder)",
        "" if options.ema == 0 else "--ema 0 (no second copy of the trained weights)",
        "" if lora else "--lora (gradients and optimizer state for adapters only)",
    ]
    return "Try, in this order: " + "; ".join(step for step in steps if step)
