"""The server's voices: files in one folder, found by id, and the ids that exist without a file."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from csm import Segment
from csm.errors import AudioError, VoiceError, VoiceFileError
from csm.voices import SUFFIX, Voice, check_name, load_voice, save_voice

log = logging.getLogger("csm.serve")

OPENAI_NAMES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer"),
    "verse",
)
BUILT_IN = tuple(f"speaker_{speaker}" for speaker in range(4))  # a speaker id alone, without a recording
# Of a recording. The codec hears up to 12 kHz, so a higher rate than 96 kHz is no microphone's, and costs memory.
MIN_SECONDS, MAX_SECONDS = 0.5, 60.0
MIN_RATE, MAX_RATE = 8_000, 96_000  # Hz
MAX_CHANNELS = 2

Version = tuple[int, int]  # of a file: when it was written, in ns, and its size


@dataclass(frozen=True)
class Chosen:
    """A voice to generate with: the speaker id, and the turns that go before."""

    speaker: int
    context: tuple[Segment, ...] = ()


class VoiceStore:
    """Voices of a folder; None: there are no files. Safe to use from several threads.

    All methods read or write files, so they must not run on the event loop. A file that cannot be read or written is
    the server's fault: VoiceFileError. Every other VoiceError is the caller's.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._lock = threading.Lock()
        self._adding = threading.Lock()
        self._loaded: dict[Path, tuple[Version, Voice]] = {}
        self._listed: dict[Path, tuple[Version, bool]] = {}  # of the last listing: can it be read?
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise VoiceFileError(f"{folder}: the folder of voices cannot be made: {error.strerror}") from error

    def files(self) -> dict[str, Path]:
        """Voices by id. A file that cannot be read is left out; a warning in the log names it, once."""
        found = sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder is not None else []
        listed = {path: self._check(path) for path in found}
        self._listed = listed
        return {path.stem: path for path, (_, readable) in listed.items() if readable}

    def _check(self, path: Path) -> tuple[Version, bool]:
        """Whether a file holds a voice; unchanged files are not read again."""
        version: Version = (0, 0)  # of a file that has gone
        known = self._listed.get(path)
        try:
            version = _version(path)
            if known is not None and known[0] == version:
                return known
            load_voice(path)
        except VoiceFileError as error:
            if known is None or known[0] != version:
                log.warning("voice skipped: %s", error)
            return version, False
        return version, True

    def choose(self, voice_id: str, speaker: int | None) -> Chosen:
        """The voice with this id, which has a file or is built in. The folder is not listed.

        Raises VoiceError, or VoiceFileError for a file that cannot be read.
        """
        path = self._file(voice_id)
        if path is not None:
            voice = self._load(path)
            speaker = voice.speaker if speaker is None else speaker
            return Chosen(speaker, tuple(voice.segments(speaker)))
        if voice_id in BUILT_IN:
            return Chosen(BUILT_IN.index(voice_id) if speaker is None else speaker)
        raise VoiceError(f"no voice is called {voice_id[:64]!r}; GET /v1/audio/voices lists them")

    def has_file(self, voice_id: str) -> bool:
        """Whether there is a file of this name. The folder is not listed."""
        return self._file(voice_id) is not None

    def _file(self, voice_id: str) -> Path | None:
        """A voice's file, without listing a folder that may have many. Only a name becomes part of a path."""
        if self.folder is None:
            return None
        try:
            path = self.folder / f"{check_name(voice_id)}{SUFFIX}"
        except VoiceError:
            return None
        return path if path.is_file() else None

    def _load(self, path: Path) -> Voice:
        version = _version(path)
        with self._lock:
            known = self._loaded.get(path)
            if known is None or known[0] != version:
                known = self._loaded[path] = version, load_voice(path)
            return known[1]

    def check_new(self, name: str) -> Path:
        """The file that a new voice of this name will have. Raises VoiceError."""
        if self.folder is None:
            raise VoiceError("this server keeps no voices: start it with --voices DIR")
        path = self.folder / f"{check_name(name)}{SUFFIX}"
        if path.exists() or name in BUILT_IN:
            raise VoiceError(f"there is a voice {name!r} already: delete it first")
        return path

    def add(self, name: str, text: str, codes_TK: Tensor, speaker: int, consent: str) -> None:
        """Keep a voice. Raises VoiceError, or VoiceFileError if its file cannot be written."""
        with self._adding:
            save_voice(Voice(name, (text,), (codes_TK,), speaker, consent), self.check_new(name))

    def delete(self, voice_id: str) -> bool:
        """Remove a voice's file; False if there is none."""
        path = self._file(voice_id)
        if path is None:
            return False
        with self._lock:
            self._loaded.pop(path, None)
        path.unlink(missing_ok=True)
        return True


def all_ids(files: Iterable[str]) -> list[str]:
    """Ids of voices with a file, then of the built-in voices, then OpenAI's."""
    return list(dict.fromkeys([*files, *BUILT_IN, *OPENAI_NAMES]))


def voice_for(name: str, files: Iterable[str]) -> str:
    """The id that one of OpenAI's names leads to: they are spread over ``files``, or else over the built-in voices."""
    known = list(files) or list(BUILT_IN)
    return known[OPENAI_NAMES.index(name) % len(known)]


def _version(path: Path) -> Version:
    try:
        stat = path.stat()
    except OSError as error:
        raise VoiceFileError(f"{path}: cannot be read as a voice: {error.strerror}") from error
    return stat.st_mtime_ns, stat.st_size


def read_recording(data: bytes) -> tuple[Tensor, int]:
    """A recording of any format that libsndfile reads: (samples,) mono and the sample rate. Raises AudioError.

    It is decoded block by block and refused at ``MAX_SECONDS``, whatever its header says: a small file can unpack to
    gigabytes. Two channels are averaged.
    """
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels = file.samplerate, file.channels
            if channels > MAX_CHANNELS:
                raise AudioError(f"the recording has {channels} channels: send 1 or {MAX_CHANNELS}")
            if not MIN_RATE <= rate <= MAX_RATE:
                raise AudioError(f"the recording has {rate} Hz: send {MIN_RATE} to {MAX_RATE} Hz")
            limit = int(MAX_SECONDS * rate)
            while sum(map(len, blocks)) <= limit:
                block = file.read(min(rate, limit + 1), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(axis=1))
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError("the recording cannot be decoded: send WAV, FLAC, MP3 or Ogg") from error
    return _checked(blocks, rate), rate


def _checked(blocks: Sequence[np.ndarray], rate: int) -> Tensor:
    num_samples = sum(map(len, blocks))
    if num_samples > MAX_SECONDS * rate:
        raise AudioError(f"the recording is longer than {MAX_SECONDS:g} s")
    if num_samples < MIN_SECONDS * rate:
        raise AudioError(f"the recording has {num_samples / rate:.2f} s, which is less than {MIN_SECONDS:g} s")
    audio_N = torch.from_numpy(np.concatenate(blocks))
    if not torch.isfinite(audio_N).all() or audio_N.abs().max() < 1e-3:
        raise AudioError("the recording is silent, or has samples that are not numbers")
    return audio_N
