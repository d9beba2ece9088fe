"""List and read the tensors of .safetensors and .pt files.

Each tensor is read through its own memory map, which is released with the tensor. Pages that were already copied do
not accumulate in the process.
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
    """Name and shape of every tensor of a .safetensors or .pt file. Raises CheckpointError, which names the file."""
    if path.suffix == ".pt":
        return {name: tuple(tensor.shape) for name, tensor in _load_pt(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One memory-mapped tensor. Raises CheckpointError, which names both, if it is unreadable or not floating point."""
    try:
        if path.suffix == ".pt":
            tensor = _load_pt(path)[name]
        else:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: tensor {name}: {_reason(path, error)}") from error
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{path}: tensor {name}: expected a floating-point dtype, got {tensor.dtype}")
    return tensor


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: contains objects other than tensors; code in a pickle is never run: {error}"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name!r}: expected a tensor, got {type(value).__name__}")
    return content


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "expected a file, got a folder"
    if not path.exists():
        return "no such file"
    return f"truncated or corrupt; download it again ({error})"
