"""Scripts: who says what, sentence by sentence, spoken as one conversation. Plain text is a script of one speaker.

A script's lines are ``[0] text`` or ``[anna] text``, with a speaker id or the name of a voice, and ``[pause 0.5]``. A
line without a speaker continues the one before. Lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.conversation import Conversation
from csm.errors import PromptError
from csm.generator import Generator
from csm.text import Pause, normalize, parse_pauses, split, strip_markup
from csm.voices import Voice, check_name

SPEAKER = re.compile(r"\s*\[([^\]\n]*)\]\s*(.*)")
FADE_MS = 5.0  # at both ends of a turn, so that no join has a step


@dataclass(frozen=True)
class Line:
    """One turn: a speaker's id or a voice's name, the text as it is spoken, and as it was written."""

    speaker: int | str
    text: str
    written: str


@dataclass(frozen=True)
class Cue:
    """When a line is heard: seconds from the start."""

    start: float
    end: float
    speaker: int | str
    text: str


Item = Line | Pause


def text_items(text: str, speaker: int | str = 0, normalized: bool = True, sentences: bool = True) -> list[Item]:
    """The turns and pauses of a plain text: its lines, and by default their sentences, as they are spoken.

    ``normalized`` spells out numbers and removes markup; ``sentences`` splits lines. Raises PromptError.
    """
    items: list[Item] = []
    for part in parse_pauses(text):
        if isinstance(part, Pause):
            items.append(part)
            continue
        for line in (strip_markup(part) if normalized else part).splitlines():
            for written in split(line) if sentences else [line.strip()]:
                spoken = normalize(written) if normalized else written
                if spoken.strip():
                    items.append(Line(speaker, spoken, written))
    return items


def parse_script(text: str, normalized: bool = True, sentences: bool = True) -> list[Item]:
    """The turns and pauses of a script. Raises PromptError, which names the line, or VoiceError for a bad name."""
    items: list[Item] = []
    speaker: int | str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        match = SPEAKER.match(line)
        if match and not re.match(r"pause\b", match[1].strip(), re.IGNORECASE):
            speaker, line = _speaker(match[1].strip()), match[2]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            parts = text_items(line, 0 if speaker is None else speaker, normalized, sentences)
        except PromptError as error:
            raise PromptError(f"line {number}: {error}") from error
        if speaker is None and any(isinstance(part, Line) for part in parts):
            raise PromptError(f"line {number}: nobody speaks it; begin it with [0], or with the name of a voice")
        items += parts
    return items


def _speaker(name: str) -> int | str:
    return int(name) if name.isascii() and name.isdigit() else check_name(name)


def speaker_ids(items: Iterable[Item], generator: Generator, voices: Mapping[int, Voice]) -> dict[int | str, int]:
    """An id for every speaker of a script: numbers are ids, and a voice takes its own id if that is free."""
    names = list(dict.fromkeys(item.speaker for item in items if isinstance(item, Line)))
    ids: dict[int | str, int] = {name: name for name in names if isinstance(name, int)}
    for name in names:
        if isinstance(name, str):
            taken = {*ids.values(), *voices}
            own = generator.voice(name).speaker
            ids[name] = own if own not in taken else next(free for free in range(len(taken) + 1) if free not in taken)
    return ids


class Narration:
    """Speaks items as turns of one conversation. ``cues`` grows as they are heard."""

    def __init__(
        self,
        generator: Generator,
        items: Sequence[Item],
        voices: Mapping[int, Voice] | None = None,
        max_turn_ms: float | None = None,
        max_turns: int | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
    ):
        """Arguments as for Conversation. Every text is checked here: a bad last line fails before the first is spoken.

        Raises PromptError, VoiceError, SamplingError.
        """
        self.items = items
        self.cues: list[Cue] = []
        self.sample_rate = generator.sample_rate
        self.ids = speaker_ids(items, generator, voices or {})
        named = {speaker: generator.voice(name) for name, speaker in self.ids.items() if isinstance(name, str)}
        limit_ms = generator.defaults.max_audio_length_ms if max_turn_ms is None else max_turn_ms
        self.conversation = Conversation(
            generator,
            {**(voices or {}), **named},
            limit_ms,
            max_turns=max_turns,
            temperature=temperature,
            topk=topk,
            seed=seed,
        )
        for item in items:
            if isinstance(item, Line):
                self.conversation.check(self.ids[item.speaker], item.text)
        self._num_samples = 0

    def stream(self, watch: Callable[[Line, Iterator[Tensor]], Iterator[Tensor]] | None = None) -> Iterator[Tensor]:
        """Chunks (samples,) of all items. ``watch`` wraps the chunks of a line, for example in a progress bar."""
        for item in self.items:
            if isinstance(item, Pause):
                yield self._count(torch.zeros(round(item.seconds * self.sample_rate)))
                continue
            start = self._num_samples
            chunks = self.conversation.say(self.ids[item.speaker], item.text)
            for chunk in fade(watch(item, chunks) if watch else chunks, round(FADE_MS * self.sample_rate / 1000)):
                yield self._count(chunk)
            if self._num_samples > start:
                times = start / self.sample_rate, self._num_samples / self.sample_rate
                self.cues.append(Cue(*times, item.speaker, item.written))

    def _count(self, chunk: Tensor) -> Tensor:
        self._num_samples += chunk.shape[0]
        return chunk


def fade(chunks: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """The same samples with a linear fade over ``length`` samples at both ends; so many are held back until the end."""
    ramp = torch.arange(1, length + 1) / (length + 1)
    held, first = torch.zeros(0), True
    for chunk in chunks:
        held = torch.cat((held, chunk))
        if first and held.shape[0] >= length:
            held = torch.cat((held[:length] * ramp, held[length:]))
            first = False
        if not first and held.shape[0] > length:
            yield held[:-length]
            held = held[-length:]
    tail = min(length, held.shape[0])
    if tail:
        yield torch.cat((held[: held.shape[0] - tail], held[held.shape[0] - tail :] * ramp.flip(0)[length - tail :]))


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
    return json.dumps([vars(cue) for cue in cues], indent=2, ensure_ascii=False) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
