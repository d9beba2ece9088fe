"""Grouped-query attention of a few query rows over the KV cache."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import INTERPRETED, jit, launch, power_of_two, tl, use_kernels
from csm.kernels.tiles import release_next_kernel, wait_for_inputs

MIN_DOT = 16  # the smallest side of tl.dot's operands
SHORT_CHUNK, CHUNK = 32, 64  # cache positions per program: of the depth decoder's cache, and of longer ones


def causal_bias(position_BT: Tensor, context: int, dtype: torch.dtype) -> Tensor:
    """The mask that ``attention_reference`` adds: 0 up to a row's position, -inf beyond (B, T, context)."""
    future_BTS = torch.arange(context, device=position_BT.device) > position_BT.unsqueeze(-1)
    return torch.zeros_like(future_BTS, dtype=dtype).masked_fill_(future_BTS, -torch.inf)


def attention_reference(q_BTHd: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, bias_BTS: Tensor) -> Tensor:
    """``attention`` in PyTorch. Query heads of the same key head become extra rows: keys are not repeated in memory."""
    B, T, H, d = q_BTHd.shape
    G, S = k_cache_BGSd.shape[1], bias_BTS.shape[-1]
    R = H // G
    q = q_BTHd.unflatten(2, (G, R)).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, d)
    bias = bias_BTS.unsqueeze(1).expand(B, R, T, S).reshape(B, 1, R * T, S)
    k, v = k_cache_BGSd[:, :, :S], v_cache_BGSd[:, :, :S]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H * d)


@jit
def softmax_dot(q_MD, k_SD, v_SD, visible_MS, scale):
    """Attention of M query heads on tensor cores, not normalised.

    Returns, per head, the maximum score, the sum of exp(score - maximum), and the values weighted by those terms
    (M, D), all in float32. Every head needs a visible position. The weights are rounded to the dtype of the values.
    float32 inputs are multiplied as three TF32 products, almost as precise as float32, which needs fewer registers.
    """
    if INTERPRETED:
        q_MD, k_SD, v_SD = q_MD.to(tl.float32), k_SD.to(tl.float32), v_SD.to(tl.float32)
    score_MS = tl.dot(q_MD, tl.trans(k_SD), input_precision="tf32x3") * scale
    score_MS = tl.where(visible_MS, score_MS, -float("inf"))
    max_M = tl.max(score_MS, axis=1)
    weight_MS = tl.exp(score_MS - max_M[:, None])
    acc_MD = tl.dot(weight_MS.to(v_SD.dtype), v_SD, input_precision="tf32x3")
    return max_M, tl.sum(weight_MS, axis=1), acc_MD


@jit
def load_keys_values(k_ptr, v_ptr, s_S, d_D, position, d: tl.constexpr):
    """Keys and values of one head at positions ``s_S``, zeros after ``position``: (S, D) each."""
    offset_SD = s_S[:, None] * d + d_D[None, :]
    mask_SD = (s_S <= position)[:, None] & (d_D < d)[None, :]
    return tl.load(k_ptr + offset_SD, mask=mask_SD, other=0.0), tl.load(v_ptr + offset_SD, mask=mask_SD, other=0.0)


@jit
def store_part(max_ptr_M, sum_ptr_M, acc_ptr_MD, max_M, sum_M, acc_MD, mask_M, mask_MD):
    """A chunk's part of the softmax, which ``combine_chunks`` reads."""
    tl.store(max_ptr_M, max_M, mask=mask_M)
    tl.store(sum_ptr_M, sum_M, mask=mask_M)
    tl.store(acc_ptr_MD, acc_MD, mask=mask_MD)


