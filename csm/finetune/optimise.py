"""The optimiser and the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from csm.finetune.options import TrainOptions


def adamw(parameters: Mapping[str, Tensor], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101); what is no matrix of a linear layer does not decay."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in parameters.items():
        (kept if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    # Fused: one pass over the memory, and no temporary copies of all parameters.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(options.beta1, options.beta2), fused=True
    )


class Average:
    """An exponential moving average of the trained tensors, warmed up: decay min(d, (1 + steps) / (10 + steps))."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Move towards the parameters after ``steps`` steps."""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        for name, parameter in parameters.items():
            self.shadow[name].lerp_(parameter, weight)

    @contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """The averages in the parameters' place for the time; theirs are swapped back, to the last bit."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            aside = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(aside)
