"""A prompt into a slot: the keys and values of its rows, computed in passes or copied from a prompt before.

A captured pass can follow neither a slot to another address nor a prompt to another length. So passes write into a
cache of one slot of their own, from which the prompt's positions are then copied to the slot; and where passes are
captured they have one of a few lengths, with rows of nothing behind the prompt's, at positions that are written again
before they are looked at: those behind, or over and over the cache's last, which no prompt fills.

Shapes: T rows of a pass, C columns of a row, D dim.
"""

from __future__ import annotations

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

CHUNK_SIZES = (32, 64, 128, 256)  # the last bounds the memory of a pass: 33 embeddings for each row


class PrefillJob:
    """One prompt on its way into a slot."""

    def __init__(self, prefill: Prefill, state: FrameState, slot: int, prompt: Prompt, params: SamplingParams):
        self.prefill, self.state, self.slot, self.prompt, self.params = prefill, state, slot, prompt, params
        known = prefill._prefixes.load(prompt, prefill.cache)
        self._chunks = list(_chunks(known, prompt.row_TC.shape[0] - 1, prompt.turn_ends))

    @torch.inference_mode()
    def run_chunk(self) -> bool:
        """Run the next chunk; True once the slot is ready."""
        if self._chunks:
            first, last = self._chunks.pop(0)
            self.prefill._run_chunk(self.prompt.row_TC[first:last], self.prompt.mask_TC[first:last], first)
        if not self._chunks:
            self.prefill.finish(self)
        return not self._chunks


class Prefill:
    """Starts requests in slots, one at a time."""

    def __init__(self, model: CSM, prefixes: PrefixCache | None = None, lengths: Sequence[int] | None = None):
        """``lengths`` are those that passes are filled up to; None is ``CHUNK_SIZES`` on a GPU, and nothing elsewhere:
        where launches are cheap, rows are not."""
        config, device = model.config, model.device
        self.model = model
        self.cache = KVCache.allocate(config.backbone, 1, config.backbone.max_positions, device, model.dtype)
        self.lengths = CHUNK_SIZES if lengths is None and device.type == "cuda" else tuple(lengths or ())
        self.row_1TC = torch.zeros(1, CHUNK_SIZES[-1], config.num_codebooks + 1, device=device, dtype=torch.int64)
        self.mask_1TC = torch.zeros_like(self.row_1TC, dtype=torch.bool)
        self.first_11 = torch.zeros(1, 1, device=device, dtype=torch.int64)
        self._prefixes = PrefixCache(0) if prefixes is None else prefixes
        self._graphs: dict[tuple[int, int], Graph] = {}

    def capture(self, pool: Pool) -> None:
        """Capture a pass of every length, for every context_bucket of the cache that holds it."""
        buffers = {name: getattr(self, name) for name in ("row_1TC", "mask_1TC", "first_11")} | vars(self.cache)
        for length in self.lengths:
            for context_bucket in (context_bucket for context_bucket in self.cache.buckets if context_bucket >= length):
                step = partial(self._compute_chunk, length, context_bucket)
                self._graphs[length, context_bucket] = Graph(step, lambda: buffers, self.model.device, pool)

    def check(self) -> None:
        """Raise GraphError if a buffer of the captured passes has moved."""
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
        """Start a request in ``slot``: write the keys and values of rows 0..T-2 and leave the last row pending.

        ``row_TC`` (T, K + 1) int64 and ``mask_TC`` bool on the CPU, of T >= 1 rows that fit the cache. Rows up to the
        last of ``turn_ends`` that was seen before are copied.
        """
        job = self.job(state, slot, Prompt(row_TC, mask_TC, tuple(turn_ends)), params)
        while not job.run_chunk():
            pass

    def job(self, state: FrameState, slot: int, prompt: Prompt, params: SamplingParams) -> PrefillJob:
        """A prefill that runs chunk by chunk; one at a time, since all use the staging cache."""
        return PrefillJob(self, state, slot, prompt, params)

    def finish(self, job: PrefillJob) -> None:
        state, slot, params = job.state, job.slot, job.params
        row_TC, mask_TC, turn_ends = job.prompt
        num_rows = row_TC.shape[0]
        if turn_ends:
            self._prefixes.store(job.prompt, turn_ends[-1], self.cache)
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
        """One pass over rows whose first is at position ``first``."""
        num_rows = row_TC.shape[0]
        length = next((n for n in self.lengths if num_rows <= n), num_rows)
        context_bucket = self.cache.bucket_for(first + length)
        self.row_1TC[0, :num_rows] = row_TC.to(self.row_1TC.device)
        self.mask_1TC[0, :num_rows] = mask_TC.to(self.mask_1TC.device)
        self.mask_1TC[0, num_rows:length] = False
        self.first_11.fill_(first)
        if (length, context_bucket) in self._graphs:
            self._graphs[length, context_bucket].replay()
        else:
            self._compute_chunk(length, context_bucket)

    def _compute_chunk(self, length: int, context_bucket: int) -> None:
        """What is captured: the first ``length`` rows of the buffers."""
        backbone = self.model.backbone
        x_1TD = self.model.embed_rows(self.row_1TC[:, :length], self.mask_1TC[:, :length])
        position_1T = self.first_11 + torch.arange(length, device=x_1TD.device)
        position_1T = position_1T.clamp(max=self.cache.max_positions - 1)
        backbone(x_1TD, self.cache, backbone.attention_metadata(position_1T, context_bucket))


def _chunks(start: int, stop: int, turn_ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut the rows from ``start`` to ``stop`` at the ends of turns, and each turn into passes."""
    for turn_end in [*(end for end in turn_ends if start < end < stop), stop]:
        for first in range(start, turn_end, CHUNK_SIZES[-1]):
            yield first, min(first + CHUNK_SIZES[-1], turn_end)
        start = turn_end
