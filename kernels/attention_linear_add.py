"""Attention, its output projection and the residual: everything in a block's attention after the cache write.

The depth decoder attends to at most 32 positions. For a single row, every program of the output projection computes the
whole attention itself instead of waiting for another kernel. The backbone uses the separate attention kernels,
``csm.kernels.attention``.

Shapes of the fused kernel: M heads, padded to a tensor-core tile; C keys of all key heads, S per key head.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from csm.kernels.attention import MIN_DOT, attention, covered_positions, softmax_dot
from csm.kernels.launch import jit, launch, power_of_two, tl, use_kernels
from csm.kernels.launch_config import launch_config, weight_arguments
from csm.kernels.linear_add import linear_add
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight
from csm.kernels.quantized_rows import PAIR
from csm.kernels.tiles import gemv_tile, release_next_kernel, scale_tile, wait_for_inputs, weight_tile

MAX_FUSED_CONTEXT = 32  # and a single row: every program repeats the attention and holds its tiles in registers


@jit
def head_offsets(
    k, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """Offsets into a row (H * d) of the elements ``k`` of its padded form (GROUPS, R, D), and which of them exist."""
    offset, mask = k, k < H * d
    if H * d != GROUPS * R * D:  # only then: the compiler cannot see that these offsets are contiguous
        g, r, d_ = k // (R * D), k // D % R, k % D
        offset, mask = (g * (H // G) + r) * d + d_, (g < G) & (r < H // G) & (d_ < d)
    return offset, mask


@jit
def attend_all_heads(
    q_MD,
    k_ptr,
    v_ptr,
    position_ptr,
    head_stride,
    scale,
    G: tl.constexpr,
    CONTEXT: tl.constexpr,
    d: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """All heads of one row over the first CONTEXT positions of its slot: (M, D) float32.

    One product covers the keys of all key heads; a head's scores with other heads' keys are masked. Keys and values are
    loaded before the position is known, so those beyond it are discarded after the load.
    """
    m_M, c_C, d_D = tl.arange(0, q_MD.shape[0]), tl.arange(0, GROUPS * S), tl.arange(0, q_MD.shape[1])
    offset_CD = (c_C // S)[:, None] * head_stride + (c_C % S)[:, None] * d + d_D[None, :]
    exists_CD = ((c_C // S < G) & (c_C % S < CONTEXT))[:, None] & (d_D < d)[None, :]
    if GROUPS == G and S == CONTEXT and q_MD.shape[1] == d:  # CSM-1B: no padding, and no registers for a mask
        k_CD = tl.load(k_ptr + offset_CD)
        v_CD = tl.load(v_ptr + offset_CD)
    else:
        k_CD = tl.load(k_ptr + offset_CD, mask=exists_CD, other=0.0)
        v_CD = tl.load(v_ptr + offset_CD, mask=exists_CD, other=0.0)
    visible_C = c_C % S <= tl.load(position_ptr)
    visible_MC = visible_C[None, :] & ((m_M // R % GROUPS)[:, None] == (c_C // S)[None, :])
    _, sum_M, acc_MD = softmax_dot(q_MD, k_CD, tl.where(visible_C[:, None], v_CD, 0.0), visible_MC, scale)
    return acc_MD / sum_M[:, None]


@jit
def one_row(attended_MD, DTYPE: tl.constexpr, HEADS: tl.constexpr):
    """The first HEADS heads one after the other, rounded to DTYPE: (HEADS * D,) float32."""
    M: tl.constexpr = attended_MD.shape[0]
    K: tl.constexpr = HEADS * attended_MD.shape[1]
    attended_MD = tl.where((tl.arange(0, M) < HEADS)[:, None], attended_MD, 0.0)
    attended_K = tl.sum(tl.reshape(attended_MD, (M // HEADS, K)), axis=0).to(DTYPE)  # drops the padded heads
    return attended_K.to(tl.float32)


@jit
def projection_tile(
    weight_ptr,
    n_N,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Rows ``n_N`` of the output projection, with inputs in the order of padded heads. Quantised: without padding."""
    if KIND == "dense":
        k_K, mask_K = head_offsets(tl.arange(0, GROUPS * R * D), H, G, d, GROUPS, R, D)
        mask_NK = (n_N < N)[:, None] & mask_K[None, :]
        weight_ptr_NK = weight_ptr + n_N[:, None] * (H * d) + k_K[None, :]
        weight_NK = tl.load(weight_ptr_NK, mask=mask_NK, other=0.0, eviction_policy=EVICT)
    else:
        weight_NK = weight_tile(weight_ptr, n_N, N, H * d, GROUPS * R * D, KIND, EVICT)
    return weight_NK


