"""One request for speech: from its body to a ticket of the generator, and from its frames to bytes on the socket.

The engine runs in its own thread and calls ``notify``; the event loop takes the frames, encodes and sends them.
Whatever ends a request (its last byte, an error, a client that has gone, a time limit), ``Job.close`` frees its slot.

Shapes: N samples, T frames, K codebooks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from torch import Tensor

from csm import CSMError, Generator, Segment, SpeechRequest, Watermark
from csm.codec import check_codes
from csm.errors import AudioError, VoiceFileError
from csm.formats import ENCODERS, MEDIA_TYPES, Stretch
from csm.guards import GuardedTicket
from csm.metrics import Listener
from csm.serve.errors import ApiError, api_error
from csm.serve.schema import SpeechBody, Turn
from csm.serve.service import Service, encode_turns
from csm.serve.voices import OPENAI_NAMES, Chosen, read_recording, voice_for
from csm.watermark import StreamMarker

PLAIN_MODELS = ("tts-1", "tts-1-hd")  # OpenAI's models without SSE
MAX_FRAMES = 25  # of 80 ms, in one piece of a response


class Job:
    """A request that is being generated. ``close`` may be called more than once.

    ``turns`` are earlier turns with codes, before those of a session and of the body's context.
    """

    def __init__(self, service: Service, body: SpeechBody, owner: str, turns: Sequence[Segment] = ()):
        self.service = service
        self.body = body
        self.started = time.monotonic()
        self.deadline = self.started + service.settings.request_timeout
        self.codes: list[Tensor] = []
        self.speaker = 0
        self.num_tokens = 0
        self._turns = turns
        self.watermark: Watermark | None = None
        self._session = None if body.session is None else f"{owner}/{body.session}"
        self._contexts = ExitStack()
        self._ticket: GuardedTicket | None = None
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._outcome = "cancelled"
        self._closed = False

    async def start(self) -> None:
        """Take a place, put the prompt together, and submit. Raises ApiError and CSMError."""
        service, body = self.service, self.body
        self._contexts.enter_context(service.admitted())
        generator = self._generator = await service.generator()
        chosen = await choose_voice(service, body)
        check_voice(generator, body.voice_id, chosen)
        turns = await service.in_thread(encode_context, generator, body.context)
        if self._session is not None:
            turns = await service.sessions.begin(self._session) + turns
            self._contexts.callback(self._end_session, self._session)
        self.speaker = chosen.speaker
        self.watermark = choose_watermark(service, body, added_voice=bool(chosen.context or turns or self._turns))
        given = {"temperature": body.temperature, "topk": body.top_k}
        speech = SpeechRequest(
            body.input,
            speaker=chosen.speaker,
            context=(*chosen.context, *self._turns, *turns),
            max_audio_length_ms=service.settings.max_seconds * 1000,
            seed=int(torch.randint(2**31, ())) if body.seed is None else body.seed,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        self.num_tokens = generator.num_positions(Segment(chosen.speaker, body.input))
        self._listener = Listener()
        self._ticket = generator.submit(speech, service.guards, notify=self._notify)

    @property
    def seed(self) -> int:
        """The seed of the take that is being generated."""
        assert self._ticket is not None
        return self._ticket.seed

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return self._generator.sample_rate

    def _notify(self) -> None:
        """From the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def audio(self) -> AsyncIterator[np.ndarray]:
        """Samples (N,), those of the frames that have arrived. Raises the exception that ended the request.

        At most ``MAX_FRAMES`` at once, so that a client that does not read holds up the model even if that is faster
        than this loop.
        """
        assert self._ticket is not None
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            parts: list[np.ndarray] = []
            while len(parts) < MAX_FRAMES and (frame := self._ticket.take()) is not None:
                assert frame.audio_N is not None
                self._measure()
                self.codes.append(frame.codes_K)
                parts.append(frame.audio_N.numpy())
            if len(parts) == MAX_FRAMES:
                self._arrived.set()  # there may be more
            if parts:
                yield np.concatenate(parts)
            if self._ticket.finished:
                break
        if self._ticket.error is not None:
            raise self._ticket.error
        self._outcome = self._ticket.finish_reason or "end"

    def _measure(self) -> None:
        metrics, now = self.service.metrics, time.monotonic()
        if not self.codes:
            metrics.first_audio.observe(now - self.started)
        late = self._listener.arrive(now, self._generator.frame_ms / 1000)
        metrics.lateness.observe(late)
        metrics.underruns.inc(late > 0)

    def fail(self, error: BaseException) -> None:
        """Say what ended the request, for the metrics."""
        self._outcome = "timeout" if isinstance(error, TimeoutError) else "error"

    def close(self) -> None:
        """Free the slot and the place in the queue; keep a finished turn for the session."""
        if self._closed:
            return
        self._closed = True
        if self._ticket is not None:
            self._ticket.cancel()
            seconds = len(self.codes) * self._generator.codec.frame_size / self.sample_rate
            self.service.metrics.audio.inc(seconds)
            if seconds:
                self.service.metrics.rtf.observe((time.monotonic() - self.started) / seconds)
        self._contexts.close()
        self.service.metrics.requests.labels(self._outcome).inc()

    async def released(self) -> None:
        """After ``close``: return once the engine has freed the slot, which its next step does."""
        while self._ticket is not None and not self._ticket.released:
            self._arrived.clear()
            if not self._ticket.released:
                await self._arrived.wait()

    def _end_session(self, session: str) -> None:
        complete = self.codes and self._outcome not in ("cancelled", "error", "timeout")
        turn = Segment(self.speaker, self.body.input, codes=torch.stack(self.codes)) if complete else None
        evicted = self.service.sessions.end(session, turn, self._generator.config.backbone.max_positions)
        self.service.metrics.evictions.inc(evicted)


