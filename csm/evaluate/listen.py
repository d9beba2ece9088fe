"""A speech recogniser and a speaker encoder, from packages that include their models (the extra ``eval``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm.audio import to_mono
from csm.errors import CSMError

SAMPLE_RATE = 16_000  # of both models' input
RENEW_AFTER = 100  # recordings: the transcriber keeps about 4 MB of each until it is closed
NO_VAD = {"vad_threshold": "0.0"}
SILENCE_SECONDS = 0.5  # added at both ends; speech that starts at once loses its first word or gains a "you"


def _package(name: str) -> ModuleType:
    """Import an optional package, without the warnings of Resemblyzer's own imports."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise CSMError(
            f"evaluation needs the package {name} ({error}); install it with: pip install 'csm[eval]'"
        ) from error


class Recogniser:
    """Moonshine tiny (English), from the package moonshine-voice.

    Its voice activity detector (VAD) is off. The detector keeps state between recordings, which changes how the next
    one is split, and silence that it classifies as speech is transcribed as "you".
    """

    def __init__(self) -> None:
        self._transcriber: Any = None
        self._num_transcribed = 0
        self._renew()

    def _renew(self) -> None:
        moonshine = _package("moonshine_voice")
        if self._transcriber is not None:
            self._transcriber.close()
        model = Path(moonshine.get_assets_path()) / "tiny-en"
        self._transcriber = moonshine.Transcriber(str(model), moonshine.ModelArch.TINY, options=NO_VAD)

    def transcribe(self, audio: Tensor, sample_rate: int) -> str:
        """The text of audio (samples,) or (channels, samples); empty for no samples."""
        if audio.numel() == 0:
            return ""
        if self._num_transcribed and self._num_transcribed % RENEW_AFTER == 0:
            self._renew()
        self._num_transcribed += 1
        silence = torch.zeros(int(SILENCE_SECONDS * SAMPLE_RATE))
        samples = torch.cat((silence, to_mono(audio, sample_rate, SAMPLE_RATE), silence))
        found = self._transcriber.transcribe_without_streaming(samples.tolist(), SAMPLE_RATE)
        return " ".join(line.text for line in found.lines)


class SpeakerEncoder:
    """Resemblyzer's speaker encoder (GE2E, https://arxiv.org/abs/1710.10467), on the CPU."""

    def __init__(self) -> None:
        self._package = _package("resemblyzer")
        self._encoder = self._package.VoiceEncoder("cpu", verbose=False)

    def embed(self, audio: Tensor, sample_rate: int) -> np.ndarray | None:
        """The voice of audio (samples,) or (channels, samples) as a unit vector; None for no samples."""
        if audio.numel() == 0:
            return None
        samples = to_mono(audio, sample_rate, SAMPLE_RATE).numpy()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            trimmed = self._package.preprocess_wav(samples)
            return self._encoder.embed_utterance(trimmed if trimmed.size else samples)


def similarity(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Cosine similarity of two voices; None where one of them is None."""
    if one is None or other is None:
        return None
    cosine = float(one @ other)
    return cosine if np.isfinite(cosine) else None
