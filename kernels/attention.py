"""Grouped-query attention of a few query rows against the cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import jit, kernels_run, launch, power_of_two, tl
from csm.kernels.tiles import wait_for_inputs

CHUNK = 64  # positions a program looks at: the same at every context, so that a longer context changes no bit


def attention_reference(q_BTHd: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, bias_BTS: Tensor) -> Tensor:
    """``attention`` in PyTorch. Query heads that share a key head are further rows: no key is repeated in memory."""
    B, T, H, d = q_BTHd.shape
    G, S = k_cache_BGSd.shape[1], bias_BTS.shape[-1]
    R = H // G
    q = q_BTHd.unflatten(2, (G, R)).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, d)
    bias = bias_BTS.unsqueeze(1).expand(B, R, T, S).reshape(B, 1, R * T, S)
    k, v = k_cache_BGSd[:, :, :S], v_cache_BGSd[:, :, :S]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H * d)


@jit
def softmax_part(q_RD, k_SD, v_SD, live_S):
    """Of each query: the best score, the sum of its weights relative to that, and the values they mix."""
    score_RS = tl.sum(q_RD[:, None, :] * k_SD[None, :, :], axis=2)
    score_RS = tl.where(live_S[None, :], score_RS, -float("inf"))
    best_R = tl.max(score_RS, axis=1)
    weight_RS = tl.exp(score_RS - best_R[:, None])
    return best_R, tl.sum(weight_RS, axis=1), tl.sum(weight_RS[:, :, None] * v_SD[None, :, :], axis=1)


@jit
def attend_chunk(
    q_ptr,
    k_ptr,
    v_ptr,
    sum_ptr,
    best_ptr,
    mixed_ptr,
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
    """One row, one key head, one chunk of positions: each query head's best score, sum of weights and mixed values."""
    row, group, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    if chunk * S <= position:
        r_R, d_D, s_S = tl.arange(0, R), tl.arange(0, D), chunk * S + tl.arange(0, S)
        head_R = group * (H // G) + r_R
        mask_RD = (r_R < H // G)[:, None] & (d_D < d)[None, :]
        at_RD = (row * H + head_R)[:, None] * d + d_D[None, :]
        q_RD = tl.load(q_ptr + at_RD, mask=mask_RD, other=0.0).to(tl.float32) * scale
        at_SD = row // T * slot_stride + group * head_stride + s_S[:, None] * d + d_D[None, :]
        mask_SD = (s_S <= position)[:, None] & (d_D < d)[None, :]
        k_SD = tl.load(k_ptr + at_SD, mask=mask_SD, other=0.0).to(tl.float32)
        v_SD = tl.load(v_ptr + at_SD, mask=mask_SD, other=0.0).to(tl.float32)
        best_R, sum_R, mixed_RD = softmax_part(q_RD, k_SD, v_SD, s_S <= position)
        part_R = (row * H + head_R) * CHUNKS + chunk
        tl.store(best_ptr + part_R, best_R, mask=r_R < H // G)
        tl.store(sum_ptr + part_R, sum_R, mask=r_R < H // G)
        tl.store(mixed_ptr + part_R[:, None] * d + d_D[None, :], mixed_RD, mask=mask_RD)


@jit
def combine_chunks(
    sum_ptr,
    best_ptr,
    mixed_ptr,
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
    """One row, one query head: its chunks up to the row's position, as one softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + row // T * position_stride + row % T)
    c_C, d_D = tl.arange(0, C), tl.arange(0, D)
    live_C = c_C * S <= position
    part_C = (row * H + head) * CHUNKS + c_C
    best_C = tl.load(best_ptr + part_C, mask=live_C, other=-float("inf"))
    scale_C = tl.exp(best_C - tl.max(best_C, axis=0))
    sum_C = tl.load(sum_ptr + part_C, mask=live_C, other=0.0)
    mask_CD = live_C[:, None] & (d_D < d)[None, :]
    mixed_CD = tl.load(mixed_ptr + part_C[:, None] * d + d_D[None, :], mask=mask_CD, other=0.0)
    out_D = tl.sum(mixed_CD * scale_C[:, None], axis=0) / tl.sum(sum_C * scale_C, axis=0)
    tl.store(out_ptr + (row * H + head) * d + d_D, out_D.to(out_ptr.dtype.element_ty), mask=d_D < d)


def attention(
    q_BTHd: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, bias_BTS: Tensor, position_BT: Tensor
) -> Tensor:
    """Softmax attention with scale 1/sqrt(d): (B, T, H, d) -> (B, T, H * d).

    Only the cache positions that ``bias_BTS`` spans are looked at; it is added to the scores, 0 up to ``position_BT``
    and -inf beyond: the same said twice, since PyTorch's op reads the one and the kernel the other.
    """
    (B, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    if not kernels_run(q_BTHd, B * T):
        return attention_reference(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    chunks = -(-bias_BTS.shape[-1] // CHUNK)
    sum_BTHC, best_BTHC = q_BTHd.new_empty((2, B, T, H, chunks), dtype=torch.float32)
    mixed_BTHCd = q_BTHd.new_empty((B, T, H, chunks, d), dtype=torch.float32)
    out_BTE = q_BTHd.new_empty(B, T, H * d)
    parts = (sum_BTHC, best_BTHC, mixed_BTHCd)
    constants = dict(T=T, H=H, d=d, CHUNKS=chunks, S=CHUNK, D=power_of_two(d))
    strides = (position_BT.stride(0), *k_cache_BGSd.stride()[:2], 1 / math.sqrt(d))
    keys = (q_BTHd, k_cache_BGSd, v_cache_BGSd)
    grid, heads = (B * T, G, chunks), dict(G=G, R=power_of_two(H // G))
    launch(attend_chunk, grid, *keys, *parts, position_BT, *strides, **constants, **heads, num_warps=8)
    out = (*parts, out_BTE, position_BT, position_BT.stride(0))
    launch(combine_chunks, (B * T, H), *out, **constants, C=power_of_two(chunks), num_warps=1)
    return out_BTE
