"""Audio formats, encoded block by block, so that the first bytes leave while the rest is being generated.

libsndfile (soundfile) encodes MP3, Vorbis, Opus and FLAC; WAV and PCM need no encoder; AAC takes PyAV, an extra. The
server streams these encoders, and ``csm.audio_file`` writes files with them.

Shapes: N samples, float32 within -1 and 1.
"""

from __future__ import annotations

import ctypes
import io
import struct
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any, BinaryIO, Protocol

import numpy as np

from csm.errors import AudioError

MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
MPEG2_KBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # layer III, below 32 kHz
UNKNOWN_SIZE = 0xFFFFFFFF  # of a WAV file that is streamed
MP3 = ("MP3", "MPEG_LAYER_III")
# 80 kbit/s throughout: readers work a length out from the bit rate.
MP3_OPTIONS: dict[str, Any] = {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
AAC_BITS = 64_000  # bits a second
BITEXACT = {"fflags": "+bitexact"}  # the same input gives the same bytes: no random serial number, no version
OGG_PAGE_SECONDS = 0.1  # libsndfile's own choice is 1 s, which would be the delay of the first audio
SET_OGG_PAGE_LATENCY_MS = 0x1302  # a command of sndfile.h, for which soundfile has no method


class Encoder(Protocol):
    """Samples in, bytes out, in order."""

    def write(self, audio_N: np.ndarray) -> bytes:
        """The bytes that are complete once these samples are in."""

    def close(self) -> bytes:
        """The rest."""


class PcmEncoder:
    """16-bit little-endian samples, after a header if there is one."""

    def __init__(self, header: bytes = b""):
        self._header = header

    def write(self, audio_N: np.ndarray) -> bytes:
        """The header once, then the samples."""
        header, self._header = self._header, b""
        return header + (audio_N.clip(-1, 1) * 32767).round().astype("<i2").tobytes()

    def close(self) -> bytes:
        """The header, if there were no samples."""
        return self.write(np.zeros(0, np.float32))


def wav_header(sample_rate: int) -> bytes:
    """The header of a 16-bit mono WAV file of unknown length."""
    riff = struct.pack("<4sI4s", b"RIFF", UNKNOWN_SIZE, b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return riff + layout + struct.pack("<4sI", b"data", UNKNOWN_SIZE)


def import_soundfile() -> ModuleType:
    """The package soundfile. Raises AudioError, which says how to install it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, libsndfile is not
        raise AudioError("this audio format needs soundfile: pip install soundfile") from error
    return soundfile


def import_av(purpose: str) -> ModuleType:
    """The package av (PyAV). Raises AudioError, which names the purpose and says how to install it."""
    try:
        import av
    except ImportError as error:
        raise AudioError(f"{purpose} needs PyAV: pip install av") from error
    return av


class _Pipe(io.RawIOBase):
    """A file that is read while it is written. What is written to an earlier position is dropped: those bytes left.

    Only lengths and checksums in headers are written twice, and every format has a value for "unknown" there.
    """

    def __init__(self) -> None:
        self._ready = bytearray()
        self._length = self._position = 0

    def write(self, data: Any) -> int:
        """Append what lies beyond the end."""
        new = bytes(data)[max(0, self._length - self._position) :]
        self._ready += new
        self._position += len(data)
        self._length = max(self._length, self._position)
        return len(data)

    def readinto(self, _: Any) -> int:
        """Nothing: libsndfile asks for it but never needs it."""
        return 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def seekable(self) -> bool:
        """Yes, for headers."""
        return True

    def writable(self) -> bool:
        """Yes."""
        return True

    def drain(self) -> bytes:
        """What was written since the last call."""
        ready, self._ready = bytes(self._ready), bytearray()
        return ready


class SoundFileEncoder:
    """A format of libsndfile. ``target`` is a file to write to; without one the bytes are handed out."""

    def __init__(
        self, format_name: str, subtype: str, sample_rate: int, target: BinaryIO | None = None, **options: Any
    ):
        self._soundfile = import_soundfile()
        self._pipe = None if target is not None else _Pipe()
        self._file = self._soundfile.SoundFile(
            target or self._pipe, "w", sample_rate, 1, subtype, format=format_name, **options
        )
        if format_name == "OGG" and target is None:
            self._set_page_latency()

    def _set_page_latency(self) -> None:
        latency = self._soundfile._ffi.new("double *", OGG_PAGE_SECONDS * 1000)
        size = ctypes.sizeof(ctypes.c_double)
        self._soundfile._snd.sf_command(self._file._file, SET_OGG_PAGE_LATENCY_MS, latency, size)

    def write(self, audio_N: np.ndarray) -> bytes:
        """Encode."""
        self._file.write(audio_N.clip(-1, 1))
        return self._drain()

    def close(self) -> bytes:
        """Flush."""
        self._file.close()
        return self._drain()

    def _drain(self) -> bytes:
        return b"" if self._pipe is None else self._pipe.drain()


class Mp3Encoder(SoundFileEncoder):
    """MP3 without the first frame, which is reserved for the number of frames: known too late for a stream."""

    def __init__(self, sample_rate: int):
        super().__init__(*MP3, sample_rate, **MP3_OPTIONS)
        self._sample_rate = sample_rate
        self._started = False

    def write(self, audio_N: np.ndarray) -> bytes:
        """Encode."""
        return self._without_info(super().write(audio_N))

    def close(self) -> bytes:
        """Flush."""
        return self._without_info(super().close())

    def _without_info(self, data: bytes) -> bytes:
        if self._started or not data:
            return data
        self._started = True
        # ISO/IEC 13818-3: the bit rate's index is the upper half of byte 2; a frame has 72 bytes at 1 bit a sample.
        length = 72_000 * MPEG2_KBITS[data[2] >> 4] // self._sample_rate + (data[2] >> 1 & 1)
        return data[length:] if not any(data[4:64]) else data


class AacEncoder:
    """AAC by PyAV, in ADTS frames that are handed out, or in an MP4 file at ``target``."""

    def __init__(self, sample_rate: int, target: BinaryIO | None = None):
        self._av = import_av("AAC")
        self._pipe = None if target is not None else _Pipe()
        container = {"format": "adts"} if target is None else {"format": "ipod", "options": BITEXACT}
        self._container = self._av.open(target or self._pipe, "w", **container)
        options = {} if target is None else {"bit_rate": AAC_BITS}
        self._stream = self._container.add_stream("aac", rate=sample_rate, layout="mono", **options)
        self._rate, self._position = sample_rate, 0
        self._primed = target is not None

    def write(self, audio_N: np.ndarray) -> bytes:
        """Encode."""
        if audio_N.shape[0]:
            frame = self._av.AudioFrame.from_ndarray(audio_N.clip(-1, 1)[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = self._rate, self._position
            frame.time_base = Fraction(1, self._rate)
            self._position += audio_N.shape[0]
            self._mux(self._stream.encode(frame))
        return self._drain()

    def close(self) -> bytes:
        """Flush."""
        self._mux(self._stream.encode(None))
        self._container.close()
        return self._drain()

    def _drain(self) -> bytes:
        return b"" if self._pipe is None else self._pipe.drain()

    def _mux(self, packets: list[Any]) -> None:
        """The encoder's first packet is its own delay, silence: ADTS has no field for it, so it is left out there."""
        self._container.mux(packets if self._primed else packets[1:])
        self._primed |= bool(packets)


ENCODERS: dict[str, Callable[[int], Encoder]] = {
    "mp3": Mp3Encoder,
    "opus": lambda rate: SoundFileEncoder("OGG", "OPUS", rate),
    "flac": lambda rate: SoundFileEncoder("FLAC", "PCM_16", rate),
    "aac": AacEncoder,
    "wav": lambda rate: PcmEncoder(wav_header(rate)),
    "pcm": lambda rate: PcmEncoder(),
}


class Stretch:
    """Another speed with the same pitch, block by block, by FFmpeg's filter atempo. Speed 1 passes samples through."""

    def __init__(self, speed: float, sample_rate: int):
        self._graph: Any = None
        if speed == 1:
            return
        self._av = av = import_av("a speed other than 1")
        self._rate = sample_rate
        self._graph = graph = av.filter.Graph()
        last = graph.add_abuffer(
            sample_rate=sample_rate, format="flt", layout="mono", time_base=Fraction(1, sample_rate)
        )
        # The filter reaches down to 0.5, and skips samples instead of blending them above 2.
        for _ in range(2):
            last.link_to(tempo := graph.add("atempo", str(speed**0.5)))
            last = tempo
        last.link_to(graph.add("abuffersink"))
        graph.configure()
        self._speed, self._num_in, self._num_out = speed, 0, 0

    def write(self, audio_N: np.ndarray) -> np.ndarray:
        """The samples that are complete."""
        if self._graph is None or not audio_N.shape[0]:
            return audio_N
        frame = self._av.AudioFrame.from_ndarray(np.ascontiguousarray(audio_N[None], np.float32), "flt", "mono")
        frame.sample_rate, frame.pts, frame.time_base = self._rate, self._num_in, Fraction(1, self._rate)
        self._num_in += audio_N.shape[0]
        self._graph.push(frame)
        return self._pull()

    def _pull(self) -> np.ndarray:
        parts = [np.zeros(0, np.float32)]
        while True:
            try:
                parts.append(self._graph.pull().to_ndarray()[0])
            except (self._av.error.BlockingIOError, self._av.error.EOFError):
                break
        out_N = np.concatenate(parts)
        self._num_out += out_N.shape[0]
        return out_N

    def close(self) -> np.ndarray:
        """The rest."""
        if self._graph is None or not self._num_in:
            return np.zeros(0, np.float32)
        self._graph.push(None)
        return self._pull()
