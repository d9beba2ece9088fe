"""What a book needs to be resumed: a plan with a key for every sentence, and a folder with the sentences that are done.

A key is a hash of all that decides a sentence's codes: the model, the voices, the settings, the text, and the keys of
the sentences that it continues. A finished sentence is a file that its key names. A run that was killed therefore goes
on with the same files, and after a change of text or settings it generates again just what the change affects.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csm.book.types import BookError
from csm.script import Item, Line
from csm.voices import SUFFIX, save_tensors

FORMAT = "csm-book-1"
LOCK, MANIFEST = "lock", "manifest.json"


@dataclass(frozen=True)
class Section:
    """A chapter as it is spoken: its title and its items."""

    title: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Settings:
    """What decides the codes of all sentences, besides text and model.

    ``context_turns`` earlier sentences are continued; ``restart`` lets each section begin without any. ``retries`` is
    how often a sentence that a guard rejected is generated again. ``no_guards`` names the guards that are off.
    """

    temperature: float = 0.9
    topk: int = 50
    max_turn_ms: float = 90_000
    seed: int = 0
    context_turns: int = 1
    restart: bool = True
    retries: int = 2
    no_guards: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sentence:
    """A line of the plan: its section, its key and seed, and the indices of the sentences that it continues."""

    section: int
    line: Line
    speaker: int
    key: str
    seed: int
    context: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Take:
    """A generated sentence: codes (T, K), and the guards that rejected the takes before it, and it if ``kept``."""

    codes_TK: Tensor
    rejections: tuple[str, ...] = ()
    kept: bool = False


def plan(sections: Sequence[Section], ids: dict[int | str, int], settings: Settings, model: str) -> list[Sentence]:
    """All sentences in order. ``ids`` are the speakers' ids, ``model`` is the fingerprint."""
    sentences: list[Sentence] = []
    base = " ".join([model, str(settings), *(f"no-guard-{name}" for name in settings.no_guards)])
    for number, section in enumerate(sections):
        first = len(sentences) if settings.restart else 0
        for item in section.items:
            if isinstance(item, Line):
                start = max(first, len(sentences) - settings.context_turns)
                context = tuple(range(start, len(sentences)))
                parts = [base, ids[item.speaker], item.text, [sentences[index].key for index in context]]
                digest = hashlib.sha256(json.dumps(parts).encode()).digest()
                seed = int.from_bytes(digest[16:24], "little") % 2**62
                sentences.append(Sentence(number, item, ids[item.speaker], digest[:16].hex(), seed, context))
    return sentences


class Parts:
    """The folder of finished sentences, beside the output."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, and keep other runs out of it. Raises BookError if one is in it."""
        try:
            self.folder.mkdir(exist_ok=True)
            lock = open(self.folder / LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise BookError(f"{self.folder}: cannot be written: {error.strerror}") from error
        with lock:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows: files are written atomically all the same
                pass
            except OSError as error:
                raise BookError(f"{self.folder}: another run is writing this book") from error
            yield

    def describe(self, values: dict[str, object]) -> None:
        """Write what the folder is for, for people who look into it."""
        (self.folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **values}, indent=2) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def load(self, key: str) -> Take | None:
        """A finished sentence; None if it is not there, or cannot be read."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                codes_TK = file.get_tensor("codes").long()
        except (OSError, SafetensorError):
            return None
        return Take(codes_TK, tuple(json.loads(metadata["rejections"])), metadata["kept"] == "True")

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def save(self, key: str, take: Take, text: str) -> None:
        """Keep a finished sentence: the file is there as a whole or not at all."""
        metadata = {
            "format": FORMAT,
            "text": text,
            "rejections": json.dumps(take.rejections),
            "kept": str(take.kept),
        }
        save_tensors({"codes": take.codes_TK.to(torch.int32).contiguous()}, self._path(key), metadata)

    def is_foreign(self) -> bool:
        """Whether the folder has something in it, but not what a run leaves there."""
        return self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LOCK).is_file()

    def remove(self) -> None:
        """Delete what runs have left in the folder, and the folder if nothing else is in it."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name.startswith(".csm-"):
                shutil.rmtree(path)  # of a run that was killed while it wrote
            elif path.suffix == SUFFIX or path.name in (LOCK, MANIFEST):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()
