"""The state of a run in one file a checkpoint, which appears whole or not at all; the newest is gone on from.

There is no random state in it: everything random is drawn from the seed and the number of the step or the example.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from csm.errors import CheckpointError

PATTERN = "checkpoint-*.pt"
PARTS = {"place", "options", "data", "adapters", "frozen", "trained", "optimizer", "average"}


def write(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after ``step`` steps, and remove all but the newest ``keep``."""
    path = folder / f"checkpoint-{step:08d}.pt"
    aside = path.with_suffix(".part")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: could not be written; is there room for it? ({error})") from error
    finally:
        aside.unlink(missing_ok=True)
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return max(folder.glob(PATTERN), default=None)


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. Raises CheckpointError, naming the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= PARTS:
            raise ValueError("parts of it are missing")
        return state
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a run that can be read: {error}") from error
