"""Audio conversion and files: to mono float samples at one sample rate, and 16-bit WAV files.

Independent of the codec. Files are decoded by sphn (a dependency of moshi), some by PyAV; torchaudio resamples.
"""

from __future__ import annotations

import itertools
import math
import numbers
import os
import tempfile
import wave
from pathlib import Path

import numpy as np
import sphn
import torch
import torchaudio.functional
from torch import Tensor

from csm.errors import AudioError
from csm.formats import import_av

FFMPEG_SUFFIXES = (".m4a", ".m4b", ".mp4", ".aac", ".opus", ".webm")  # formats that sphn does not read
MAX_PHASES = 1_000_000  # of torchaudio's polyphase filter bank; 44,100 Hz to 24,000 Hz takes 147 * 80


def to_mono(audio: Tensor, sample_rate: int, target_rate: int) -> Tensor:
    """Convert (samples,) or (channels, samples) at any rate to (samples,) float32 at ``target_rate`` Hz, on the CPU.

    Channels are averaged. Integer samples are PCM of the dtype's width. Raises AudioError if the audio is empty, not
    finite, or of another shape.
    """
    audio = _as_tensor(audio)
    if audio.dtype == torch.bool or audio.is_complex() or audio.ndim not in (1, 2):
        raise AudioError(f"audio must be (samples,) or (channels, samples) of real numbers, not {_kind(audio)}")
    if audio.dtype == torch.uint8:  # 8-bit PCM is unsigned
        audio = audio.float() / 128 - 1
    elif not audio.is_floating_point():
        audio = audio.float() / (torch.iinfo(audio.dtype).max + 1)
    if audio.ndim == 2:
        if audio.shape[0] > 8:
            raise AudioError(f"audio must be (channels, samples) with at most 8 channels, not {tuple(audio.shape)}")
        audio = audio.float().mean(dim=0) if audio.shape[0] else audio.new_empty(0)
    audio = audio.float()
    if audio.numel() == 0:
        raise AudioError("audio is empty")
    if not torch.isfinite(audio).all():
        raise AudioError("audio has samples that are not finite (NaN or infinite)")
    if not isinstance(sample_rate, numbers.Real) or not sample_rate >= 1 or sample_rate % 1 != 0:
        raise AudioError(f"sample rate must be a whole number of at least 1 Hz, not {sample_rate!r}")
    sample_rate = int(sample_rate)
    return audio if sample_rate == target_rate else _resample(audio, sample_rate, target_rate)


def _as_tensor(audio: Tensor) -> Tensor:
    try:
        if isinstance(audio, np.ndarray):  # torch supports neither negative strides nor foreign byte orders
            audio = np.ascontiguousarray(audio, audio.dtype.newbyteorder("="))
        return torch.as_tensor(audio).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"audio must be a tensor or an array of samples, not {type(audio).__name__}") from error


def _resample(audio: Tensor, sample_rate: int, target_rate: int) -> Tensor:
    """Resample (samples,) by a polyphase filter bank, or by FFT if the bank would be too large.

    The bank has one filter per phase. For almost coprime rates (24,001 and 24,000 Hz) it would take gigabytes.
    """
    common = math.gcd(sample_rate, target_rate)
    if (sample_rate // common) * (target_rate // common) <= MAX_PHASES:
        return torchaudio.functional.resample(audio, sample_rate, target_rate)
    num_samples = max(1, round(audio.shape[0] * target_rate / sample_rate))
    return torch.fft.irfft(torch.fft.rfft(audio), n=num_samples) * (num_samples / audio.shape[0])


def _kind(audio: Tensor) -> str:
    return f"{audio.dtype} of shape {tuple(audio.shape)}"


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """Read an audio file: (channels, samples) float32 and the sample rate in Hz.

    WAV, FLAC, MP3 and Ogg Vorbis; with PyAV also AAC and Opus (m4a, m4b, opus, ...). Raises AudioError that names the
    file.
    """
    if not Path(path).is_file():
        raise AudioError(f"{path}: no such file")
    if Path(path).suffix.lower() in FFMPEG_SUFFIXES:
        return _read_with_ffmpeg(path)
    try:
        samples, sample_rate = sphn.read(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic in sphn (for a sample rate of 0, say) derives from BaseException
        raise AudioError(f"{path}: cannot be decoded as audio: {error}") from error
    return torch.from_numpy(samples), int(sample_rate)


def _read_with_ffmpeg(path: str | Path) -> tuple[Tensor, int]:
    av = import_av(f"{path}: reading this format")
    parts = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: cannot be decoded as audio: there is no audio in it")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            for frame in itertools.chain(container.decode(stream), [None]):
                parts += [torch.from_numpy(out.to_ndarray()) for out in planar.resample(frame)]
            sample_rate = stream.rate
    except (av.FFmpegError, ValueError) as error:
        raise AudioError(f"{path}: cannot be decoded as audio: {error}") from error
    return torch.cat(parts, dim=1) if parts else torch.zeros(1, 0), sample_rate


def to_pcm(audio: Tensor) -> bytes:
    """(samples,) floats, clipped to -1..1, as 16-bit little-endian samples."""
    pcm = (audio.detach().cpu().float().clamp(-1, 1) * 32767).round().to(torch.int16)
    return pcm.numpy().astype("<i2").tobytes()


class AtomicWriter:
    """Writes a file that appears under its name only once it is whole. A context manager.

    Entering it creates a temporary file beside ``path``, so an unwritable folder raises before any work is done.
    Leaving it renames the temporary file to ``path``, or removes it after an exception. Call ``begin`` before
    ``write``. Subclasses write to ``_file``, and finish it in ``_close``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.realpath(path))  # replace the target of a symbolic link, not the link

    def __enter__(self) -> AtomicWriter:
        if self.path.is_dir():
            raise AudioError(f"{self.path} is a folder: give a file name")
        if self.path.exists() and not self.path.is_file():
            raise AudioError(f"{self.path} is a device or a pipe: give the name of a regular file")
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".csm-", suffix=".part")
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._temporary = Path(name)
        self._file = os.fdopen(handle, "w+b")
        return self

    def begin(self, sample_rate: int) -> None:
        """Set the sample rate in Hz."""
        raise NotImplementedError

    def write(self, audio: Tensor) -> None:
        """Append (samples,) floats, clipped to -1..1."""
        raise NotImplementedError

    def write_bytes(self, data: bytes) -> None:
        """Append bytes as they are."""
        try:
            self._file.write(data)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _close(self, complete: bool) -> None:
        """Write what is left; ``complete`` is false after an exception."""

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            self._close(kind is None)
            self._file.close()
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                os.chmod(self._temporary, 0o666 & ~umask)  # mkstemp's own mode is 0600
                os.replace(self._temporary, self.path)
        except OSError as failure:
            raise AudioError(f"{self.path}: cannot be written: {failure.strerror}") from failure
        finally:
            self._temporary.unlink(missing_ok=True)


class WavWriter(AtomicWriter):
    """Writes a 16-bit mono WAV file atomically. A context manager: ``begin``, then ``write``."""

    _wave: wave.Wave_write | None = None

    def begin(self, sample_rate: int) -> None:
        """Set the sample rate in Hz."""
        self._wave = wave.Wave_write(self._file)
        self._wave.setparams((1, 2, sample_rate, 0, "NONE", "not compressed"))

    def write(self, audio: Tensor) -> None:
        """Append (samples,) floats, clipped to -1..1."""
        assert self._wave is not None, "call begin() first"
        try:
            self._wave.writeframes(to_pcm(audio))
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _close(self, complete: bool) -> None:
        if self._wave is not None:
            self._wave.close()
