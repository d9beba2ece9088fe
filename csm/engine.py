"""Continuous batching: requests enter and leave while others run. The engine knows rows, codes and samples, not text.

``Engine.step`` does one round: it admits requests to free slots, prefills, launches one frame of every running slot,
and hands out the oldest launched frame, for which it waits once enough frames are in flight. It is synchronous and
starts no thread; ``csm.worker`` does that.

Every slot owns a range of the KV cache and a codec stream. New requests take the lowest free slot, and a slot moves
down where that lets a smaller batch cover all running slots. On a GPU, frames are launched ahead of the one that is
read back. A request that ends therefore has up to ``BatchRunner.frames_ahead`` more frames in flight; they are dropped.

Shapes: B slots, T rows, C columns of a row, K codebooks, N samples of a frame.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from csm.codec import Codec
from csm.errors import QueueFullError
from csm.frame import FrameState
from csm.graph import Pool, graphs_enabled
from csm.model import CSM
from csm.prefill import Prefill, PrefillJob
from csm.prefix_cache import PrefixCache
from csm.prompt import Prompt, audio_rows
from csm.runner import AudioDecoder, BatchDecoder, BatchRunner, Output, SlotDecoders, audio_decoder, group_size
from csm.sampling import SamplingParams
from csm.selfcheck import choose_rung, fall_back

log = logging.getLogger("csm.engine")


@dataclass(frozen=True, eq=False)
class Request:
    """What to generate: a prompt, how to draw, the most frames, and whether samples are wanted or codes alone.

    ``keep`` stores keys and values of the generated frames in the prefix cache. They differ from prefilled ones by
    rounding.
    """

    prompt: Prompt
    params: SamplingParams
    max_frames: int
    audio: bool = True
    keep: bool = True


class Frame(NamedTuple):
    """80 ms of one request: codes (K,) and, where they were asked for, samples (N,), on the CPU."""

    codes_K: Tensor
    audio_N: Tensor | None


class Ticket:
    """A submitted request: its frames arrive here, in order. One thread reads, the engine writes.

    ``finish_reason`` is None while the request runs. Then it is "end" (the model ended the speech), "length"
    (``max_frames``), "cancelled" or "error"; ``error`` holds the exception of the last.
    """

    def __init__(self, request: Request, max_unread: int | None, notify: Callable[[], None] | None):
        self.request = request
        self.max_unread = max_unread
        self.num_frames = 0
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.arrived_at = 0.0  # when the frame last taken arrived, in time.monotonic's seconds
        self._frames: deque[tuple[Frame, float]] = deque()
        self._notify = notify

    @property
    def finished(self) -> bool:
        """Whether no further frame will arrive."""
        return self.finish_reason is not None

    @property
    def num_unread(self) -> int:
        return len(self._frames)

    def take(self) -> Frame | None:
        """The oldest unread frame; None if none has arrived."""
        if not self._frames:
            return None
        frame, self.arrived_at = self._frames.popleft()
        return frame

    def _put(self, frame: Frame) -> None:
        self.num_frames += 1
        self._frames.append((frame, time.monotonic()))
        self._wake()

    def _finish(self, reason: str, error: BaseException | None = None) -> None:
        self.error, self.finish_reason = error, reason
        try:
            self._wake()
        except Exception:  # the request has ended, and its slot is free: nothing is left to end
            log.exception("the reader of a request could not be notified of its end")

    def _wake(self) -> None:
        if self._notify is not None:
            self._notify()


@dataclass(eq=False)
class _Active:
    """A request that has a slot."""

    ticket: Ticket
    slot: int
    job: PrefillJob | None
    launched: int = 0
    codes: list[Tensor] = field(default_factory=list)
    saved: dict[str, Tensor] | None = None  # the slot's state, kept while its reader lags and others run

    @property
    def num_positions(self) -> int:
        """Backbone positions in use once the next frame has been launched."""
        return self.ticket.request.prompt.row_TC.shape[0] + self.launched

    @property
    def done(self) -> bool:
        return self.ticket.finished or self.ticket.cancelled

    @property
    def runnable(self) -> bool:
        """Whether the next frame may be launched: prefilled, not at its limit, and its reader keeps up."""
        ticket = self.ticket
        if self.done or self.job is not None or self.launched == ticket.request.max_frames:
            return False
        unread = ticket.num_unread + self.launched - ticket.num_frames
        return ticket.max_unread is None or unread < ticket.max_unread


@dataclass(eq=False)
class _Flight:
    """A launched frame that has not been read back, and the requests that it belongs to, by slot at launch."""

    output: Output
    members: dict[int, _Active] = field(default_factory=dict)


class Engine:
    """``max_slots`` slots over one allocation of buffers, and the requests that wait for one.

    ``submit`` and ``cancel`` may be called from any thread, also while another steps. ``codec`` returns the codec
    (``frame_size`` samples a frame) and is called when samples are first asked for. ``graphs`` captures each batch
    size on its first use, and ``progress`` shows a bar while its kernels are compiled and checked.
    """

    def __init__(
        self,
        model: CSM,
        codec: Callable[[], Codec],
        frame_size: int,
        max_slots: int,
        prefix_cache: PrefixCache,
        max_queue: int | None = None,
        graphs: bool = True,
        progress: bool = False,
    ):
        self.model = model
        self.max_slots = max_slots
        self.max_queue = max_queue
        self._codec = codec
        self._frame_size = frame_size
        self._device = model.device
        with torch.inference_mode(False):  # buffers that any later call may write, in whatever mode
            self._state = FrameState.allocate(model.config, max_slots, model.device, model.dtype)
            self._prefill = Prefill(model, prefix_cache)
        self._prefix_cache = prefix_cache
        self._graphs = graphs and graphs_enabled(model.device)
        self._progress = progress
        self._prepared: set[int] = set()  # batch sizes
        self._runners: dict[int, BatchRunner] = {}
        self._decoder: AudioDecoder | None = None
        self._slots: list[_Active | None] = [None] * max_slots
        self._queue: deque[Ticket] = deque()
        self._is_admitting = False
        self._in_flight: deque[_Flight] = deque()
        self._lock = threading.Lock()  # of the queue
        self._stepping = threading.RLock()
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._pools: tuple[Pool, Pool] | None = None

    # Requests

    def submit(
        self, request: Request, max_unread: int | None = None, notify: Callable[[], None] | None = None
    ) -> Ticket:
        """Queue a request; the ticket receives its frames.

        ``max_unread`` pauses the request while its reader has so many frames unread. ``notify`` is called from the
        engine's thread when a frame has arrived and when the request has finished. Raises QueueFullError.
        """
        num_rows, limit = request.prompt.row_TC.shape[0], self._state.backbone_cache.max_positions
        assert request.max_frames >= 1 and num_rows >= 1 and num_rows + request.max_frames - 1 <= limit
        ticket = Ticket(request, max_unread, notify)
        with self._lock:
            if self.max_queue is not None and len(self._queue) >= self.max_queue:
                raise QueueFullError(f"{len(self._queue)} requests are waiting, the limit is {self.max_queue}")
            self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request: the next step frees its slot. Frames that have arrived stay readable."""
        ticket.cancelled = True

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def num_active(self) -> int:
        """Requests that hold a slot."""
        return sum(active is not None for active in self._slots)

    @property
    def idle(self) -> bool:
        """Whether no request is waiting, active or in flight."""
        return not (self._queue or self._is_admitting or self.num_active or self._in_flight)

    # One round

    def step(self) -> bool:
        """Admit, prefill, launch a frame of every running slot, hand out the oldest. False if there was nothing to do.

        An exception in a prefill, in the codec of a slot or in a reader's ``notify`` ends its request. One in the
        shared step ends the requests that take part in it or have frames in flight. It is on their tickets, and the
        engine goes on.
        """
        with self._stepping, self._on_stream(), torch.no_grad():
            advanced = self._admit()
            running = [active for active in self._active() if active.runnable]
            try:
                launched = self._launch(running)
                collected = self._collect(launched)
            except BaseException as error:
                self._fail_step(running, error)
                if not isinstance(error, Exception):
                    raise
                return True
        return advanced or launched or collected

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """The engine's own CUDA stream: work of other threads neither delays it nor is captured with it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield

    def _drop_cancelled(self) -> None:
        with self._lock:
            dropped = [ticket for ticket in self._queue if ticket.cancelled]
            self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)
        for ticket in dropped:
            ticket._finish("cancelled")
        for active in self._active():
            if active.ticket.cancelled and not active.ticket.finished:
                self._release(active, "cancelled")

    def _active(self) -> list[_Active]:
        return [active for active in self._slots if active is not None]

    # Admission and prefill

    def _admit(self) -> bool:
        """Drop what was cancelled, prefill what has a slot, and give free slots to waiting requests, in order.

        One chunk a round, so that no frame waits for a long prompt or for several prompts. Only while no frame can be
        launched or is in flight, further chunks follow at once.
        """
        advanced = False
        while True:
            self._drop_cancelled()
            if advanced and (self._in_flight or any(active.runnable for active in self._active())):
                return True
            active = next((active for active in self._active() if active.job is not None), None) or self._next_request()
            if active is None:
                return advanced
            self._run_chunk(active)
            advanced = True

    def _next_request(self) -> _Active | None:
        """The oldest waiting request, in the lowest free slot."""
        while True:
            free = next((slot for slot, active in enumerate(self._slots) if active is None), None)
            with self._lock:
                if free is None or not self._queue:
                    return None
                self._is_admitting = True  # neither in the queue nor in a slot
                ticket = self._queue.popleft()
            try:
                job = self._begin(ticket.request, free)
                self._slots[free] = active = _Active(ticket, free, job)
                return active
            except BaseException as error:
                ticket._finish("error", error)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._is_admitting = False

    def _begin(self, request: Request, slot: int) -> PrefillJob:
        """Prepare a slot for a request, and begin to prefill its prompt."""
        self._prepare(self._batch_size(slot + 1))
        if request.audio:
            self._audio_decoder().reset(slot)
        row_TC, mask_TC, turn_ends = request.prompt
        return self._prefill.begin(self._state, slot, row_TC, mask_TC, request.params, turn_ends)

    def _run_chunk(self, active: _Active) -> None:
        assert active.job is not None
        try:
            if active.job.run_chunk():
                active.job = None
        except BaseException as error:
            self._release(active, "error", error)
            if not isinstance(error, Exception):
                raise

    def _prepare(self, batch: int) -> None:
        """Before a prompt is read: capture the batch size that it needs, and check what is captured."""
        runner = self._runner(batch)
        if batch not in self._prepared:
            self._choose_ops(batch)
            self._prepared.add(batch)
        runner.check()
        self._prefill.check()
        if isinstance(self._decoder, BatchDecoder):
            self._decoder.check()

    def _choose_ops(self, batch: int) -> None:
        """Check the kernels and graphs of a batch size on this device, and capture it if they pass."""
        rung = choose_rung(self.model, (batch,), self._progress)
        self.model.precompute_depth_qkv()
        if not (self._graphs and rung.graph):
            return
        try:
            self._capture(batch)
        except Exception as error:  # noqa: BLE001 (CUDA raises errors of many classes)
            fall_back(self._device, replace(rung, kernels=False), f"batch {batch} cannot be captured: {error}")

    def _capture(self, batch: int) -> None:
        """Capture the step and the codec at a batch size, and the prefill's chunks once."""
        if self._pools is None:
            self._pools = Pool(self._device), Pool(self._device)
            self._prefill.capture(self._pools[0])
        self._runner(batch).capture(self._pools[0])
        decoder = self._audio_decoder()
        if isinstance(decoder, BatchDecoder):
            decoder.capture(batch, self._pools[1])

    def warmup(self, batches: Sequence[int]) -> None:
        """Capture these batch sizes now instead of on their first use. Requests that run meanwhile continue."""
        with self._stepping, self._on_stream(), torch.no_grad():
            for batch in sorted({self._batch_size(batch) for batch in batches}, reverse=True):
                self._prepare(batch)  # the largest first: smaller graphs fit its memory

    # Frames

    def _launch(self, running: Sequence[_Active]) -> bool:
        """Launch one frame of these requests."""
        if not running:
            return False
        self._compact(running)
        members = {active.slot: active for active in sorted(running, key=lambda active: active.slot)}
        runner = self._runner(self._batch_size(max(members) + 1))
        for active in self._active():
            self._park(active, running=active.slot in members, covered=active.slot < runner.state.batch)
        bucket = self._state.backbone_cache.bucket_for(max(active.num_positions for active in running))
        audio = [slot for slot, active in members.items() if active.ticket.request.audio]
        decoder = self._audio_decoder() if audio else None
        output = runner.launch(bucket, decoder if isinstance(decoder, BatchDecoder) else None, audio)
        for active in running:
            active.launched += 1
        self._in_flight.append(_Flight(output, members))
        return True

    def _park(self, active: _Active, running: bool, covered: bool) -> None:
        """Keep the state of a slot that the batch covers but must not advance; put it back before it runs again.

        The batch overwrites only cache positions from the slot's own on, which are written anew when it runs again.
        """
        paused = not running and covered and not active.done and active.job is None
        if paused and active.saved is None and active.launched < active.ticket.request.max_frames:
            active.saved = self._state.save(slice(active.slot, active.slot + 1))
        elif running and active.saved is not None:
            self._state.restore(active.saved, slice(active.slot, active.slot + 1))
            active.saved = None

    def _compact(self, running: Sequence[_Active]) -> None:
        """Move the highest running slot down as long as that makes the batch smaller."""
        while True:
            slots = sorted(active.slot for active in running)
            free = next((slot for slot, active in enumerate(self._slots) if active is None), self.max_slots)
            if free > slots[-1]:
                return
            below = max([free, *slots[:-1]])
            if self._batch_size(below + 1) >= self._batch_size(slots[-1] + 1):
                return
            self._move(slots[-1], free)

    def _move(self, source: int, target: int) -> None:
        active = self._slots[source]
        assert active is not None and self._slots[target] is None
        self._state.move(source, target, num_positions=active.num_positions)
        if self._decoder is not None:
            self._decoder.move(source, target)
        self._slots[source], self._slots[target], active.slot = None, active, target

    def _collect(self, launched: bool) -> bool:
        """Hand out the oldest frame once enough are in flight, or once none was launched."""
        ahead = next(iter(self._runners.values())).frames_ahead if self._runners else 0
        if not self._in_flight or (launched and len(self._in_flight) <= ahead):
            return False
        flight = self._in_flight[0]
        if any(not active.done for active in flight.members.values()):
            flight.output.wait()
        for slot, active in flight.members.items():
            if active.done:
                continue
            try:
                self._hand_out(active, flight.output, slot)
            except Exception as error:  # noqa: BLE001 - of the slot's codec, or of the reader's notify
                self._release(active, "error", error)
        self._in_flight.popleft()  # last: until then an exception ends its members
        return True

    def _hand_out(self, active: _Active, output: Output, slot: int) -> None:
        ended = not output.codes_BK[slot].any()  # a frame of zeros ends the speech
        if not ended:
            active.codes.append(output.codes_BK[slot].clone())
        last = ended or len(active.codes) == active.ticket.request.max_frames
        if active.ticket.request.audio and isinstance(self._decoder, SlotDecoders):
            self._hand_out_group(active, self._decoder, last)
        elif not ended:
            audio_N = output.audio_BN[slot].clone() if active.ticket.request.audio else None
            active.ticket._put(Frame(output.codes_BK[slot].clone(), audio_N))
        if last:
            self._release(active, "end" if ended else "length")

    def _hand_out_group(self, active: _Active, decoder: SlotDecoders, last: bool) -> None:
        """Decode and hand out the frames since the last group, once they are a group or the last ones."""
        ticket = active.ticket
        codes = active.codes[ticket.num_frames :]
        if codes and (last or len(codes) == group_size(ticket.num_frames, ticket.max_unread)):
            audio_TN = decoder.decode(active.slot, torch.stack(codes))
            for codes_K, audio_N in zip(codes, audio_TN, strict=True):
                ticket._put(Frame(codes_K.clone(), audio_N.clone()))

    # Ends

    def _release(self, active: _Active, reason: str, error: BaseException | None = None) -> None:
        """Free the slot of a request that has ended, and keep its keys and values for a prompt that continues it."""
        self._slots[active.slot] = None  # whatever fails below
        if active.job is not None:
            active.job.cancel()
        elif reason != "error" and active.ticket.request.keep:
            try:
                self._store_prefix(active)
            except Exception:  # the request has its frames; a later prompt is prefilled
                log.exception("keys and values of a request were not kept")
        active.ticket._finish(reason, error)

    def _store_prefix(self, active: _Active) -> None:
        """Keep the keys and values of the prompt and of the frames that were handed out."""
        prompt = active.ticket.request.prompt
        if active.codes:
            frames = audio_rows(torch.stack(active.codes))
            prompt = Prompt(
                torch.cat((prompt.row_TC, frames.row_TC[:-1])),
                torch.cat((prompt.mask_TC, frames.mask_TC[:-1])),
                prompt.turn_ends,
            )
        # Each launched frame has read one row: the prompt's last one, then the frames.
        length = min(prompt.row_TC.shape[0], active.num_positions - 1)
        self._prefix_cache.store(prompt, length, self._state.backbone_cache.slots(active.slot, active.slot + 1))

    def abort(self, error: BaseException) -> None:
        """End every request with this exception: the thread that steps the engine cannot go on."""
        with self._stepping:
            self._in_flight.clear()
            for active in self._active():
                self._release(active, "error", error)
            with self._lock:
                waiting, self._queue = self._queue, deque()
            for ticket in waiting:
                ticket._finish("error", error)

    def _fail_step(self, running: Sequence[_Active], error: BaseException) -> None:
        """End the requests that were running or have frames in flight.

        Others are not affected: a paused request's slot is saved before a step that covers it.
        """
        members = {*running, *(active for flight in self._in_flight for active in flight.members.values())}
        self._in_flight.clear()
        for active in members:
            if not active.ticket.finished:
                self._release(active, "error", error)

    # Batch sizes

    def _batch_size(self, num_slots: int) -> int:
        """The size of the batch that covers so many slots: exact, or with graphs the next power of two."""
        if not self._graphs:
            return num_slots
        return min(1 << (num_slots - 1).bit_length(), self.max_slots)

    def _runner(self, batch: int) -> BatchRunner:
        runner = self._runners.get(batch)
        if runner is None:
            with torch.inference_mode(False), torch.no_grad():
                runner = BatchRunner(self.model, self._state.narrow(batch), self._frame_size)
            self._runners[batch] = runner
        return runner

    def _audio_decoder(self) -> AudioDecoder:
        if self._decoder is None:
            with torch.no_grad():
                self._decoder = audio_decoder(self._codec(), self.max_slots, self._device)
        return self._decoder
