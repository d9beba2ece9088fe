"""The optimizer, its learning-rate schedule, and the moving average of the trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from csm.finetune.options import TrainOptions


def adamw(parameters: Mapping[str, Tensor], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101). Embeddings and norms have no weight decay."""
    decayed: list[Tensor] = []
    not_decayed: list[Tensor] = []
    for name, parameter in parameters.items():
        (not_decayed if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    # The fused implementation needs one pass over memory and no temporary copy of all parameters.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(options.beta1, options.beta2), fused=True
    )


def learning_rate_at(options: TrainOptions, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then decay to ``min_lr_ratio`` times the peak."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup) / max(1, options.steps - 1 - options.warmup)
    left = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.learning_rate * (options.min_lr_ratio + (1 - options.min_lr_ratio) * left)


class WeightEMA:
    """Exponential moving average of the trained weights. The decay warms up: min(decay, (1 + steps) / (10 + steps))."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Update the average after ``steps`` optimizer steps."""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for name, parameter in parameters.items():
            self.shadow[name].lerp_(parameter, weight)

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages into ``parameters`` within the context; then restore the exact values."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            saved = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(saved)
