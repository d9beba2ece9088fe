"""What the routes share: the model, the voices, sessions, metrics, and the threads for work that blocks."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from csm import Generator, Segment, Watermark
from csm.guards import GuardEvent
from csm.serve.errors import ApiError, queue_full
from csm.serve.metrics import Metrics
from csm.serve.settings import Settings
from csm.serve.voices import VoiceStore

Result = TypeVar("Result")
MAX_SESSIONS = 1000
SESSION_SECONDS = 3600.0  # a session that was not used for so long is forgotten
SESSION_SHARE = 0.5  # of the backbone's positions, which a session's turns may take


class Sessions:
    """The turns of conversations by key, least recently used first. A session takes one request at a time."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, tuple[float, list[Segment]]] = OrderedDict()
        self._busy: set[str] = set()

    def begin(self, key: str) -> list[Segment]:
        """The session's turns so far, oldest first; it is in use until ``end``. Raises ApiError if it is already."""
        if key in self._busy:
            raise ApiError(409, "a request of this session is still running", "session", "session_busy")
        oldest = time.monotonic() - SESSION_SECONDS
        for stale in [name for name, (used, _) in self._turns.items() if used < oldest]:
            del self._turns[stale]
        self._busy.add(key)
        return list(self._turns.get(key, (0.0, []))[1])

    def end(self, key: str, turn: Segment | None, max_positions: int) -> int:
        """Add a turn, if it was generated to its end; return how many of the oldest left because they do not fit."""
        self._busy.discard(key)
        if turn is None:
            return 0
        turns = [*self._turns.get(key, (0.0, []))[1], turn]
        num_turns = len(turns)
        while turns and sum(map(_positions, turns)) > max_positions * SESSION_SHARE:
            turns.pop(0)
        self._turns[key] = time.monotonic(), turns
        self._turns.move_to_end(key)
        while len(self._turns) > MAX_SESSIONS:
            self._turns.popitem(last=False)
        return num_turns - len(turns)


def _positions(turn: Segment) -> int:
    """At most so many rows of a prompt: a token has at least one byte."""
    return len(turn.text.encode()) + 8 + (0 if turn.codes is None else turn.codes.shape[0])


class Service:
    """One server's state. ``load`` makes the generator, again after it has been unloaded."""

    def __init__(self, settings: Settings, load: Callable[[], Generator], watermark: Watermark | None = None):
        assert (watermark is None) == (settings.watermark is None)
        self.settings = settings
        self.watermark = watermark
        self.voices = VoiceStore(settings.voices)
        self.sessions = Sessions()
        self.metrics = Metrics(lambda: self.num_streams, lambda: self.num_waiting)
        self.guards = replace(settings.guards, report=self._count_guard)
        self.draining = False
        self.created = int(time.time())
        self._load = load
        self._generator: Generator | None = None
        self._loading = asyncio.Lock()
        self._in_use = 0
        self._last_used = time.monotonic()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="csm-serve")

    @property
    def ready(self) -> bool:
        """Whether a request would start at once: the model is loaded, and the server is not shutting down."""
        return self._generator is not None and not self.draining

    @property
    def num_streams(self) -> int:
        """Requests that are being generated."""
        return min(self._in_use, self.settings.max_streams)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return max(0, self._in_use - self.settings.max_streams)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it is in here. Raises ApiError 429 if the queue is full."""
        if self._in_use >= self.settings.max_streams + self.settings.max_queue:
            raise queue_full(self.num_waiting)
        self._in_use += 1
        try:
            yield
        finally:
            self._in_use -= 1
            self._last_used = time.monotonic()

    async def in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Run what blocks in one of two threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def generator(self) -> Generator:
        """The model, loaded on first use."""
        async with self._loading:
            if self._generator is None:
                self._generator = await self.in_thread(self._load)
                self._last_used = time.monotonic()
            return self._generator

    def load_now(self) -> Generator:
        """Load the model before anything is served."""
        self._generator = self._load()
        return self._generator

    async def unload_when_idle(self) -> None:
        """For ever: let the model go after ``unload_after`` seconds without a request."""
        limit = self.settings.unload_after
        while limit is not None:
            await asyncio.sleep(min(1.0, limit / 2))
            idle = not self._in_use and time.monotonic() - self._last_used > limit
            if idle and self._generator is not None and not self._loading.locked():
                self._generator = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _count_guard(self, event: GuardEvent) -> None:
        self.metrics.guards.labels(event.guard).inc()


def encode_turns(generator: Generator, turns: Sequence[Segment]) -> list[Segment]:
    """Turns with codes in place of audio."""
    return [turn if turn.codes is not None else generator.prepare(turn) for turn in turns]
