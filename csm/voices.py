"""Voices: named clips with their transcripts and codec codes, kept in files and used as the start of a prompt.

A voice is one safetensors file, NAME.safetensors: a tensor codes_0, codes_1, ... (T, K) for each clip, and in the
metadata its format, name, texts (JSON), speaker, consent, and whether a recogniser guessed the texts. Voices are found
in ``voices_folder()``, then in the folder ``voices`` beside a checkpoint's weights. Sesame's six prompts are voices
where the checkpoint has their recordings.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csm.errors import VoiceError, VoiceFileError
from csm.prompt import Segment

log = logging.getLogger("csm.voices")

FORMAT = "csm-voice-1"
SUFFIX = ".safetensors"
NAME = re.compile(r"\w[\w.-]{0,63}")
MAX_NAME_BYTES = 200  # file systems allow 255, and a suffix follows
# The recordings in the folder prompts of sesame/csm-1b. Transcripts: SesameAILabs/csm, run_csm.py, and the app of the
# model's page on the hub.
SESAME_PROMPTS = {
    "conversational_a": (
        "like revising for an exam I'd have to try and like keep up the momentum because I'd start really early I'd be "
        "like okay I'm gonna start revising now and then like you're revising for ages and then I just like start "
        "losing steam I didn't do that for the exam we had recently to be fair that was a more of a last minute "
        "scenario but like yeah I'm trying to like yeah I noticed this yesterday that like Mondays I sort of start the "
        "day with this not like a panic but like a"
    ),
    "conversational_b": (
        "like a super Mario level. Like it's very like high detail. And like, once you get into the park, it just "
        "like, everything looks like a computer game and they have all these, like, you know, if, if there's like a, "
        "you know, like in a Mario game, they will have like a question block. And if you like, you know, punch it, a "
        "coin will come out. So like everyone, when they come into the park, they get like this little bracelet and "
        "then you can go punching question blocks around."
    ),
    "read_speech_a": (
        "And Lake turned round upon me, a little abruptly, his odd yellowish eyes, a little like those of the sea "
        "eagle, and the ghost of his smile that flickered on his singularly pale face, with a stern and insidious "
        "look, confronted me."
    ),
    "read_speech_b": (
        "He was such a big boy that he wore high boots and carried a jack knife. He gazed and gazed at the cap, and "
        "could not keep from fingering the blue tassel."
    ),
    "read_speech_c": (
        "All passed so quickly, there was so much going on around him, the Tree quite forgot to look to himself."
    ),
    "read_speech_d": (
        "Suddenly I was back in the old days Before you felt we ought to drift apart. It was some trick-the way your "
        "eyebrows raise."
    ),
}


@dataclass(frozen=True, eq=False)
class Voice:
    """A named voice: for each clip its transcript and its codes (T, K) int64.

    ``speaker`` is the id that the clips were recorded under; a request may use another. ``consent`` says who allowed
    the voice to be used, and how. ``guessed``: the transcripts are those of a speech recogniser.
    """

    name: str
    texts: tuple[str, ...]
    codes: tuple[Tensor, ...]
    speaker: int = 0
    consent: str = ""
    guessed: bool = False

    @property
    def num_frames(self) -> int:
        """Frames of all clips, 80 ms each."""
        return sum(codes_TK.shape[0] for codes_TK in self.codes)

    def segments(self, speaker: int | None = None) -> list[Segment]:
        """The clips as context turns of a speaker; None is the voice's own id."""
        speaker = self.speaker if speaker is None else speaker
        return [Segment(speaker, text, codes=codes) for text, codes in zip(self.texts, self.codes, strict=True)]


def check_name(name: str) -> str:
    """The name itself. Raises VoiceError if it could be a path, a speaker id, or is too long for a file's name."""
    valid = isinstance(name, str) and NAME.fullmatch(name) and not name.isdigit()
    if not valid or len(name.encode()) > MAX_NAME_BYTES:
        raise VoiceError(
            f"a voice's name has at most 64 letters, digits, '_', '-' and '.' ({MAX_NAME_BYTES} bytes), begins "
            f"with a letter and is no number; not {name!r}"
        )
    return name


