"""Grouped-query attention of a few query rows over the KV cache."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.tiles import wait_for_inputs

CHUNK = 64  # cache positions per program; the same at every context, so that a longer context changes no bit


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
def partial_softmax(q_RD, k_SD, v_SD, visible_S):
    """Per query head: the maximum score, the sum of exp(score - maximum), and the values weighted by those terms."""
    score_RS = tl.sum(q_RD[:, None, :] * k_SD[None, :, :], axis=2)
    score_RS = tl.where(visible_S[None, :], score_RS, -float("inf"))
    max_R = tl.max(score_RS, axis=1)
    weight_RS = tl.exp(score_RS - max_R[:, None])
    return max_R, tl.sum(weight_RS, axis=1), tl.sum(weight_RS[:, :, None] * v_SD[None, :, :], axis=1)


@jit
def attend_chunk(
    q_ptr,
    k_ptr,
    v_ptr,
    sum_ptr,
    max_ptr,
    acc_ptr,
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
    R: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """The partial softmax of one row, one key head and one chunk of positions (split-KV attention)."""
    row, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    if chunk * S <= position:
        r_R, d_D, s_S = tl.arange(0, R), tl.arange(0, D), chunk * S + tl.arange(0, S)
        head_R = group * (H // G) + r_R
        mask_RD = (r_R < H // G)[:, None] & (d_D < d)[None, :]
        q_RD = tl.load(q_ptr + (row * H + head_R)[:, None] * d + d_D[None, :], mask=mask_RD, other=0.0)
        offset_SD = row // T * slot_stride + group * head_stride + s_S[:, None] * d + d_D[None, :]
        mask_SD = (s_S <= position)[:, None] & (d_D < d)[None, :]
        k_SD = tl.load(k_ptr + offset_SD, mask=mask_SD, other=0.0).to(tl.float32)
        v_SD = tl.load(v_ptr + offset_SD, mask=mask_SD, other=0.0).to(tl.float32)
        max_R, sum_R, acc_RD = partial_softmax(q_RD.to(tl.float32) * scale, k_SD, v_SD, s_S <= position)
        part_R = (row * H + head_R) * CHUNKS + chunk
        tl.store(max_ptr + part_R, max_R, mask=r_R < H // G)
        tl.store(sum_ptr + part_R, sum_R, mask=r_R < H // G)
        tl.store(acc_ptr + part_R[:, None] * d + d_D[None, :], acc_RD, mask=mask_RD)


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
    """One row, one query head: merge the partial softmaxes of its chunks, up to the row's position."""
    row, head = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    c_C, d_D = tl.arange(0, C), tl.arange(0, D)
    written_C = c_C * S <= position
    part_C = (row * H + head) * CHUNKS + c_C
    max_C = tl.load(max_ptr + part_C, mask=written_C, other=-float("inf"))
    scale_C = tl.exp(max_C - tl.max(max_C, axis=0))
    sum_C = tl.load(sum_ptr + part_C, mask=written_C, other=0.0)
    mask_CD = written_C[:, None] & (d_D < d)[None, :]
    acc_CD = tl.load(acc_ptr + part_C[:, None] * d + d_D[None, :], mask=mask_CD, other=0.0)
    out_D = tl.sum(acc_CD * scale_C[:, None], axis=0) / tl.sum(sum_C * scale_C, axis=0)
    tl.store(out_ptr + (row * H + head) * d + d_D, out_D.to(out_ptr.dtype.element_ty), mask=d_D < d)


def attention(
    q_BTHd: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, bias_BTS: Tensor, position_BT: Tensor
) -> Tensor:
    """Causal softmax attention with scale 1/sqrt(d): (B, T, H, d) -> (B, T, H * d).

    Attention covers the first S positions of the cache. ``bias_BTS`` is added to the scores: 0 up to ``position_BT``,
    -inf beyond. The two hold the same information: PyTorch's op reads the bias, the kernels read the position.
    """
    (B, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    if not use_kernels(q_BTHd, B * T):
        return attention_reference(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    chunks = -(-bias_BTS.shape[-1] // CHUNK)
    sum_BTHC, max_BTHC = q_BTHd.new_empty((2, B, T, H, chunks), dtype=torch.float32)
    acc_BTHCd = q_BTHd.new_empty((B, T, H, chunks, d), dtype=torch.float32)
    shared: dict[str, Any] = dict(sum_ptr=sum_BTHC, max_ptr=max_BTHC, acc_ptr=acc_BTHCd, position_ptr=position_BT)
    shared |= dict(position_stride=position_BT.stride(0), T=T, H=H, d=d, CHUNKS=chunks, S=CHUNK, D=power_of_two(d))
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
        R=power_of_two(H // G),
        num_warps=8,
        **shared,
    )
    out_BTE = q_BTHd.new_empty(B, T, H * d)
    launch(combine_chunks, (B * T, H), out_ptr=out_BTE, C=power_of_two(chunks), num_warps=1, **shared)
    return out_BTE
