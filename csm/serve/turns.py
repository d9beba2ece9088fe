"""One turn of a WebSocket: text that arrives in pieces becomes clauses, and each clause a request for speech.

A clause is generated as ``POST /v1/audio/speech`` would generate it with the turns before it as context, so its samples
are the same.

Shapes: codes of a frame (K,).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm import Segment
from csm.serve.errors import ApiError
from csm.serve.messages import Start
from csm.serve.service import Service, recent_turns, within
from csm.serve.settings import MAX_PENDING
from csm.serve.speech import Job, check_voice, choose_voice, encode_context, encoded
from csm.text import ClauseBuffer

SECONDS_PER_CHARACTER = 0.07  # of ordinary speech, until a clause of the turn is complete and says more
BYTES_PER_SAMPLE = 2

Send = Callable[[dict[str, Any] | bytes], Awaitable[None]]  # an event as JSON, or PCM


@dataclass
class Clause:
    """A clause that is being generated or is complete. ``start`` and ``end`` count samples of the turn's audio."""

    text: str
    seed: int
    speaker: int
    start: int
    end: int
    codes: list[Tensor] = field(repr=False)
    complete: bool = False

    def segment(self) -> Segment:
        """The clause as a turn of the context."""
        return Segment(self.speaker, self.text, codes=torch.stack(self.codes))


class SlowReader(Exception):
    """The client does not read what it is sent."""


class Heard(NamedTuple):
    """What a listener has heard of a turn: its length, its text, and the turns that the context keeps of it."""

    seconds: float
    text: str
    segments: list[Segment]


