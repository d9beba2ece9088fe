"""``python -m csm quantize``: write a model with quantised weights to a folder that loads fast and in little memory, or
as a GGUF file.

The folder has the model's tensors under this package's names in ``quantized.safetensors``: quantised weights packed, as
uint8, and what they are in the file's metadata; and ``config.json``, ``tokenizer.json``, what the checkpoint has of
``generation_config.json`` and ``pronunciation.json.gz``, and the codec.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from csm.codec import normalize_codebooks
from csm.command_line import add_tokenizer_option
from csm.errors import CheckpointError, CSMError
from csm.gguf_model import SCHEMES, empty_model, read_gguf_model, save_gguf
from csm.kernels import row_file
from csm.kernels.native.ops import is_available
from csm.kernels.quantized import QuantizedWeight, huge_page_buffer, packed_shape
from csm.kernels.quantized_rows import QuantizedRows, empty_rows
from csm.kernels.row_file import RowFile
from csm.model import CSM
from csm.prompt import TextTokenizer
from csm.quantize import (
    ALIGNMENT,
    BITS,
    PRESETS,
    ModelWeight,
    check_device,
    parse_scheme,
    quantize_model,
    quantized_weights,
    set_weight,
    use_rows,
)
from csm.weights import Checkpoint, open_checkpoint, read_codec, read_model
from csm.weights.checkpoint import MIMI_FILE
from csm.weights.config_json import read_config
from csm.weights.hub import OPTIONAL

FILE = "quantized.safetensors"
SCHEME, DTYPE = "csm.scheme", "csm.dtype"  # keys of the file's metadata
SCALES = ".scales"  # of an fp8 weight: its name and this
CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_quantized(
    checkpoint: Checkpoint, scheme: str, dtype: torch.dtype, progress: bool = False, device: torch.device = CPU
) -> CSM:
    """Read a checkpoint's model and quantise it weight by weight: one of them at a time is in memory in ``dtype``.

    They are quantised on the CPU and then moved to ``device``.
    """
    if checkpoint.gguf is not None:
        return read_gguf(checkpoint, scheme, dtype, progress, device, keep_blocks=False)
    types = parse_scheme(scheme)
    check_device(types.values(), device)

    def read(name: str) -> Tensor:
        table = [entry for entry in checkpoint.table if entry.target == name]
        return read_model(replace(checkpoint, table=table), CPU, dtype)[name]

    model = empty_model(checkpoint.config)
    later = {weight.name for weight in quantized_weights(model) if weight.part in types}
    for name, _ in list(model.named_parameters()):
        if name not in later:
            set_weight(model, name, nn.Parameter(read(name), requires_grad=False))
    if "projection" in later:
        set_weight(model, "projection", nn.Parameter(read("projection"), requires_grad=False))
    model.precompute_depth_embedding()
    quantize_model(model, scheme, progress, read, rows=device.type != "cpu")
    if device.type != "cpu":
        use_rows(model, device)
    return model.eval()


def read_gguf(
    checkpoint: Checkpoint,
    scheme: str | None,
    dtype: torch.dtype,
    progress: bool = False,
    device: torch.device = CPU,
    keep_blocks: bool = True,
) -> CSM:
    """``read_gguf_model``, then moved to ``device``. Raises CSMError for a device that has no ops for the scheme."""
    check_device(parse_scheme(scheme).values() if scheme else (), device)
    model = read_gguf_model(checkpoint, scheme, dtype, progress, keep_blocks, rows=device.type != "cpu")
    if device.type != "cpu":
        use_rows(model, device)
    return model


def save_quantized(
    checkpoint: Checkpoint, scheme: str, folder: Path, dtype: torch.dtype = torch.bfloat16, progress: bool = False
) -> Path:
    """Quantise a checkpoint and write it to ``folder``; the path of its weights.

    ``dtype`` is that of embeddings, norms and activations. The codec is written where the checkpoint has one. Raises
    CSMError for an unknown scheme, and where there are no native ops.
    """
    parse_scheme(scheme)  # wrong arguments are errors before anything is compiled or read
    if folder.exists() and not folder.is_dir():
        raise CSMError(f"{folder}: a file of this name exists; name a folder")
    if folder.resolve() == checkpoint.config_folder.resolve():
        raise CSMError(f"{folder}: is the folder of the model that is read; name another one to write to")
    TextTokenizer(checkpoint.tokenizer_path, checkpoint.config.text_vocab_size)  # a bad one is an error now
    if not is_available():
        raise CSMError("a quantised model is for the native ops, which need a C++ compiler: install g++")
    model = read_quantized(checkpoint, scheme, dtype, progress)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert isinstance(model.depth_embedding, Tensor)
    tensors["depth_embedding"] = model.depth_embedding
    for weight in quantized_weights(model):
        value = weight.value
        if isinstance(value, QuantizedWeight):
            tensors[weight.name] = value.packed.contiguous()
        elif isinstance(value, QuantizedRows):
            tensors[weight.name], tensors[weight.name + SCALES] = value.values, value.scales
    folder.mkdir(parents=True, exist_ok=True)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    save_file(tensors, folder / f"{FILE}.part", metadata={"format": "pt", SCHEME: scheme, DTYPE: name})
    os.replace(folder / f"{FILE}.part", folder / FILE)
    shutil.copyfile(checkpoint.config_folder / "config.json", folder / "config.json")
    shutil.copyfile(checkpoint.tokenizer_path, folder / "tokenizer.json")
    for optional in OPTIONAL:
        if (checkpoint.config_folder / optional).is_file():
            shutil.copyfile(checkpoint.config_folder / optional, folder / optional)
        else:
            (folder / optional).unlink(missing_ok=True)  # of a model that was written there before
    if checkpoint.has_own_codec:
        codec = normalize_codebooks(read_codec(checkpoint, None, CPU))
        save_file(codec, folder / MIMI_FILE, metadata={"format": "pt"})
    return folder / FILE


def open_quantized(name: str | Path, device: torch.device = CPU) -> tuple[Checkpoint, CSM] | None:
    """The checkpoint and model of a folder that ``save_quantized`` wrote; None for anything else.

    On a CPU embeddings stay on disk: only the rows that are used are read. Raises CheckpointError, which names the file
    and the tensor, and CSMError for a device that has no ops for these weights.
    """
    folder = Path(name).expanduser()
    path = folder / FILE
    if not path.is_file():
        return None
    config, codec_config = read_config(folder / "config.json")
    model = empty_model(config)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(DTYPE) not in DTYPES or SCHEME not in metadata:
                raise CheckpointError(
                    f"{path}: metadata without {SCHEME} and {DTYPE}; write it again with csm quantize"
                )
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt; write it again with csm quantize ({error})") from error
    types, dtype = parse_scheme(metadata[SCHEME]), DTYPES[metadata[DTYPE]]
    _check(model, found, types, path)
    check_device(types.values(), device)
    _fill(model, types, dtype, path, rows=device.type != "cpu")
    if device.type != "cpu":
        use_rows(model, device)
    return Checkpoint(folder, config, codec_config, table=[], file_of={}, shape_of={}), model.eval()


def _check(model: CSM, found: dict[str, tuple[int, ...]], types: dict[str, str], path: Path) -> None:
    """Raise CheckpointError at the first missing tensor, wrong shape or unexpected tensor."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected["depth_embedding"] = tuple(model.depth_embedding.shape)
    for weight in _quantized(model, types):
        kind = types[weight.part]
        if kind in BITS:
            expected[weight.name] = packed_shape(weight.value.shape, BITS[kind])
        else:
            rows = empty_rows(weight.value.shape, kind, torch.float32, torch.device("meta"))
            expected[weight.name], expected[weight.name + SCALES] = tuple(rows.values.shape), tuple(rows.scales.shape)
    for name, sizes in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: missing tensor {name}")
        if found[name] != sizes:
            raise CheckpointError(f"{path}: tensor {name}: expected shape {sizes}, got {found[name]}")
    unexpected = sorted(set(found) - set(expected))
    if unexpected:
        raise CheckpointError(f"{path}: unexpected tensor {unexpected[0]}")


