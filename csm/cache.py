"""Keys and values of past positions, in buffers that never move.

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


class PrefixCache:
    """Keys and values of context turns that were spoken after before, the least recently used forgotten first.

    Whoever speaks many sentences after the same reference (a cloned voice) prefills it once. A prefix ends where a turn
    ends, and a prefill never straddles the end of a turn, so what is copied is bit for bit what would be computed.
    """

    def __init__(self, max_positions: int):
        """``max_positions`` is how many positions to keep, over all prefixes."""
        self._max_positions = max_positions
        self._entries: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, row_TC: Tensor, turn_ends: Sequence[int], cache: KVCache) -> int:
        """Copy the longest cached prefix into a slot's cache (a batch of one); return its length, or 0."""
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
        """Keep the first ``length`` positions of a slot's cache under the rows that they came from."""
        with self._lock:
            prefix = cache.k_LBGSd[:, :, :, :length].clone(), cache.v_LBGSd[:, :, :, :length].clone()
            self._entries[self._key(row_TC, length)] = prefix
            while sum(k.shape[3] for k, _ in self._entries.values()) > self._max_positions:
                self._entries.popitem(last=False)

    @staticmethod
    def _key(row_TC: Tensor, length: int) -> bytes:
        # A row says what it is by its values too: a text row has no codes, an audio row no text token.
        return hashlib.sha256(row_TC[:length].contiguous().numpy().tobytes()).digest()