def choose_watermark(service: Service, body: SpeechBody, added_voice: bool) -> Watermark | None:
    """The watermark that this request's audio must have. ``added_voice``: the prompt holds somebody's voice."""
    watermark, policy = service.watermark, service.settings.watermark_for
    if body.watermark and watermark is None:
        raise ApiError(400, "this server has no watermark: start it with --watermark perth", "watermark")
    wanted = policy == "all" or body.watermark or (policy == "added-voices" and added_voice)
    return watermark if wanted else None


async def choose_voice(service: Service, body: SpeechBody) -> Chosen:
    """The body's voice; one of OpenAI's names without a file of its own leads to another voice.

    Raises ApiError, or VoiceFileError for a file that cannot be read.
    """
    voices, voice_id = service.voices, body.voice_id
    if voice_id in OPENAI_NAMES and not await service.in_thread(voices.has_file, voice_id):
        voice_id = voice_for(voice_id, await service.list_voices())
    try:
        return await service.in_thread(voices.choose, voice_id, body.speaker)
    except VoiceFileError:
        raise
    except CSMError as error:
        raise ApiError(400, str(error), "voice", "voice_not_found") from error


def check_voice(generator: Generator, voice_id: str, chosen: Chosen) -> None:
    """Raise VoiceFileError for a voice that another codec encoded."""
    try:
        for turn in chosen.context:
            assert turn.codes is not None
            check_codes(turn.codes, generator.config.num_codebooks, generator.config.codebook_size)
    except AudioError as error:
        raise VoiceFileError(f"the voice {voice_id!r} was made for another model: {error}") from error


def encode_context(generator: Generator, turns: Sequence[Turn]) -> list[Segment]:
    """The turns of ``context``, with codes. Raises ApiError."""
    segments: list[Segment] = []
    room = generator.config.backbone.max_positions
    for index, turn in enumerate(turns):
        try:
            segment = _segment(turn, generator)
            room -= _num_frames(segment, generator)
            if room < 0:  # known before anything is encoded in vain
                raise CSMError("the recordings up to this one are longer than the model's window")
            segments += encode_turns(generator, [segment])
        except (CSMError, binascii.Error, OverflowError, ValueError, RuntimeError) as error:
            raise ApiError(400, f"context.{index}: {error}", f"context.{index}") from error
    return segments


def _segment(turn: Turn, generator: Generator) -> Segment:
    if (turn.audio is None) == (turn.codes is None):
        raise CSMError("a turn needs either audio (a file in Base64) or codes (T, K)")
    if turn.codes is not None:
        config, codes_TK = generator.config, torch.tensor(turn.codes, dtype=torch.int64)
        codes_TK = check_codes(codes_TK, config.num_codebooks, config.codebook_size)
        return Segment(turn.speaker, turn.text, codes=codes_TK)
    audio_N, sample_rate = read_recording(base64.b64decode(turn.audio or "", validate=True))
    return Segment(turn.speaker, turn.text, audio_N, sample_rate=sample_rate)


def _num_frames(turn: Segment, generator: Generator) -> int:
    if turn.codes is not None:
        return len(turn.codes)
    assert turn.audio is not None and turn.sample_rate is not None
    samples = turn.audio.shape[-1] * generator.sample_rate / turn.sample_rate
    return math.ceil(samples / generator.codec.frame_size)