def _quantized(model: CSM, types: dict[str, str]) -> list[ModelWeight]:
    return [weight for weight in quantized_weights(model) if weight.part in types]


def _fill(model: CSM, types: dict[str, str], dtype: torch.dtype, path: Path, rows: bool) -> None:
    """Put the file's tensors into the model, those of quantised weights copied to huge pages.

    With ``rows`` int8 and int4 weights get the layout of the Triton kernels.
    """
    tiled = [weight for weight in _quantized(model, types) if types[weight.part] in BITS]
    shapes = [packed_shape(weight.value.shape, BITS[types[weight.part]]) for weight in tiled]
    sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes]
    names = {name for name, _ in model.named_parameters()}
    for weight in _quantized(model, types):
        names.remove(weight.name)
        if weight not in tiled:
            parts = (_mapped(path, weight.name), _mapped(path, weight.name + SCALES))
            set_weight(model, weight.name, QuantizedRows(*parts, weight.value.shape, types[weight.part], dtype))
    for weight, shape, buffer in zip(tiled, shapes, huge_page_buffer(sum(sizes)).split(sizes), strict=True):
        packed = buffer[: math.prod(shape)].view(shape)
        packed.copy_(_mapped(path, weight.name))
        value = QuantizedWeight(packed, weight.value.shape, BITS[types[weight.part]], dtype)
        usable: QuantizedWeight | QuantizedRows = value.to_rows() if rows else value
        set_weight(model, weight.name, usable if rows or is_available() else nn.Parameter(value.dequantize(), False))
    for name in ("depth_embedding", *names):
        if not rows and row_file.IS_SUPPORTED and name in ("text_embedding", "audio_embedding", "depth_embedding"):
            table = _row_file(path, name, dtype)
            set_weight(model, name, table)
            if name != "text_embedding":  # of which a prompt needs few rows
                table.read_ahead()
        elif name == "depth_embedding":
            model.depth_embedding = _mapped(path, name)
        else:
            set_weight(model, name, _parameter(_mapped(path, name)))


