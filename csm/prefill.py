"""Prefill: computes the keys and values of a prompt's rows in chunks, or copies them from the prefix cache.

A captured graph has fixed addresses and shapes. So chunks write to a cache of one slot, the staging cache, from which
the prompt's positions are copied to the request's slot, and captured chunks are padded to one of a few sizes. Padding
writes past the prompt, or repeatedly to the cache's last position, which no prompt fills; those positions are
overwritten before attention can see them.

Shapes: T rows of a chunk, C columns of a row, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from csm.cache import KVCache, PrefixCache
from csm.frame import FrameState
from csm.graph import Graph, Pool
from csm.model import CSM
from csm.sampling import SamplingParams

CHUNK_SIZES = (32, 64, 128, 256)  # the last bounds the memory of a chunk: every row gathers 33 embeddings


class Prefill:
    """Starts requests in slots, one at a time."""

    def __init__(self, model: CSM, prefixes: PrefixCache | None = None, chunk_sizes: Sequence[int] | None = None):
        """``chunk_sizes`` are the sizes that chunks are padded to, ascending. An empty sequence means no padding. None
        means ``CHUNK_SIZES`` on a GPU, and no padding elsewhere, where launches are cheap and rows are not."""
        config, device = model.config, model.device
        self.model = model
        self.cache = KVCache.allocate(config.backbone, 1, config.backbone.max_positions, device, model.dtype)
        self.chunk_sizes = CHUNK_SIZES if chunk_sizes is None and device.type == "cuda" else tuple(chunk_sizes or ())
        self.row_1TC = torch.zeros(1, CHUNK_SIZES[-1], config.num_codebooks + 1, device=device, dtype=torch.int64)
        self.mask_1TC = torch.zeros_like(self.row_1TC, dtype=torch.bool)
        self.first_11 = torch.zeros(1, 1, device=device, dtype=torch.int64)
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        self._graphs: dict[tuple[int, int], Graph] = {}

    def capture(self, pool: Pool) -> None:
        """Capture a chunk of every size for every context bucket that is at least as large."""
        buffers = {name: getattr(self, name) for name in ("row_1TC", "mask_1TC", "first_11")} | vars(self.cache)
        for chunk_size in self.chunk_sizes:
            for context_bucket in (bucket for bucket in self.cache.buckets if bucket >= chunk_size):
                step = partial(self._compute_chunk, chunk_size, context_bucket)
                self._graphs[chunk_size, context_bucket] = Graph(step, lambda: buffers, self.model.device, pool)

    def check(self) -> None:
        """Raise GraphError if a buffer of the captured chunks has changed."""
        for graph in list(self._graphs.values())[:1]:  # all have the same buffers
            graph.check()

    @torch.inference_mode()
    def start(
        self,
        state: FrameState,
        slot: int,
        row_TC: Tensor,
        mask_TC: Tensor,
        params: SamplingParams,
        turn_ends: Sequence[int] = (),
    ) -> None:
        """Start a request in ``slot``: write the keys and values of rows 0..T-2 and make the last row pending.

        ``row_TC`` (T, K + 1) int64 and ``mask_TC`` bool are on the CPU, with 1 <= T <= the cache's positions. The
        longest prefix up to one of ``turn_ends`` that is in the prefix cache is copied instead of computed.
        """
        num_rows = row_TC.shape[0]
        assert 1 <= num_rows <= self.cache.max_positions
        num_cached = self._prefixes.load(row_TC, turn_ends, self.cache)
        for first, last in _chunks(num_cached, num_rows - 1, turn_ends):
            self._run_chunk(row_TC[first:last], mask_TC[first:last], first)
        if turn_ends and num_cached < turn_ends[-1]:
            self._prefixes.store(row_TC, turn_ends[-1], self.cache)
        slot_cache = state.backbone_cache.slots(slot, slot + 1)
        slot_cache.k_LBGSd[:, :, :, : num_rows - 1] = self.cache.k_LBGSd[:, :, :, : num_rows - 1]
        slot_cache.v_LBGSd[:, :, :, : num_rows - 1] = self.cache.v_LBGSd[:, :, :, : num_rows - 1]
        state.pending_row_BC[slot] = row_TC[-1].to(state.pending_row_BC.device)
        state.pending_mask_BC[slot] = mask_TC[-1].to(state.pending_mask_BC.device)
        state.position_B[slot] = num_rows - 1
        state.frame_B[slot] = 0
        state.seed_B[slot] = int(params.seed)
        state.temperature_B[slot] = float(params.temperature)
        state.top_k_B[slot] = min(int(params.top_k), self.model.config.codebook_size)

    def _run_chunk(self, row_TC: Tensor, mask_TC: Tensor, first: int) -> None:
        """Write keys and values of rows whose first position is ``first`` to the staging cache."""
        num_rows = row_TC.shape[0]
        chunk_size = next((size for size in self.chunk_sizes if num_rows <= size), num_rows)
        context_bucket = self.cache.bucket_for(first + chunk_size)
        self.row_1TC[0, :num_rows] = row_TC.to(self.row_1TC.device)
        self.mask_1TC[0, :num_rows] = mask_TC.to(self.mask_1TC.device)
        self.mask_1TC[0, num_rows:chunk_size] = False
        self.first_11.fill_(first)
        if (chunk_size, context_bucket) in self._graphs:
            self._graphs[chunk_size, context_bucket].replay()
        else:
            self._compute_chunk(chunk_size, context_bucket)

    def _compute_chunk(self, chunk_size: int, context_bucket: int) -> None:
        """The captured step: the first ``chunk_size`` rows of the buffers."""
        backbone = self.model.backbone
        x_1TD = self.model.embed_rows(self.row_1TC[:, :chunk_size], self.mask_1TC[:, :chunk_size])
        position_1T = self.first_11 + torch.arange(chunk_size, device=x_1TD.device)
        position_1T = position_1T.clamp(max=self.cache.max_positions - 1)
        backbone(x_1TD, self.cache, backbone.attention_metadata(position_1T, context_bucket))


def _chunks(start: int, stop: int, turn_ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each chunk of rows ``start`` to ``stop``. No chunk crosses the end of a turn."""
    for turn_end in [*(end for end in turn_ends if start < end < stop), stop]:
        for first in range(start, turn_end, CHUNK_SIZES[-1]):
            yield first, min(first + CHUNK_SIZES[-1], turn_end)
        start = turn_end
