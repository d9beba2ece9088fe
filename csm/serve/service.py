"""What the routes share: the model, the voices, sessions, metrics, and the threads for work that blocks."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from csm import Generator, Segment, Watermark
from csm.guards import GuardEvent
from csm.serve.errors import ApiError, queue_full
from csm.serve.metrics import Metrics
from csm.serve.settings import Settings
from csm.serve.voices import VoiceStore

Result = TypeVar("Result")

OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
MAX_SESSIONS = 1000
SESSION_SECONDS = 3600.0  # a session that was not used for so long is forgotten
SESSION_SHARE = 0.5  # of the backbone's positions, which a session's turns may take


class Sessions:
    """The turns of conversations by key, least recently used first. A session takes one request at a time."""

    def __init__(self) -> None:
        self._turns: OrderedDict[str, tuple[float, list[Segment]]] = OrderedDict()
        self._busy: set[str] = set()

    async def begin(self, key: str) -> list[Segment]:
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
        before = [*self._turns.get(key, (0.0, []))[1], turn]
        turns = recent_turns(before, max_positions)
        self._turns[key] = time.monotonic(), turns
        self._turns.move_to_end(key)
        while len(self._turns) > MAX_SESSIONS:
            self._turns.popitem(last=False)
        return len(before) - len(turns)


def recent_turns(turns: Sequence[Segment], max_positions: int) -> list[Segment]:
    """The last turns, as many as take ``SESSION_SHARE`` of the backbone's positions."""
    first, total = len(turns), 0
    while first and (total := total + _positions(turns[first - 1])) <= max_positions * SESSION_SHARE:
        first -= 1
    return list(turns[first:])


def _positions(turn: Segment) -> int:
    """At most so many rows of a prompt: a token has at least one byte."""
    return len(turn.text.encode()) + 8 + (0 if turn.codes is None else turn.codes.shape[0])


class Drainable(Protocol):
    """A connection that can be asked to end once its current turn is complete."""

    def drain(self) -> None:
        """Begin no further turn."""


class Service:
    """One server's state. ``load`` makes the generator, again after it has been unloaded."""

    def __init__(self, settings: Settings, load: Callable[[], Generator], watermark: Watermark | None = None):
        assert (watermark is None) == (settings.watermark is None)
        self.settings = settings
        self.watermark = watermark
        self.voices = VoiceStore(settings.voices)
        self.sessions = Sessions()
        self.metrics = Metrics(lambda: self.num_streams, lambda: self.num_waiting, lambda: len(self.sockets))
        self.guards = replace(settings.guards, report=self._count_guard)
        self.sockets: set[Drainable] = set()
        self.draining = False
        self.created = int(time.time())
        self._load = load
        self._generator: Generator | None = None
        self._loading = asyncio.Lock()
        self._in_use = 0
        self._last_used = time.monotonic()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="csm-serve")
        self._lister = ThreadPoolExecutor(max_workers=1, thread_name_prefix="csm-voices")

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

    def models(self) -> list[str]:
        """The loaded model's name, and OpenAI's names for it."""
        return list(dict.fromkeys([self.settings.model, *OPENAI_MODELS]))

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 for a model that is not here. OpenAI's names may carry a date."""
        if name not in self.models() and not name.startswith(f"{OPENAI_MODELS[-1]}-"):
            message = f"no model is called {name[:100]!r}; there are {', '.join(self.models())}"
            raise ApiError(404, message, "model", "model_not_found")

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

    async def list_voices(self) -> Mapping[str, Path]:
        """Voices with a file, by id. A large folder takes seconds, so this has a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._lister, self.voices.files)

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
                return_memory()

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._lister):
            threads.shutdown(wait=False, cancel_futures=True)

    def _count_guard(self, event: GuardEvent) -> None:
        self.metrics.guards.labels(event.guard).inc()


def return_memory() -> None:
    """Give freed memory back to the system. glibc keeps some for each thread, so that each reload would take more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def encode_turns(generator: Generator, turns: Sequence[Segment]) -> list[Segment]:
    """Turns with codes in place of audio."""
    return [turn if turn.codes is not None else generator.prepare(turn) for turn in turns]


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """The work's result. Raises TimeoutError after so many seconds.

    Unlike ``asyncio.wait_for`` before Python 3.12 it never swallows a cancellation. The work has ended when this
    returns.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
