"""What a run of training is told, complete and unchanging. Those of a run are kept beside it and must not change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from csm.errors import CSMError

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class TrainOptions:
    """How to train. 0 as a count of steps between means never; shares are of one.

    A step takes ``accumulate`` batches, each shared out among the processes: neither changes with the number of these.
    ``ema`` is the decay of the averaged weights, 0 for none. ``precision`` is that of the matrix products; bfloat16 is
    autocast over float32 weights.
    """

    steps: int = 1000
    batch_size: int = 8
    batch_rows: int = 4096
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 100
    schedule: str = "cosine"
    final_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    clip: float = 1.0
    depth_share: float = 1 / 16
    depth_weight: float = 1.0
    code_noise: float = 0.0
    precision: str = "float32"
    checkpointing: bool = False
    ema: float = 0.0
    seed: int = 0
    eval_every: int = 200
    eval_batches: int = 16
    save_every: int = 200
    keep: int = 2
    sample_every: int = 0
    sample_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "batch_rows", "accumulate", "keep"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "eval_every", "eval_batches", "save_every", "sample_every"):
            _require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "clip", "depth_weight", "final_rate"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"{name} must be at least 0, not {value}")
        for name in ("beta1", "beta2", "ema", "code_noise"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be within 0 and 1, not {getattr(self, name)}")
        _require(0 < self.depth_share <= 1, f"depth_share must be above 0 and at most 1, not {self.depth_share}")
        _require(self.schedule in SCHEDULES, f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule}")
        _require(
            self.precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision}"
        )

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ...: linearly up for ``warmup`` steps, then down to ``final_rate`` of it."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * left)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CSMError(message)
