"""Keys and values of earlier requests, found again under the rows that they were computed from.

A voice's reference, a conversation's earlier turns and a retried text are all the same thing here: the longest known
prefix of a prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.cache import KVCache
from csm.prompt import Prompt


@dataclass(eq=False)
class _Entry:
    """``keys`` are those under which prefixes of this entry are found, by length."""

    k_LBGSd: Tensor
    v_LBGSd: Tensor
    keys: dict[int, bytes]

    @property
    def num_bytes(self) -> int:
        return self.k_LBGSd.nbytes + self.v_LBGSd.nbytes


class PrefixCache:
    """Prefixes of prompts with their keys and values, evicted least recently used first. Safe to use from threads.

    Each entry can be found at the end of every turn in it, and at its own end. Prefill chunks never cross the end of a
    turn, so keys and values that prefill computed are copied bit for bit. Those of generated frames were computed one
    row at a time, and may differ from a prefill of the same rows by rounding.
    """

    def __init__(self, max_bytes: int):
        """``max_bytes`` limits the memory of all entries."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._found: dict[bytes, tuple[int, int]] = {}  # key -> entry, length
        self._lengths: Counter[int] = Counter()
        self._serial = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, prompt: Prompt, cache: KVCache) -> int:
        """Copy the longest known prefix into ``cache`` (of one slot); return its length, or 0.

        The last row of the prompt is never part of it: the first frame's step reads that row.
        """
        with self._lock:
            lengths = sorted(length for length in self._lengths if length < prompt.row_TC.shape[0])
            keys = prefix_keys(prompt, lengths)
            length = next((length for length in reversed(lengths) if keys[length] in self._found), 0)
            if length:
                serial, _ = self._found[keys[length]]
                self._entries.move_to_end(serial)
                entry = self._entries[serial]
                cache.k_LBGSd[:, :, :, :length] = entry.k_LBGSd[:, :, :, :length]
                cache.v_LBGSd[:, :, :, :length] = entry.v_LBGSd[:, :, :, :length]
            return length

    def store(self, prompt: Prompt, length: int, cache: KVCache) -> None:
        """Keep the first ``length`` positions of ``cache`` (of one slot), those of the first rows of ``prompt``."""
        if length < 1:
            return
        keys = prefix_keys(prompt, [*(end for end in prompt.turn_ends if end < length), length])
        with self._lock:
            if keys[length] in self._found:
                self._entries.move_to_end(self._found[keys[length]][0])
                return
            entry = _Entry(cache.k_LBGSd[:, :, :, :length].clone(), cache.v_LBGSd[:, :, :, :length].clone(), keys)
            if entry.num_bytes > self.max_bytes:
                return
            for key in keys.values():  # a longer entry replaces those that are prefixes of it
                if key in self._found and self._found[key][1] == max(self._entries[self._found[key][0]].keys):
                    self._remove(self._found[key][0])
            self._add(entry)
            while self.num_bytes > self.max_bytes:
                self._remove(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        with self._lock:
            for serial in list(self._entries):
                self._remove(serial)

    def _add(self, entry: _Entry) -> None:
        serial = next(self._serial)
        self._entries[serial] = entry
        self.num_bytes += entry.num_bytes
        for length, key in entry.keys.items():
            if key not in self._found:
                self._found[key] = serial, length
                self._lengths[length] += 1

    def _remove(self, serial: int) -> None:
        entry = self._entries.pop(serial)
        self.num_bytes -= entry.num_bytes
        for length, key in entry.keys.items():
            if self._found.get(key) != (serial, length):
                continue
            others = (other for other, each in reversed(self._entries.items()) if each.keys.get(length) == key)
            if (other := next(others, None)) is not None:  # the same prefix, in an entry that stays
                self._found[key] = other, length
                continue
            del self._found[key]
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]


def prefix_keys(prompt: Prompt, lengths: Sequence[int]) -> dict[int, bytes]:
    """A hash of the first rows of a prompt for each of the ``lengths``, which ascend."""
    # Masked-out columns count as -1: a text token 0 is no frame of zeros.
    rows = torch.where(prompt.mask_TC, prompt.row_TC, -1).contiguous().numpy()
    digest, done, keys = hashlib.sha256(), 0, {}
    for length in lengths:
        digest.update(rows[done:length].tobytes())
        done, keys[length] = length, digest.copy().digest()
    return keys
