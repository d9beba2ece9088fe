"""``csm batch``: a file of lines, many at a time through the engine, into a folder of WAV files (docs/batch.md).

Every line is checked before the model is loaded. A line's audio depends on the line and the options alone: its seed
comes from its id, not from its place or its time. A finished line has its WAV file, then an entry in the manifest, each
written at once, so a run that was killed at any point goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from csm.audio import WavWriter
from csm.errors import CSMError, RoomWarning
from csm.fingerprint import codec_fingerprint, fingerprint
from csm.generator import Generator
from csm.guards import DEFAULT_GUARDS, GuardedTicket, Guards
from csm.metrics import GenerationMetrics
from csm.request import SpeechRequest
from csm.sampling import SamplingParams
from csm.stream import Speech
from csm.text import Pause, normalize, parse_pauses, strip_markup
from csm.voices import Voice, check_name
from csm.watermark import Watermark
from csm.weights import GenerationDefaults

MANIFEST, ERRORS = "manifest.jsonl", "errors.jsonl"
ENTRY_START = b'{"id": '  # of a manifest's line
ID = re.compile(r"\w(?:[\w.-]{0,98}\w)?")  # a file name on every system, and no path
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows
SPARE = 2  # requests that wait while all slots are in use, so that a free slot is filled at once


class LineError(CSMError):
    """A line that cannot be spoken."""


@dataclass(frozen=True)
class BatchLine:
    """One line of the file. Fields that are None have the checkpoint's or the run's default."""

    id: str
    text: str
    voice: str | None = None
    speaker: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        check_id(self.id)
        if not isinstance(self.text, str) or not self.text.strip():
            raise LineError("text is missing or empty")
        if self.voice is not None:
            check_name(self.voice)
        if self.speaker is not None and (not _is_integer(self.speaker) or not 0 <= self.speaker < 2**31):
            raise LineError(f"speaker must be a whole number of at least 0, not {self.speaker!r}")
        given = {"temperature": self.temperature, "top_k": self.top_k, "seed": self.seed}
        if any(isinstance(value, bool) for value in given.values()):
            raise LineError("temperature, top_k and seed are numbers")
        SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        seconds = self.max_seconds
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float)):
            raise LineError(f"max_seconds must be a number, not {seconds!r}")
        if seconds is not None and not 0.08 <= seconds < math.inf:
            raise LineError(f"max_seconds must be at least 0.08, not {seconds!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


FIELDS = [field.name for field in fields(BatchLine)]


def check_id(name: object) -> str:
    """The id itself. Raises LineError if it is no plain file name."""
    if not isinstance(name, str) or not ID.fullmatch(name) or RESERVED.fullmatch(name) or len(name.encode()) > 200:
        raise LineError(
            f"id must be a file name without a path: 1 to 100 letters, digits, '_', '-' and '.', beginning and ending "
            f"with a letter, a digit or '_', and no name of a device; not {name!r}"
        )
    return name


@dataclass(frozen=True)
class Problem:
    """A line that was left out: its number from 1, its id if it has one, and the reason."""

    line: int
    id: str | None
    error: str


def read_lines(path: Path) -> tuple[dict[int, BatchLine], list[Problem]]:
    """The lines by number, and those that cannot be spoken. Raises CSMError if the file cannot be read or has none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{path}: cannot be read as text: {error}") from error
    lines: dict[int, BatchLine] = {}
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = None
        try:
            value = _parse(line)
            name = value["id"] if isinstance(value.get("id"), str) else None
            item = BatchLine(**value)
            key = unicodedata.normalize("NFC", item.id).casefold()  # as file systems compare names
            if key in seen:
                raise LineError(f"the id {item.id!r} names the same file as that of line {seen[key]}")
            seen[key], lines[number] = number, item
        except CSMError as error:
            problems.append(Problem(number, name, str(error)))
    if not lines:
        reason = f"line {problems[0].line}: {problems[0].error}" if problems else "the file is empty"
        raise CSMError(f"{path}: no line can be spoken: {reason}")
    return lines, problems


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise LineError(f"not an object with {', '.join(FIELDS)}")
    unknown = sorted(set(value) - set(FIELDS))
    if unknown:
        raise LineError(f"unknown field {unknown[0]!r}; the fields are {', '.join(FIELDS)}")
    return {"id": None, "text": None, **value}


@dataclass(frozen=True)
class Job:
    """A line, ready to be generated. ``key`` is a digest of everything that its audio depends on."""

    line: int
    id: str
    speech: SpeechRequest
    key: str


