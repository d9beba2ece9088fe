"""Keys and values of past positions, in buffers that never move.

Shapes: L layers, B slots, G key/value heads, S positions, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csm.config import TransformerConfig

MIN_CONTEXT_BUCKET = 256  # spans are this times a power of two: few enough to capture a graph for each


@dataclass(frozen=True, eq=False)
class KVCache:
    """``k_LBGSd`` and ``v_LBGSd``, allocated once and written in place by the op ``rope_cache``.

    A position is overwritten, never cleared: what lies beyond a slot's own position is not looked at, so restarting a
    slot is setting its position.
    """

    k_LBGSd: Tensor
    v_LBGSd: Tensor
    slot_B1: Tensor

    @classmethod
    def allocate(
        cls, config: TransformerConfig, batch: int, max_positions: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        shape = (config.num_layers, batch, config.num_kv_heads, max_positions, config.head_dim)
        return cls(
            k_LBGSd=torch.zeros(shape, device=device, dtype=dtype),
            v_LBGSd=torch.zeros(shape, device=device, dtype=dtype),
            slot_B1=torch.arange(batch, device=device).unsqueeze(1),
        )

    @property
    def max_positions(self) -> int:
        return self.k_LBGSd.shape[3]

    @property
    def buckets(self) -> list[int]:
        """How much of the cache a pass may be asked to look at, ascending; the last is the whole."""
        doubled = (MIN_CONTEXT_BUCKET << n for n in range(self.max_positions.bit_length()))
        return [
            *(context_bucket for context_bucket in doubled if context_bucket < self.max_positions),
            self.max_positions,
        ]

    def bucket_for(self, num_positions: int) -> int:
        """The least context_bucket that holds so many positions."""
        return next(
            (context_bucket for context_bucket in self.buckets if context_bucket >= num_positions), self.max_positions
        )

    def slots(self, first: int, last: int) -> KVCache:
        """The cache of the slots ``first`` to ``last``, which is left out: views of the same memory."""
        return KVCache(self.k_LBGSd[:, first:last], self.v_LBGSd[:, first:last], self.slot_B1[: last - first])


def kv_bytes_per_position(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Memory of one position's keys and values over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
