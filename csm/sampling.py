"""The sampling parameters of a request. Sampling itself is the op ``csm.kernels.sample``."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from csm.errors import SamplingError

MAX_TEMPERATURE = 1e6  # times the largest noise, 16, it is far below the largest float32


@dataclass(frozen=True)
class SamplingParams:
    """How the codes of one request are sampled.

    ``temperature`` 0 is greedy. ``top_k`` keeps the k ids with the largest logits and any that tie with the k-th.
    ``seed`` (0 to 2**63 - 1) determines the noise: equal logits give equal codes, alone or in a batch, on any device.
    Raises SamplingError for a value out of range.
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
            raise SamplingError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}")
