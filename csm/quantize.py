"""A model's weights in int8, int4 or fp8: which ones, and with which scales.

``kernels/quantized.py`` says what a quantised weight is. ``docs/cpu.md`` says what it costs and gains on a CPU,
``docs/quantization.md`` on a GPU.

Shapes: N outputs, K inputs, J blocks of 32 inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from csm.errors import CSMError
from csm.kernels.native import ops as native
from csm.kernels.quantized import (
    BLOCK,
    LARGEST,
    LEAST,
    QuantizedWeight,
    Weight,
    huge_page_buffer,
    pack,
    packed_shape,
)
from csm.kernels.quantized_rows import KINDS, QuantizedRows, pack_rows, quantize_fp8, stack_rows
from csm.kernels.row_file import RowFile
from csm.model import CSM

ALIGNMENT = 64  # bytes: of a weight in the memory that all share
BITS = {"int8": 8, "int4": 4}
PARTS = ("backbone", "depth", "heads")
PRESETS = {
    "int8": {"backbone": "int8", "depth": "int8", "heads": "int8"},
    "fp8": {"backbone": "fp8", "depth": "fp8", "heads": "fp8"},
    "int4-depth": {"backbone": "int8", "depth": "int4", "heads": "int8"},
    "int4": {"backbone": "int4", "depth": "int4", "heads": "int8"},
}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0
# GPUs whose L2 is large beside what a frame reads again and again. That of an A100 or H100 is in two halves, and a line
# that is read across may be in both.
KEEPING_CAPABILITIES = ((8, 9), (12, 0))
L2_SHARE = 0.8  # of the L2, for weights that stay in it
CHUNK_ROWS = 4096  # outputs whose scales are searched at once: the search takes ten times their memory in float32
# What a block's largest value may become: the search tries a scale for each. At 8 (the value of most magnitude becomes
# -8) nothing is cut off; beyond, it is, and the others are stored finer.
LARGEST_BECOMES = {8: (127.0,), 4: tuple(-(6.5 + 0.25 * step) for step in range(14))}


def parse_scheme(scheme: str) -> dict[str, str]:
    """The type of each part, from a preset or from ``backbone=int4,depth=int8``; a part left out keeps its dtype."""
    if scheme in PRESETS:
        return dict(PRESETS[scheme])
    types: dict[str, str] = {}
    for item in scheme.split(","):
        part, _, kind = item.strip().partition("=")
        if part not in PARTS or kind not in KINDS or part in types:
            raise CSMError(
                f"quantisation {scheme!r}: {item!r} is none of {', '.join(PRESETS)} and no PART=TYPE with a part of "
                f"{', '.join(PARTS)}, each once, and a type of {', '.join(KINDS)}"
            )
        types[part] = kind
    return types


class ModelWeight(NamedTuple):
    """A weight that is multiplied: its part of the model, its name, itself, and the weight of its inputs' RMSNorm."""

    part: str
    name: str
    value: Weight
    norm_K: Tensor | None


def check_device(kinds: Iterable[str], device: torch.device) -> None:
    """Raise CSMError if weights of these kinds cannot be used on a device."""
    if device.type not in ("cpu", "cuda", "meta"):
        raise CSMError(f"quantised weights run on a CPU or an NVIDIA GPU, not on {device}")
    if "fp8" in kinds and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise CSMError(
            "fp8 weights need a GPU of compute capability {}.{} (Ada, Hopper or later), and {} has {}.{}: "
            "use int8".format(*FP8_CAPABILITY, name, *capability)
        )


def quantize_model(
    model: CSM,
    scheme: str,
    progress: bool = False,
    read: Callable[[str], Tensor] | None = None,
    rows: bool = False,
) -> None:
    """Replace the weights that are multiplied by quantised ones, in place; embeddings and norms stay as they are.

    ``read`` gives a weight by its name, one at a time, where the model's own are on the meta device. The model can then
    run, but neither be trained nor saved. Each weight's memory is freed as it is replaced. On a CPU int8 and int4 are
    packed for the native ops; without these a weight gets the quantised values in its own dtype. With ``rows``, and on
    a GPU, they have the layout of the Triton kernels, as fp8 always has. Raises CSMError for an unknown scheme, for a
    model that is quantised already, and for a device that has no ops for the scheme.
    """
    types, device = parse_scheme(scheme), model.backbone.norm.device
    check_device(types.values(), device)
    if describe(model):
        raise CSMError("the model is quantised already")
    todo = [(w.part, w.name, w.value.shape, w.norm_K) for w in quantized_weights(model) if w.part in types]
    tiled = [types[part] in BITS and device.type == "cpu" and not rows for part, *_ in todo]
    shapes = [
        packed_shape(shape, BITS[types[part]]) if tile else (0,)
        for (part, _, shape, _), tile in zip(todo, tiled, strict=True)
    ]
    sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes]
    buffers = huge_page_buffer(sum(sizes)).split(sizes)  # in the order in which they are read
    bar = tqdm(todo, desc=f"quantising to {scheme}", disable=not progress, leave=False)
    for (part, name, _, norm_K), tile, shape, buffer in zip(bar, tiled, shapes, buffers, strict=True):
        weight = model.get_parameter(name).detach() if read is None else read(name)
        if not tile:
            set_weight(model, name, quantize_rows(weight, types[part], weight.dtype, norm_K))
            continue
        quantized = quantize(weight, BITS[types[part]], weight.dtype, norm_K, buffer[: math.prod(shape)].view(shape))
        dequantized = None if native.is_available() else nn.Parameter(quantized.dequantize(), requires_grad=False)
        set_weight(model, name, quantized if dequantized is None else dequantized)
    if device.type == "cuda":
        keep_in_cache(model, l2_budget(device))


