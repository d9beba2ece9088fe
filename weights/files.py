"""Tensors in files: which there are, and one at a time.

A tensor is read through a memory map of its own, which is gone with the tensor: pages of what has been copied do not
pile up in the process.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csm.errors import CheckpointError

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a .safetensors or .pt file. Raises CheckpointError, naming the file."""
    if path.suffix == ".pt":
        return {name: tuple(tensor.shape) for name, tensor in _load_pt(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, mapped from its file. Raises CheckpointError, naming both, if it is unreadable or not of floats."""
    try:
        if path.suffix == ".pt":
            tensor = _load_pt(path)[name]
        else:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: tensor {name}: {_reason(path, error)}") from error
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; weights must be of floats")
    return tensor


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors (code in a pickle is never run): {error}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a state dict but a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r} is no tensor but a {type(value).__name__}")
    return content


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "is a folder, not a file"
    if not path.exists():
        return "no such file"
    return f"truncated or corrupt ({error})"
