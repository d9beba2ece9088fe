"""Scripts: who says what, sentence by sentence, spoken as one conversation. Plain text is a script of one speaker.

A script's lines are ``[0] text`` or ``[anna] text``, with a speaker id or the name of a voice, and ``[pause 0.5]``. A
line without a speaker continues the one before. Lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from csm.conversation import Conversation
from csm.errors import PromptError
from csm.generator import Generator
from csm.guards import DEFAULT_GUARDS, Guards
from csm.joins import Level, check_speed, join
from csm.subtitles import Cue, words_within
from csm.text import Pause, normalize, parse_pauses, split, strip_markup
from csm.voices import Voice, check_name

SPEAKER = re.compile(r"\s*\[([^\]\n]*)\]\s*(.*)")


@dataclass(frozen=True)
class Line:
    """One utterance: a speaker's id or a voice's name, the text as it is spoken, and as it was written.

    ``entry`` counts the entries of a script, each of which begins with a speaker.
    """

    speaker: int | str
    text: str
    written: str
    entry: int = field(default=0, compare=False)


Item = Line | Pause
Watch = Callable[[Line, Iterator[Tensor]], Iterator[Tensor]]


def text_items(
    text: str,
    speaker: int | str = 0,
    normalized: bool = True,
    sentences: bool = True,
    wrapped: bool = False,
    strict: bool = False,
) -> list[Item]:
    """The turns and pauses of a plain text: its lines, and by default their sentences, as they are spoken.

    ``normalized`` spells out numbers and removes markup; ``sentences`` splits lines. In ``wrapped`` text a sentence
    may go on in the next line, as in a book. ``strict`` as for ``parse_pauses``. Raises PromptError.
    """
    items: list[Item] = []
    for part in parse_pauses(text, strict):
        if isinstance(part, Pause):
            items.append(part)
            continue
        plain = strip_markup(part) if normalized else part
        for line in [plain] if wrapped else plain.splitlines():
            for written in split(line) if sentences else [line.strip()]:
                spoken = normalize(written) if normalized else written
                if spoken.strip():
                    items.append(Line(speaker, spoken, written))
    return items


def parse_script(text: str, normalized: bool = True, sentences: bool = True) -> list[Item]:
    """The turns and pauses of a script. Raises PromptError, which names the line, or VoiceError for a bad name."""
    items: list[Item] = []
    speaker: int | str | None = None
    entry = -1
    for number, line in enumerate(text.splitlines(), start=1):
        comment = line.lstrip().startswith("#")
        match = SPEAKER.match(line)
        if match and not re.match(r"pause\b", match[1].strip(), re.IGNORECASE):
            speaker, line, entry = _speaker(match[1].strip()), match[2], entry + 1
        if comment or not line.strip():
            continue
        try:
            parts = text_items(line, 0 if speaker is None else speaker, normalized, sentences, strict=True)
        except PromptError as error:
            raise PromptError(f"line {number}: {error}") from error
        if speaker is None and any(isinstance(part, Line) for part in parts):
            raise PromptError(f"line {number}: nobody speaks it; begin it with [0], or with the name of a voice")
        items += [replace(part, entry=entry) if isinstance(part, Line) else part for part in parts]
    return items


def entries(items: Iterable[Item]) -> list[list[Item]]:
    """The items of each entry of a script that speaks. Pauses belong to the entry before them."""
    groups: list[list[Item]] = []
    last: int | None = None
    leading: list[Item] = []
    for item in items:
        if isinstance(item, Line) and item.entry != last:
            groups.append(leading)
            last, leading = item.entry, []
        (groups[-1] if groups else leading).append(item)
    return groups


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
        speed: float = 1.0,
        level: bool = False,
        words: bool = False,
        guards: Guards = DEFAULT_GUARDS,
    ):
        """Arguments as for Conversation. Every text is checked here: a bad last line fails before the first is spoken.

        ``level`` brings all lines to the loudness of the first. A line is then handed out once it is whole.
        ``words`` gives the cues times of their words.
        Raises PromptError, VoiceError, SamplingError.
        """
        check_speed(speed)
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
            guards=guards,
        )
        for item in items:
            if isinstance(item, Line):
                self.conversation.check(self.ids[item.speaker], item.text)
        self.speed, self._words = speed, words
        self._level = Level(generator.sample_rate) if level else None
        self._num_samples = 0

    def stream(self, watch: Watch | None = None) -> Iterator[Tensor]:
        """Chunks (samples,) of all items. ``watch`` wraps the chunks of a line, for example in a progress bar."""
        return self.speak(self.items, watch)

    def speak(self, items: Iterable[Item], watch: Watch | None = None) -> Iterator[Tensor]:
        """``stream`` of some of the items. Each of the narration's items is spoken once, in order."""
        for item in items:
            if isinstance(item, Pause):
                yield self._count(torch.zeros(round(item.seconds * self.sample_rate)))
                continue
            start = self._num_samples
            chunks = self.conversation.say(self.ids[item.speaker], item.text)
            chunks = watch(item, chunks) if watch else chunks
            for chunk in join(chunks, self.sample_rate, self.speed, self._level):
                yield self._count(chunk)
            if self._num_samples > start:
                times = start / self.sample_rate, self._num_samples / self.sample_rate
                words = self.conversation.generator.word_times(self.conversation.turns[-1]) if self._words else []
                self.cues.append(Cue(*times, item.speaker, item.written, words_within(words, *times)))

    def _count(self, chunk: Tensor) -> Tensor:
        self._num_samples += chunk.shape[0]
        return chunk