def describe(model: CSM) -> str:
    """The types of a model's quantised weights by part, such as ``backbone=int8,depth=int4``; empty if none is."""
    found = {(w.part, w.value.kind) for w in quantized_weights(model) if not isinstance(w.value, Tensor)}
    return ",".join(f"{part}={kind}" for part, kind in sorted(found))


@torch.no_grad()
def use_rows(model: CSM, device: torch.device) -> None:
    """Move a quantised model to a device, its weights in the layout of the Triton kernels."""
    weights = {w.name: w.value for w in quantized_weights(model) if not isinstance(w.value, Tensor)}
    check_device({weight.kind for weight in weights.values()}, device)
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight):  # the bytes are put in order on the device
            weight = replace(weight, packed=weight.packed.to(device)).to_rows()
        set_weight(model, name, weight.to(device))
    for name, parameter in list(model.named_parameters()):
        set_weight(model, name, nn.Parameter(parameter.to(device), requires_grad=False))
    model.offset_K = model.offset_K.to(device)
    if isinstance(model.depth_embedding, Tensor):  # rows in a file are read on the CPU
        model.depth_embedding = model.depth_embedding.to(device)
    for stack in (model.backbone, model.depth_decoder):
        stack.rope.rope_Sp2 = stack.rope.rope_Sp2.to(device)
    if device.type == "cuda":
        keep_in_cache(model, l2_budget(device))


def l2_budget(device: torch.device) -> int:
    """Bytes of weights that a GPU can keep in its L2 cache."""
    properties = torch.cuda.get_device_properties(device)
    keeps = (properties.major, properties.minor) in KEEPING_CAPABILITIES
    return int(L2_SHARE * properties.L2_cache_size) if keeps else 0


def keep_in_cache(model: CSM, num_bytes: int) -> None:
    """Mark the quantised weights of the depth decoder's blocks that fit into so many bytes to stay in the GPU's cache.

    They are read 31 times a frame, all others once. The MLPs come first: their products take the longest.
    """
    depth = [weight for weight in quantized_weights(model) if weight.part == "depth"]
    for weight in sorted(depth, key=lambda weight: ".mlp." not in weight.name):
        if isinstance(weight.value, QuantizedRows) and weight.value.nbytes <= num_bytes:
            num_bytes -= weight.value.nbytes
            set_weight(model, weight.name, replace(weight.value, keep=True))


def quantized_weights(model: CSM) -> Iterator[ModelWeight]:
    """Every weight that a scheme can name, in the order in which a frame reads them."""
    for part, stack in (("backbone", "backbone"), ("depth", "depth_decoder")):
        for index, layer in enumerate(getattr(model, stack).layers):
            name, attention, mlp = f"{stack}.layers.{index}", layer.attention, layer.mlp
            yield ModelWeight(part, f"{name}.attention.qkv", attention.qkv, attention.norm)
            yield ModelWeight(part, f"{name}.attention.output", attention.output, None)
            yield ModelWeight(part, f"{name}.mlp.gate_up", mlp.gate_up, mlp.norm)
            yield ModelWeight(part, f"{name}.mlp.down", mlp.down, None)
    yield ModelWeight("heads", "projection", model.projection, model.backbone.norm)
    yield ModelWeight("heads", "codebook0_head", model.codebook0_head, model.backbone.norm)
    yield ModelWeight("heads", "depth_heads", model.depth_heads, model.depth_decoder.norm)


