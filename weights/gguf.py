"""Tensors and metadata of a GGUF file. ``docs/gguf.md`` says which files are read, and what they become.

Shapes: N outputs, K inputs, J blocks of 32 inputs.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm.errors import CheckpointError
from csm.weights.gguf_blocks import BITS, unpack_blocks
from csm.weights.gguf_header import Header, TensorInfo, read_header

# Metadata key of each file that a folder has beside its weights.
CONFIG, TOKENIZER = "csm.config_json", "tokenizer.huggingface.json"
DEFAULTS, PRONUNCIATION = "csm.generation_config_json", "csm.pronunciation_json"
CONFIG_FILES = {"config.json": CONFIG, "generation_config.json": DEFAULTS}
TOKENIZER_FILES = {"tokenizer.json": TOKENIZER, "pronunciation.json.gz": PRONUNCIATION}
ARCHITECTURE = "general.architecture"
CONVERT = "convert the original checkpoint instead: csm quantize sesame/csm-1b --scheme q8_0 --out csm-1b-q8_0.gguf"
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 22  # values that are dequantised at a time


class ExtractedFiles:
    """A temporary folder that is removed with this object. Its name is that of the GGUF file, for messages."""

    def __init__(self, name: str):
        parent = Path(tempfile.mkdtemp(prefix="csm-"))
        self._remove = weakref.finalize(self, shutil.rmtree, parent, True)
        self.folder = parent / name
        self.folder.mkdir()


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header is checked. Tensors are read one at a time."""

    path: Path
    header: Header

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.header.tensors.items()}

    @property
    def quantized(self) -> list[str]:
        """Names of the tensors in blocks."""
        return [name for name, info in self.header.tensors.items() if info.type.block > 1]

    def bits(self, name: str) -> int | None:
        """8 for a tensor of q8_0, 4 for q4_0, None for the types that no op reads."""
        info = self.header.tensors[name]
        return BITS.get(info.type.name) if len(info.shape) == 2 else None

    def read_blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """Values (N, K) int8 and scales (N, J) float16 of a tensor with ``bits``: those of the file, bit for bit."""
        info = self.header.tensors[name]
        q_NK, scale_NJ = unpack_blocks(self._bytes(name, info), BITS[info.type.name])
        self._check_finite(name, scale_NJ)
        return q_NK, scale_NJ

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype, or dequantised to float32. Raises CheckpointError, which names it."""
        info = self.header.tensors[name]
        data = self._bytes(name, info)
        dtype = DENSE.get(info.type.name)
        tensor = _dequantize(data.numpy(), info) if dtype is None else data.view(dtype)
        self._check_finite(name, tensor)
        return tensor.view(info.shape)

    def extract(self, tokenizer: Path | None) -> ExtractedFiles:
        """config.json, tokenizer.json and what belongs to them, from the metadata, else from beside the file.

        ``tokenizer`` replaces the tokenizer: a tokenizer.json, or its folder. A config.json that neither the metadata
        nor the file's folder has is taken from beside it.
        """
        extracted, metadata, beside = ExtractedFiles(self.path.name), self.header.metadata, self.path.parent
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        if tokenizer is not None and not tokenizer.is_file():
            raise CheckpointError(f"{tokenizer}: no such file; pass a tokenizer.json, or its folder")
        given = None if tokenizer is None else tokenizer.parent
        configs = beside if given is None or (beside / "config.json").is_file() else given
        self._extract(CONFIG_FILES, None if CONFIG in metadata else configs, extracted.folder)
        self._extract(TOKENIZER_FILES, given or (None if TOKENIZER in metadata else beside), extracted.folder)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, extracted.folder / "tokenizer.json")
        return extracted

    def _extract(self, files: dict[str, str], source: Path | None, target: Path) -> None:
        """Write these files to ``target``: copies of those of ``source``, or the metadata's if it is None."""
        for name, key in files.items():
            if source is not None:
                if (source / name).is_file():
                    shutil.copyfile(source / name, target / name)
                continue
            value = self.header.metadata.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise CheckpointError(f"{self.path}: metadata {key!r}: expected a string, got {value!r}")
            data = value.encode("utf-8")
            (target / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)

    def _bytes(self, name: str, info: TensorInfo) -> Tensor:
        """The tensor's bytes, uint8: (N, bytes of a row) if it is quantised, else (bytes,)."""
        try:
            data = np.fromfile(self.path, np.uint8, info.num_bytes, offset=info.offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: cannot be read: {error.strerror or error}") from error
        if data.size != info.num_bytes:
            raise CheckpointError(f"{self.path}: tensor {name}: truncated since the file was opened")
        if info.type.block > 1:
            data = data.reshape(-1, info.shape[-1] // info.type.block * info.type.num_bytes)
        return torch.from_numpy(data)

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.path}: tensor {name}: values that are not finite; download the file again")


def _dequantize(data_Nb: np.ndarray, info: TensorInfo) -> Tensor:
    """Quantised rows as float32, a few at a time: the package needs several times the memory of its result."""
    quants, kind = package().quants, package().GGMLQuantizationType[info.type.name]
    out_NK = torch.empty(data_Nb.shape[0], info.shape[-1])
    rows = max(1, CHUNK // info.shape[-1])
    with np.errstate(all="ignore"):  # scales that are not finite are reported with the tensor's name
        for first in range(0, data_Nb.shape[0], rows):
            part = quants.dequantize(data_Nb[first : first + rows], kind)
            out_NK[first : first + rows] = torch.from_numpy(part)
    return out_NK


def package() -> Any:
    """The package ``gguf``. Raises CheckpointError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"GGUF files need the package gguf: pip install gguf ({error})") from error
    return gguf


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file with the tensors of a CSM model in one of the layouts that are read.

    Raises CheckpointError for a damaged file, and for another dialect, with what to do.
    """
    file = GGUFFile(path, read_header(path))
    metadata, tensors = file.header.metadata, file.header.tensors
    architecture = metadata.get(ARCHITECTURE, "not given")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{path}: one of {metadata['split.count']} parts of a split model; join them with llama-gguf-split --merge"
        )
    if not tensors:
        raise CheckpointError(f"{path}: no tensors (architecture: {architecture})")
    if architecture == "llama-csm" or {"audio_embd.weight", "csm_proj.weight"} & tensors.keys():
        raise CheckpointError(
            f"{path}: a file of llama.cpp's CSM example, which splits the model into two files, backbone and decoder, "
            f"with other names. It is not supported; {CONVERT}"
        )
    if not {"text_embeddings.weight", "embed_text_tokens.weight"} & tensors.keys():
        some = ", ".join(list(tensors)[:3])
        raise CheckpointError(
            f"{path}: its tensors ({some}, ...; architecture: {architecture}) are not those of CSM in Sesame's or HF's "
            f"layout: missing tensor text_embeddings.weight. If it is a CSM model, {CONVERT}"
        )
    return file
