"""Checkpoints of a training run: one file each, written atomically; a run resumes from the newest.

A checkpoint holds no random-number state. Every random number is derived from the seed and the index of a step or an
example.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm.errors import CheckpointError, CSMError
from csm.finetune.batches import Example
from csm.finetune.options import RENAMED, RESUMABLE, TrainOptions
from csm.lora import LoraConfig

PATTERN = "checkpoint-*.pt"
KEYS = {"trainer_state", "options", "data", "adapters", "frozen", "trained", "optimizer", "ema"}
RENAMED_KEYS = {"place": "trainer_state", "average": "ema"}  # names in checkpoints of earlier versions


@dataclass(frozen=True)
class TrainerState:
    """Completed steps, and the next batch: its epoch and its index in that epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a checkpoint to resume a run. ``frozen`` and ``data`` are hashes."""

    options: dict[str, Any]
    adapters: dict[str, Any] | None
    frozen: str
    data: str

    @classmethod
    def of(
        cls, options: TrainOptions, lora: LoraConfig | None, model: nn.Module, train: Sequence[Example]
    ) -> RunIdentity:
        """The identity of a run that trains ``model`` on ``train``."""
        return cls(asdict(options), None if lora is None else asdict(lora), _hash_frozen(model), _hash_data(train))

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError where ``state``, read from ``path``, is of another run."""
        for name in self.options.keys() - RESUMABLE:
            saved = state["options"].get(name)
            if saved != self.options[name]:
                raise CheckpointError(
                    f"{path}: the run was started with --{name.replace('_', '-')} {saved}, not {self.options[name]}; "
                    "repeat its options to resume, or give another --out"
                )
        if state["adapters"] != self.adapters:
            raise CheckpointError(
                f"{path}: the run was started with adapters {state['adapters']}, not {self.adapters}; "
                "repeat its --lora options to resume, or give another --out"
            )
        if state["frozen"] != self.frozen:
            raise CheckpointError(
                f"{path}: the run was started from other weights; resume with its --model, or give another --out"
            )
        if state["data"] != self.data:
            raise CheckpointError(
                f"{path}: the run was started on other data (turns added, removed or changed); "
                "restore the data to resume, or give another --out"
            )


def save(
    folder: Path,
    trainer_state: TrainerState,
    identity: RunIdentity,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    keep: int,
) -> Path:
    """Write a checkpoint and delete all but the newest ``keep``. ``ema`` holds the averaged weights."""
    state = {
        **asdict(identity),
        "trainer_state": asdict(trainer_state),
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else dict(ema),
    }
    path = folder / f"checkpoint-{trainer_state.step:08d}.pt"
    _write(path, state)
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def load(
    path: Path,
    identity: RunIdentity,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
) -> TrainerState:
    """Load a checkpoint into the trained weights, the optimizer and the averages; return where to continue.

    Raises CheckpointError where the checkpoint is of another run: other options, adapters, weights or data.
    """
    state = read(path)
    identity.check(state, path)
    found = {name: tuple(tensor.shape) for name, tensor in state["trained"].items()}
    expected = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            shapes = f"{found.get(name, 'missing')}, the model needs {expected.get(name, 'no such tensor')}"
            raise CheckpointError(f"{path}: trained tensor {name} is {shapes}; give another --out")
    with torch.no_grad():
        for name, tensor in state["trained"].items():
            trained[name].copy_(tensor)
        if ema is not None:
            for name, tensor in state["ema"].items():
                ema[name].copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    return TrainerState(**state["trainer_state"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder."""
    return max(folder.glob(PATTERN), default=None)


def find_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any. Raises CSMError where one exists and ``resume`` is false."""
    found = newest(folder)
    if found is not None and not resume:
        raise CSMError(f"{folder}: holds a run ({found.name}); add --resume to continue it, or give another --out")
    return found


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU, with names of earlier versions brought up to date.

    Raises CheckpointError, naming the file, where it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__}, not a dictionary")
        state = {RENAMED_KEYS.get(key, key): value for key, value in state.items()}
        if missing := sorted(KEYS - state.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
        state["options"] = {RENAMED.get(name, name): value for name, value in state["options"].items()}
        return state
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable training checkpoint ({error}); delete it to resume from an earlier one"
        ) from error


def _write(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint ({error}); check the free disk space") from error
    finally:
        temporary.unlink(missing_ok=True)


def _hash_frozen(model: nn.Module) -> str:
    """A hash of up to about 64 values of every frozen weight; checkpoints do not hold these weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(f"{name} {tuple(parameter.shape)} {values.double().tolist()}".encode())
    return digest.hexdigest()


def _hash_data(train: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in train:
        digest.update(repr((example.first_trained, [turn.text_ids for turn in example.turns])).encode())
        for turn in example.turns:
            digest.update(turn.codes_TK.contiguous().numpy().tobytes())
    return digest.hexdigest()
