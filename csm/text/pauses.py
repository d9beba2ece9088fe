"""``[pause 0.5]`` inside text: half a second of silence."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csm.errors import PromptError

MAX_PAUSE = 60.0  # seconds
MARKUP = re.compile(r"\[pause\b([^\]\n]*)\]", re.IGNORECASE)
LENGTH = re.compile(r"\s*[-+]?[.,]?\d")  # begins a length, right or wrong
SECONDS = re.compile(r"\s+(\d+(?:\.\d*)?|\.\d+)\s*s?\s*")


@dataclass(frozen=True)
class Pause:
    """Silence of this many seconds."""

    seconds: float


def parse_pauses(text: str, strict: bool = False) -> list[str | Pause]:
    """The parts of a text, in order. Parts without a visible character are left out.

    ``[Pause]`` and ``[pause for applause]`` are words of the text, unless it is ``strict``, as scripts are.
    Raises PromptError for a length that is no number of seconds, or more than ``MAX_PAUSE``.
    """
    parts: list[str | Pause] = []
    done = 0
    for match in MARKUP.finditer(text):
        if not strict and not LENGTH.match(match[1]):
            continue
        parts += [text[done : match.start()], _pause(match)]
        done = match.end()
    parts.append(text[done:])
    return [part for part in parts if isinstance(part, Pause) or part.strip()]


def _pause(match: re.Match[str]) -> Pause:
    seconds = SECONDS.fullmatch(match[1])
    if seconds is None or float(seconds[1]) > MAX_PAUSE:
        raise PromptError(f"{match[0]}: write a pause as [pause 0.5], in seconds, at most {MAX_PAUSE:g}")
    return Pause(float(seconds[1]))