def wants_sse(body: SpeechBody, accept: str) -> bool:
    """Whether the client asked for events, by field or by header. OpenAI's plain models have none."""
    if body.stream_format is not None:
        return body.stream_format == "sse" and body.model not in PLAIN_MODELS
    return "text/event-stream" in accept


async def encoded(job: Job) -> AsyncIterator[bytes]:
    """The response's body as raw audio."""
    encoder = ENCODERS[job.body.response_format or "mp3"](job.sample_rate)
    stretch = Stretch(job.body.speed or 1.0, job.sample_rate)
    marker = None if job.watermark is None else job.watermark.marker(job.sample_rate)

    async def marked(audio_N: np.ndarray, last: bool = False) -> np.ndarray:
        """The samples with the watermark, those that are complete; in a thread, since marking takes its time."""
        return audio_N if marker is None else await job.service.in_thread(_mark, marker, audio_N, last)

    async for audio_N in job.audio():
        data = encoder.write(await marked(stretch.write(audio_N)))
        if data:
            yield data
    yield encoder.write(await marked(stretch.close(), last=True)) + encoder.close()


def _mark(marker: StreamMarker, audio_N: np.ndarray, last: bool) -> np.ndarray:
    parts = [marker.write(torch.from_numpy(audio_N))]
    if last:
        parts.append(marker.close())
    return torch.cat(parts).numpy()


async def events(job: Job) -> AsyncIterator[bytes]:
    """The response's body as server-sent events: deltas with Base64, then usage, or the error."""
    try:
        async for data in encoded(job):
            yield _event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    except Exception as error:
        if not job.codes:
            raise  # nothing has been sent yet: the status can still say it
        job.fail(error)
        yield _event({"type": "error", **api_error(error).body})
        return
    usage = {"input_tokens": job.num_tokens, "output_tokens": len(job.codes)}
    usage["total_tokens"] = sum(usage.values())
    yield _event({"type": "speech.audio.done", "usage": usage})


def _event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def until_disconnected(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Disconnected(Exception):
    """The client has gone."""


async def while_connected(receive: Receive, work: Awaitable[bytes | None], deadline: float) -> bytes | None:
    """The work's result. Raises Disconnected where the client goes first, TimeoutError at the deadline.

    Whichever it is, the work has ended when this returns.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(until_disconnected(receive))
    try:
        timeout = max(0.0, deadline - time.monotonic())
        await asyncio.wait({task, watch}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected if watch.done() else TimeoutError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class AudioResponse(Response):
    """A job's audio. The status is sent with the first audio, so an earlier error is an ordinary response."""

    def __init__(self, job: Job, sse: bool):
        super().__init__()
        self._job = job
        self._chunks = events(job) if sse else encoded(job)
        self._media_type = "text/event-stream" if sse else MEDIA_TYPES[job.body.response_format or "mp3"]
        self._first = b""

    async def begin(self, receive: Receive) -> None:
        """Wait for the first audio. Raises what ends the request before it."""
        self._first = await while_connected(receive, self._next(), self._job.deadline) or b""

    async def _next(self) -> bytes | None:
        return await anext(self._chunks, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything. A failure under way closes the connection, so that it does not pass for the end."""
        try:
            await while_connected(receive, self._send_all(send), self._job.deadline)
        except Disconnected:
            return
        except Exception as error:
            self._job.fail(error)
            raise
        finally:
            self._job.close()

    async def _send_all(self, send: Send) -> None:
        headers = {
            "content-type": self._media_type,
            "cache-control": "no-store",
            "x-csm-seed": str(self._job.seed),
            "x-csm-sample-rate": str(self._job.sample_rate),
        }
        if self._job.watermark is not None:
            headers["x-csm-watermark"] = self._job.watermark.name
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        data: bytes | None = self._first
        while data is not None:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            data = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def speak(service: Service, body: SpeechBody, owner: str, accept: str, receive: Receive) -> Response:
    """The response to ``POST /v1/audio/speech``. Raises ApiError and CSMError."""
    job = Job(service, body, owner)
    try:
        await while_connected(receive, job.start(), job.deadline)
        response = AudioResponse(job, wants_sse(body, accept))
        await response.begin(receive)
    except Disconnected:
        job.close()
        return Response(status_code=499)  # nobody reads it
    except TimeoutError as error:
        job.fail(error)
        job.close()
        message = f"no audio within {service.settings.request_timeout:g} s"
        raise ApiError(504, message, code="timeout") from error
    except BaseException as error:
        job.fail(error)
        job.close()
        if not isinstance(error, Exception):
            raise
        raise api_error(error) from error
    return response
