"""Ears: a speech recogniser and a speaker encoder, from packages that carry their models (the extra ``eval``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from csm.audio import to_mono
from csm.errors import CSMError

RATE = 16_000  # of both
DETECTOR_OFF = {"vad_threshold": "0.0"}
SILENCE_SECONDS = 0.5  # before and after: speech that begins at once loses its first word or gains a "you"


def _package(name: str) -> ModuleType:
    """An optional package; Resemblyzer's own imports warn of things that are not ours to mend."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise CSMError(f"evaluation needs {name} ({error}): pip install 'csm[eval]'") from error


class Recogniser:
    """Moonshine tiny (English), from moonshine-voice.

    Its voice activity detector is off: what it remembers of one recording changes where it cuts the next, and a piece
    of silence that it takes for speech is heard as "you".
    """

    def __init__(self) -> None:
        moonshine = _package("moonshine_voice")
        model = Path(moonshine.get_assets_path()) / "tiny-en"
        self._transcriber = moonshine.Transcriber(str(model), moonshine.ModelArch.TINY, options=DETECTOR_OFF)

    def hear(self, audio: Tensor, sample_rate: int) -> str:
        """The words in (samples,) or (channels, samples); none in no samples."""
        if audio.numel() == 0:
            return ""
        silence = torch.zeros(int(SILENCE_SECONDS * RATE))
        samples = torch.cat((silence, to_mono(audio, sample_rate, RATE), silence))
        found = self._transcriber.transcribe_without_streaming(samples.tolist(), RATE)
        return " ".join(line.text for line in found.lines)


class SpeakerEncoder:
    """Resemblyzer's (GE2E, https://arxiv.org/abs/1710.10467) on the CPU."""

    def __init__(self) -> None:
        self._package = _package("resemblyzer")
        self._encoder = self._package.VoiceEncoder("cpu", verbose=False)

    def embed(self, audio: Tensor, sample_rate: int) -> np.ndarray | None:
        """A voice as a vector of length 1; None where there are no samples."""
        if audio.numel() == 0:
            return None
        samples = to_mono(audio, sample_rate, RATE).numpy()
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            trimmed = self._package.preprocess_wav(samples)
            return self._encoder.embed_utterance(trimmed if trimmed.size else samples)


def similarity(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
    """Cosine of two voices, 1 for the same; None without one of them."""
    if one is None or other is None:
        return None
    cosine = float(one @ other)
    return cosine if np.isfinite(cosine) else None
