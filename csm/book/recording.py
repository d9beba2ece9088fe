"""Speaks a book: generates the sentences that are missing, then joins all of them into files.

Sentences are generated one at a time, and each request ignores what the engine keeps of generated frames. Codes then
depend on the plan alone, not on where a run began, and a resumed run writes the bytes of an unbroken one.

Shapes: T frames, K codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from csm.audio_file import WITH_CHAPTERS, ChapterMark, EncodedWriter, open_writer
from csm.book.parts import Parts, Section, Sentence, Settings, Take
from csm.generator import Generator
from csm.guards import GuardEvent, Guards
from csm.joins import Level, join
from csm.metrics import GenerationMetrics
from csm.prompt import Segment
from csm.request import SpeechRequest
from csm.script import Line
from csm.subtitles import Cue, until, words_within
from csm.watermark import AudioOutput, Watermark, marked

DECODED_FRAMES = 8
RESERVE = 0.25  # share of the window that the next sentence gets before earlier ones leave
WordShares = list[tuple[str, float, float]]
PREFERENCE = ("", "silence", "short", "repeats", "budget")  # of all takes, the one with the first of these is kept


@dataclass(frozen=True)
class Sound:
    """How sentences are joined: speed, loudness in LUFS, the pause between sections, and whether words get times."""

    speed: float = 1.0
    loudness: float = -20.0
    section_pause: float = 0.0
    words: bool = False


@dataclass
class Recording:
    """What one file holds: its cues and chapters, in seconds from its start."""

    path: Path
    cues: list[Cue] = field(default_factory=list)
    marks: list[ChapterMark] = field(default_factory=list)
    seconds: float = 0.0


class Attempt(NamedTuple):
    """One take of a sentence: the guard that rejects it or "", its codes (T, K), and its metrics."""

    rejection: str
    codes_TK: Tensor
    metrics: GenerationMetrics


def measured(attempts: Sequence[Attempt], audio_seconds: float, evictions: int) -> GenerationMetrics:
    """The metrics of a sentence: the time of all its takes, and ``audio_seconds`` of the one that was kept."""
    last = attempts[-1].metrics
    earlier = sum(attempt.metrics.elapsed_seconds for attempt in attempts[:-1])
    first = None if last.first_audio_seconds is None else earlier + last.first_audio_seconds
    elapsed, retries = earlier + last.elapsed_seconds, len(attempts) - 1
    return replace(
        last,
        audio_seconds=audio_seconds,
        elapsed_seconds=elapsed,
        first_audio_seconds=first,
        retries=retries,
        evictions=evictions,
    )


class Reader:
    """Generates the sentences of a plan. ``references`` are the voices' clips, which begin every prompt."""

    def __init__(self, generator: Generator, references: Sequence[Segment], settings: Settings, parts: Parts):
        self._generator = generator
        self._references = list(references)
        self._settings = settings
        self._guards = Guards.without(*settings.no_guards)
        self._parts = parts

    def check(self, sentence: Sentence) -> None:
        """Raise what its request would raise, without earlier sentences. Generates nothing."""
        self._generator.stream_frames(self._request(sentence, []))

    def generate(
        self, sentences: Sequence[Sentence], done: Callable[[Sentence, Take, bool], None]
    ) -> list[GenerationMetrics]:
        """Generate what is missing; the metrics of each generated sentence.

        ``done`` is told each sentence, and whether it was there already.
        """
        turns: dict[int, Segment] = {}
        parts: list[GenerationMetrics] = []
        for index, sentence in enumerate(sentences):
            take = self._parts.load(sentence.key)
            found = take is not None
            if take is None:
                context = [turns[earlier] for earlier in sentence.context if earlier in turns]
                take, metrics = self._speak(sentence, context)
                parts.append(metrics)
                self._parts.save(sentence.key, take, sentence.line.text)
            turns.pop(index - self._settings.context_turns, None)
            if take.codes_TK.shape[0] and self._settings.context_turns:
                turns[index] = Segment(sentence.speaker, sentence.line.text, codes=take.codes_TK)
            done(sentence, take, found)
        return parts

    def _speak(self, sentence: Sentence, turns: list[Segment]) -> tuple[Take, GenerationMetrics]:
        """Generate until no guard rejects a take, or the retries are used up; then keep the least bad one."""
        request = self._request(sentence, turns)
        attempts: list[Attempt] = []
        again = self._guards.retries and self._settings.temperature != 0  # greedy takes are all the same
        retries = self._settings.retries if again else 0
        for number in range(retries + 1):
            attempts.append(self._attempt(replace(request, seed=sentence.seed + number)))
            if not attempts[-1].rejection:
                break
        kept = min(attempts, key=lambda attempt: (PREFERENCE.index(attempt.rejection), -attempt.codes_TK.shape[0]))
        rejections = tuple(attempt.rejection for attempt in attempts if attempt.rejection)
        seconds = kept.codes_TK.shape[0] * self._generator.frame_ms / 1000
        evictions = len(self._references) + len(turns) - len(request.context)
        return Take(kept.codes_TK, rejections, bool(kept.rejection)), measured(attempts, seconds, evictions)

    def _attempt(self, request: SpeechRequest) -> Attempt:
        events: list[GuardEvent] = []
        guards = replace(self._guards, retries=0, report=events.append)
        stream = self._generator.stream_frames(request, guards, hold=True)
        frames = [frame.codes_K for frame in stream]
        assert stream.metrics is not None
        num_codebooks = self._generator.config.num_codebooks
        codes_TK = torch.stack(frames) if frames else torch.zeros(0, num_codebooks, dtype=torch.int64)
        seconds = len(frames) * self._generator.frame_ms / 1000
        is_short = self._guards.retries > 0 and seconds < guards.min_seconds(request.text)
        rejection = events[0].guard if events else "short" if is_short else ""
        return Attempt(rejection, codes_TK, stream.metrics)

    def _request(self, sentence: Sentence, turns: list[Segment]) -> SpeechRequest:
        """The request of a sentence. The oldest turns leave while it would get less than its share of the window."""
        settings, generator = self._settings, self._generator
        reserve = min(settings.max_turn_ms, RESERVE * generator.config.backbone.max_positions * generator.frame_ms)
        while True:
            request = SpeechRequest(
                sentence.line.text,
                sentence.speaker,
                [*self._references, *turns],
                settings.max_turn_ms,
                settings.temperature,
                settings.topk,
                sentence.seed,
                repeatable=True,
            )
            room = generator.room_ms(request)
            if room >= reserve or not turns:
                return replace(request, max_audio_length_ms=min(settings.max_turn_ms, room))
            turns = turns[1:]


