"""Prefill: computes the keys and values of a prompt's rows in chunks, or copies them from the prefix cache.

A captured graph has fixed addresses and shapes. So chunks write to a cache of one slot, the staging cache, from which
the prompt's positions are copied to the request's slot, and captured chunks are padded to one of a few sizes. Padding
writes past the prompt, or repeatedly to the cache's last position, which no prompt fills; those positions are
overwritten before attention can see them.

Shapes: T rows of a chunk, C columns of a row, D dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from csm.cache import KVCache
from csm.frame import FrameState
from csm.graph import Graph, Pool
from csm.model import CSM
from csm.prefix_cache import PrefixCache
from csm.prompt import Prompt
from csm.sampling import SamplingParams

CHUNK_SIZES = (32, 64, 128, 256)  # the last bounds the memory of a chunk: every row gathers 33 embeddings


class Prefill:
    """The captured chunks, the staging cache they write to, and the prefix cache."""

    def __init__(self, model: CSM, prefix_cache: PrefixCache | None = None, chunk_sizes: Sequence[int] | None = None):
        """``chunk_sizes`` are the sizes that chunks are padded to, ascending. An empty sequence means no padding. None
        means ``CHUNK_SIZES`` on a GPU, and no padding elsewhere, where launches are cheap and rows are not."""
        config, device = model.config, model.device
        self.model = model
        self.cache = KVCache.allocate(config.backbone, 1, config.backbone.max_positions, device, model.dtype)
        self.chunk_sizes = CHUNK_SIZES if chunk_sizes is None and device.type == "cuda" else tuple(chunk_sizes or ())
        self.row_1TC = torch.zeros(1, CHUNK_SIZES[-1], config.num_codebooks + 1, device=device, dtype=torch.int64)
        self.mask_1TC = torch.zeros_like(self.row_1TC, dtype=torch.bool)
        self.first_11 = torch.zeros(1, 1, device=device, dtype=torch.int64)
        self.prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
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
        job = PrefillJob(self, state, slot, Prompt(row_TC, mask_TC, tuple(turn_ends)), params)
        while not job.run_chunk():
            pass

    def run_chunk(self, row_TC: Tensor, mask_TC: Tensor, first: int) -> None:
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


class PrefillJob:
    """The prefill of one request, chunk by chunk, so that an engine can generate frames in between.

    One at a time: all jobs of a ``Prefill`` use its staging cache.
    """

    def __init__(self, prefill: Prefill, state: FrameState, slot: int, prompt: Prompt, params: SamplingParams):
        """Copies the longest known prefix. ``slot`` itself is not written before the last chunk."""
        assert 1 <= prompt.row_TC.shape[0] <= prefill.cache.max_positions
        self._prefill, self._state, self._slot = prefill, state, slot
        self._prompt, self._params = prompt, params
        num_cached = prefill.prefix_cache.load(prompt, prefill.cache)
        self._chunks = deque(_chunks(num_cached, prompt.row_TC.shape[0] - 1, prompt.turn_ends))

    @torch.inference_mode()
    def run_chunk(self) -> bool:
        """Compute the next chunk. True once the slot is ready to generate."""
        row_TC, mask_TC, turn_ends = self._prompt
        if self._chunks:
            first, last = self._chunks.popleft()
            self._prefill.run_chunk(row_TC[first:last], mask_TC[first:last], first)
        if self._chunks:
            return False
        if turn_ends:
            self._prefill.prefix_cache.store(self._prompt, turn_ends[-1], self._prefill.cache)
        self._write_slot(row_TC[-1], mask_TC[-1], row_TC.shape[0] - 1)
        return True

    def _write_slot(self, row_C: Tensor, mask_C: Tensor, position: int) -> None:
        """Copy the prompt's keys and values to the slot and set its buffers."""
        state, slot, params = self._state, self._slot, self._params
        staging, own = self._prefill.cache, state.backbone_cache.slots(slot, slot + 1)
        own.k_LBGSd[:, :, :, :position] = staging.k_LBGSd[:, :, :, :position]
        own.v_LBGSd[:, :, :, :position] = staging.v_LBGSd[:, :, :, :position]
        state.pending_row_BC[slot] = row_C.to(state.pending_row_BC.device)
        state.pending_mask_BC[slot] = mask_C.to(state.pending_mask_BC.device)
        state.position_B[slot] = position
        state.frame_B[slot] = 0
        state.seed_B[slot] = int(params.seed)
        state.temperature_B[slot] = float(params.temperature)
        state.top_k_B[slot] = min(int(params.top_k), self._prefill.model.config.codebook_size)


def _chunks(start: int, stop: int, turn_ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each chunk of rows ``start`` to ``stop``. No chunk crosses the end of a turn."""
    for turn_end in [*(end for end in turn_ends if start < end < stop), stop]:
        for first in range(start, turn_end, CHUNK_SIZES[-1]):
            yield first, min(first + CHUNK_SIZES[-1], turn_end)
        start = turn_end
