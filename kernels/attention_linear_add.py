"""Attention, its output projection and the residual: what follows the cache's write in a block.

The depth decoder looks at 32 positions at most: their keys and values are so few that, for one row, every program of
the output projection attends for itself, rather than wait for another kernel to do it. The backbone attends in kernels
of its own, ``csm.kernels.attention``.
"""

from __future__ import annotations

import math

from torch import Tensor

from csm.kernels.attention import attention
from csm.kernels.launch import jit, kernels_run, launch, power_of_two, tl
from csm.kernels.launch_config import launch_config
from csm.kernels.linear_add import linear_add
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight
from csm.kernels.tiles import product, wait_for_inputs

MAX_FUSED_CONTEXT = 32  # and one row: every program repeats the attention, whose tiles fill its registers


@jit
def heads_of(H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Where each query head's elements stand in a row (H * d), as (key head, query head of it, d), and which exist.

    Each of the three is filled up to a power of two.
    """
    g_G, r_R, d_D = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, D)[None, None, :]
    return (g_G * (H // G) + r_R) * d + d_D, (g_G < G) & (r_R < H // G) & (d_D < d)


@jit
def attend(q_GRD, k_ptr, v_ptr, position, head_stride, G: tl.constexpr, d: tl.constexpr, S: tl.constexpr):
    """All heads of one row against the first S positions of a slot: (GROUPS, R, D) float32."""
    g_G, s_S = tl.arange(0, q_GRD.shape[0])[:, None, None], tl.arange(0, S)
    d_D = tl.arange(0, q_GRD.shape[2])[None, None, :]
    at_GSD = g_G * head_stride + s_S[None, :, None] * d + d_D
    mask_GSD = (g_G < G) & (s_S <= position)[None, :, None] & (d_D < d)
    k_GSD = tl.load(k_ptr + at_GSD, mask=mask_GSD, other=0.0).to(tl.float32)
    v_GSD = tl.load(v_ptr + at_GSD, mask=mask_GSD, other=0.0).to(tl.float32)
    score_GRS = tl.sum(q_GRD[:, :, None, :] * k_GSD[:, None, :, :], axis=3)
    score_GRS = tl.where((s_S <= position)[None, None, :], score_GRS, -float("inf"))
    weight_GRS = tl.exp(score_GRS - tl.max(score_GRS, axis=2, keep_dims=True))
    mixed_GRD = tl.sum(weight_GRS[:, :, :, None] * v_GSD[:, None, :, :], axis=2)
    return mixed_GRD / tl.sum(weight_GRS, axis=2, keep_dims=True)


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
    """See ``attention_linear_add``. What attention gives is rounded, where the reference rounds."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_GRD, mask_GRD = heads_of(H, G, d, GROUPS, R, D)
    at_K = tl.arange(0, GROUPS * R * D)
    mask_K = at_K < H * d
    if H * d != GROUPS * R * D:  # only then: reshaped, the compiler no longer sees that neighbours are neighbours
        at_K, mask_K = tl.reshape(at_GRD, (GROUPS * R * D,)), tl.reshape(mask_GRD, (GROUPS * R * D,))
    mask_NK = (n_N < N)[:, None] & mask_K[None, :]
    weight_NK = tl.load(weight_ptr + n_N[:, None] * (H * d) + at_K[None, :], mask=mask_NK, other=0.0)
    wait_for_inputs(PDL)
    q_GRD = tl.load(q_ptr + at_GRD, mask=mask_GRD, other=0.0).to(tl.float32) * scale
    mixed_GRD = attend(q_GRD, k_ptr, v_ptr, tl.load(position_ptr), head_stride, G, d, S)
    mixed_K = tl.reshape(mixed_GRD, (GROUPS * R * D,)).to(q_ptr.dtype.element_ty).to(tl.float32)
    residual_N = tl.load(residual_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)
    out_N = residual_N + product(weight_NK, mixed_K)
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
    if B * T <= native.MAX_ROWS and native.native_runs(q_BTHd, B * T, weight_DE):
        keys = (k_cache_BGSd, v_cache_BGSd, position_BT)
        return native.attention_linear_add(q_BTHd, *keys, weight_DE, residual_BTD)
    context = bias_BTS.shape[-1]
    fused = B * T == 1 and context <= MAX_FUSED_CONTEXT and kernels_run(q_BTHd, 1)
    shape = launch_config("attention_linear_add", weight_DE, 1) if fused else None
    if shape is None:
        mixed_BTE = attention(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS, position_BT)
        return linear_add(mixed_BTE, weight_DE, residual_BTD)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    out_BTD = q_BTHd.new_empty(B, T, D)
    constants = dict(H=H, G=G, d=d, N=D, BLOCK_N=shape.constants["BLOCK_N"])
    blocks = dict(GROUPS=power_of_two(G), R=power_of_two(H // G), D=power_of_two(d), S=power_of_two(context))
    tensors = (q_BTHd, k_cache_BGSd, v_cache_BGSd, weight_DE, residual_BTD, out_BTD, position_BT)
    numbers = (k_cache_BGSd.stride(1), 1 / math.sqrt(d))
    options = dict(**constants, **blocks, num_warps=shape.num_warps)
    launch(attention_linear_add_row, [shape.blocks(D)], *tensors, *numbers, **options)
    return out_BTD