class Turn:
    """A turn while it is generated, and afterwards what it was. ``history``: the turns before it, with codes."""

    def __init__(self, service: Service, start: Start, owner: str, history: Sequence[Segment], send: Send):
        self.history = list(history)
        self.clauses: list[Clause] = []
        self.seed = int(torch.randint(2**31, ())) if start.seed is None else start.seed
        self.ended = False
        self._service = service
        self._start = start
        self._owner = owner
        self._send = send
        self._buffer = ClauseBuffer(sentences=start.split == "sentence")
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()  # bounded by MAX_PENDING characters
        self._num_queued = 0  # characters in it
        self._num_started = 0  # clauses
        self._sample_rate, self._frame_size, self._max_positions = 24_000, 1920, 0
        self.waiting = True  # for text

    # Text

    def push(self, text: str) -> None:
        """Add a piece. Raises ApiError, and takes nothing of it, if the text has ended or too much of it waits."""
        if self.ended:
            raise ApiError(400, "the turn's text has ended: send start first", code="no_turn")
        if self._num_queued + self._buffer.num_chars + len(text) > MAX_PENDING:
            message = f"more than {MAX_PENDING} characters would wait to be spoken: send this piece again later"
            raise ApiError(429, message, "text", "text_queue_full")
        self._put(self._buffer.push(text))

    def flush(self) -> None:
        """What has arrived is a clause, complete or not."""
        self._put(self._buffer.flush())

    def end(self) -> None:
        """No more text will come."""
        if not self.ended:
            self.flush()
            self.ended = True
            self._queue.put_nowait(None)

    def _put(self, clauses: Sequence[str]) -> None:
        for clause in clauses:
            if any(map(str.isalnum, clause)):
                self._num_queued += len(clause)
                self._queue.put_nowait(clause)

    # Speech

    async def run(self) -> None:
        """Generate and send until the text has ended. Raises what ends a request: ApiError, CSMError, TimeoutError."""
        await self._prepare()
        while True:
            self.waiting = True
            text = await self._queue.get()
            self.waiting = False
            if text is None:
                return
            self._num_queued -= len(text)
            await self._generate(text)

    async def _prepare(self) -> None:
        """Check the voice and encode the context. The generator is not kept: an idle model may be unloaded."""
        generator = await self._service.generator()
        body = self._start.body("-", 0)
        check_voice(generator, body.voice_id, await choose_voice(self._service, body))  # an error before any text
        self._sample_rate, self._frame_size = generator.sample_rate, generator.codec.frame_size
        self._max_positions = generator.config.backbone.max_positions
        self.history += await self._service.in_thread(encode_context, generator, self._start.context)

    async def _generate(self, text: str) -> None:
        body = self._start.body(text, self.seed + self._num_started)
        self._num_started += 1
        job = Job(self._service, body, self._owner, self.context)
        try:
            await job.start()
            await self._send_audio(job, text)
        except Exception as error:
            job.fail(error)
            raise
        finally:
            job.close()
            await job.released()

    async def _send_audio(self, job: Job, text: str) -> None:
        """Send a clause's PCM, and before it the event that names the clause."""
        clause, chunks = None, encoded(job)
        while (data := await _before(job.deadline, chunks)) is not None:
            if not data:
                continue
            if clause is None:
                start = self.num_samples
                clause = Clause(text, job.seed, job.speaker, start, start, job.codes)
                self.clauses.append(clause)
                await self._deliver({"type": "clause", "text": text, "start": self._seconds(start), "seed": job.seed})
            await self._deliver(data, clause)
        if clause is not None:
            clause.complete = True

    async def _deliver(self, message: dict[str, Any] | bytes, clause: Clause | None = None) -> None:
        """Send, and count the samples. They are counted exactly if they were sent, whenever this is cancelled."""

        async def send() -> None:
            await self._send(message)
            if clause is not None:
                clause.end += len(message) // BYTES_PER_SAMPLE

        try:
            await within(self._service.settings.send_timeout, send())
        except TimeoutError as error:
            raise SlowReader("the client does not read") from error

    # What was generated

    @property
    def num_samples(self) -> int:
        """Samples that have been sent."""
        return self.clauses[-1].end if self.clauses else 0

    @property
    def context(self) -> list[Segment]:
        """The turns that the next clause continues."""
        return self.followed_by([clause.segment() for clause in self.clauses if clause.complete and clause.codes])

    def followed_by(self, spoken: Sequence[Segment]) -> list[Segment]:
        """The turns before this one and then ``spoken``, without the oldest that no longer fit."""
        turns = [*self.history, *spoken]
        return recent_turns(turns, self._max_positions) if self._max_positions else turns  # 0: before the model loads

    def _seconds(self, samples: int) -> float:
        return round(samples / self._sample_rate, 3)

    def times(self) -> list[dict[str, Any]]:
        """The clauses with their times, in seconds."""
        return [
            {"text": each.text, "start": self._seconds(each.start), "end": self._seconds(each.end), "seed": each.seed}
            for each in self.clauses
        ]

    def heard(self, played: float | None = None) -> Heard:
        """What was heard up to ``played`` seconds; None is all that was sent.

        Inside a clause the words are estimated: the text is taken to be spoken at a constant pace.
        """
        end = self.num_samples
        if played is not None:
            end = min(end, round(min(played, end) * self._sample_rate))
        texts, segments = [], []
        for clause in self.clauses:
            if clause.complete and clause.end <= end:
                texts.append(clause.text)
                segments.append(clause.segment())
            elif clause.start < end:
                text = _first_words(clause.text, (end - clause.start) / self._length(clause))
                num_frames = int((end - clause.start) * (self._start.speed or 1.0) / self._frame_size)
                if text and clause.codes[:num_frames]:
                    texts.append(text)
                    segments.append(Segment(clause.speaker, text, codes=torch.stack(clause.codes[:num_frames])))
        return Heard(self._seconds(end), " ".join(texts), segments)

    def _length(self, clause: Clause) -> float:
        """Samples of a clause, estimated from the turn's pace if it is not complete."""
        if clause.complete:
            return clause.end - clause.start
        done = [each for each in self.clauses if each.complete]
        pace = SECONDS_PER_CHARACTER * self._sample_rate / (self._start.speed or 1.0)
        if done:
            pace = sum(each.end - each.start for each in done) / sum(len(each.text) for each in done)
        return max(pace * len(clause.text), clause.end - clause.start)


async def _before(deadline: float, chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk; None at the end. Raises TimeoutError at the deadline."""

    async def following() -> bytes | None:
        return await anext(chunks, None)

    return await within(max(0.0, deadline - time.monotonic()), following())


def _first_words(text: str, share: float) -> str:
    """The whole words in this share of the text."""
    length = round(share * len(text))
    if length >= len(text) or text[length].isspace():
        return text[:length].rstrip()
    return text[: max(text.rfind(" ", 0, length), 0)].rstrip()
