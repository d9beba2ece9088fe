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
    """Starts requests in slots: one after the other, each as a ``PrefillJob`` of one or more chunks.

    All jobs share the staging cache, so a job must be done or cancelled before the next one begins.
    """

    def __init__(self, model: CSM, prefix_cache: PrefixCache | None = None, chunk_sizes: Sequence[int] | None = None):
        """``chunk_sizes`` are the sizes that chunks are padded to, ascending. An empty sequence means no padding. None
        means ``CHUNK_SIZES`` on a GPU, and no padding elsewhere, where launches are cheap and rows are not."""
        config, device = model.config, model.device
        max_positions, num_columns = config.backbone.max_positions, config.num_codebooks + 1
        self.model = model
        self.cache = KVCache.allocate(config.backbone, 1, max_positions, device, model.dtype)
        self.chunk_sizes = CHUNK_SIZES if chunk_sizes is None and device.type == "cuda" else tuple(chunk_sizes or ())
        self.row_1TC = torch.zeros(1, CHUNK_SIZES[-1], num_columns, device=device, dtype=torch.int64)
        self.mask_1TC = torch.zeros_like(self.row_1TC, dtype=torch.bool)
        self.first_11 = torch.zeros(1, 1, device=device, dtype=torch.int64)
        self._upload = _Upload(max_positions, num_columns, device)
        self._prefix_cache = PrefixCache(0) if prefix_cache is None else prefix_cache
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._job: PrefillJob | None = None

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

    def start(
        self,
        state: FrameState,
        slot: int,
        row_TC: Tensor,
        mask_TC: Tensor,
        params: SamplingParams,
        turn_ends: Sequence[int] = (),
    ) -> None:
        """Start a request in ``slot``: all chunks of a ``PrefillJob`` at once."""
        job = self.begin(state, slot, row_TC, mask_TC, params, turn_ends)
        while not job.run_chunk():
            pass

    @torch.inference_mode()
    def begin(
        self,
        state: FrameState,
        slot: int,
        row_TC: Tensor,
        mask_TC: Tensor,
        params: SamplingParams,
        turn_ends: Sequence[int] = (),
    ) -> PrefillJob:
        """Begin a request: upload its integers, and copy the longest prefix that is cached.

        ``row_TC`` (T, K + 1) int64 and ``mask_TC`` bool are on the CPU, with 1 <= T <= the cache's positions. ``state``
        changes only with the job's last chunk.
        """
        assert self._job is None or self._job.is_done, "the previous job must be done or cancelled: it uses the cache"
        assert 1 <= row_TC.shape[0] <= self.cache.max_positions
        self._upload.send(row_TC, mask_TC, params, min(int(params.top_k), self.model.config.codebook_size))
        prompt = Prompt(row_TC, mask_TC, tuple(turn_ends))
        self._job = PrefillJob(self, state, slot, prompt, num_cached=self._prefix_cache.load(prompt, self.cache))
        return self._job

    def _finish(self, job: PrefillJob) -> None:
        """Copy the prompt's keys and values to the slot, and make the last row its pending row."""
        state, slot, num_rows = job.state, job.slot, job.prompt.row_TC.shape[0]
        if job.prompt.turn_ends:
            self._prefix_cache.store(job.prompt, job.prompt.turn_ends[-1], self.cache)
        slot_cache = state.backbone_cache.slots(slot, slot + 1)
        slot_cache.k_LBGSd[:, :, :, : num_rows - 1] = self.cache.k_LBGSd[:, :, :, : num_rows - 1]
        slot_cache.v_LBGSd[:, :, :, : num_rows - 1] = self.cache.v_LBGSd[:, :, :, : num_rows - 1]
        row_TC, mask_TC = self._upload.rows(num_rows - 1, num_rows)
        state.pending_row_BC[slot] = row_TC[0]
        state.pending_mask_BC[slot] = mask_TC[0]
        for buffer_B, value in zip(
            (state.position_B, state.frame_B, state.seed_B, state.top_k_B, state.temperature_B),
            self._upload.scalars(),
            strict=True,
        ):
            buffer_B[slot] = value

    def _run_chunk(self, first: int, last: int) -> None:
        """Write keys and values of rows ``first`` to ``last`` (exclusive) to the staging cache."""
        num_rows = last - first
        chunk_size = next((size for size in self.chunk_sizes if num_rows <= size), num_rows)
        context_bucket = self.cache.bucket_for(first + chunk_size)
        row_TC, mask_TC = self._upload.rows(first, last)
        self.row_1TC[0, :num_rows] = row_TC
        self.mask_1TC[0, :num_rows] = mask_TC
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
    """The prefill of one request, a chunk at a time, so that an engine can interleave chunks with frames.

    Made by ``Prefill.begin``. ``slot`` may be changed until the job is done. Meanwhile frames may be generated in all
    slots of ``state``, this one included: nothing of the slot is kept.
    """

    def __init__(self, prefill: Prefill, state: FrameState, slot: int, prompt: Prompt, num_cached: int):
        """``num_cached`` is the number of rows whose keys and values are in the staging cache already."""
        self.state = state
        self.slot = slot
        self.prompt = prompt
        self.is_done = False
        self._prefill = prefill
        self._chunks = deque(_chunks(num_cached, prompt.row_TC.shape[0] - 1, prompt.turn_ends))

    @property
    def num_chunks_left(self) -> int:
        return len(self._chunks)

    @torch.inference_mode()
    def run_chunk(self) -> bool:
        """Compute the next chunk, if any is left. With the last one, start the request in its slot and return True.

        Does not synchronise with the device.
        """
        assert not self.is_done, "the job is done or cancelled"
        if self._chunks:
            self._prefill._run_chunk(*self._chunks.popleft())
        if not self._chunks:
            self._prefill._finish(self)
            self.is_done = True
        return self.is_done

    def cancel(self) -> None:
        """End the job without starting its request."""
        self.is_done = True


