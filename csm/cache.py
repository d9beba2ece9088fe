"""The KV cache: keys and values of past positions, in buffers with fixed addresses.

Shapes: L layers, B slots, G key/value heads, S positions, d head dim.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.config import TransformerConfig

MIN_MAPPED_BYTES = 1 << 20
MIN_CONTEXT_BUCKET = 256  # buckets are this times a power of two, so that one CUDA graph for each is affordable


@dataclass(frozen=True, eq=False)
class KVCache:
    """``k_LBGSd`` and ``v_LBGSd``, allocated once and written in place by the op ``rope_cache``.

    Positions are overwritten, never cleared. Attention does not read beyond a slot's position, so setting the position
    to 0 restarts the slot.
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
            k_LBGSd=zeros(shape, device, dtype),
            v_LBGSd=zeros(shape, device, dtype),
            slot_B1=torch.arange(batch, device=device).unsqueeze(1),
        )

    @property
    def max_positions(self) -> int:
        return self.k_LBGSd.shape[3]

    @property
    def buckets(self) -> list[int]:
        """Context buckets: the numbers of positions that attention can be limited to, ascending. The last is all."""
        doubled = (MIN_CONTEXT_BUCKET << n for n in range(self.max_positions.bit_length()))
        return [*(bucket for bucket in doubled if bucket < self.max_positions), self.max_positions]

    def bucket_for(self, num_positions: int) -> int:
        """The smallest context bucket that holds ``num_positions``; the largest if none does."""
        return next((bucket for bucket in self.buckets if bucket >= num_positions), self.max_positions)

    def slots(self, first: int, last: int) -> KVCache:
        """Views of slots ``first`` (inclusive) to ``last`` (exclusive)."""
        return KVCache(self.k_LBGSd[:, first:last], self.v_LBGSd[:, first:last], self.slot_B1[: last - first])


def zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """``torch.zeros``; on a CPU, pages of memory that nothing has been written to take none.

    ``torch.zeros`` writes the zeros, which takes 60 ms for eight slots of the embedded voice, and all of its memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < MIN_MAPPED_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, device=device, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def kv_bytes_per_position(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Memory of one position's keys and values over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
