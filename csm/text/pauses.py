"""``[pause 0.5]`` inside text: half a second of silence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csm.errors import PromptError

MAX_PAUSE = 60.0  # seconds
MARKUP = re.compile(r"\[pause\b([^\]\n]*)\]", re.IGNORECASE)
SECONDS = re.compile(r"\s+(\d+(?:\.\d*)?|\.\d+)\s*s?\s*")


@dataclass(frozen=True)
class Pause:
    """Silence of this many seconds."""

    seconds: float


def parse_pauses(text: str) -> list[str | Pause]:
    """The parts of a text, in order. Parts without a visible character are left out.

    Raises PromptError for a pause without a length, or longer than ``MAX_PAUSE`` seconds.
    """
    parts: list[str | Pause] = []
    done = 0
    for match in MARKUP.finditer(text):
        parts += [text[done : match.start()], _pause(match)]
        done = match.end()
    parts.append(text[done:])
    return [part for part in parts if isinstance(part, Pause) or part.strip()]


def _pause(match: re.Match[str]) -> Pause:
    seconds = SECONDS.fullmatch(match[1])
    if seconds is None or float(seconds[1]) > MAX_PAUSE:
        raise PromptError(f"{match[0]}: write a pause as [pause 0.5], in seconds, at most {MAX_PAUSE:g}")
    return Pause(float(seconds[1]))