@jit
def attend_chunk(
    q_ptr,
    k_ptr,
    v_ptr,
    sum_ptr,
    max_ptr,
    acc_ptr,
    out_ptr,
    position_ptr,
    position_stride,
    slot_stride,
    head_stride,
    scale,
    T: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    CHUNKS: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of one row and one key head over one chunk of positions (split-KV). A single chunk is the result."""
    release_next_kernel(PDL)
    row, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m_M, d_D, s_S = tl.arange(0, M), tl.arange(0, D), chunk * S + tl.arange(0, S)
    head_M, mask_M = row * H + group * (H // G) + m_M, m_M < H // G
    mask_MD = mask_M[:, None] & (d_D < d)[None, :]
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    q_MD = tl.load(q_ptr + head_M[:, None] * d + d_D[None, :], mask=mask_MD, other=0.0)
    if chunk * S <= position:
        head = row // T * slot_stride + group * head_stride
        k_SD, v_SD = load_keys_values(k_ptr + head, v_ptr + head, s_S, d_D, position, d)
        max_M, sum_M, acc_MD = softmax_dot(q_MD, k_SD, v_SD, (s_S <= position)[None, :], scale)
        part_M, offset_MD = head_M * CHUNKS + chunk, (head_M * CHUNKS + chunk)[:, None] * d + d_D[None, :]
        if CHUNKS == 1:
            tl.store(out_ptr + offset_MD, (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty), mask=mask_MD)
        else:
            store_part(max_ptr + part_M, sum_ptr + part_M, acc_ptr + offset_MD, max_M, sum_M, acc_MD, mask_M, mask_MD)


@jit
def combine_chunks(
    sum_ptr,
    max_ptr,
    acc_ptr,
    out_ptr,
    position_ptr,
    position_stride,
    T: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    CHUNKS: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, one query head: merge the softmaxes of its chunks, up to the row's position.

    All chunks are loaded before the position is known; those beyond it were never written and are discarded.
    """
    release_next_kernel(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    c_C, d_D = tl.arange(0, C), tl.arange(0, D)
    part_C = (row * H + head) * CHUNKS + c_C
    mask_CD = (c_C < CHUNKS)[:, None] & (d_D < d)[None, :]
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    max_C = tl.load(max_ptr + part_C, mask=c_C < CHUNKS, other=0.0)
    sum_C = tl.load(sum_ptr + part_C, mask=c_C < CHUNKS, other=0.0)
    acc_CD = tl.load(acc_ptr + part_C[:, None] * d + d_D[None, :], mask=mask_CD, other=0.0)
    written_C = c_C * S <= position
    max_C = tl.where(written_C, max_C, -float("inf"))
    scale_C = tl.exp(max_C - tl.max(max_C, axis=0))
    acc_CD = tl.where(written_C[:, None], acc_CD * scale_C[:, None], 0.0)
    total = tl.sum(tl.where(written_C, sum_C * scale_C, 0.0), axis=0)
    out_D = tl.sum(acc_CD, axis=0) / total
    tl.store(out_ptr + (row * H + head) * d + d_D, out_D.to(out_ptr.dtype.element_ty), mask=d_D < d)


def covered_positions(bias_BTS: Tensor | None, context: int | None) -> int:
    """The cache positions that attention covers."""
    if bias_BTS is not None:
        return bias_BTS.shape[-1]
    assert context is not None, "attention needs a context or a bias"
    return context


def chunk_size(context: int) -> int:
    """Cache positions per program. Every context of a cache shares it, so that a longer context changes no bit."""
    return SHORT_CHUNK if context <= SHORT_CHUNK else CHUNK


def attention(
    q_BTHd: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    bias_BTS: Tensor | None,
    position_BT: Tensor,
    context: int | None = None,
) -> Tensor:
    """Causal softmax attention with scale 1/sqrt(d): (B, T, H, d) -> (B, T, H * d).

    Attention covers the first ``context`` positions of the cache. The reference adds ``bias_BTS``, from
    ``causal_bias``; the kernels compare positions with ``position_BT`` instead, so the bias may be None if they run,
    and only then. ``context`` may be left out if there is a bias, whose last dimension it is.
    """
    (B, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    if not use_kernels(q_BTHd, B * T):
        assert bias_BTS is not None, "the attention reference needs a bias"
        return attention_reference(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    context = covered_positions(bias_BTS, context)
    chunk = chunk_size(context)
    chunks = -(-context // chunk)
    sum_BTHC, max_BTHC = q_BTHd.new_empty((2, B, T, H, chunks), dtype=torch.float32)
    acc_BTHCd = q_BTHd.new_empty((B, T, H, chunks, d), dtype=torch.float32)
    out_BTE = q_BTHd.new_empty(B, T, H * d)
    shared: dict[str, Any] = dict(sum_ptr=sum_BTHC, max_ptr=max_BTHC, acc_ptr=acc_BTHCd, out_ptr=out_BTE)
    shared |= dict(position_ptr=position_BT, position_stride=position_BT.stride(0))
    shared |= dict(T=T, H=H, d=d, CHUNKS=chunks, S=chunk, D=max(MIN_DOT, power_of_two(d)))
    launch(
        attend_chunk,
        (B * T, G, chunks),
        q_ptr=q_BTHd,
        k_ptr=k_cache_BGSd,
        v_ptr=v_cache_BGSd,
        slot_stride=k_cache_BGSd.stride(0),
        head_stride=k_cache_BGSd.stride(1),
        scale=1 / math.sqrt(d),
        G=G,
        M=max(MIN_DOT, power_of_two(H // G)),
        num_warps=4,
        **shared,
    )
    if chunks > 1:
        launch(combine_chunks, (B * T, H), C=power_of_two(chunks), num_warps=1, **shared)
    return out_BTE
