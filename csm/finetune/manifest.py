"""What is trained on: a JSONL manifest or an LJSpeech folder, read and checked whole before anything is done with it.

A manifest has one JSON object a line: ``audio`` (a file, relative to the manifest's folder), ``text``, and optionally
``speaker`` (a whole number, 0 if missing) and ``conversation`` with ``order`` (who speaks when, in one conversation).
An LJSpeech folder has ``metadata.csv``, ``id|text`` or ``id|text|normalised text`` a line, and ``wavs/id.wav``.
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
from csm.errors import AudioError, CSMError

KEYS = frozenset({"audio", "text", "speaker", "conversation", "order"})
MIN_SECONDS, MAX_SECONDS = 0.1, 120.0
MIN_RATE, MAX_RATE = 16_000, 192_000  # below, half of what the codec would learn to say is not in the recording
SILENCE = 1e-4  # -80 dB of full scale
JOBS = 4  # recordings read at once
MAX_REPORTED = 200


class DataError(CSMError):
    """Data that cannot be trained on; the message names every bad line."""


@dataclass(frozen=True)
class Clip:
    """One spoken turn, of line ``line``. ``conversation`` is unique to a clip that has none."""

    line: int
    audio: Path
    text: str
    speaker: int
    conversation: str
    order: int

    @property
    def key(self) -> str:
        """Changes when the recording does: path, size and time of change."""
        status = self.audio.stat()
        return f"{self.audio.resolve()}|{status.st_size}|{status.st_mtime_ns}"


@dataclass(frozen=True)
class Manifest:
    """The clips of the lines that can be read, in order, and what is wrong with the others, by line."""

    path: Path
    clips: list[Clip]
    problems: list[tuple[int, str]]

    def refuse(self, more: Sequence[tuple[int, str]] = ()) -> None:
        """Raise DataError with all problems and ``more``, if there are any, or if there are no clips."""
        problems = sorted([*self.problems, *more])
        lines = [f"{self.path.name}:{line}: {what}" for line, what in problems[:MAX_REPORTED]]
        if len(problems) > MAX_REPORTED:
            lines.append(f"... and {len(problems) - MAX_REPORTED} more")
        if lines:
            raise DataError(f"{self.path}: {len(problems)} problems; nothing was trained:\n" + "\n".join(lines))
        if not self.clips:
            raise DataError(f"{self.path}: there is no line in it")


def read_manifest(data: Path) -> Manifest:
    """A manifest, that of a folder with ``manifest.jsonl`` in it, or an LJSpeech folder's.

    What can be checked without the recordings has been. Raises DataError where there is no manifest at all.
    """
    if data.is_dir():
        found = [path for path in (data / "manifest.jsonl", data / "metadata.csv") if path.is_file()]
        if not found:
            raise DataError(f"{data}: neither manifest.jsonl nor metadata.csv (LJSpeech) is in it")
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
            problems.append((line, "not UTF-8"))
        except DataError as error:
            problems.append((line, str(error)))
    return Manifest(data, clips, [*problems, *_duplicates(clips)])


def _parse_json(text: str, folder: Path, line: int) -> Clip:
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"not a JSON object but {type(values).__name__}")
    unknown = sorted(values.keys() - KEYS)
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(KEYS))}")
    audio, conversation = _text_of(values, "audio"), values.get("conversation")
    if ("order" in values) != (conversation is not None):
        raise DataError("conversation and order go together")
    if conversation is not None and not isinstance(conversation, (str, int)):
        raise DataError(f"conversation must be a name or a number, not {conversation!r}")
    name = f"alone {line}" if conversation is None else f"named {conversation}"
    order = _whole_of(values, "order")
    return Clip(line, folder / audio, _text_of(values, "text"), _whole_of(values, "speaker"), name, order)


def _text_of(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        raise DataError(f"{key} is missing")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is empty" if isinstance(value, str) else f"{key} must be a string, not {value!r}")
    if "\0" in value:
        raise DataError(f"{key} has a zero byte in it")
    return value.strip()


def _whole_of(values: dict[str, Any], key: str) -> int:
    value = values.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise DataError(f"{key} must be a whole number of at least 0, not {value!r}")
    return value


def _parse_ljspeech(text: str, folder: Path, line: int) -> Clip:
    fields = text.split("|")
    if len(fields) not in (2, 3) or not fields[0].strip():
        raise DataError(f"{len(fields)} fields; LJSpeech has id|text or id|text|normalised text")
    if not fields[-1].strip():
        raise DataError("text is empty")
    return Clip(line, folder / "wavs" / f"{fields[0].strip()}.wav", fields[-1].strip(), 0, f"alone {line}", 0)


def _duplicates(clips: Sequence[Clip]) -> Iterator[tuple[int, str]]:
    seen: dict[object, int] = {}
    for clip in clips:
        recording = ("recording", os.path.normpath(clip.audio), clip.text)
        first = seen.setdefault(recording, clip.line)
        if first != clip.line:
            yield clip.line, f"duplicate: recording and text are those of line {first}"
        first = seen.setdefault(("order", clip.conversation, clip.order), clip.line)
        if first != clip.line:
            yield clip.line, f"duplicate: order {clip.order} of its conversation is line {first}'s"


def check_clips(manifest: Manifest, examine: Callable[[Clip], None], progress: bool = True) -> None:
    """Call ``examine``, which raises CSMError for a bad one, with each clip. Raises DataError with every problem."""

    def problem(clip: Clip) -> tuple[int, str] | None:
        try:
            examine(clip)
        except (CSMError, OSError) as error:
            return clip.line, " ".join(str(error).split())
        return None

    clips, disable = manifest.clips, None if progress else True
    with ThreadPoolExecutor(JOBS) as pool:
        found = tqdm(pool.map(problem, clips), "checking recordings", len(clips), unit="clip", disable=disable)
        manifest.refuse([one for one in found if one is not None])


def check_recording(path: Path) -> float:
    """Seconds of a recording that can be trained on. Raises AudioError, naming the file and what is wrong with it."""
    if path.is_dir():
        raise AudioError(f"{path}: is a folder")
    if path.is_file() and path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    audio, sample_rate = read_audio(path)
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(f"{path}: sampled at {sample_rate} Hz; from {MIN_RATE} to {MAX_RATE} can be trained on")
    seconds = audio.shape[-1] / sample_rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise AudioError(f"{path}: {seconds:.2f} s long; from {MIN_SECONDS} to {MAX_SECONDS:g} s can be trained on")
    if not torch.isfinite(audio).all():
        raise AudioError(f"{path}: has samples that are not finite (NaN or infinite)")
    if to_mono(audio, sample_rate, sample_rate).abs().max() < SILENCE:  # as the codec hears it
        raise AudioError(f"{path}: is silent throughout")
    if audio.abs().max() > 8:
        raise AudioError(f"{path}: has samples of up to {audio.abs().max():.3g}; full scale is 1")
    return seconds
