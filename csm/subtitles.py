"""Subtitles: when each sentence is heard, as SubRip, WebVTT or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Word:
    """When a word is heard: seconds from the start."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Cue:
    """When a sentence is heard: seconds from the start. ``words`` is empty where their times are not known."""

    start: float
    end: float
    speaker: int | str
    text: str
    words: tuple[Word, ...] = ()


def until(cues: Sequence[Cue], seconds: float) -> list[Cue]:
    """The same cues, the last one until the audio ends: a pause may follow it. Times of words stay."""
    return [*cues[:-1], *(replace(cue, end=max(cue.end, seconds)) for cue in cues[-1:])]


def to_srt(cues: Sequence[Cue]) -> str:
    """SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_one_line(cue.text)}\n\n"
        for number, cue in enumerate(cues, start=1)
    )


def to_vtt(cues: Sequence[Cue]) -> str:
    """WebVTT subtitles."""
    escaped = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_one_line(cue.text).translate(escaped)}\n\n"
        for cue in cues
    )


def to_json(cues: Sequence[Cue]) -> str:
    """A list of objects with start, end (seconds), speaker, text, and words where their times are known."""
    return json.dumps([cue_values(cue) for cue in cues], indent=2, ensure_ascii=False) + "\n"


def cue_values(cue: Cue) -> dict[str, object]:
    """A cue as JSON has it."""
    return {key: value for key, value in asdict(cue).items() if key != "words" or value}


def words_within(frames: Sequence[tuple[str, float, float]], start: float, end: float) -> tuple[Word, ...]:
    """Words of a sentence that is heard from ``start`` to ``end``; their times are shares of its length, 0 to 1."""
    return tuple(
        Word(start + first * (end - start), start + last * (end - start), text) for text, first, last in frames
    )


SUBTITLES: dict[str, Callable[[Sequence[Cue]], str]] = {"srt": to_srt, "vtt": to_vtt, "json": to_json}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
