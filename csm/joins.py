"""What turns go through before they are joined: one loudness, another speed, and fades at both ends.

Shapes: (samples,) float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torchaudio.functional
from torch import Tensor

from csm.errors import CSMError
from csm.formats import Stretch, import_av

FADE_MS = 5.0  # at both ends of a turn, so that no join has a step
MIN_SPEED, MAX_SPEED = 0.25, 4.0
MAX_GAIN_DB = 12.0  # a turn that is further from the loudness of the others is not speech
PEAK = 0.97  # of full scale: a turn is not made louder than that
SILENCE = 1e-4  # peak: -80 dB
MEASURED_PEAK = 0.25
BLOCK_SECONDS = 0.4  # ITU-R BS.1770: a loudness needs so much audio


def check_speed(speed: float) -> None:
    """Raise CSMError for a speed that is out of range, AudioError where PyAV is missing."""
    if not MIN_SPEED <= speed <= MAX_SPEED:
        raise CSMError(f"the speed must be from {MIN_SPEED:g} to {MAX_SPEED:g}, not {speed:g}")
    if speed != 1:
        import_av("a speed other than 1")


def loudness(audio: Tensor, sample_rate: int) -> float | None:
    """Loudness in LUFS (ITU-R BS.1770-4, pauses do not count); None for silence. Short audio is measured repeated."""
    peak = float(audio.abs().max()) if audio.numel() else 0.0
    if peak < SILENCE:
        return None
    scale = MEASURED_PEAK / peak  # torchaudio's filters clip at 1, and one of them lifts high tones
    audio = audio.repeat(math.ceil(BLOCK_SECONDS * sample_rate / audio.shape[0])) * scale
    value = float(torchaudio.functional.loudness(audio[None], sample_rate)) - 20 * math.log10(scale)
    return value if math.isfinite(value) else None


class Level:
    """Brings turns to one loudness: ``target`` in LUFS, or that of the first turn."""

    def __init__(self, sample_rate: int, target: float | None = None):
        self._sample_rate = sample_rate
        self._target = target

    def __call__(self, audio: Tensor) -> Tensor:
        """The same samples with one gain, which does not lift their peak above ``PEAK``. Silence stays as it is."""
        measured = loudness(audio, self._sample_rate)
        if measured is None:
            return audio
        if self._target is None:
            self._target = measured
        decibels = max(-MAX_GAIN_DB, min(MAX_GAIN_DB, self._target - measured))
        gain = 10 ** (decibels / 20)
        return audio * min(gain, max(1.0, PEAK / float(audio.abs().max())))


def whole(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """All chunks as one, once the last has arrived."""
    parts = list(chunks)
    if parts:
        yield torch.cat(parts)


def stretched(chunks: Iterable[Tensor], speed: float, sample_rate: int) -> Iterator[Tensor]:
    """The chunks at another speed, with the same pitch."""
    stretch = Stretch(speed, sample_rate)
    for chunk in chunks:
        audio_N = stretch.write(chunk.numpy())
        if audio_N.shape[0]:
            yield torch.from_numpy(audio_N)
    rest_N = stretch.close()
    if rest_N.shape[0]:
        yield torch.from_numpy(rest_N)


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


def join(
    chunks: Iterable[Tensor], sample_rate: int, speed: float = 1.0, level: Level | None = None
) -> Iterator[Tensor]:
    """A turn's chunks, ready to be followed by the next turn's. With ``level`` they arrive as one, at the end."""
    if level is not None:
        chunks = map(level, whole(chunks))
    return fade(stretched(chunks, speed, sample_rate), round(FADE_MS * sample_rate / 1000))
