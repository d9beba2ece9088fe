"""Speech before the recogniser: a manifest's recordings, the same through the codec, and what a model says."""

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
from csm.prompt import Segment

VOICE_RECORDINGS = 20  # of a speaker, by which the voice is known


@dataclass(frozen=True)
class Sentence:
    """What is to be said, by whom, and the recording of it, where there is one."""

    text: str
    speaker: int = 0
    audio: Path | None = None


@dataclass(frozen=True)
class Heard:
    """What came of one sentence.

    ``length_ratio`` is against its recording, ``similar`` the likeness to its voice or the reference's, ``right_voice``
    whether no other speaker of the recordings sounds more like it than its own.
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
class Speaking:
    """How a model is made to speak. ``context`` is heard before every sentence."""

    seeds: int = 1
    temperature: float = 0.9
    top_k: int = 50
    max_seconds: float = 20.0
    batch: int = 4
    context: tuple[Segment, ...] = ()


class Ears:
    """Recogniser and speaker encoder, the voices of recordings heard before, and each speaker's voice among them.

    ``sentences`` are those whose recordings tell what the speakers sound like, if there are several.
    """

    def __init__(self, reference: Path | None = None, sentences: Sequence[Sentence] = ()):
        self._recogniser, self._encoder = Recogniser(), SpeakerEncoder()
        self._reference = reference
        self._voices: dict[Path, np.ndarray | None] = {}
        self._speakers = self._speakers_of(sentences)

    def _speakers_of(self, sentences: Sequence[Sentence]) -> dict[int, np.ndarray]:
        """The mean voice of up to VOICE_RECORDINGS recordings of each speaker; nothing of one speaker alone."""
        paths: dict[int, list[Path]] = {}
        for sentence in sentences:
            if sentence.audio is not None:
                paths.setdefault(sentence.speaker, []).append(sentence.audio)
        if len(paths) < 2:
            return {}
        speakers = {}
        for speaker, own in paths.items():
            voices = [voice for path in own[:VOICE_RECORDINGS] if (voice := self._voice(path)) is not None]
            if voices:
                speakers[speaker] = np.mean(voices, axis=0)
                speakers[speaker] /= np.linalg.norm(speakers[speaker])
        return speakers

    def hear(
        self,
        sentence: Sentence,
        audio: Tensor,
        sample_rate: int,
        seed: int | None = None,
        ended: bool | None = None,
        compare: bool = True,
    ) -> Heard:
        """A sentence as it sounded. Its voice and length are compared with its recording, or the reference, if any."""
        heard = self._recogniser.hear(audio, sample_rate)
        errors, words = word_errors(sentence.text, heard)
        seconds = audio.shape[-1] / sample_rate
        ratio = similar = right = None
        if compare and sentence.audio is not None:
            recorded, rate = read_audio(sentence.audio)
            ratio = seconds / (recorded.shape[-1] / rate)
        voice_of = self._reference or sentence.audio
        known = sentence.speaker in self._speakers
        voice = self._encoder.embed(audio, sample_rate) if known or (compare and voice_of is not None) else None
        if compare and voice_of is not None:
            similar = similarity(voice, self._voice(voice_of))
        if known:
            right = voice is not None and self._nearest(voice) == sentence.speaker
        return Heard(sentence.text, heard, errors, words, seconds, seed, ended, ratio, similar, sentence.speaker, right)

    def _nearest(self, voice: np.ndarray) -> int:
        return max(self._speakers, key=lambda speaker: float(voice @ self._speakers[speaker]))

    def _voice(self, path: Path) -> np.ndarray | None:
        if path not in self._voices:
            self._voices[path] = self._encoder.embed(*read_audio(path))
        return self._voices[path]


def recordings(ears: Ears, sentences: Sequence[Sentence], progress: bool = True) -> list[Heard]:
    """The recogniser's floor: the recordings themselves, some of which are among those that voices are known by."""

    def one(sentence: Sentence) -> Heard:
        assert sentence.audio is not None
        audio, rate = read_audio(sentence.audio)
        return ears.hear(sentence, audio, rate, compare=False)

    return [one(sentence) for sentence in _bar(sentences, "recordings", progress)]


def through_codec(
    ears: Ears, generator: Generator, sentences: Sequence[Sentence], progress: bool = True
) -> list[Heard]:
    """The codec's floor: the recordings, encoded and decoded."""

    def one(sentence: Sentence) -> Heard:
        assert sentence.audio is not None
        audio = generator.decode(generator.encode(*read_audio(sentence.audio)))
        return ears.hear(sentence, audio, generator.sample_rate)

    return [one(sentence) for sentence in _bar(sentences, "codec", progress)]


def speech(
    ears: Ears,
    generator: Generator,
    sentences: Sequence[Sentence],
    how: Speaking,
    keep: Path | None = None,
    progress: bool = True,
) -> list[Heard]:
    """Every sentence from every seed, in batches; ``keep`` is a folder for what was said."""
    jobs = [(sentence, seed) for seed in range(how.seeds) for sentence in sentences]
    chunks = [jobs[first : first + how.batch] for first in range(0, len(jobs), how.batch)]
    found: list[Heard] = []
    for chunk in _bar(chunks, "speech", progress):
        for (sentence, seed), (audio, ended) in zip(chunk, _speak(generator, chunk, how), strict=True):
            if keep is not None:
                _write(keep / f"{len(found):04d}-seed{seed}.wav", audio, generator.sample_rate)
            found.append(ears.hear(sentence, audio, generator.sample_rate, seed, ended))
    return found


def _speak(generator: Generator, jobs: Sequence[tuple[Sentence, int]], how: Speaking) -> Iterator[tuple[Tensor, bool]]:
    """Samples of each job, and whether the speech ended by itself."""
    requests = [
        {
            "text": sentence.text,
            "speaker": sentence.speaker,
            "context": how.context,
            "max_audio_length_ms": how.max_seconds * 1000,
            "temperature": how.temperature,
            "topk": how.top_k,
            "seed": seed,
        }
        for sentence, seed in jobs
    ]
    frame_seconds = generator.codec.frame_size / generator.sample_rate
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoomWarning)  # what ends for want of positions has not ended by itself
        try:
            spoken = generator.generate_codes_batch(requests)
        except RoomWarning as warning:
            raise CSMError(f"{warning}: give a smaller --max-seconds") from warning
    for codes_TK in spoken:
        ended = (codes_TK.shape[0] + 1) * frame_seconds <= how.max_seconds + 1e-6
        yield (generator.decode(codes_TK) if len(codes_TK) else torch.zeros(0)), ended


def _write(path: Path, audio: Tensor, sample_rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with WavWriter(path) as wav:
        wav.begin(sample_rate)
        wav.write(audio)


def _bar(items: Sequence, what: str, progress: bool) -> tqdm:
    return tqdm(items, desc=what, disable=None if progress else True)