class _Upload:
    """Copies a request's integers to the device, in one asynchronous copy of one pinned buffer.

    The buffer has 2 * C columns. Row 0 holds the scalars, row t + 1 the prompt's row t and its mask.
    """

    def __init__(self, max_positions: int, num_columns: int, device: torch.device):
        self._num_columns = num_columns
        self._is_cuda = device.type == "cuda"
        shape = (1 + max_positions, 2 * num_columns)
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=self._is_cuda)
        self._device = torch.zeros(shape, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if self._is_cuda else None

    def send(self, row_TC: Tensor, mask_TC: Tensor, params: SamplingParams, top_k: int) -> None:
        """Copy a request's rows and scalars. The previous request's must not be needed any more."""
        if self._copied is not None:
            self._copied.synchronize()  # the host buffer is in use until its last copy has ended
        num_rows = row_TC.shape[0]
        temperature_bits = torch.tensor(float(params.temperature)).view(torch.int32)
        scalars = (num_rows - 1, 0, int(params.seed), top_k, int(temperature_bits))
        self._host[0, : len(scalars)] = torch.tensor(scalars)
        self._host[1 : num_rows + 1, : self._num_columns] = row_TC
        self._host[1 : num_rows + 1, self._num_columns :] = mask_TC
        # Without an event to wait for, only a blocking copy is safe (MPS: pytorch issue 140296).
        self._device[: num_rows + 1].copy_(self._host[: num_rows + 1], non_blocking=self._is_cuda)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows ``first`` to ``last`` (exclusive) and their mask (as integers), on the device."""
        rows = self._device[1 + first : 1 + last]
        return rows[:, : self._num_columns], rows[:, self._num_columns :]

    def scalars(self) -> tuple[Tensor, ...]:
        """Position and frame counter, seed, top-k and temperature, on the device."""
        position, frame, seed, top_k, temperature_bits = self._device[0, :5].unbind()
        return position, frame, seed, top_k, temperature_bits.to(torch.int32).view(torch.float32)


def _chunks(start: int, stop: int, turn_ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each chunk of rows ``start`` to ``stop``. No chunk crosses the end of a turn."""
    for turn_end in [*(end for end in turn_ends if start < end < stop), stop]:
        for first in range(start, turn_end, CHUNK_SIZES[-1]):
            yield first, min(first + CHUNK_SIZES[-1], turn_end)
        start = turn_end
