"""Evaluation of speech from three sources: recordings, the same through the codec, and a model's generated audio."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from csm.audio import WavWriter, read_audio
from csm.errors import CSMError, RoomWarning
from csm.evaluate.listen import Recogniser, SpeakerEncoder, similarity
from csm.evaluate.words import word_errors
from csm.generator import Generator
from csm.guards import GuardEvent, Guards
from csm.prompt import Segment

SPEAKER_RECORDINGS = 20  # recordings averaged into a speaker's reference voice


@dataclass(frozen=True)
class Sentence:
    """A text to evaluate, its speaker id, and its recording, if there is one."""

    text: str
    speaker: int = 0
    audio: Path | None = None


@dataclass(frozen=True)
class Utterance:
    """The evaluation of one sentence's audio. Values that do not apply are None.

    ``heard`` is the recogniser's text. ``ended`` says whether the audio is shorter than the limit. ``length_ratio`` is
    the duration divided by the recording's. ``similar`` is the cosine similarity to the voice of the recording or of
    the reference. ``right_voice`` says whether the sentence's own speaker is the most similar of all speakers.
    """

    text: str
    heard: str
    errors: int
    words: int
    seconds: float
    seed: int | None = None
    ended: bool | None = None
    length_ratio: float | None = None
    similar: float | None = None
    speaker: int = 0
    right_voice: bool | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How a model generates the sentences. ``context`` precedes every sentence; ``batch`` are generated at once.

    A ``temperature`` or ``top_k`` of None is the checkpoint's own default. ``guard_events``, if it is a list, turns
    the guards on and collects what they did.
    """

    seeds: int = 1
    temperature: float | None = None
    top_k: int | None = None
    max_seconds: float = 20.0
    batch: int = 4
    context: tuple[Segment, ...] = ()
    guard_events: list[GuardEvent] | None = None


class Evaluator:
    """The recogniser, the speaker encoder, and the voices that audio is compared with.

    ``reference`` is a recording whose voice replaces each sentence's own as the target of the comparison. The
    recordings of ``sentences`` define the voices of the speakers, if there are several.
    """

    def __init__(self, reference: Path | None = None, sentences: Sequence[Sentence] = ()):
        self._recogniser, self._encoder = Recogniser(), SpeakerEncoder()
        self._reference = reference
        self._voices: dict[Path, np.ndarray | None] = {}
        self._speakers = self._speaker_voices(sentences)

    def _speaker_voices(self, sentences: Sequence[Sentence]) -> dict[int, np.ndarray]:
        """Each speaker's mean voice over up to SPEAKER_RECORDINGS recordings; empty for a single speaker."""
        paths: dict[int, list[Path]] = {}
        for sentence in sentences:
            if sentence.audio is not None:
                paths.setdefault(sentence.speaker, []).append(sentence.audio)
        if len(paths) < 2:
            return {}
        speakers = {}
        for speaker, own in paths.items():
            voices = [voice for path in own[:SPEAKER_RECORDINGS] if (voice := self._voice(path)) is not None]
            if voices:
                speakers[speaker] = np.mean(voices, axis=0)
                speakers[speaker] /= np.linalg.norm(speakers[speaker])
        return speakers

    def evaluate(
        self,
        sentence: Sentence,
        audio: Tensor,
        sample_rate: int,
        seed: int | None = None,
        ended: bool | None = None,
        compare: bool = True,
    ) -> Utterance:
        """Evaluate audio (samples,) or (channels, samples) of a sentence.

        ``compare`` compares voice and duration with the sentence's recording, or the voice with the reference.
        """
        heard = self._recogniser.transcribe(audio, sample_rate)
        errors, words = word_errors(sentence.text, heard)
        seconds = audio.shape[-1] / sample_rate
        ratio = similar = right = None
        if compare and sentence.audio is not None:
            recorded, rate = read_audio(sentence.audio)
            ratio = seconds / (recorded.shape[-1] / rate)
        target = self._reference or sentence.audio
        known = sentence.speaker in self._speakers
        voice = self._encoder.embed(audio, sample_rate) if known or (compare and target is not None) else None
        if compare and target is not None:
            similar = similarity(voice, self._voice(target))
        if known:
            right = voice is not None and self._most_similar_speaker(voice) == sentence.speaker
        return Utterance(
            sentence.text, heard, errors, words, seconds, seed, ended, ratio, similar, sentence.speaker, right
        )

    def _most_similar_speaker(self, voice: np.ndarray) -> int:
        return max(self._speakers, key=lambda speaker: float(voice @ self._speakers[speaker]))

    def _voice(self, path: Path) -> np.ndarray | None:
        if path not in self._voices:
            self._voices[path] = self._encoder.embed(*read_audio(path))
        return self._voices[path]


