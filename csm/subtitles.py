"""Subtitles: when each sentence is heard, as SubRip, WebVTT or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cue:
    """When a sentence is heard: seconds from the start."""

    start: float
    end: float
    speaker: int | str
    text: str


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
    """A list of objects with start, end (seconds), speaker and text."""
    return json.dumps([asdict(cue) for cue in cues], indent=2, ensure_ascii=False) + "\n"


SUBTITLES: dict[str, Callable[[Sequence[Cue]], str]] = {"srt": to_srt, "vtt": to_vtt, "json": to_json}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