@dataclass(frozen=True)
class BatchOptions:
    """What holds for all lines. ``identity`` is what else ``Job.key`` depends on, such as guards that are off."""

    seed: int = 0
    normalized: bool = True
    max_seconds: float | None = None
    identity: str = ""
    guards: Guards = DEFAULT_GUARDS


def identified(options: BatchOptions, generator: Generator) -> BatchOptions:
    """The options with hashes of model, tokenizer and codec: keys depend on their contents, not their names."""
    weights = f"{fingerprint(generator, ())} {codec_fingerprint(generator)}"
    return replace(options, identity=f"{options.identity} {weights}")


def make_job(generator: Generator, number: int, line: BatchLine, options: BatchOptions) -> Job:
    """The request of a line. Raises CSMError: an unknown voice, a text that is too long, ..."""
    voice = None if line.voice is None else generator.voice(line.voice)
    text = spoken_text(line.text, options.normalized)
    seconds = options.max_seconds if line.max_seconds is None else line.max_seconds
    speech = SpeechRequest(
        text,
        speaker=line.speaker if line.speaker is not None else voice.speaker if voice is not None else 0,
        max_audio_length_ms=None if seconds is None else seconds * 1000,
        temperature=line.temperature,
        topk=line.top_k,
        seed=seed_of(options.seed, line.id) if line.seed is None else line.seed,
        voice=voice,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoomWarning)  # the request will warn
        generator.stream_frames(speech)  # raises what the request would; generates nothing
    return Job(number, line.id, speech, _key(speech, voice, generator.defaults, options.identity))


def _key(speech: SpeechRequest, voice: Voice | None, defaults: GenerationDefaults, identity: str) -> str:
    """A digest of a request, with the checkpoint's defaults in place of values that are None."""
    values = [
        speech.text,
        speech.speaker,
        defaults.max_audio_length_ms if speech.max_audio_length_ms is None else speech.max_audio_length_ms,
        defaults.temperature if speech.temperature is None else speech.temperature,
        defaults.top_k if speech.topk is None else speech.topk,
        speech.seed,
        identity,
        _voice_digest(voice),
    ]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def make_jobs(
    generator: Generator, lines: Iterable[tuple[int, BatchLine]], options: BatchOptions
) -> tuple[list[Job], list[Problem]]:
    """The requests of all numbered lines, and the lines that have none."""
    jobs: list[Job] = []
    problems: list[Problem] = []
    for number, line in lines:
        try:
            jobs.append(make_job(generator, number, line, options))
        except CSMError as error:
            problems.append(Problem(number, line.id, str(error)))
    return jobs, problems


def problem_of(job: Job, error: Exception) -> Problem:
    """The problem of a job that failed."""
    return Problem(job.line, job.id, f"{error}" or type(error).__name__)


def spoken_text(written: str, normalized: bool) -> str:
    """The text as it is spoken. Raises LineError for a pause, which only a script can have."""
    if any(isinstance(part, Pause) for part in parse_pauses(written)):
        raise LineError("[pause] is for generate --text and --script; a line of a batch is one utterance")
    text = normalize(strip_markup(written)) if normalized else written
    if not text.strip():
        raise LineError(f"there is nothing to speak in {written!r}")
    return " ".join(text.split()) if normalized else text


