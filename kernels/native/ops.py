"""The native ops, called with tensors. See the wrappers in ``csm.kernels`` for what they compute."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csm.kernels.launch import row_stride
from csm.kernels.native import library
from csm.kernels.quantized import LARGEST, LEAST, QuantizedWeight, Weight
from csm.kernels.row_file import RowFile, Table

if TYPE_CHECKING:
    from csm.kernels.block import BlockWeights

MAX_ROWS = 8  # beyond, PyTorch's own products of floats win; those with quantised weights it does not have
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
KINDS = {8: 2, 4: 3}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS = [_INT, _POINTER, _INT, _INT]  # dtype, rows, their stride and number
_NORM = [_POINTER, _FLOAT]
_WEIGHT = [_INT, _POINTER, _INT, _INT]
_RESIDUAL = [_POINTER, _INT]
_TABLE = [_POINTER, _INT, _INT, _INT]  # in memory, or a file and an offset; number of rows
_OUT = [_POINTER, _INT]  # and the number of threads
_ARGUMENTS: dict[str, list[Any]] = {
    "csm_norm_linear": [*_ROWS, *_NORM, *_WEIGHT, *_OUT],
    "csm_norm_swiglu": [*_ROWS, *_NORM, *_WEIGHT, *_OUT],
    "csm_linear_add": [*_ROWS, *_WEIGHT, *_RESIDUAL, *_OUT],
    "csm_norm_rope_cache": [
        *(*_ROWS, *_NORM, *_WEIGHT, _POINTER, _POINTER, _POINTER, _INT, _INT),
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT, *_OUT),
    ],
    "csm_attention_linear_add": [
        *(_INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT),
        *(_INT, _INT, _INT, _INT, *_WEIGHT, *_RESIDUAL, *_OUT),
    ],
    "csm_blocks": [
        *(*_ROWS, _INT, _POINTER, _FLOAT, _POINTER, _POINTER, _POINTER, _INT, _INT),
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, *_OUT),
    ],
    "csm_sample": [*_ROWS, _INT, *[_POINTER] * 4, _INT, _POINTER, _INT],
    "csm_depth_codes": [
        *(_INT, _POINTER, _INT, _INT, _INT, _POINTER, _FLOAT, _POINTER, _POINTER, _POINTER, _INT),
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER, _POINTER),
        *(*_TABLE, _INT, _INT, *[_POINTER] * 4, *_OUT, _INT),
    ],
    "csm_embed_rows": [_INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _INT, *_TABLE, *_TABLE, *_OUT],
    "csm_quantize": [_INT, _POINTER, _INT, _INT, _POINTER, _INT, _FLOAT, _FLOAT, _POINTER, _INT, *_OUT],
}


@cache
def _ops() -> Any:
    """The library, its functions typed; None where it could not be built."""
    ops = library()
    if ops is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(ops, name).argtypes = arguments
            getattr(ops, name).restype = _INT if name in ("csm_depth_codes", "csm_embed_rows") else None
        ops.csm_isa.restype = ctypes.c_char_p
    return ops


def is_available() -> bool:
    """Whether there are native ops: built, or from the cache."""
    return _ops() is not None


def isa() -> str:
    """The instructions that the int8 and int4 products were compiled for; an empty string without native ops."""
    return _ops().csm_isa().decode() if _ops() else ""


def use_native(x: Tensor, num_rows: int, weight: Weight) -> bool:
    """Whether an op on so many rows of ``x`` and this weight runs natively."""
    if not x.is_cpu or x.dtype not in DTYPES or os.environ.get("CSM_OPS"):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if not isinstance(weight, Tensor):  # rows are for Triton's kernels
        return isinstance(weight, QuantizedWeight) and _ops() is not None
    if num_rows > MAX_ROWS or weight.dtype != x.dtype or (torch.is_grad_enabled() and weight.requires_grad):
        return False
    return weight.is_contiguous() and _ops() is not None


def use_native_sampling(like: Weight) -> bool:
    """Whether codes are drawn natively from logits on the device and of the dtype of ``like``."""
    return like.device.type == "cpu" and like.dtype in DTYPES and not os.environ.get("CSM_OPS") and _ops() is not None


def use_native_blocks(x: Tensor, num_rows: int, layers: Sequence[BlockWeights]) -> bool:
    """Whether a transformer's blocks run natively, in one call. Where gradients are recorded, each op decides."""
    if num_rows > MAX_ROWS or torch.is_grad_enabled() or not use_native(x, num_rows, layers[0].qkv_ED):
        return False
    return all(_readable(weight, x.dtype) for layer in layers for weight in layer)


