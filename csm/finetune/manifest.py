"""Manifests: a JSONL file or an LJSpeech folder, read and checked completely before training.

A manifest has one JSON object per line: ``audio`` (a path relative to the manifest's folder), ``text``, and optionally
``speaker`` (an integer, default 0) and ``conversation`` with ``order`` (the turn's position in the conversation).
An LJSpeech folder has ``metadata.csv`` with ``id|text`` or ``id|text|normalised text`` per line, and ``wavs/id.wav``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from csm.audio import read_audio, to_mono
from csm.errors import AudioError, CSMError, ListError

KEYS = frozenset({"audio", "text", "speaker", "conversation", "order"})
MIN_SECONDS, MAX_SECONDS = 0.1, 120.0
MIN_RATE, MAX_RATE = 16_000, 192_000  # below 16 kHz, too much of the codec's 12 kHz band is missing
SILENCE_PEAK = 1e-4  # -80 dB of full scale
CHECK_THREADS = 4
MAX_REPORTED = 200


class DataError(ListError):
    """Invalid training data. The message names every bad line."""


@dataclass(frozen=True)
class Clip:
    """One recorded turn, from line ``line``. A clip without a conversation gets a unique ``conversation``."""

    line: int
    audio: Path
    text: str
    speaker: int
    conversation: str
    order: int

    @property
    def key(self) -> str:
        """Path, size and time of change: differs after the recording has changed."""
        status = self.audio.stat()
        return f"{self.audio.resolve()}|{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True)
class Manifest:
    """The valid lines' clips, in order, and the problems of the invalid lines, as (line, problem)."""

    path: Path
    clips: list[Clip]
    problems: list[tuple[int, str]]

    def raise_problems(self, more: Sequence[tuple[int, str]] = ()) -> None:
        """Raise DataError that lists the manifest's problems and ``more``, or says that there are no clips."""
        problems = sorted([*self.problems, *more])
        lines = [f"{self.path.name}:{line}: {what}" for line, what in problems[:MAX_REPORTED]]
        if len(problems) > MAX_REPORTED:
            lines.append(f"... and {len(problems) - MAX_REPORTED} more problems")
        if lines:
            raise DataError(
                f"{self.path}: {len(problems)} problems; correct or remove these lines:\n" + "\n".join(lines)
            )
        if not self.clips:
            raise DataError(f"{self.path}: the manifest is empty; it needs one line per recording")


def read_manifest(data: Path) -> Manifest:
    """Read a manifest, or the manifest of a folder: ``manifest.jsonl`` or LJSpeech's ``metadata.csv``.

    The lines are checked; the recordings are not. Raises DataError where there is no manifest.
    """
    if data.is_dir():
        found = [path for path in (data / "manifest.jsonl", data / "metadata.csv") if path.is_file()]
        if not found:
            raise DataError(
                f"{data}: the folder has neither manifest.jsonl nor metadata.csv (LJSpeech); give a folder that has one"
            )
        data = found[0]
    if not data.is_file():
        raise DataError(f"{data}: no such file or folder")
    parse = _parse_ljspeech if data.suffix == ".csv" else _parse_json
    clips: list[Clip] = []
    problems: list[tuple[int, str]] = []
    for line, raw in enumerate(data.read_bytes().split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r")
            if text.strip():
                clips.append(parse(text, data.parent, line))
        except UnicodeDecodeError:
            problems.append((line, "not UTF-8; save the file as UTF-8"))
        except DataError as error:
            problems.append((line, str(error)))
    return Manifest(data, clips, [*problems, *_duplicates(clips)])


def _parse_json(text: str, folder: Path, line: int) -> Clip:
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"must be a JSON object, not {type(values).__name__}")
    unknown = sorted(values.keys() - KEYS)
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}; known keys: {', '.join(sorted(KEYS))}")
    audio, conversation = _string_value(values, "audio"), values.get("conversation")
    if ("order" in values) != (conversation is not None):
        raise DataError("conversation and order must be given together")
    if conversation is not None and not isinstance(conversation, (str, int)):
        raise DataError(f"conversation must be a string or an integer, not {conversation!r}")
    name = f"alone {line}" if conversation is None else f"named {conversation}"
    order = _integer_value(values, "order")
    return Clip(line, folder / audio, _string_value(values, "text"), _integer_value(values, "speaker"), name, order)


def _string_value(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        raise DataError(f"{key} is missing")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is empty" if isinstance(value, str) else f"{key} must be a string, not {value!r}")
    if "\0" in value:
        raise DataError(f"{key} contains a NUL character; remove it")
    return value.strip()


def _integer_value(values: dict[str, Any], key: str) -> int:
    value = values.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise DataError(f"{key} must be an integer of at least 0 and below 2**31, not {value!r}")
    return value


def _parse_ljspeech(text: str, folder: Path, line: int) -> Clip:
    fields = text.split("|")
    if len(fields) not in (2, 3) or not fields[0].strip():
        raise DataError(f"{len(fields)} fields; a line of LJSpeech is id|text or id|text|normalised text")
    if not fields[-1].strip():
        raise DataError("text is empty")
    return Clip(line, folder / "wavs" / f"{fields[0].strip()}.wav", fields[-1].strip(), 0, f"alone {line}", 0)


def _duplicates(clips: Sequence[Clip]) -> Iterator[tuple[int, str]]:
    seen: dict[object, int] = {}
    for clip in clips:
        recording = ("recording", os.path.normpath(clip.audio), clip.text)
        first = seen.setdefault(recording, clip.line)
        if first != clip.line:
            yield clip.line, f"duplicate: same recording and text as line {first}"
        first = seen.setdefault(("order", clip.conversation, clip.order), clip.line)
        if first != clip.line:
            yield clip.line, f"duplicate: same conversation and order ({clip.order}) as line {first}"


def check_clips(manifest: Manifest, examine: Callable[[Clip], None], progress: bool = True) -> None:
    """Call ``examine`` with each clip; it raises CSMError for a bad one. Raises DataError with every problem."""

    def problem(clip: Clip) -> tuple[int, str] | None:
        try:
            examine(clip)
        except (CSMError, OSError) as error:
            return clip.line, " ".join(str(error).split())
        return None

    clips, disable = manifest.clips, None if progress else True
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        found = tqdm(pool.map(problem, clips), "checking recordings", len(clips), unit="clip", disable=disable)
        manifest.raise_problems([one for one in found if one is not None])


def check_recording(path: Path) -> float:
    """Check a recording and return its duration in seconds. Raises AudioError, naming the file and the limit."""
    if path.is_dir():
        raise AudioError(f"{path}: is a folder, not a recording")
    if path.is_file() and path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    audio, sample_rate = read_audio(path)
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(f"{path}: sample rate is {sample_rate} Hz; it must be {MIN_RATE} to {MAX_RATE} Hz")
    seconds = audio.shape[-1] / sample_rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise AudioError(f"{path}: is {seconds:.2f} s long; it must be {MIN_SECONDS} to {MAX_SECONDS:g} s")
    if not torch.isfinite(audio).all():
        raise AudioError(f"{path}: contains samples that are not finite (NaN or infinite)")
    if to_mono(audio, sample_rate, sample_rate).abs().max() < SILENCE_PEAK:  # the codec's input is mono
        raise AudioError(f"{path}: is silent (all samples below {SILENCE_PEAK:g})")
    if audio.abs().max() > 8:
        raise AudioError(f"{path}: has samples of magnitude {audio.abs().max():.3g}; full scale is 1")
    return seconds