def set_weight(model: CSM, name: str, weight: nn.Parameter | QuantizedWeight | QuantizedRows | RowFile) -> None:
    """Replace a weight by one of any kind."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    delattr(module, attribute)  # a parameter's name takes nothing but parameters
    setattr(module, attribute, weight)


@torch.no_grad()
def quantize(
    weight: Tensor, bits: int, dtype: torch.dtype, norm_K: Tensor | None = None, out: Tensor | None = None
) -> QuantizedWeight:
    """Quantise a weight, (N, K) or (L, N, K), that is multiplied with inputs of ``dtype``.

    ``norm_K`` is the weight of the RMSNorm that its inputs come from: their size, and so what an error counts, is in
    proportion to it. ``out``, uint8 of ``packed_shape``, receives the bytes.
    """
    importance_K = torch.ones(weight.shape[-1]) if norm_K is None else norm_K.detach().float().square().cpu()
    packed = torch.empty(packed_shape(weight.shape, bits), dtype=torch.uint8) if out is None else out
    parts = [(weight, packed)] if weight.ndim == 2 else list(zip(weight, packed, strict=True))
    for part_NK, part_out in parts:
        if native.use_native_quantization(part_NK):
            native.quantize(part_NK, importance_K, bits, LARGEST_BECOMES[bits], part_out)
        else:
            part_out.copy_(pack(*quantize_blocks(part_NK.float(), bits, importance_K), bits))
    return QuantizedWeight(packed, weight.shape, bits, dtype)


@torch.no_grad()
def quantize_rows(weight: Tensor, kind: str, dtype: torch.dtype, norm_K: Tensor | None = None) -> QuantizedRows:
    """``quantize`` to the layout of the Triton kernels, on the weight's device; ``kind`` may also be fp8."""
    if weight.ndim == 3:
        return stack_rows([quantize_rows(part_NK, kind, dtype, norm_K) for part_NK in weight])
    if kind == "fp8":
        return quantize_fp8(weight, dtype)
    if native.use_native_quantization(weight):
        return quantize(weight, BITS[kind], dtype, norm_K).to_rows()
    importance_K = torch.ones(weight.shape[1]) if norm_K is None else norm_K.detach().float().square()
    importance_K, bits = importance_K.to(weight.device), BITS[kind]
    chunks = [quantize_blocks(chunk.float(), bits, importance_K) for chunk in weight.split(CHUNK_ROWS)]
    q_NK, scale_NJ = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return pack_rows(q_NK, scale_NJ, kind, dtype)


def quantize_blocks(weight_NK: Tensor, bits: int, importance_K: Tensor) -> tuple[Tensor, Tensor]:
    """Values, (N, K) int8, and float16 scales, (N, J), with the least error: of each block, the sum over its inputs of
    importance * (weight - scale * value) squared.

    For each of a few scales the nearest values are taken, and then the scale that fits these best.
    """
    K = weight_NK.shape[1]
    fill = (0, -K % BLOCK)
    block_NJB = nn.functional.pad(weight_NK, fill).unflatten(1, (-1, BLOCK))
    importance_JB = nn.functional.pad(importance_K, fill).unflatten(0, (-1, BLOCK))
    extreme_NJ1 = block_NJB.gather(2, block_NJB.abs().argmax(2, keepdim=True))
    best_error_NJ1 = torch.full_like(extreme_NJ1, torch.inf)
    best_scale_NJ1, best_q_NJB = torch.zeros_like(extreme_NJ1), torch.zeros_like(block_NJB)
    for largest in LARGEST_BECOMES[bits]:
        scale_NJ1 = extreme_NJ1 / largest
        q_NJB = (block_NJB / scale_NJ1).nan_to_num(0).round().clamp(LEAST[bits], LARGEST[bits])
        fit_NJ1 = (importance_JB * block_NJB * q_NJB).sum(2, keepdim=True)
        size_NJ1 = (importance_JB * q_NJB.square()).sum(2, keepdim=True)
        scale_NJ1 = torch.where(size_NJ1 > 0, fit_NJ1 / size_NJ1, scale_NJ1).half().float()
        error_NJ1 = (importance_JB * (block_NJB - scale_NJ1 * q_NJB).square()).sum(2, keepdim=True)
        better_NJ1 = error_NJ1 < best_error_NJ1
        best_error_NJ1 = torch.where(better_NJ1, error_NJ1, best_error_NJ1)
        best_scale_NJ1 = torch.where(better_NJ1, scale_NJ1, best_scale_NJ1)
        best_q_NJB = torch.where(better_NJ1, q_NJB, best_q_NJB)
    return best_q_NJB.flatten(1)[:, :K].to(torch.int8), best_scale_NJ1.squeeze(2).half()


def weight_bytes(model: CSM) -> dict[str, int]:
    """Bytes of the model's weights by kind: ``int4``, ``int8``, ``fp8`` and the dtypes of the others."""
    sizes: Counter[str] = Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    for weight in quantized_weights(model):
        if not isinstance(weight.value, Tensor):
            sizes[weight.value.kind] += weight.value.nbytes
    for table in (model.text_embedding, model.audio_embedding, model.depth_embedding):
        if isinstance(table, RowFile):
            sizes[str(table.dtype).removeprefix("torch.")] += table.nbytes
    return dict(sizes)
