"""Guards: they stop generation that runs on, and generate again what came out empty or far too short.

They sit between the engine and the generator, so the command line, the Python API and the server have the same ones. A
``Watch`` looks at the frames of one take. A ``GuardedTicket`` is a ticket of the engine whose frames pass a watch. No
guard changes a frame: guards end a request early, or replace a take by another one.

Shapes: K codebooks, N samples of a frame.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from csm.engine import Frame, Request, Ticket
from csm.errors import CSMError
from csm.metrics import GenerationMetrics, Meter
from csm.runner import MAX_GROUP
from csm.worker import Worker

log = logging.getLogger("csm.guards")

GUARDS = ("budget", "silence", "repeats", "retry")
SPEECH_LEVEL = 0.01  # RMS from which a frame counts as speech; full scale is 1
QUIET_SHARE = 0.02  # of the loudest frame's RMS (-34 dB): below it a frame counts as silent
MAX_PERIOD = 4  # longest cycle of repeating frames that is looked for
FLOOR_SECONDS = 0.08  # speech of at most one frame is too short for any text


class GuardEvent(NamedTuple):
    """What a guard did: ``guard`` is one of ``GUARDS``."""

    guard: str
    num_frames: int
    seed: int
    text: str


@dataclass(frozen=True)
class Guards:
    """Which guards are on, and their limits. The defaults leave ordinary speech as it is.

    Args:
        budget: stop after ``spare_seconds`` plus ``seconds_per_character`` for each character of the text. Ordinary
            speech takes 0.05 to 0.1 s a character. The stop waits up to ``tail_seconds`` for a silent frame.
        silence: stop after ``silence_seconds`` of silence that follows speech. Speech that is not streamed keeps
            ``tail_seconds`` of it.
        repeats: stop where frames have repeated for ``repeat_seconds``. A frame repeats if at least half of its codes
            equal those of the frame one to four places before.
        retries: how often speech is generated again, with the next seed, if it ended by itself with less than
            ``min_seconds_per_character``. A stream is generated again only while nothing of it has been handed out,
            that is if it was empty. Greedy speech is not: it would be the same.
        report: called with each GuardEvent, which is also logged.
    """

    budget: bool = True
    silence: bool = True
    repeats: bool = True
    retries: int = 2
    seconds_per_character: float = 0.3
    spare_seconds: float = 10.0
    silence_seconds: float = 3.0
    repeat_seconds: float = 2.0
    tail_seconds: float = 0.32
    min_seconds_per_character: float = 0.015
    report: Callable[[GuardEvent], None] | None = None

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise CSMError(f"guards: retries must be at least 0, not {self.retries}")
        for name in ("seconds_per_character", "spare_seconds", "silence_seconds", "repeat_seconds", "tail_seconds"):
            if not getattr(self, name) > 0:
                raise CSMError(f"guards: {name} must be positive, not {getattr(self, name)}")

    @classmethod
    def off(cls) -> Guards:
        """No guard at all."""
        return cls.without("all")

    @classmethod
    def without(cls, *names: str) -> Guards:
        """All guards but those of these names: any of ``GUARDS``, or "all". Raises CSMError for another name."""
        for name in names:
            if name not in (*GUARDS, "all"):
                raise CSMError(f"no guard is called {name!r}; there are {', '.join(GUARDS)}, and all")
        off = set(GUARDS if "all" in names else names)
        guards = cls(budget="budget" not in off, silence="silence" not in off, repeats="repeats" not in off)
        return replace(guards, retries=0) if "retry" in off else guards

    def max_seconds(self, text: str) -> float:
        """The budget of this text."""
        return self.spare_seconds + self.seconds_per_character * len(text)

    def min_seconds(self, text: str) -> float:
        """Shorter speech of this text is taken for a failure."""
        spoken = sum(character.isalnum() for character in text)
        return max(FLOOR_SECONDS, self.min_seconds_per_character * spoken)


DEFAULT_GUARDS, NO_GUARDS = Guards(), Guards.off()


class Watch:
    """Looks at the frames of one take, in order."""

    def __init__(self, guards: Guards, text: str, frame_rate: float):
        self._guards = guards
        self._tail = round(guards.tail_seconds * frame_rate)
        self._max_frames = round(guards.max_seconds(text) * frame_rate)
        self._max_quiet = round(guards.silence_seconds * frame_rate)
        self._max_repeats = round(guards.repeat_seconds * frame_rate)
        self._min_frames = guards.min_seconds(text) * frame_rate
        self._loudest = 0.0
        self._recent: deque[Tensor] = deque(maxlen=MAX_PERIOD)
        self._repeats = [0] * MAX_PERIOD  # frames in a row that equal the one 1, 2, ... places before
        self.num_frames = 0
        self.num_quiet = 0  # silent frames since the last one with sound

    def feed(self, codes_K: Tensor, audio_N: Tensor | None) -> str | None:
        """The next frame. Returns the guard that ends the take with it, or None. Without samples nothing is silent."""
        self.num_frames += 1
        self._hear(audio_N)
        self._compare(codes_K)
        guards = self._guards
        over = self.num_frames - self._max_frames
        if guards.budget and over >= 0 and (audio_N is None or self.num_quiet or over >= self._tail):
            return "budget"
        if guards.silence and self._loudest >= SPEECH_LEVEL and self.num_quiet >= self._max_quiet:
            return "silence"
        if guards.repeats and max(self._repeats) >= self._max_repeats:
            return "repeats"
        return None

    def _hear(self, audio_N: Tensor | None) -> None:
        if audio_N is None:
            return
        level = float(audio_N.square().mean().sqrt())
        self._loudest = max(self._loudest, level)
        self.num_quiet = self.num_quiet + 1 if level < QUIET_SHARE * self._loudest else 0

    def _compare(self, codes_K: Tensor) -> None:
        for period, earlier_K in enumerate(reversed(self._recent), start=1):
            same = 2 * int((codes_K == earlier_K).sum()) >= codes_K.shape[0]
            self._repeats[period - 1] = self._repeats[period - 1] + 1 if same else 0
        self._recent.append(codes_K)

    @property
    def too_short(self) -> bool:
        """Whether a take that ended here by itself is a failure."""
        return self.num_frames < self._min_frames or self.num_frames == 0

    @property
    def num_kept(self) -> int:
        """Frames that remain when the silence guard has ended the take: up to the last sound, and a tail."""
        return self.num_frames - max(0, self.num_quiet - self._tail)


class GuardedTicket:
    """A request under guards. Read it like a ticket: ``take`` until it returns None and ``finished`` is true.

    ``hold`` keeps the frames until the end, so that a take may be replaced and its trailing silence dropped.
    ``notify`` is called from the engine's thread when ``take`` may have something. One thread reads.
    """

    def __init__(
        self,
        worker: Worker,
        request: Request,
        text: str,
        guards: Guards,
        frame_rate: float,
        hold: bool = False,
        max_unread: int | None = None,
        notify: Callable[[], None] | None = None,
    ):
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._worker = worker
        self._request = request
        self._text = text
        self._guards = guards
        self._frame_rate = frame_rate
        self._hold = hold
        self._max_unread = max_unread
        self._notify = notify
        self._out: deque[Frame] = deque()
        self._held: list[Frame] = []
        self._best: list[Frame] = []  # the longest of the takes that were too short
        self._max_retries = guards.retries if request.params.temperature > 0 else 0
        self._num_kept: int | None = None  # frames of the take that were not dropped at its end
        self._meter = Meter()
        self._start()

    def _start(self) -> None:
        self._meter.begin_take()
        self._watch = Watch(self._guards, self._text, self._frame_rate)
        self._ticket: Ticket = self._worker.submit(self._request, self._max_unread, self._notify)

    @property
    def seed(self) -> int:
        """The seed of the current take."""
        return self._request.params.seed

    @property
    def metrics(self) -> GenerationMetrics:
        """What the generation took so far; complete once it has ended."""
        seconds = None if self._num_kept is None else self._num_kept / self._frame_rate
        return self._meter.metrics(seconds)

    @property
    def finished(self) -> bool:
        """Whether ``take`` will return no further frame."""
        return self.finish_reason is not None and not self._out

    @property
    def released(self) -> bool:
        """Whether the engine has ended the current take: it holds no slot. Frames may be unread."""
        return self._ticket.finished

    def take(self) -> Frame | None:
        """The oldest unread frame; None if none has arrived."""
        while not self._out and self.finish_reason is None:
            ended = self._ticket.finished  # before the last look for frames
            frame = self._ticket.take()
            if frame is not None:
                self._accept(frame)
            elif ended:
                self._end(self._ticket.finish_reason or "error", self._ticket.error)
            else:
                break
        return self._out.popleft() if self._out else None

    def cancel(self) -> None:
        """End the request; the engine's next step frees its slot."""
        if not self._ticket.finished:
            self._worker.cancel(self._ticket)

    def _accept(self, frame: Frame) -> None:
        # A paused request has max_unread frames, of which up to MAX_GROUP - 1 still wait for the codec.
        if self._max_unread is not None and self._ticket.num_unread >= self._max_unread - MAX_GROUP:
            self._worker.wake()
        (self._held if self._hold else self._out).append(frame)
        self._meter.audio(1 / self._frame_rate, self._ticket.arrived_at)
        guard = self._watch.feed(frame.codes_K, frame.audio_N)
        if guard is not None:
            self.cancel()
            self._report(guard)
            self._end(guard)

    def _end(self, reason: str, error: BaseException | None = None) -> None:
        handed_out = self._watch.num_frames > 0 and not self._hold
        if reason == "end" and self._watch.too_short and self._meter.retries < self._max_retries and not handed_out:
            self._retry()
            return
        frames = self._held[: self._watch.num_kept] if reason == "silence" else self._held
        if reason == "end" and len(self._best) > len(frames):
            frames = self._best
        self._out.extend(frames)
        self._num_kept = len(frames) if self._hold else None
        self._meter.finish()
        self.error, self.finish_reason = error, reason

    def _retry(self) -> None:
        self._report("retry")
        self._best = max(self._best, self._held, key=len)
        self._held = []
        self._meter.retries += 1
        seed = (self.seed + 1) % 2**63
        self._request = replace(self._request, params=replace(self._request.params, seed=seed))
        self._start()

    def _report(self, guard: str) -> None:
        event = GuardEvent(guard, self._watch.num_frames, self.seed, self._text)
        done = "is generated again" if guard == "retry" else "is stopped"
        log.warning(
            "%s guard: seed %d %s after %d frames: %.60r", guard, event.seed, done, event.num_frames, event.text
        )
        if self._guards.report is not None:
            self._guards.report(event)


Opener = Callable[[Callable[[], None] | None], GuardedTicket]  # submits a request, given its ``notify``


def guarded_frames(openers: Sequence[Opener]) -> Generator[tuple[int, Frame], None, None]:
    """Frames of several requests as they arrive, each with the index of its request. Closing it cancels them.

    Raises the exception of the first request that failed.
    """
    arrived = threading.Semaphore(0)
    tickets: list[GuardedTicket] = []
    try:
        for open_ticket in openers:
            tickets.append(open_ticket(arrived.release))
        pending = dict(enumerate(tickets))
        while pending:
            arrived.acquire()
            for index, ticket in list(pending.items()):
                while (frame := ticket.take()) is not None:
                    yield index, frame
                if ticket.finished:
                    del pending[index]
                    if ticket.error is not None:
                        raise ticket.error
    finally:
        for ticket in tickets:
            ticket.cancel()
