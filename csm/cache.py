"""The KV cache: keys and values of past positions, in buffers with fixed addresses.

Shapes: L layers, B slots, G key/value heads, S positions, d head dim.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.config import TransformerConfig

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
            k_LBGSd=torch.zeros(shape, device=device, dtype=dtype),
            v_LBGSd=torch.zeros(shape, device=device, dtype=dtype),
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


class PrefixCache:
    """Keys and values of context turns of earlier requests, evicted least recently used first.

    Many requests with the same context (a cloned voice, say) prefill it once. Prefixes end where turns end, and prefill
    chunks never cross the end of a turn, so a copied prefix equals a computed one bit for bit.
    """

    def __init__(self, max_positions: int):
        """``max_positions`` limits the sum of the lengths of all prefixes."""
        self._max_positions = max_positions
        self._entries: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, row_TC: Tensor, turn_ends: Sequence[int], cache: KVCache) -> int:
        """Copy the longest cached prefix into ``cache`` (of one slot); return its length, or 0."""
        with self._lock:
            for length in reversed(turn_ends):
                key = self._key(row_TC, length)
                if key in self._entries:
                    self._entries.move_to_end(key)
                    k_LBGSd, v_LBGSd = self._entries[key]
                    cache.k_LBGSd[:, :, :, :length] = k_LBGSd
                    cache.v_LBGSd[:, :, :, :length] = v_LBGSd
                    return length
        return 0

    def store(self, row_TC: Tensor, length: int, cache: KVCache) -> None:
        """Store the first ``length`` positions of ``cache`` (of one slot), keyed by their rows."""
        with self._lock:
            prefix = cache.k_LBGSd[:, :, :, :length].clone(), cache.v_LBGSd[:, :, :, :length].clone()
            self._entries[self._key(row_TC, length)] = prefix
            while sum(k.shape[3] for k, _ in self._entries.values()) > self._max_positions:
                self._entries.popitem(last=False)

    @staticmethod
    def _key(row_TC: Tensor, length: int) -> bytes:
        # The mask is not part of the key: begin and end tokens delimit the text rows, so the ids determine it.
        return hashlib.sha256(row_TC[:length].contiguous().numpy().tobytes()).digest()