def evaluate_recordings(evaluator: Evaluator, sentences: Sequence[Sentence], progress: bool = True) -> list[Utterance]:
    """Evaluate the recordings themselves: the recogniser's own error rate.

    Some of them may also define the speakers' voices.
    """

    def one(sentence: Sentence) -> Utterance:
        assert sentence.audio is not None
        audio, rate = read_audio(sentence.audio)
        return evaluator.evaluate(sentence, audio, rate, compare=False)

    return [one(sentence) for sentence in _bar(sentences, "recordings", progress)]


def evaluate_codec(
    evaluator: Evaluator, generator: Generator, sentences: Sequence[Sentence], progress: bool = True
) -> list[Utterance]:
    """Evaluate the recordings after encoding and decoding: the codec's limit."""

    def one(sentence: Sentence) -> Utterance:
        assert sentence.audio is not None
        audio = generator.decode(generator.encode(*read_audio(sentence.audio)))
        return evaluator.evaluate(sentence, audio, generator.sample_rate)

    return [one(sentence) for sentence in _bar(sentences, "codec", progress)]


def evaluate_speech(
    evaluator: Evaluator,
    generator: Generator,
    sentences: Sequence[Sentence],
    settings: GenerationSettings,
    keep: Path | None = None,
    progress: bool = True,
) -> list[Utterance]:
    """Generate and evaluate every sentence with every seed, in batches. ``keep`` is a folder for the audio."""
    jobs = [(sentence, seed) for seed in range(settings.seeds) for sentence in sentences]
    batches = [jobs[first : first + settings.batch] for first in range(0, len(jobs), settings.batch)]
    utterances: list[Utterance] = []
    for batch in _bar(batches, "speech", progress):
        for (sentence, seed), (audio, ended) in zip(batch, _generate(generator, batch, settings), strict=True):
            if keep is not None:
                _write_wav(keep / f"{len(utterances):04d}-seed{seed}.wav", audio, generator.sample_rate)
            utterances.append(evaluator.evaluate(sentence, audio, generator.sample_rate, seed, ended))
    return utterances


def _generate(
    generator: Generator, jobs: Sequence[tuple[Sentence, int]], settings: GenerationSettings
) -> Iterator[tuple[Tensor, bool]]:
    """The audio (samples,) of each job, and whether it ended before the limit."""
    requests = [
        {
            "text": sentence.text,
            "speaker": sentence.speaker,
            "context": settings.context,
            "max_audio_length_ms": settings.max_seconds * 1000,
            "temperature": settings.temperature,
            "topk": settings.top_k,
            "seed": seed,
        }
        for sentence, seed in jobs
    ]
    frame_seconds = generator.codec.frame_size / generator.sample_rate
    with warnings.catch_warnings():
        # Audio that ends because positions run out would be counted as ended before the limit.
        warnings.simplefilter("error", RoomWarning)
        try:
            audios = _audio(generator, requests, settings.guard_events)
        except RoomWarning as warning:
            raise CSMError(f"{warning}: give a smaller --max-seconds") from warning
    for audio in audios:
        yield audio, audio.shape[0] / generator.sample_rate + frame_seconds <= settings.max_seconds + 1e-6


def _audio(generator: Generator, requests: list[dict], guard_events: list[GuardEvent] | None) -> list[Tensor]:
    if guard_events is not None:
        return generator.generate_batch(requests, Guards(report=guard_events.append))
    all_codes = generator.generate_codes_batch(requests)
    return [generator.decode(codes_TK) if len(codes_TK) else torch.zeros(0) for codes_TK in all_codes]


def _write_wav(path: Path, audio: Tensor, sample_rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with WavWriter(path) as wav:
        wav.begin(sample_rate)
        wav.write(audio)


def _bar(items: Sequence, what: str, progress: bool) -> tqdm:
    return tqdm(items, desc=what, disable=None if progress else True)
