"""A model's weights in int8 or int4: which ones, and with which scales.

``kernels/quantized.py`` says what a quantised weight is. ``docs/cpu.md`` says what it costs and gains.

Shapes: N outputs, K inputs, J blocks of 32 inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
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
from csm.kernels.row_file import RowFile
from csm.model import CSM

ALIGNMENT = 64  # bytes: of a weight in the memory that all share
BITS = {"int8": 8, "int4": 4}
PARTS = ("backbone", "depth", "heads")
PRESETS = {
    "int8": {"backbone": "int8", "depth": "int8", "heads": "int8"},
    "int4": {"backbone": "int4", "depth": "int4", "heads": "int8"},
}
# What a block's largest value may become: the search tries a scale for each. At 8 (the value of most magnitude becomes
# -8) nothing is cut off; beyond, it is, and the others are stored finer.
LARGEST_BECOMES = {8: (127.0,), 4: tuple(-(6.5 + 0.25 * step) for step in range(14))}


def parse_scheme(scheme: str) -> dict[str, str]:
    """``int8``, ``int4`` or ``backbone=int4,depth=int8``: the type of each part; a part left out keeps its dtype."""
    if scheme in PRESETS:
        return dict(PRESETS[scheme])
    types: dict[str, str] = {}
    for item in scheme.split(","):
        part, _, kind = item.strip().partition("=")
        if part not in PARTS or kind not in BITS or part in types:
            raise CSMError(
                f"quantisation {scheme!r}: {item!r} is none of {', '.join(PRESETS)} and no PART=TYPE with a part of "
                f"{', '.join(PARTS)}, each once, and a type of {', '.join(BITS)}"
            )
        types[part] = kind
    return types


class ModelWeight(NamedTuple):
    """A weight that is multiplied: its part of the model, its name, itself, and the weight of its inputs' RMSNorm."""

    part: str
    name: str
    value: Weight
    norm_K: Tensor | None


def quantize_model(
    model: CSM, scheme: str, progress: bool = False, read: Callable[[str], Tensor] | None = None
) -> None:
    """Replace the weights that are multiplied by quantised ones, in place; embeddings and norms stay as they are.

    ``read`` gives a weight by its name, one at a time, where the model's own are on the meta device. The model can then
    run, but neither be trained nor saved. Each weight's memory is freed as it is replaced. Without native ops a weight
    gets the quantised values in its own dtype. Raises CSMError for an unknown scheme, and for a model that is not on a
    CPU or quantised already.
    """
    types = parse_scheme(scheme)
    if model.backbone.norm.device.type != "cpu":
        raise CSMError(f"quantised weights run on a CPU, not on {model.device}")
    if any(isinstance(weight.value, QuantizedWeight) for weight in quantized_weights(model)):
        raise CSMError("the model is quantised already")
    todo = [(w.part, w.name, w.value.shape, w.norm_K) for w in quantized_weights(model) if w.part in types]
    shapes = [packed_shape(shape, BITS[types[part]]) for part, _, shape, _ in todo]
    sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes]
    buffers = huge_page_buffer(sum(sizes)).split(sizes)  # in the order in which they are read
    bar = tqdm(todo, desc=f"quantising to {scheme}", disable=not progress, leave=False)
    for (part, name, _, norm_K), shape, buffer in zip(bar, shapes, buffers, strict=True):
        weight = model.get_parameter(name).detach() if read is None else read(name)
        out = buffer[: math.prod(shape)].view(shape)
        quantized = quantize(weight, BITS[types[part]], weight.dtype, norm_K, out)
        dequantized = None if native.is_available() else nn.Parameter(quantized.dequantize(), requires_grad=False)
        set_weight(model, name, quantized if dequantized is None else dequantized)


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


def set_weight(model: CSM, name: str, weight: nn.Parameter | QuantizedWeight | RowFile) -> None:
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
    """Bytes of the model's weights by kind: ``int4``, ``int8`` and the dtypes of the others."""
    sizes: Counter[str] = Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    for weight in quantized_weights(model):
        if isinstance(weight.value, QuantizedWeight):
            sizes[f"int{weight.value.bits}"] += weight.value.nbytes
    return dict(sizes)
