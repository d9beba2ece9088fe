"""GGUF files: read one into a model that keeps its quantised blocks, and write one from any checkpoint.

``docs/gguf.md`` says which files are read, and what is written.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from csm.config import CSMConfig
from csm.errors import CheckpointError, CSMError
from csm.kernels.native.ops import is_available
from csm.kernels.quantized import BLOCK, QuantizedWeight, huge_page_buffer, pack, packed_shape, unpack
from csm.kernels.quantized_rows import QuantizedRows, pack_rows
from csm.model import CSM
from csm.quantize import (
    ALIGNMENT,
    BITS,
    ModelWeight,
    parse_scheme,
    quantize,
    quantize_rows,
    quantized_weights,
    set_weight,
)
from csm.weights import Checkpoint, read_codec, read_model
from csm.weights.checkpoint import codec_beside
from csm.weights.gguf import CONFIG_FILES, TOKENIZER_FILES, package
from csm.weights.gguf_blocks import BITS as BLOCK_BITS
from csm.weights.gguf_blocks import pack_blocks, quantize_q4_k
from csm.weights.gguf_header import TYPES
from csm.weights.layouts import Entry, Table, sesame_table

CPU = torch.device("cpu")
BLOCK_OF = {kind.name: kind.block for kind in TYPES.values()}
# ggml's type of each part. Rows that are no multiple of a type's block get the next of q4_k, q8_0 and f16.
SCHEMES = {
    "q8_0": {"backbone": "Q8_0", "depth": "Q8_0", "heads": "Q8_0"},
    "q4_0": {"backbone": "Q4_0", "depth": "Q4_0", "heads": "Q8_0"},
    "q4_k": {"backbone": "Q4_K", "depth": "Q4_K", "heads": "Q8_0"},
}
FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_k": 15}  # general.file_type: most tensors are of this type
ROWS = 1 << 20  # values that are quantised to q4_k at a time


def read_gguf_model(
    checkpoint: Checkpoint,
    scheme: str | None,
    dtype: torch.dtype,
    progress: bool = False,
    keep_blocks: bool = True,
    rows: bool = False,
) -> CSM:
    """Read the model of a GGUF file into the CPU's memory. Blocks of q8_0 and q4_0 become int8 and int4 weights as
    they are.

    ``scheme`` quantises other weights, or these to another type; without it they have ``dtype``, like embeddings and
    norms. ``keep_blocks`` False dequantises the blocks of parts that ``scheme`` does not name. One weight at a time is
    in memory in ``dtype``. Int8 and int4 are packed for the native ops of a CPU, and dequantised where there are none;
    with ``rows`` they have the layout of the Triton kernels, as fp8 always has.
    """
    types = parse_scheme(scheme) if scheme else {}
    model = empty_model(checkpoint.config)
    names = {weight.name for weight in quantized_weights(model)}
    for name in [name for name, _ in model.named_parameters()]:
        if name not in names or name == "projection":
            set_weight(model, name, _dense(checkpoint, name, dtype))
    model.precompute_depth_embedding()
    weights = list(quantized_weights(model))  # in the order in which they are read
    kept = {weight.name: _kept_kind(checkpoint, weight.name) if keep_blocks else None for weight in weights}
    kinds = {weight.name: types.get(weight.part) or kept[weight.name] for weight in weights}
    buffers = {} if rows else _buffers(weights, kinds)
    for weight in tqdm(weights, desc="loading weights", delay=1, leave=False, disable=None if progress else True):
        name, kind = weight.name, kinds[weight.name]
        if kind is None:
            set_weight(model, name, _dense(checkpoint, name, dtype))
            continue
        value = _quantized(checkpoint, weight, kind, dtype, buffers.get(name))
        usable = isinstance(value, QuantizedRows) or is_available()
        set_weight(model, name, value if usable else nn.Parameter(value.dequantize(), requires_grad=False))
    return model.eval()


def empty_model(config: CSMConfig) -> CSM:
    """A model for a CPU whose weights are on the meta device: without memory."""
    with torch.device("meta"):
        return CSM(config, CPU)


def _entries(checkpoint: Checkpoint, name: str) -> Table:
    """The entries that fill a weight, in the order of its rows."""
    return sorted((entry for entry in checkpoint.table if entry.target == name), key=lambda entry: entry.first)


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    return read_model(replace(checkpoint, table=_entries(checkpoint, name)), CPU, dtype)[name]


def _dense(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_read(checkpoint, name, dtype), requires_grad=False)


def _kept_kind(checkpoint: Checkpoint, name: str) -> str | None:
    """int8 or int4 of a weight whose tensors all have such blocks. A weight of several types is dequantised."""
    assert checkpoint.gguf is not None
    found = {checkpoint.gguf.bits(entry.source) for entry in _entries(checkpoint, name)}
    return next((kind for kind, bits in BITS.items() if found == {bits}), None)


def _buffers(weights: list[ModelWeight], kinds: dict[str, str | None]) -> dict[str, Tensor]:
    """Memory for the packed bytes of each int8 and int4 weight, all in one piece."""
    shapes = {
        weight.name: packed_shape(weight.value.shape, BITS[kind])
        for weight in weights
        if (kind := kinds[weight.name]) in BITS
    }
    sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes.values()]
    parts = huge_page_buffer(sum(sizes)).split(sizes) if sizes else ()
    return {
        name: part[: math.prod(shape)].view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _quantized(
    checkpoint: Checkpoint, weight: ModelWeight, kind: str, dtype: torch.dtype, out: Tensor | None
) -> QuantizedWeight | QuantizedRows:
    """A weight of a kind: the file's blocks if they are of this kind, else quantised from their values.

    ``out`` receives the bytes that are packed for a CPU. Without it the weight has the layout of the Triton kernels.
    """
    assert checkpoint.gguf is not None
    if _kept_kind(checkpoint, weight.name) != kind:
        dense = _read(checkpoint, weight.name, dtype)
        if out is None:
            return quantize_rows(dense, kind, dtype, weight.norm_K)
        return quantize(dense, BITS[kind], dtype, weight.norm_K, out)
    entries = _entries(checkpoint, weight.name)
    blocks = [checkpoint.gguf.read_blocks(entry.source) for entry in entries]
    # Rows of the file may be permuted (HF's layout). A block is within a row.
    q_NK = torch.cat([entry.to_target(q_NK) for entry, (q_NK, _) in zip(entries, blocks, strict=True)])
    scale_NJ = torch.cat([entry.to_target(scale_NJ) for entry, (_, scale_NJ) in zip(entries, blocks, strict=True)])
    if out is None:
        return pack_rows(q_NK, scale_NJ, kind, dtype)
    out.copy_(pack(q_NK, scale_NJ, BITS[kind]))
    return QuantizedWeight(out, weight.value.shape, BITS[kind], dtype)


def save_gguf(checkpoint: Checkpoint, scheme: str, path: Path, progress: bool = False) -> list[Path]:
    """Write a checkpoint as a GGUF file in Sesame's layout, one tensor in memory at a time; the files written.

    Config and tokenizer go into its metadata, and the checkpoint's own codec, if it has one, into a file beside it.
    Raises CSMError for an unknown scheme, a name without .gguf, and a checkpoint that is quantised.
    """
    if scheme not in SCHEMES:
        raise CSMError(f"quantisation {scheme!r}: a GGUF file can have {', '.join(SCHEMES)}")
    if path.suffix != ".gguf":
        raise CSMError(f"{path}: {scheme} is for a GGUF file: give --out a name that ends in .gguf")
    if checkpoint.gguf is not None and checkpoint.gguf.quantized:
        raise CSMError(f"{checkpoint.gguf.path} is quantised already: convert the original checkpoint")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _write(checkpoint, scheme, part, path.stem, progress)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if not checkpoint.has_own_codec:
        return [path]
    save_file(read_codec(checkpoint, None, CPU), codec_beside(path), metadata={"format": "pt"})
    return [path, codec_beside(path)]


def _write(checkpoint: Checkpoint, scheme: str, path: Path, name: str, progress: bool) -> None:
    gguf = package()
    writer = gguf.GGUFWriter(path, "csm")  # writes the key general.architecture
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[scheme])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, text in _metadata(checkpoint):
        writer.add_string(key, text)
    kinds = _kinds(checkpoint, scheme)
    for entry in _by_target(checkpoint):
        kind = gguf.GGMLQuantizationType[kinds[entry.source]]
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(entry.shape) // block * num_bytes
        writer.add_tensor_info(entry.source, entry.shape, np.dtype(np.float16), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        model = _model_with_norms(checkpoint)
        norms = {weight.name: weight.norm_K for weight in quantized_weights(model)}
        targets = list(dict.fromkeys(entry.target for entry in _by_target(checkpoint)))
        for target in tqdm(targets, desc=f"quantising to {scheme}", disable=not progress, leave=False):
            for data in _tensors(checkpoint, target, kinds, norms.get(target)):
                writer.write_tensor_data(data.numpy())
    finally:
        writer.close()


def _metadata(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Key and text of each file of the checkpoint that describes it."""
    _ = checkpoint.tokenizer_path  # a missing one is an error
    for name, key in {**CONFIG_FILES, **TOKENIZER_FILES}.items():
        path = checkpoint.config_folder / name
        if path.is_file():
            data = path.read_bytes()
            yield key, (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")


def _by_target(checkpoint: Checkpoint) -> Table:
    """Sesame's table, the entries of each parameter together and in the order of its rows."""
    table = sesame_table(checkpoint.config)
    order = {target: index for index, target in enumerate(dict.fromkeys(entry.target for entry in table))}
    return sorted(table, key=lambda entry: (order[entry.target], entry.first))


def _kinds(checkpoint: Checkpoint, scheme: str) -> dict[str, str]:
    """ggml's type of each tensor. Embeddings, norms and the depth decoder's heads (3-D) are f16."""
    part_of = {weight.name: weight.part for weight in quantized_weights(empty_model(checkpoint.config))}
    kinds = {}
    for entry in sesame_table(checkpoint.config):
        wanted = [SCHEMES[scheme][part_of[entry.target]]] if entry.target in part_of else []
        candidates = [*wanted, "Q8_0"] if wanted and len(entry.shape) == 2 else []
        fitting = [kind for kind in candidates if entry.shape[-1] % BLOCK_OF[kind] == 0]
        kinds[entry.source] = fitting[0] if fitting else "F16"
    return kinds


def _model_with_norms(checkpoint: Checkpoint) -> CSM:
    """A model of which only the norms are read: what an input's error counts is in proportion to them."""
    model = empty_model(checkpoint.config)
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim == 1:
            set_weight(model, name, _dense(checkpoint, name, torch.float32))
    return model


def _tensors(checkpoint: Checkpoint, target: str, kinds: dict[str, str], norm_K: Tensor | None) -> Iterator[Tensor]:
    """The file's tensors of one parameter, in its order, as uint8 or float16."""
    entries = [entry for entry in _by_target(checkpoint) if entry.target == target]
    kind = kinds[entries[0].source]
    if kind == "F16":
        weight = _read(checkpoint, target, torch.float16)
        for entry in entries:
            yield _half(checkpoint, entry, _rows(weight, entry))
        return
    weight = _read(checkpoint, target, torch.float32)
    if kind in BLOCK_BITS:
        bits = BLOCK_BITS[kind]
        q_NK, scale_NJ = unpack(quantize(weight, bits, torch.float32, norm_K).packed, bits)
        N, K = weight.shape
        data = pack_blocks(q_NK[:N, :K], scale_NJ[:N, : K // BLOCK], bits)
    else:
        importance_K = torch.ones(weight.shape[1]) if norm_K is None else norm_K.detach().square()
        parts = weight.split(max(1, ROWS // weight.shape[1]))
        data = torch.cat([quantize_q4_k(part, importance_K) for part in parts])
    for entry in entries:
        yield _rows(data, entry)


def _rows(weight: Tensor, entry: Entry) -> Tensor:
    return weight[entry.first : entry.first + entry.target_shape[0]]


def _half(checkpoint: Checkpoint, entry: Entry, rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{checkpoint.folder}: tensor {entry.source}: values that float16 cannot hold")
    return entry.to_source(rows).contiguous()