def _mapped(path: Path, name: str) -> Tensor:
    """One tensor, through a memory map of its own: pages that were copied leave memory with it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _row_file(path: Path, name: str, dtype: torch.dtype) -> RowFile:
    """A table of a safetensors file whose header has been checked, for a gather of few rows."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_size))[name]
    return RowFile(path, 8 + header_size + entry["data_offsets"][0], entry["shape"], dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("model", help="hub name, folder, GGUF file, or tiny")
    parser.add_argument(
        "--scheme",
        required=True,
        help=f"{', '.join(PRESETS)}, or types by part: backbone=int4,depth=int4,heads=int8; "
        f"for a GGUF file {', '.join(SCHEMES)}",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, or FILE.gguf")
    add_tokenizer_option(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of embeddings and activations (default: bfloat16); embeddings of a GGUF file are float16",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> str:
    """Quantise the model; return what was written."""
    checkpoint = open_checkpoint(args.model, not args.quiet, args.tokenizer)
    if args.scheme in SCHEMES or args.out.suffix == ".gguf":
        paths = save_gguf(checkpoint, args.scheme, args.out, not args.quiet)
    else:
        paths = [save_quantized(checkpoint, args.scheme, args.out, DTYPES[args.dtype], not args.quiet)]
    size = f"{paths[0]}: {paths[0].stat().st_size / 1e6:.0f} MB, {args.scheme}"
    return size if len(paths) == 1 else f"{size}; its codec: {paths[1]}"