def _readable(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a weight or a norm is in a layout that native ops read, for inputs of this dtype."""
    return isinstance(weight, QuantizedWeight) or (
        isinstance(weight, Tensor) and weight.dtype == dtype and weight.is_contiguous()
    )


def _rows(x_BTD: Tensor) -> tuple[int, int, int, int]:
    B, T, D = x_BTD.shape
    return DTYPES[x_BTD.dtype], x_BTD.data_ptr(), D if x_BTD.is_contiguous() else row_stride(x_BTD), B * T


def _weight(weight: Weight) -> tuple[int, int, int, int]:
    n, k = weight.shape
    if isinstance(weight, QuantizedWeight):
        return KINDS[weight.bits], weight.packed.data_ptr(), n, k
    assert isinstance(weight, Tensor)
    return DTYPES[weight.dtype], weight.data_ptr(), n, k


def _residual(x_BTD: Tensor) -> tuple[int, int]:
    return x_BTD.data_ptr(), x_BTD.shape[2] if x_BTD.is_contiguous() else row_stride(x_BTD)


def use_native_quantization(weight: Tensor) -> bool:
    """Whether the scales of a weight are searched natively."""
    return weight.is_cpu and weight.dtype in DTYPES and is_available()


def quantize(weight_NK: Tensor, importance_K: Tensor, bits: int, largest_becomes: Sequence[float], out: Tensor) -> None:
    """Write what ``csm.quantize.quantize_blocks`` chooses into ``out``, packed."""
    (n, k), weight_NK = weight_NK.shape, weight_NK.contiguous()
    assert out.is_contiguous()
    extremes, importance_K = torch.tensor(largest_becomes), importance_K.float().contiguous()
    tensors = (weight_NK.data_ptr(), n, k, importance_K.data_ptr())
    levels = (KINDS[bits], LEAST[bits], LARGEST[bits], extremes.data_ptr(), len(extremes))
    _ops().csm_quantize(DTYPES[weight_NK.dtype], *tensors, *levels, out.data_ptr(), torch.get_num_threads())


def use_native_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear`` computes this product: any number of rows."""
    return use_native(x, 1, weight)


def linear(x_BTD: Tensor, weight_ED: Tensor) -> Tensor:
    """``F.linear`` without a bias. ``x_BTD`` is contiguous."""
    out_BTE = x_BTD.new_empty(x_BTD.shape[0], x_BTD.shape[1], weight_ED.shape[0])
    no_norm = (None, 0.0)
    _ops().csm_norm_linear(*_rows(x_BTD), *no_norm, *_weight(weight_ED), out_BTE.data_ptr(), torch.get_num_threads())
    return out_BTE


def norm_linear(x_BTD: Tensor, norm_D: Tensor, weight_ED: Weight, eps: float) -> Tensor:
    """``csm.kernels.norm_linear``."""
    out_BTE = x_BTD.new_empty(x_BTD.shape[0], x_BTD.shape[1], weight_ED.shape[0])
    norm = (norm_D.data_ptr(), eps)
    _ops().csm_norm_linear(*_rows(x_BTD), *norm, *_weight(weight_ED), out_BTE.data_ptr(), torch.get_num_threads())
    return out_BTE


def norm_swiglu(x_BTD: Tensor, norm_D: Tensor, gate_up_2FD: Weight, eps: float) -> Tensor:
    """``csm.kernels.norm_swiglu``."""
    out_BTF = x_BTD.new_empty(x_BTD.shape[0], x_BTD.shape[1], gate_up_2FD.shape[0] // 2)
    norm = (norm_D.data_ptr(), eps)
    _ops().csm_norm_swiglu(*_rows(x_BTD), *norm, *_weight(gate_up_2FD), out_BTF.data_ptr(), torch.get_num_threads())
    return out_BTF


def linear_add(x_BTF: Tensor, weight_DF: Weight, residual_BTD: Tensor) -> Tensor:
    """``csm.kernels.linear_add``."""
    out_BTD = x_BTF.new_empty(residual_BTD.shape)
    out = (out_BTD.data_ptr(), torch.get_num_threads())
    _ops().csm_linear_add(*_rows(x_BTF), *_weight(weight_DF), *_residual(residual_BTD), *out)
    return out_BTD


def norm_rope_cache(
    x_BTD: Tensor,
    norm_D: Tensor,
    qkv_ED: Weight,
    eps: float,
    rope_BTp2: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """``csm.kernels.norm_rope_cache``."""
    (B, T), (_, G, _, d) = x_BTD.shape[:2], k_cache_BGSd.shape
    q_BTHd = x_BTD.new_empty(B, T, qkv_ED.shape[0] // d - 2 * G, d)
    where = (rope_BTp2.data_ptr(), slot_B1.data_ptr(), position_BT.data_ptr(), position_BT.stride(0), T)
    caches = (k_cache_BGSd.data_ptr(), v_cache_BGSd.data_ptr(), *k_cache_BGSd.stride()[:2], G, d)
    out = (q_BTHd.data_ptr(), torch.get_num_threads())
    _ops().csm_norm_rope_cache(*_rows(x_BTD), norm_D.data_ptr(), eps, *_weight(qkv_ED), *where, *caches, *out)
    return q_BTHd


def attention_linear_add(
    q_BTHd: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    position_BT: Tensor,
    weight_DE: Weight,
    residual_BTD: Tensor,
) -> Tensor:
    """``csm.kernels.attention_linear_add``."""
    (B, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    out_BTD = residual_BTD.new_empty(residual_BTD.shape)
    queries = (DTYPES[q_BTHd.dtype], q_BTHd.data_ptr(), B * T, H)
    where = (position_BT.data_ptr(), position_BT.stride(0), T, *k_cache_BGSd.stride()[:2], G, d)
    keys = (k_cache_BGSd.data_ptr(), v_cache_BGSd.data_ptr())
    out = (out_BTD.data_ptr(), torch.get_num_threads())
    _ops().csm_attention_linear_add(*queries, *keys, *where, *_weight(weight_DE), *_residual(residual_BTD), *out)
    return out_BTD


def blocks(
    x_BTD: Tensor,
    layers: Sequence[BlockWeights],
    eps: float,
    rope_BTp2: Tensor,
    k_cache_LBGSd: Tensor,
    v_cache_LBGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """``csm.kernels.blocks``."""
    (_, T, _), (_, _, G, _, d) = x_BTD.shape, k_cache_LBGSd.shape
    out_BTD, table = x_BTD.new_empty(x_BTD.shape), _layers(layers)
    weights = (len(layers), table.buffer_info()[0], eps)
    where = (rope_BTp2.data_ptr(), slot_B1.data_ptr(), position_BT.data_ptr(), position_BT.stride(0), T)
    cache = (k_cache_LBGSd.data_ptr(), v_cache_LBGSd.data_ptr(), *k_cache_LBGSd.stride()[:3], G, d)
    _ops().csm_blocks(*_rows(x_BTD), *weights, *where, *cache, out_BTD.data_ptr(), torch.get_num_threads())
    return out_BTD


def _layers(layers: Sequence[BlockWeights]) -> array[int]:
    """What the library needs of the weights of a transformer's blocks: two norms and four weights each."""
    values: list[int] = []
    for norm_D, qkv_ED, output_DE, mlp_norm_D, gate_up_2FD, down_DF in layers:
        values += norm_D.data_ptr(), mlp_norm_D.data_ptr(), *_weight(qkv_ED), *_weight(output_DE)
        values += (*_weight(gate_up_2FD), *_weight(down_DF))
    return array("q", values)


def sample(logits_BV: Tensor, codebook: int, slots: tuple[Tensor, Tensor, Tensor, Tensor], codes_BK: Tensor) -> None:
    """``csm.kernels.sample``, without a table."""
    B, V = logits_BV.shape
    assert logits_BV.stride(1) == 1 and codes_BK.stride(1) == 1
    logits = (DTYPES[logits_BV.dtype], logits_BV.data_ptr(), logits_BV.stride(0), B, V)
    codes = (codes_BK.data_ptr(), codes_BK.stride(0))
    _ops().csm_sample(*logits, *(x.data_ptr() for x in slots), codebook, *codes)


def use_native_depth_codes(
    x_B2D: Tensor, layers: Sequence[BlockWeights], heads: Sequence[Weight], table_WD: Table
) -> bool:
    """Whether all passes of the depth decoder for a frame run natively, in one call."""
    B, T, _ = x_B2D.shape
    if not use_native_blocks(x_B2D, B * T, layers) or not _is_table(table_WD, x_B2D.dtype):
        return False
    return all(_readable(head, x_B2D.dtype) for head in heads)


def _is_table(table_VD: Table, dtype: torch.dtype) -> bool:
    """Whether the library reads rows of this table."""
    in_memory = isinstance(table_VD, Tensor) and table_VD.is_cpu and table_VD.is_contiguous()
    return table_VD.dtype == dtype and (in_memory or isinstance(table_VD, RowFile))


def _table(table_VD: Table) -> tuple[int | None, int, int, int]:
    if isinstance(table_VD, Tensor):
        return table_VD.data_ptr(), 0, 0, table_VD.shape[0]
    return None, table_VD.file, table_VD.offset, table_VD.shape[0]


def use_native_embedding(audio_WD: Table, text_VD: Table) -> bool:
    """Whether rows of these tables are summed natively."""
    if os.environ.get("CSM_OPS") or audio_WD.dtype not in DTYPES or text_VD.dtype != audio_WD.dtype:
        return False
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (audio_WD, text_VD)):
        return False
    return _is_table(audio_WD, audio_WD.dtype) and _is_table(text_VD, audio_WD.dtype) and _ops() is not None


def embed_rows(row_BTC: Tensor, mask_BTC: Tensor, offset_K: Tensor, audio_WD: Table, text_VD: Table) -> Tensor | None:
    """``csm.kernels.embed_rows``; None where an id is outside its table, or a file is too short."""
    (B, T, C), D = row_BTC.shape, audio_WD.shape[1]
    assert row_BTC.dtype == offset_K.dtype == torch.int64 and mask_BTC.dtype == torch.bool
    row_BTC, mask_BTC = row_BTC.contiguous(), mask_BTC.contiguous()
    out_BTD = torch.empty(B, T, D, dtype=audio_WD.dtype, device="cpu")  # whatever the default device is
    rows = (row_BTC.data_ptr(), mask_BTC.data_ptr(), B * T, offset_K.data_ptr(), C - 1, D)
    tables = (*_table(audio_WD), *_table(text_VD))
    out = (out_BTD.data_ptr(), torch.get_num_threads())
    complete = _ops().csm_embed_rows(DTYPES[audio_WD.dtype], *rows, *tables, *out)
    return out_BTD if complete else None


def depth_codes(
    x_B2D: Tensor,
    layers: Sequence[BlockWeights],
    eps: float,
    rope_BKp2: Tensor,
    k_cache_LBGSd: Tensor,
    v_cache_LBGSd: Tensor,
    slot_B1: Tensor,
    position_BK: Tensor,
    norm_D: Tensor,
    heads: Sequence[Weight],
    table_WD: Table,
    table_step: int,
    slots: tuple[Tensor, Tensor, Tensor, Tensor],
    codes_BK: Tensor,
) -> None:
    """``csm.kernels.depth_codes``."""
    (B, _, D), (_, _, G, _, d) = x_B2D.shape, k_cache_LBGSd.shape
    assert x_B2D.is_contiguous() and codes_BK.stride(1) == 1 and position_BK.stride(1) == 1
    assert rope_BKp2.is_contiguous() and position_BK.shape[1] == len(heads) + 1 == codes_BK.shape[1]
    weights, values = _layers(layers), array("q", [value for head in heads for value in _weight(head)])
    decoder = (len(layers), weights.buffer_info()[0], eps, rope_BKp2.data_ptr(), slot_B1.data_ptr())
    where = (position_BK.data_ptr(), position_BK.stride(0), k_cache_LBGSd.data_ptr(), v_cache_LBGSd.data_ptr())
    failed: int = _ops().csm_depth_codes(
        *(DTYPES[x_B2D.dtype], x_B2D.data_ptr(), B, codes_BK.shape[1], *decoder, *where),
        *(*k_cache_LBGSd.stride()[:3], G, d, norm_D.data_ptr(), values.buffer_info()[0]),
        *(*_table(table_WD), D, table_step, *(x.data_ptr() for x in slots)),
        *(codes_BK.data_ptr(), codes_BK.stride(0), torch.get_num_threads()),
    )
    if failed:
        assert isinstance(table_WD, RowFile)
        raise table_WD.ends_early(failed)
