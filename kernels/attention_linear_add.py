"""Attention, its output projection and the residual: everything in a block's attention after the cache write.

The depth decoder attends to at most 32 positions. For a single row, every program of the output projection computes the
whole attention itself instead of waiting for another kernel. The backbone uses the separate attention kernels,
``csm.kernels.attention``.
"""

from __future__ import annotations

import math

from torch import Tensor

from csm.kernels.attention import attention
from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.launch_config import launch_config
from csm.kernels.linear_add import linear_add
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight
from csm.kernels.tiles import gemv_tile, wait_for_inputs

MAX_FUSED_CONTEXT = 32  # and a single row: every program repeats the attention and holds its tiles in registers


@jit
def head_offsets(
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """Offsets into a row (H * d) of the elements (key head, its query heads, d), and which of them exist.

    Each of the three dimensions is padded to a power of two.
    """
    g_G, r_R, d_D = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, D)[None, None, :]
    return (g_G * (H // G) + r_R) * d + d_D, (g_G < G) & (r_R < H // G) & (d_D < d)


@jit
def attend(q_GRD, k_ptr, v_ptr, position, head_stride, G: tl.constexpr, d: tl.constexpr, S: tl.constexpr):
    """All heads of one row over the first S positions of a slot: (GROUPS, R, D) float32."""
    g_G, s_S = tl.arange(0, q_GRD.shape[0])[:, None, None], tl.arange(0, S)
    d_D = tl.arange(0, q_GRD.shape[2])[None, None, :]
    offset_GSD = g_G * head_stride + s_S[None, :, None] * d + d_D
    mask_GSD = (g_G < G) & (s_S <= position)[None, :, None] & (d_D < d)
    k_GSD = tl.load(k_ptr + offset_GSD, mask=mask_GSD, other=0.0).to(tl.float32)
    v_GSD = tl.load(v_ptr + offset_GSD, mask=mask_GSD, other=0.0).to(tl.float32)
    score_GRS = tl.sum(q_GRD[:, :, None, :] * k_GSD[:, None, :, :], axis=3)
    score_GRS = tl.where((s_S <= position)[None, None, :], score_GRS, -float("inf"))
    weight_GRS = tl.exp(score_GRS - tl.max(score_GRS, axis=2, keep_dims=True))
    acc_GRD = tl.sum(weight_GRS[:, :, :, None] * v_GSD[:, None, :, :], axis=2)
    return acc_GRD / tl.sum(weight_GRS, axis=2, keep_dims=True)


@jit
def attention_linear_add_row(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    position_ptr,
    head_stride,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """``attention_linear_add`` of one row. The attention output is rounded where the reference rounds it."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset_GRD, mask_GRD = head_offsets(H, G, d, GROUPS, R, D)
    k_K = tl.arange(0, GROUPS * R * D)
    mask_K = k_K < H * d
    if H * d != GROUPS * R * D:  # only then: after a reshape the compiler no longer sees that loads are contiguous
        k_K, mask_K = tl.reshape(offset_GRD, (GROUPS * R * D,)), tl.reshape(mask_GRD, (GROUPS * R * D,))
    mask_NK = (n_N < N)[:, None] & mask_K[None, :]
    weight_NK = tl.load(weight_ptr + n_N[:, None] * (H * d) + k_K[None, :], mask=mask_NK, other=0.0)
    wait_for_inputs(PDL)
    q_GRD = tl.load(q_ptr + offset_GRD, mask=mask_GRD, other=0.0).to(tl.float32) * scale
    attended_GRD = attend(q_GRD, k_ptr, v_ptr, tl.load(position_ptr), head_stride, G, d, S)
    attended_K = tl.reshape(attended_GRD, (GROUPS * R * D,)).to(q_ptr.dtype.element_ty).to(tl.float32)
    residual_N = tl.load(residual_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)
    out_N = residual_N + gemv_tile(weight_NK, attended_K)
    tl.store(out_ptr + n_N, out_N.to(q_ptr.dtype.element_ty), mask=n_N < N)


def attention_linear_add(
    q_BTHd: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    bias_BTS: Tensor,
    position_BT: Tensor,
    weight_DE: Weight,
    residual_BTD: Tensor,
) -> Tensor:
    """``linear_add(attention(q, ...), weight, residual)``: (B, T, H, d), (B, T, D) -> (B, T, D)."""
    (B, T, H, d), G, D = q_BTHd.shape, k_cache_BGSd.shape[1], residual_BTD.shape[2]
    if B * T <= native.MAX_ROWS and native.use_native(q_BTHd, B * T, weight_DE):
        cache = (k_cache_BGSd, v_cache_BGSd, position_BT)
        return native.attention_linear_add(q_BTHd, *cache, weight_DE, residual_BTD)
    context = bias_BTS.shape[-1]
    fused = B * T == 1 and context <= MAX_FUSED_CONTEXT and use_kernels(q_BTHd, 1)
    config = launch_config("attention_linear_add", weight_DE, 1) if fused else None
    if config is None:
        attended_BTE = attention(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS, position_BT)
        return linear_add(attended_BTE, weight_DE, residual_BTD)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    out_BTD = q_BTHd.new_empty(B, T, D)
    launch(
        attention_linear_add_row,
        [config.num_programs(D)],
        q_ptr=q_BTHd,
        k_ptr=k_cache_BGSd,
        v_ptr=v_cache_BGSd,
        weight_ptr=weight_DE,
        residual_ptr=residual_BTD,
        out_ptr=out_BTD,
        position_ptr=position_BT,
        head_stride=k_cache_BGSd.stride(1),
        scale=1 / math.sqrt(d),
        **dict(H=H, G=G, d=d, N=D, BLOCK_N=config.constants["BLOCK_N"]),
        **dict(GROUPS=power_of_two(G), R=power_of_two(H // G), D=power_of_two(d), S=power_of_two(context)),
        num_warps=config.num_warps,
    )
    return out_BTD
