"""Audio files by suffix, with chapters: WAV, FLAC, MP3, Ogg Vorbis, Opus, and AAC in MP4 (m4a, m4b).

The encoders are those of ``csm.formats``. Chapters and tags are added at the end, when their times are known: FFmpeg
(PyAV) copies the encoded packets into a second file with a new header, without encoding them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from csm.audio import AtomicWriter, WavWriter
from csm.errors import AudioError
from csm.formats import BITEXACT, MP3, MP3_OPTIONS, AacEncoder, Encoder, SoundFileEncoder, import_av, import_soundfile

FILE_ENCODERS: dict[str, Callable[[int, BinaryIO], Encoder]] = {
    ".flac": lambda rate, file: SoundFileEncoder("FLAC", "PCM_16", rate, file),
    ".mp3": lambda rate, file: SoundFileEncoder(*MP3, rate, file, **MP3_OPTIONS),
    ".ogg": lambda rate, file: SoundFileEncoder("OGG", "VORBIS", rate, file),
    ".opus": lambda rate, file: SoundFileEncoder("OGG", "OPUS", rate, file),
    ".m4a": AacEncoder,
    ".m4b": AacEncoder,
}
MUXERS = {".flac": "flac", ".mp3": "mp3", ".ogg": "ogg", ".opus": "ogg", ".m4a": "ipod", ".m4b": "ipod"}
SUFFIXES = (".wav", *FILE_ENCODERS)
WITH_CHAPTERS = (".m4a", ".m4b", ".mp3", ".flac", ".opus")


@dataclass(frozen=True)
class ChapterMark:
    """A chapter of a file: its title, and its first and last moment in seconds."""

    title: str
    start: float
    end: float


def check_suffix(path: Path) -> str:
    """The suffix of a file that can be written. Raises AudioError, which lists them, also where a package is missing.

    A name without a suffix is a WAV file.
    """
    suffix = path.suffix.lower() or ".wav"
    if suffix not in SUFFIXES:
        raise AudioError(f"{path}: no audio format is called {suffix!r}; there are {', '.join(SUFFIXES)}")
    if suffix in (".m4a", ".m4b"):
        import_av(suffix)
    elif suffix != ".wav":
        import_soundfile()
    return suffix


def open_writer(path: str | Path) -> AtomicWriter:
    """The writer of a file's format, by its suffix. Raises AudioError as ``check_suffix`` does."""
    path = Path(path)
    return WavWriter(path) if check_suffix(path) == ".wav" else EncodedWriter(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) that appears under its name only once it is whole, or into a pipe or a device.

    Raises AudioError.
    """
    path = Path(path)
    if not path.exists() or path.is_file() or path.is_dir():
        with AtomicWriter(path) as writer:
            writer.write_bytes(text.encode())
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AudioError(f"{path}: cannot be written: {error.strerror}") from error


class EncodedWriter(AtomicWriter):
    """Writes a file of any format but WAV atomically. A context manager: ``begin``, then ``write``."""

    _encoder: Encoder | None = None

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._suffix = check_suffix(Path(path))
        self._marks: tuple[ChapterMark, ...] = ()
        self._tags: Mapping[str, str] = {}

    def begin(self, sample_rate: int) -> None:
        """Set the sample rate in Hz."""
        self._encoder = FILE_ENCODERS[self._suffix](sample_rate, self._file)

    def write(self, audio: Tensor) -> None:
        """Append (samples,) floats, clipped to -1..1."""
        assert self._encoder is not None, "call begin() first"
        with self._failures():
            self._encoder.write(audio.detach().cpu().float().numpy())

    def describe(self, marks: Sequence[ChapterMark], tags: Mapping[str, str]) -> None:
        """Add chapters and tags ("title", "artist", "album") when the file is finished. Needs PyAV."""
        import_av("a file with chapters")
        self._marks, self._tags = tuple(marks), tags

    def _close(self, complete: bool) -> None:
        if self._encoder is None:
            return
        with self._failures():
            self._encoder.close()
        self._encoder = None
        self._file.close()
        if complete and (self._marks or self._tags):
            remuxed = self._temporary.with_name(f"{self._temporary.name}.2")
            try:
                remux(self._temporary, remuxed, MUXERS[self._suffix], self._marks, self._tags)
                os.replace(remuxed, self._temporary)
            finally:
                remuxed.unlink(missing_ok=True)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors of the encoders as AudioError. soundfile asserts that everything was written."""
        try:
            yield
        except (OSError, RuntimeError, AssertionError) as error:
            raise AudioError(f"{self.path}: cannot be written: {error}") from error


def remux(source: Path, target: Path, muxer: str, marks: Sequence[ChapterMark], tags: Mapping[str, str]) -> None:
    """Copy the packets of an audio file into another one, with chapters and tags. The bytes depend on these alone."""
    av = import_av("a file with chapters")
    options = {**BITEXACT, "movflags": "+faststart"} if muxer == "ipod" else BITEXACT
    with av.open(str(source)) as reader, av.open(str(target), "w", format=muxer, options=options) as writer:
        stream = reader.streams.audio[0]
        copied = writer.add_stream_from_template(stream)
        writer.metadata.update({**tags, **(_comments(marks) if muxer == "flac" else {})})
        writer.set_chapters([_chapter(number, mark) for number, mark in enumerate(marks, start=1)])
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                writer.mux(packet)


def _chapter(number: int, mark: ChapterMark) -> dict[str, Any]:
    times = {"start": round(mark.start * 1000), "end": round(mark.end * 1000), "time_base": Fraction(1, 1000)}
    return {"id": number, **times, "metadata": {"title": mark.title}}


def _comments(marks: Sequence[ChapterMark]) -> dict[str, str]:
    """Chapters as Vorbis comments, which FFmpeg reads but writes into Opus files only."""
    comments: dict[str, str] = {}
    for number, mark in enumerate(marks):
        minutes, milliseconds = divmod(round(mark.start * 1000), 60_000)
        clock = f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"
        comments |= {f"CHAPTER{number:03}": clock, f"CHAPTER{number:03}NAME": mark.title}
    return comments