@jit
def attention_linear_add_row(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    position_ptr,
    head_stride,
    scale,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    N: tl.constexpr,
    CONTEXT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``attention_linear_add`` of one row. The attention output is rounded where the reference rounds it."""
    release_next_kernel(PDL)
    n_N, m_M = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, M)
    weight_NK = projection_tile(weight_ptr, n_N, H, G, d, N, GROUPS, R, D, KIND, EVICT)
    weight_scale = scale_tile(scale_ptr, n_N, N, H * d, GROUPS * R * D, KIND, EVICT)
    wait_for_inputs(PDL)
    residual_N = tl.load(residual_ptr + n_N, mask=n_N < N, other=0.0).to(tl.float32)
    offset_MD, mask_MD = head_offsets(m_M[:, None] * D + tl.arange(0, D)[None, :], H, G, d, GROUPS, R, D)
    q_MD = tl.load(q_ptr + offset_MD, mask=mask_MD, other=0.0)
    attended_MD = attend_all_heads(q_MD, k_ptr, v_ptr, position_ptr, head_stride, scale, G, CONTEXT, d, GROUPS, R, S)
    attended_K = one_row(attended_MD, q_ptr.dtype.element_ty, GROUPS * R)
    out_N = residual_N + gemv_tile(weight_NK, weight_scale, attended_K, KIND)
    tl.store(out_ptr + n_N, out_N.to(q_ptr.dtype.element_ty), mask=n_N < N)


def attention_linear_add(
    q_BTHd: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    bias_BTS: Tensor | None,
    position_BT: Tensor,
    weight_DE: Weight,
    residual_BTD: Tensor,
    context: int | None = None,
) -> Tensor:
    """``linear_add(attention(q, ...), weight, residual)``: (B, T, H, d), (B, T, D) -> (B, T, D)."""
    (B, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    if B * T <= native.MAX_ROWS and native.use_native(q_BTHd, B * T, weight_DE):
        return native.attention_linear_add(q_BTHd, k_cache_BGSd, v_cache_BGSd, position_BT, weight_DE, residual_BTD)
    context = covered_positions(bias_BTS, context)
    constants = _constants(H, G, d, weight_DE.shape[0], context)
    fits = isinstance(weight_DE, Tensor) or _fits(weight_DE.kind, H * d, constants)
    fused = B * T == 1 and context <= MAX_FUSED_CONTEXT and fits and use_kernels(q_BTHd, 1)
    config = launch_config("attention_linear_add", weight_DE, 1) if fused else None
    if config is None:
        attended_BTE = attention(q_BTHd, k_cache_BGSd, v_cache_BGSd, bias_BTS, position_BT, context)
        return linear_add(attended_BTE, weight_DE, residual_BTD)
    assert q_BTHd.is_contiguous() and k_cache_BGSd.stride() == v_cache_BGSd.stride()
    out_BTD = q_BTHd.new_empty(residual_BTD.shape)
    launch(
        attention_linear_add_row,
        [config.num_programs(weight_DE.shape[0])],
        q_ptr=q_BTHd,
        k_ptr=k_cache_BGSd,
        v_ptr=v_cache_BGSd,
        residual_ptr=residual_BTD,
        out_ptr=out_BTD,
        position_ptr=position_BT,
        head_stride=k_cache_BGSd.stride(1),
        scale=1 / math.sqrt(d),
        BLOCK_N=config.constants["BLOCK_N"],
        num_warps=config.num_warps,
        **weight_arguments(weight_DE),
        **constants,
    )
    return out_BTD


def _fits(kind: str, k: int, constants: dict[str, Any]) -> bool:
    """Whether the kernel can read a quantised weight: no padded heads, and whole pairs of blocks in int8."""
    return k == constants["GROUPS"] * constants["R"] * constants["D"] and (kind != "int8" or k % PAIR == 0)


def _constants(H: int, G: int, d: int, N: int, context: int) -> dict[str, Any]:
    """Sizes, and those of the tiles: powers of two, of at least ``MIN_DOT`` where a tensor core multiplies."""
    groups, heads_per_group = power_of_two(G), power_of_two(H // G)
    tiles = dict(GROUPS=groups, R=heads_per_group, M=max(MIN_DOT, groups * heads_per_group))
    tiles |= dict(D=max(MIN_DOT, power_of_two(d)), S=max(MIN_DOT, power_of_two(context)))
    return dict(H=H, G=G, d=d, N=N, CONTEXT=context, **tiles)