def data_folder() -> Path:
    """Where this user's voices are kept: ``$CSM_HOME``, else the platform's folder for application data."""
    if os.environ.get("CSM_HOME"):
        return Path(os.environ["CSM_HOME"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "csm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "csm"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "csm"


def voices_folder() -> Path:
    """The folder of this user's voices."""
    return data_folder() / "voices"


def voice_files(checkpoint_folder: Path | None = None) -> dict[str, Path]:
    """Every voice by name, with its file: NAME.safetensors, or the recording of one of Sesame's prompts."""
    files: dict[str, Path] = {}
    if checkpoint_folder is not None:
        prompts = {name: checkpoint_folder / "prompts" / f"{name}.wav" for name in SESAME_PROMPTS}
        files |= {name: path for name, path in prompts.items() if path.is_file()}
        files |= _files_in(checkpoint_folder / "voices")
    return dict(sorted((files | _files_in(voices_folder())).items()))


def _files_in(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    return {path.stem: path for path in paths if NAME.fullmatch(path.stem)}


def find_voice(name: str, checkpoint_folder: Path | None = None) -> Path:
    """The file of a voice. Raises VoiceError, which lists the voices that exist."""
    files = voice_files(checkpoint_folder)
    if check_name(name) not in files:
        known = f"there are {', '.join(files)}" if files else "there is none yet"
        raise VoiceError(f"no voice is called {name!r}; {known}. python -m csm voice add makes one")
    return files[name]


def save_voice(voice: Voice, path: Path) -> None:
    """Write a voice's file atomically. Raises VoiceFileError if the folder cannot be written."""
    tensors = {f"codes_{index}": codes.to(torch.int32).contiguous() for index, codes in enumerate(voice.codes)}
    metadata = {
        "format": FORMAT,
        "name": check_name(voice.name),
        "texts": json.dumps(list(voice.texts)),
        "speaker": str(voice.speaker),
        "consent": voice.consent,
        "guessed": json.dumps(voice.guessed),
    }
    save_tensors(tensors, path, metadata)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, its folder included. Raises VoiceFileError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".csm-") as folder:
            save_file(tensors, Path(folder) / path.name, metadata)
            os.replace(Path(folder) / path.name, path)
    except (OSError, SafetensorError) as error:
        raise VoiceFileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def load_voice(path: Path) -> Voice:
    """Read a voice's file; its name is that of the file. Raises VoiceFileError, which names the file and the fault."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VoiceFileError(f"{path}: cannot be read as a voice: {error}") from error
    try:
        return _voice(check_name(path.stem), metadata, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise VoiceFileError(f"{path}: not a voice's file: {error}") from error


def _voice(name: str, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Voice:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    texts, speaker = json.loads(metadata["texts"]), int(metadata["speaker"])
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("its texts are not a list of transcripts")
    if speaker < 0:
        raise ValueError(f"its speaker is {speaker}")
    expected = [f"codes_{index}" for index in range(len(texts))]
    if sorted(tensors) != sorted(expected):
        raise ValueError(f"it has {len(texts)} transcripts, but the tensors {', '.join(sorted(tensors))}")
    codes = tuple(tensors[key].long() for key in expected)
    for key, codes_TK in zip(expected, codes, strict=True):
        if codes_TK.ndim != 2 or not codes_TK.shape[0] or tensors[key].is_floating_point():
            raise ValueError(
                f"{key} has shape {tuple(codes_TK.shape)} and dtype {tensors[key].dtype}, not (T, K) integers"
            )
    return Voice(name, tuple(texts), codes, speaker, metadata.get("consent", ""), metadata.get("guessed") == "true")


def remove_voice(name: str) -> Path:
    """Delete one of this user's voices; return its file. Raises VoiceError for others."""
    path = voices_folder() / f"{check_name(name)}{SUFFIX}"
    if path.is_dir():
        raise VoiceError(f"{path}: is a folder, not a voice's file")
    if not path.is_file():
        raise VoiceError(f"{path}: no such voice of yours; python -m csm voice list shows them")
    try:
        path.unlink()
    except OSError as error:
        raise VoiceError(f"{path}: cannot be removed: {error.strerror}") from error
    return path


def describe(files: dict[str, Path]) -> Iterator[str]:
    """A line for each voice: name, clips, seconds and file.

    A file that cannot be read is left out, with a warning in the log (on stderr, where no handler is set). Raises
    VoiceFileError if none can be read.
    """
    failed: list[VoiceFileError] = []
    for name, path in files.items():
        if path.suffix == ".wav":
            yield f"{name}: a recording, {path}"
            continue
        try:
            voice = load_voice(path)
        except VoiceFileError as error:
            failed.append(error)
            continue
        clips = f"{len(voice.texts)} clip{'s' if len(voice.texts) > 1 else ''}"
        yield f"{name}: {clips}, {voice.num_frames * 0.08:.2f} s, speaker {voice.speaker}, {path}"
    if failed and len(failed) == len(files):
        raise VoiceFileError("; ".join(map(str, failed)))
    for failure in failed:
        log.warning("skipped: %s", failure)