def seed_of(seed: int, name: str) -> int:
    """The seed of the line with this id: the same in every run, whatever the other lines are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big")


def _voice_digest(voice: Voice | None) -> str:
    if voice is None:
        return ""
    digest = hashlib.sha256(json.dumps(voice.texts).encode())
    for codes_TK in voice.codes:
        digest.update(codes_TK.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


class Output:
    """The folder that a batch writes to: ID.wav, the manifest and the errors. A context manager; one run at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}  # of the manifest, by id

    def __enter__(self) -> Output:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / MANIFEST, "a+b")
        except OSError as error:
            raise CSMError(f"{self.folder}: cannot be written: {error.strerror}") from error
        try:
            _lock(self._file.fileno(), self.folder)
            self._read_manifest()
        except CSMError:
            self._file.close()
            raise
        for left in self.folder.glob(".csm-*.part"):  # of a run that was killed
            left.unlink()
        return self

    def _read_manifest(self) -> None:
        """Read the entries. A last line without an end was being written when the run was killed: it is cut off.

        Nothing is cut off a file that is no manifest.
        """
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                _ = entry["key"], entry["file"], entry["bytes"]
                self.entries[entry["id"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise CSMError(
                    f"{self.folder / MANIFEST}: line {number} is no entry of a batch: {error}; choose another folder"
                ) from error
        if len(whole) < len(data) and not self.entries and not data.startswith(ENTRY_START):
            raise CSMError(f"{self.folder / MANIFEST}: is no manifest of a batch; choose another folder")
        self._file.truncate(len(whole))

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, job: Job) -> bool:
        """Whether this very line was finished, and its file is as long as it was."""
        return is_finished(self.folder, job, self.entries.get(job.id))

    def write(self, job: Job, speech: Speech, sample_rate: int) -> None:
        """Keep a line's audio, then its entry in the manifest."""
        self.add(write_audio(self.folder, job, speech, sample_rate))

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry to the manifest; its file is there."""
        self.entries[entry["id"]] = entry
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, order: Sequence[str], problems: Sequence[Problem]) -> None:
        """Put the manifest into the order of the lines, without entries of other files, and list the errors."""
        entries = [self.entries[name] for name in order if name in self.entries]
        _replace(self.folder / MANIFEST, entries)
        if problems:
            _replace(self.folder / ERRORS, [vars(problem) for problem in problems])
        else:
            (self.folder / ERRORS).unlink(missing_ok=True)


def is_finished(folder: Path, job: Job, entry: dict[str, Any] | None) -> bool:
    """Whether a manifest's entry is of this very job, and its file is as long as it was."""
    path = folder / f"{job.id}.wav"
    return (
        entry is not None and entry.get("key") == job.key and path.is_file() and path.stat().st_size == entry["bytes"]
    )


def write_audio(folder: Path, job: Job, speech: Speech, sample_rate: int) -> dict[str, Any]:
    """Write a line's WAV file at once; its entry for the manifest."""
    path = folder / f"{job.id}.wav"
    with WavWriter(path) as wav:
        wav.begin(sample_rate)
        wav.write(speech.audio)
    return {
        "id": job.id,
        "line": job.line,
        "file": path.name,
        "seconds": speech.audio.shape[0] / sample_rate,
        "seed": speech.seed,
        "finish": speech.finish_reason,
        **_rounded(speech.metrics),
        "bytes": path.stat().st_size,
        "key": job.key,
    }


def _rounded(metrics: GenerationMetrics) -> dict[str, Any]:
    values = metrics.as_dict()
    del values["audio_seconds"], values["evictions"]
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def _replace(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines at once."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    os.replace(temporary, path)


def _lock(handle: int, folder: Path) -> None:
    """Hold the folder until the file is closed. Raises CSMError if another run has it. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CSMError(f"{folder}: another batch is writing to it") from error


def generate_jobs(
    generator: Generator,
    jobs: Iterable[Job],
    slots: int,
    watermark: Watermark | None = None,
    guards: Guards = DEFAULT_GUARDS,
) -> Iterator[tuple[Job, Speech | Exception]]:
    """The audio of each job, or what went wrong, in the order in which they end. ``slots`` are generated at a time."""
    arrived = threading.Semaphore(0)
    waiting, running = iter(jobs), list[_Running]()
    try:
        while True:
            while len(running) < slots + SPARE and (job := next(waiting, None)) is not None:
                try:
                    running.append(_Running(generator, job, guards, arrived.release))
                except CSMError as error:
                    yield job, error
            if not running:
                return
            arrived.acquire()
            for one in [one for one in running if one.advance()]:
                running.remove(one)
                yield one.job, one.result(watermark)
    finally:
        for one in running:
            one.ticket.cancel()


class _Running:
    """A job that has been submitted."""

    def __init__(self, generator: Generator, job: Job, guards: Guards, notify: Callable[[], None]):
        self.job = job
        self.ticket: GuardedTicket = generator.submit(job.speech, guards, max_unread=None, notify=notify, hold=True)
        self._sample_rate = generator.sample_rate
        self._chunks: list[torch.Tensor] = []

    def advance(self) -> bool:
        """Take what has arrived. Whether that was all."""
        while (frame := self.ticket.take()) is not None:
            assert frame.audio_N is not None
            self._chunks.append(frame.audio_N)
        return self.ticket.finished

    def result(self, watermark: Watermark | None) -> Speech | Exception:
        """The audio, marked whole if there is a watermark."""
        ticket = self.ticket
        if isinstance(ticket.error, Exception):
            return ticket.error
        if ticket.error is not None:
            raise ticket.error
        audio = torch.cat(self._chunks) if self._chunks else torch.zeros(0)
        if not audio.shape[0]:
            return CSMError("the model ended the speech before its first frame; try another seed")
        if watermark is not None:
            audio = watermark.apply(audio, self._sample_rate)
        return Speech(audio, ticket.metrics, ticket.seed, ticket.finish_reason or "end")
