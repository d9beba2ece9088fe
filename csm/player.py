"""Where audio goes while it is generated: a sound device, or a pipe as WAV or raw samples."""

from __future__ import annotations

import sys
from io import FileIO
from types import TracebackType
from typing import Any

from torch import Tensor

from csm.audio import to_pcm
from csm.errors import AudioError
from csm.formats import wav_header

FORMATS = ("wav", "pcm")


class Player:
    """Plays 16-bit mono audio on the default sound device. A context manager; leaving it waits for the end."""

    def __init__(self) -> None:
        try:
            import sounddevice
        except ImportError as error:
            raise AudioError('--play needs sounddevice: pip install "csm[play]"') from error
        except OSError as error:  # the package is there, the PortAudio library is not
            raise AudioError(f"--play needs the PortAudio library (apt install libportaudio2): {error}") from error
        self._sounddevice = sounddevice
        try:
            sounddevice.query_devices(kind="output")
        except (sounddevice.PortAudioError, ValueError) as error:
            raise AudioError(f"--play needs a sound device, and there is none: {error}") from error
        self._stream: Any = None
        self.underruns = 0

    def begin(self, sample_rate: int) -> None:
        """Open the device at a sample rate in Hz."""
        try:
            self._stream = self._sounddevice.RawOutputStream(samplerate=sample_rate, channels=1, dtype="int16")
            self._stream.start()
        except self._sounddevice.PortAudioError as error:
            raise AudioError(f"the sound device cannot be opened at {sample_rate} Hz: {error}") from error

    def write(self, audio: Tensor) -> None:
        """Queue (samples,) floats; waits while the device's buffer is full."""
        self.underruns += bool(self._stream.write(to_pcm(audio)))

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            if kind is None:
                self._stream.stop()  # plays what is queued
            self._stream.close()


def name_of(target: str | None) -> str | None:
    """What messages call the target of a stream."""
    return "standard output" if target == "-" else target


class StreamWriter:
    """Writes audio to a pipe or file as it is generated; "-" is standard output. A context manager.

    ``kind`` is "wav", with a header that leaves the length open, or "pcm", 16-bit little-endian samples alone.
    """

    def __init__(self, target: str, kind: str = "wav"):
        assert kind in FORMATS
        self.target, self.kind = target, kind
        self._file: FileIO | None = None

    def begin(self, sample_rate: int) -> None:
        """Write the header for a sample rate in Hz."""
        if self.kind == "wav":
            self._write(wav_header(sample_rate))

    def write(self, audio: Tensor) -> None:
        """Append (samples,) floats, clipped to -1..1."""
        self._write(to_pcm(audio))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        rest = memoryview(data)  # an unbuffered write may take a part only
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise AudioError(f"{name_of(self.target)}: the stream cannot be written: {error.strerror}") from error

    def __enter__(self) -> StreamWriter:
        try:
            target = sys.stdout.fileno() if self.target == "-" else self.target
            self._file = open(target, "wb", buffering=0, closefd=self.target != "-")
        except OSError as error:
            raise AudioError(f"{name_of(self.target)}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
