"""The server's voices: files in one folder, found by id, and the ids that exist without a file."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from csm import Segment
from csm.errors import AudioError, VoiceError
from csm.voices import NAME, SUFFIX, Voice, check_name, load_voice, save_voice

OPENAI_NAMES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer"),
    "verse",
)
BUILT_IN = tuple(f"speaker_{speaker}" for speaker in range(4))  # a speaker id alone, without a recording
MIN_SECONDS, MAX_SECONDS = 0.5, 60.0  # of a recording
MAX_RATE, MAX_CHANNELS = 192_000, 8


@dataclass(frozen=True)
class Chosen:
    """A voice to generate with: the speaker id, and the turns that go before."""

    speaker: int
    context: tuple[Segment, ...] = ()


class VoiceStore:
    """Voices of a folder; None: there are no files. Safe to use from several threads."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._lock = threading.Lock()
        self._loaded: dict[Path, tuple[int, Voice]] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise VoiceError(f"{folder}: the folder of voices cannot be made: {error.strerror}") from error

    def files(self) -> dict[str, Path]:
        """Voices by id."""
        found = sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder is not None else []
        return {path.stem: path for path in found if path.is_file()}

    def ids(self) -> list[str]:
        """Ids of files, then of the built-in voices, then OpenAI's."""
        return list(dict.fromkeys([*self.files(), *BUILT_IN, *OPENAI_NAMES]))

    def choose(self, voice_id: str, speaker: int | None) -> Chosen:
        """The voice with this id. Raises VoiceError.

        OpenAI's names are spread over the voices that have a file, or else over the built-in ones. A file of that name
        goes first.
        """
        path = self._file(voice_id)
        if voice_id in OPENAI_NAMES and path is None:
            files = self.files()
            known = list(files) or list(BUILT_IN)
            voice_id = known[OPENAI_NAMES.index(voice_id) % len(known)]
            path = files.get(voice_id)
        if path is not None:
            voice = self._load(path)
            speaker = voice.speaker if speaker is None else speaker
            return Chosen(speaker, tuple(voice.segments(speaker)))
        if voice_id in BUILT_IN:
            return Chosen(BUILT_IN.index(voice_id) if speaker is None else speaker)
        raise VoiceError(f"no voice is called {voice_id[:64]!r}; GET /v1/audio/voices lists them")

    def _file(self, voice_id: str) -> Path | None:
        """A voice's file, without listing a folder that may have many. Only a name becomes part of a path."""
        if self.folder is None or not NAME.fullmatch(voice_id):
            return None
        path = self.folder / f"{voice_id}{SUFFIX}"
        return path if path.is_file() else None

    def _load(self, path: Path) -> Voice:
        changed = path.stat().st_mtime_ns
        with self._lock:
            known = self._loaded.get(path)
            if known is None or known[0] != changed:
                known = self._loaded[path] = changed, load_voice(path)
            return known[1]

    def check_new(self, name: str) -> Path:
        """The file that a new voice of this name will have. Raises VoiceError."""
        if self.folder is None:
            raise VoiceError("this server keeps no voices: start it with --voices DIR")
        if check_name(name) in self.files() or name in BUILT_IN:
            raise VoiceError(f"there is a voice {name!r} already: delete it first")
        return self.folder / f"{name}{SUFFIX}"

    def add(self, name: str, text: str, codes_TK: Tensor, speaker: int, consent: str) -> None:
        """Keep a voice. Raises VoiceError."""
        path = self.check_new(name)
        save_voice(Voice(name, (text,), (codes_TK,), speaker, consent), path)

    def delete(self, voice_id: str) -> bool:
        """Remove a voice's file; False if there is none."""
        path = self.files().get(voice_id)
        if path is None:
            return False
        with self._lock:
            self._loaded.pop(path, None)
        path.unlink(missing_ok=True)
        return True

    def created_at(self, voice_id: str) -> int:
        """Seconds since 1970."""
        path = self.files().get(voice_id)
        return int(os.stat(path).st_mtime if path else time.time())


def read_recording(data: bytes) -> tuple[Tensor, int]:
    """A recording of any format that libsndfile reads: (channels, samples) and the sample rate. Raises AudioError.

    It is decoded block by block and refused at ``MAX_SECONDS``, whatever its header says: a small file can unpack to
    gigabytes.
    """
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels = file.samplerate, file.channels
            if not 4000 <= rate <= MAX_RATE or channels > MAX_CHANNELS:
                raise AudioError(f"the recording has {channels} channels at {rate} Hz: send 1 or 2 at 8 to 96 kHz")
            limit = int(MAX_SECONDS * rate)
            while sum(map(len, blocks)) <= limit:
                block = file.read(min(rate, limit + 1), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block)
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
    audio_CN = torch.from_numpy(np.concatenate(blocks).T.copy())
    if not torch.isfinite(audio_CN).all() or audio_CN.abs().max() < 1e-3:
        raise AudioError("the recording is silent, or has samples that are not numbers")
    return audio_CN