class Binder:
    """Joins finished sentences into files, and marks each file whole if there is a watermark."""

    def __init__(
        self,
        generator: Generator,
        sections: Sequence[Section],
        sentences: Sequence[Sentence],
        sound: Sound,
        watermark: Watermark | None = None,
    ):
        self._generator = generator
        self._sections = sections
        self._sentences = sentences
        self._sound = sound
        self._level = Level(generator.sample_rate, sound.loudness)
        self._watermark = watermark
        self._decoder = generator.codec.stream_decoder(max_frames=DECODED_FRAMES)

    def write(self, path: Path, numbers: Sequence[int], parts: Parts, tags: dict[str, str]) -> Recording:
        """Write some sections into one file, which appears under its name once it is whole."""
        recording = Recording(path)
        with open_writer(path) as writer:
            with ExitStack() as stack:
                (output,) = marked(stack, [writer], self._watermark)
                output.begin(self._generator.sample_rate)
                self._write_sections(output, numbers, parts, recording)
            if isinstance(writer, EncodedWriter):
                with_marks = len(numbers) > 1 and path.suffix.lower() in WITH_CHAPTERS
                writer.describe(recording.marks if with_marks else (), tags)
        return recording

    def _write_sections(self, output: AudioOutput, numbers: Sequence[int], parts: Parts, recording: Recording) -> None:
        """Write the audio of some sections, and note when sentences and sections begin and end."""
        rate, num_samples = self._generator.sample_rate, 0
        starts: list[float] = []
        for number in numbers:
            if number != numbers[0]:  # the pause ends the chapter before
                pause = torch.zeros(round(self._sound.section_pause * rate))
                output.write(pause)
                num_samples += pause.shape[0]
            starts.append(num_samples / rate)
            for line, audio, words in self._section(number, parts):
                output.write(audio)
                times = num_samples / rate, (num_samples + audio.shape[0]) / rate
                if line is not None and audio.shape[0]:
                    recording.cues.append(Cue(*times, line.speaker, line.written, words_within(words, *times)))
                num_samples += audio.shape[0]
        recording.seconds = num_samples / rate
        recording.cues = until(recording.cues, recording.seconds)
        for number, start, end in zip(numbers, starts, [*starts[1:], recording.seconds], strict=True):
            recording.marks.append(ChapterMark(self._sections[number].title, start, end))

    def _section(self, number: int, parts: Parts) -> Iterator[tuple[Line | None, Tensor, WordShares]]:
        """The audio of a section's items, each with its line or, for silence, None; and the times of its words."""
        rate, generator = self._generator.sample_rate, self._generator
        sentences = iter([sentence for sentence in self._sentences if sentence.section == number])
        for item in self._sections[number].items:
            if not isinstance(item, Line):
                yield None, torch.zeros(round(item.seconds * rate)), []
                continue
            sentence = next(sentences)
            take = parts.load(sentence.key)
            assert take is not None, "all sentences are generated before they are joined"
            if take.codes_TK.shape[0]:
                turn = Segment(sentence.speaker, item.text, codes=take.codes_TK)
                words = generator.word_times(turn) if self._sound.words else []
                chunks = self._decoded(take.codes_TK)
                yield item, torch.cat(list(join(chunks, rate, self._sound.speed, self._level))), words

    def _decoded(self, codes_TK: Tensor) -> Iterator[Tensor]:
        """The samples of a sentence, a few frames at a time: memory does not depend on its length."""
        self._decoder.reset()
        for block_TK in codes_TK.to(self._generator.codec.device).split(DECODED_FRAMES):
            yield self._decoder.decode(block_TK.T[None]).flatten().cpu()
