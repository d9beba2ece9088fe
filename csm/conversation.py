"""A conversation that never ends: turns that share a context, of which the oldest leave when the window is full.

Every speaker may have a voice. The voices' clips come first in every prompt and never leave. Turns keep their codes,
so a prompt begins with rows that the engine's prefix cache knows from the turn before.

The window has the backbone's number of positions (2048). When the next turn would not fit, the oldest turns leave until
the rest takes at most ``low_water`` of the window. The positions of later turns then change, so one prefill follows.
Without a low-water mark there would be one for every turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csm.engine import Frame
from csm.errors import CSMError, PromptError
from csm.generator import Generator
from csm.guards import DEFAULT_GUARDS, Guards
from csm.metrics import GenerationMetrics
from csm.prompt import Segment
from csm.request import SpeechRequest
from csm.stream import SpeechStream
from csm.text import ClauseBuffer
from csm.voices import Voice, save_tensors

FORMAT = "csm-conversation-1"
LOW_WATER = 0.6  # share of the window that turns and voices take after an eviction
RESERVE = 0.25  # share of the window that is kept free for the next turn, at most
MAX_TURN_MS = 30_000
SETTINGS = ("max_turn_ms", "low_water", "max_turns", "temperature", "topk", "seed")


@dataclass
class ConversationStats:
    """What a conversation has done: turns generated and added, turns and positions evicted, seconds generated, retries.

    A turn is evicted where it leaves the window, for lack of room or because of ``max_turns``.
    """

    num_turns: int = 0
    num_evicted: int = 0
    positions_evicted: int = 0
    seconds: float = 0.0
    num_retries: int = 0


@dataclass(eq=False)
class _Turn:
    segment: Segment
    num_positions: int


class Conversation:
    """Turns of several speakers over one generator. Not safe to use from several threads at once."""

    def __init__(
        self,
        generator: Generator,
        voices: Mapping[int, str | Voice] | None = None,
        max_turn_ms: float = MAX_TURN_MS,
        low_water: float = LOW_WATER,
        max_turns: int | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        guards: Guards = DEFAULT_GUARDS,
    ):
        """
        Args:
            generator: the model that generates.
            voices: for a speaker's id its voice, or the name of one.
            max_turn_ms: the most audio of a turn. So much of the window is kept free for it, at most a quarter.
            low_water: after an eviction, voices and turns take at most this share of the window.
            max_turns: the most turns of context; None is as many as fit.
            temperature, topk: of every turn; None is the checkpoint's default.
            seed: turn n, from 0, is drawn with ``seed + n``; None draws a seed for each.
            guards: of every turn, as for ``Generator.stream``.

        Raises:
            VoiceError: a voice does not exist.
            CSMError: an argument is out of range.
        """
        if not 0 < low_water <= 1:
            raise CSMError(f"low_water must be above 0 and at most 1, not {low_water!r}")
        if not max_turn_ms >= generator.frame_ms:
            raise CSMError(
                f"the audio's limit must be at least one frame, {generator.frame_ms:g} ms, not {max_turn_ms!r}"
            )
        if max_turns is not None and max_turns < 0:
            raise CSMError(f"max_turns must be at least 0, not {max_turns!r}")
        self.generator = generator
        self.max_turn_ms = max_turn_ms
        self.low_water = low_water
        self.max_turns = max_turns
        self.temperature, self.topk, self.seed = temperature, topk, seed
        self.guards = guards
        self.stats = ConversationStats()
        self.metrics: GenerationMetrics | None = None  # of the turn generated last
        self.voices = {speaker: generator.voice(voice) for speaker, voice in (voices or {}).items()}
        self._references = [
            segment for speaker, voice in sorted(self.voices.items()) for segment in voice.segments(speaker)
        ]
        self._pinned = sum(generator.num_positions(segment) for segment in self._references)
        self._turns: list[_Turn] = []
        self._window = generator.config.backbone.max_positions
        self._reserve = min(generator.num_frames(max_turn_ms), int(RESERVE * self._window))

    @property
    def turns(self) -> list[Segment]:
        """The turns in the window, oldest first, without the voices' clips."""
        return [turn.segment for turn in self._turns]

    @property
    def context(self) -> list[Segment]:
        """What the next turn continues: the voices' clips, then the turns."""
        return [*self._references, *self.turns]

    @property
    def num_positions(self) -> int:
        """Positions of the window that voices and turns take."""
        return self._pinned + sum(turn.num_positions for turn in self._turns)

    def add(self, turn: Segment) -> None:
        """Add a turn that is not generated here: what the other side said, with audio or codes.

        Raises PromptError, PromptTooLongError or AudioError for a turn that the model cannot read.
        """
        turn = self.generator.prepare(turn)
        num_positions = self.generator.num_positions(turn)
        if self._pinned + num_positions + self._reserve > self._window:
            raise PromptError(
                f"the turn takes {num_positions} positions, but voices and one more turn leave "
                f"{self._window - self._pinned - self._reserve}: split it"
            )
        self._make_room(num_positions)
        self._append(turn, num_positions)

    def say(self, speaker: int, text: str | Iterable[str]) -> Iterator[Tensor]:
        """Generate a turn: chunks (samples,) as they arrive, and keep it as part of the context.

        ``text`` may arrive in pieces, as a language model writes it. Each clause then becomes a turn as soon as it is
        complete. A turn whose reader stops early keeps the frames that were read. Raises as ``Generator.stream`` does;
        a string is checked at the call.
        """
        if isinstance(text, str):
            num_evicted = self.stats.num_evicted
            request = self._request(speaker, text)
            frames = self.generator.stream_frames(request, self.guards)
            return self._say(request, frames, self.stats.num_evicted - num_evicted)
        return self._say_pieces(speaker, text)

    def check(self, speaker: int, text: str) -> None:
        """Raise what ``say`` would raise for this text, after the earlier turns have left. Generates nothing."""
        request = SpeechRequest(
            text, speaker, self._references, self.max_turn_ms, self.temperature, self.topk, self.seed
        )
        self.generator.stream_frames(request)

    def _say_pieces(self, speaker: int, pieces: Iterable[str]) -> Iterator[Tensor]:
        clauses = ClauseBuffer()
        for piece in pieces:
            for clause in clauses.push(piece):
                yield from self.say(speaker, clause)
        for clause in clauses.flush():
            yield from self.say(speaker, clause)

    def _request(self, speaker: int, text: str) -> SpeechRequest:
        """The request of a turn, after the turns that do not fit have left. A text that is too long moves none."""
        num_positions = self.generator.num_positions(Segment(speaker, text))
        if num_positions >= self._window:
            self.check(speaker, text)  # raises
        self._make_room(num_positions)
        seed = None if self.seed is None else self.seed + self.stats.num_turns
        request = SpeechRequest(text, speaker, self.context, self.max_turn_ms, self.temperature, self.topk, seed)
        room_ms = self.generator.room_ms(request)
        if room_ms < self._reserve * self.generator.frame_ms:
            return request  # voices and text alone leave less than a turn may take: the generator warns
        return replace(request, max_audio_length_ms=min(self.max_turn_ms, room_ms))

    def _say(self, request: SpeechRequest, frames: SpeechStream[Frame], evictions: int) -> Iterator[Tensor]:
        codes: list[Tensor] = []
        try:
            for frame in frames:
                codes.append(frame.codes_K)
                assert frame.audio_N is not None
                yield frame.audio_N
        finally:
            if frames.metrics is not None:
                self.metrics = replace(frames.metrics, evictions=evictions)
                self.stats.num_retries += self.metrics.retries
            if codes:
                turn = Segment(request.speaker, request.text, codes=torch.stack(codes))
                self.stats.seconds += len(codes) * self.generator.frame_ms / 1000
                self._append(turn, self.generator.num_positions(turn))

    def _append(self, turn: Segment, num_positions: int) -> None:
        self._turns.append(_Turn(turn, num_positions))
        self.stats.num_turns += 1

    def _make_room(self, num_positions: int) -> None:
        """Let the oldest turns leave: those beyond ``max_turns``, and more if the next turn would not fit."""
        while self.max_turns is not None and len(self._turns) > self.max_turns:
            self._evict()
        if self.num_positions + num_positions + self._reserve <= self._window:
            return
        limit = min(self.low_water * self._window, self._window - num_positions - self._reserve)
        while self._turns and self.num_positions > limit:
            self._evict()

    def _evict(self) -> None:
        turn = self._turns.pop(0)
        self.stats.num_evicted += 1
        self.stats.positions_evicted += turn.num_positions

    def save(self, path: str | Path) -> None:
        """Write voices, turns and settings to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        turns, voices = [], []
        for index, segment in enumerate(self.turns):
            assert segment.codes is not None
            tensors[f"turn_{index}"] = segment.codes.to(torch.int32).contiguous()
            turns.append([segment.speaker, segment.text])
        for speaker, voice in self.voices.items():
            voices.append([speaker, voice.name, list(voice.texts), voice.speaker, voice.consent, voice.guessed])
            for index, codes_TK in enumerate(voice.codes):
                tensors[f"voice_{speaker}_{index}"] = codes_TK.to(torch.int32).contiguous()
        settings = {key: getattr(self, key) for key in SETTINGS}
        state = {"turns": turns, "voices": voices, "settings": settings, "stats": vars(self.stats)}
        save_tensors(tensors, Path(path), {"format": FORMAT, "state": json.dumps(state)})

    @classmethod
    def load(cls, generator: Generator, path: str | Path, guards: Guards = DEFAULT_GUARDS) -> Conversation:
        """Read what ``save`` wrote; the conversation goes on where it was. Raises CSMError, which names the file.

        ``guards`` are not part of the file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).long() for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise KeyError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            return cls._restore(generator, json.loads(metadata["state"]), tensors, guards)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CSMError(f"{path}: cannot be read as a conversation: {error}") from error

    @classmethod
    def _restore(
        cls, generator: Generator, state: dict[str, Any], tensors: dict[str, Tensor], guards: Guards
    ) -> Conversation:
        voices = {}
        for speaker, name, texts, own_id, consent, *guessed in state["voices"]:  # older files lack the last
            codes = tuple(tensors[f"voice_{speaker}_{index}"] for index in range(len(texts)))
            voices[speaker] = Voice(name, tuple(texts), codes, own_id, consent, guessed == [True])
        conversation = cls(generator, voices, **state["settings"], guards=guards)
        for index, (speaker, text) in enumerate(state["turns"]):
            turn = generator.prepare(Segment(speaker, text, codes=tensors[f"turn_{index}"]))
            conversation._append(turn, generator.num_positions(turn))
        conversation.stats = ConversationStats(**state["stats"])
        return conversation
