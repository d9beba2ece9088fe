"""How a request's codes are drawn: what a user sets. The drawing itself is an op, ``csm.kernels.sample``."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from csm.errors import SamplingError

MAX_TEMPERATURE = 1e6  # a divisor that keeps float32 finite


@dataclass(frozen=True)
class SamplingParams:
    """How the codes of one request are drawn.

    ``temperature`` 0 is greedy; ``top_k`` of k keeps the k best ids and those that tie with the last; ``seed`` (0 to
    2**63 - 1) fixes the noise: with the same logits it draws the same codes, alone or in a batch, on any device.
    """

    temperature: float = 0.9
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, numbers.Real) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise SamplingError(f"temperature must be a number from 0 to {MAX_TEMPERATURE:g}, not {self.temperature!r}")
        if not isinstance(self.top_k, numbers.Integral) or self.top_k < 1:
            raise SamplingError(f"top-k must be a whole number of at least 1, not {self.top_k!r}")
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**63:
            raise SamplingError(f"seed must be a whole number within 0 and 2**63 - 1, not {self.seed!r}")
