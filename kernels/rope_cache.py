"""The first part of a block's attention: RMSNorm, the q, k and v projection, RoPE, and the cache write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csm.kernels.launch import jit, launch, row_stride, tl, use_kernels
from csm.kernels.launch_config import MAX_GEMV_ROWS, launch_config, weight_arguments
from csm.kernels.native import ops as native
from csm.kernels.norm_linear import norm_linear
from csm.kernels.quantized import Weight
from csm.kernels.tiles import (
    gemv_tile,
    load_input,
    release_next_kernel,
    rms_norm_row,
    wait_for_inputs,
    weight_and_scale,
)

BLOCK_N = 512  # outputs per program of rope_cache_row


def rotate_pairs(x_BTHd: Tensor, rope_BTp2: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3)... by the angle of their position (RoFormer, eq. 34).

    ``rope_BTp2`` holds cosine and sine for each of the d / 2 pairs: a pair is a complex number, and its rotation a
    complex product. Computed in at least float32, then cast back.
    """
    x_wide = x_BTHd.to(torch.promote_types(x_BTHd.dtype, rope_BTp2.dtype))
    pairs_BTHp = torch.view_as_complex(x_wide.unflatten(-1, (-1, 2)))
    rotated_BTHp = pairs_BTHp * torch.view_as_complex(rope_BTp2).unsqueeze(2)
    return torch.view_as_real(rotated_BTHp).flatten(-2).to(x_BTHd.dtype)


def rope_cache_reference(
    qkv_BTE: Tensor,
    rope_BTp2: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """``rope_cache`` in PyTorch."""
    num_kv_heads, head_dim = k_cache_BGSd.shape[1], k_cache_BGSd.shape[3]
    heads = qkv_BTE.unflatten(-1, (-1, head_dim))
    num_rotated = heads.shape[2] - num_kv_heads
    rotated = rotate_pairs(heads[:, :, :num_rotated], rope_BTp2)
    q_BTHd, k_BTGd = rotated.split([num_rotated - num_kv_heads, num_kv_heads], dim=2)
    k_cache_BGSd[slot_B1, :, position_BT] = k_BTGd
    v_cache_BGSd[slot_B1, :, position_BT] = heads[:, :, num_rotated:]
    return q_BTHd


@jit
def load_rope(rope_ptr, n_N, d: tl.constexpr, ROTATED: tl.constexpr):
    """Cosine and sine of the pairs of outputs ``n_N``, whose first is even; 1 and 0 from output ROTATED (v) on."""
    n_P, _ = tl.split(tl.reshape(n_N, (n_N.shape[0] // 2, 2)))
    cos_P = tl.load(rope_ptr + n_P % d, mask=n_P < ROTATED, other=1.0)
    sin_P = tl.load(rope_ptr + n_P % d + 1, mask=n_P < ROTATED, other=0.0)
    return cos_P, sin_P


@jit
def rotate_pair_tile(qkv_N, cos_P, sin_P):
    """Rotate the pairs of neighbouring outputs, in float32: (N,) in the dtype of ``qkv_N``."""
    even_P, odd_P = tl.split(tl.reshape(qkv_N.to(tl.float32), (qkv_N.shape[0] // 2, 2)))
    rotated_P2 = tl.join(even_P * cos_P - odd_P * sin_P, even_P * sin_P + odd_P * cos_P)
    return tl.reshape(rotated_P2, (qkv_N.shape[0],)).to(qkv_N.dtype)


@jit
def write_heads(
    out_N, n_N, q_ptr, k_ptr, v_ptr, cache_offset, head_stride, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr
):
    """Store the outputs ``n_N``: queries to ``q_ptr``, keys and values to ``cache_offset``, this row's position."""
    head_N, d_N = n_N // d, n_N % d
    k_ptr, v_ptr = k_ptr + cache_offset, v_ptr + cache_offset
    tl.store(q_ptr + n_N, out_N, mask=head_N < H)
    tl.store(k_ptr + (head_N - H) * head_stride + d_N, out_N, mask=(head_N >= H) & (head_N < H + G))
    is_value_N = (head_N >= H + G) & (head_N < H + 2 * G)
    tl.store(v_ptr + (head_N - H - G) * head_stride + d_N, out_N, mask=is_value_N)


@jit
def norm_rope_cache_rows(
    x_ptr,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rope_ptr,
    slot_ptr,
    position_ptr,
    x_stride,
    position_stride,
    slot_stride,
    head_stride,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``norm_rope_cache`` of few rows. The product is rounded before RoPE, where the reference rounds it."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_NK, scale = weight_and_scale(weight_ptr, scale_ptr, n_N, (H + 2 * G) * d, K, BLOCK_K, KIND, EVICT)
    norm_K = load_input(norm_ptr, K=K, BLOCK_K=BLOCK_K, KIND=KIND)
    wait_for_inputs(PDL)
    for row in tl.range(ROWS, loop_unroll_factor=2, num_stages=1):
        row_offset = row // T * position_stride + row % T
        cache_offset = tl.load(slot_ptr + row // T) * slot_stride + tl.load(position_ptr + row_offset) * d
        cos_P, sin_P = load_rope(rope_ptr + row_offset * d, n_N, d, ROTATED=(H + G) * d)
        x_K = rms_norm_row(load_input(x_ptr + row * x_stride, K, BLOCK_K, KIND), norm_K, K=K, EPS=EPS)
        out_N = rotate_pair_tile(gemv_tile(weight_NK, scale, x_K, KIND).to(x_ptr.dtype.element_ty), cos_P, sin_P)
        write_heads(out_N, n_N, q_ptr + row * (H * d), k_ptr, v_ptr, cache_offset, head_stride, H, G, d)


@jit
def rope_cache_row(
    qkv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rope_ptr,
    slot_ptr,
    position_ptr,
    position_stride,
    slot_stride,
    head_stride,
    T: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of one row."""
    release_next_kernel(PDL)
    row = tl.program_id(0)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    qkv_ptr_N = qkv_ptr + row * ((H + 2 * G) * d) + n_N
    qkv_N = tl.load(qkv_ptr_N, mask=n_N < (H + 2 * G) * d, other=0.0)
    row_offset = row // T * position_stride + row % T
    cache_offset = tl.load(slot_ptr + row // T) * slot_stride + tl.load(position_ptr + row_offset) * d
    cos_P, sin_P = load_rope(rope_ptr + row_offset * d, n_N, d, ROTATED=(H + G) * d)
    out_N = rotate_pair_tile(qkv_N, cos_P, sin_P)
    write_heads(out_N, n_N, q_ptr + row * (H * d), k_ptr, v_ptr, cache_offset, head_stride, H, G, d)


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
    """``rope_cache(norm_linear(x, norm, qkv, eps), ...)``: (B, T, D) -> q (B, T, H, d)."""
    (B, T, D), (G, d) = x_BTD.shape, (k_cache_BGSd.shape[1], k_cache_BGSd.shape[3])
    H = qkv_ED.shape[0] // d - 2 * G
    if native.use_native(x_BTD, B * T, qkv_ED):
        cache = (k_cache_BGSd, v_cache_BGSd, slot_B1, position_BT)
        return native.norm_rope_cache(x_BTD, norm_D, qkv_ED, eps, rope_BTp2, *cache)
    use_rows_kernel = B * T <= MAX_GEMV_ROWS and use_kernels(x_BTD, B * T)
    config = launch_config("norm_rope_cache", qkv_ED, B * T) if use_rows_kernel else None
    if config is None:
        qkv_BTE = norm_linear(x_BTD, norm_D, qkv_ED, eps)
        return rope_cache(qkv_BTE, rope_BTp2, k_cache_BGSd, v_cache_BGSd, slot_B1, position_BT)
    q_BTHd = x_BTD.new_empty(B, T, H, d)
    launch(
        norm_rope_cache_rows,
        [config.num_programs(qkv_ED.shape[0])],
        x_ptr=x_BTD,
        norm_ptr=norm_D,
        x_stride=row_stride(x_BTD),
        ROWS=B * T,
        K=D,
        EPS=eps,
        **_rope_arguments(q_BTHd, rope_BTp2, k_cache_BGSd, v_cache_BGSd, slot_B1, position_BT),
        **weight_arguments(qkv_ED),
        **config.options,
    )
    return q_BTHd


def rope_cache(
    qkv_BTE: Tensor,
    rope_BTp2: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """Rotate q and k, write k and v at ``position_BT`` of their slot, and return q as (B, T, H, d).

    ``qkv_BTE`` holds the heads of q, then of k, then of v. The caches are written in place. Positions are read on the
    device, so a captured call follows them.
    """
    (B, T, E), (G, d) = qkv_BTE.shape, (k_cache_BGSd.shape[1], k_cache_BGSd.shape[3])
    H = E // d - 2 * G
    if not use_kernels(qkv_BTE, B * T):
        return rope_cache_reference(qkv_BTE, rope_BTp2, k_cache_BGSd, v_cache_BGSd, slot_B1, position_BT)
    q_BTHd = qkv_BTE.new_empty(B, T, H, d)
    launch(
        rope_cache_row,
        [B * T, -(-E // BLOCK_N)],
        qkv_ptr=qkv_BTE,
        BLOCK_N=BLOCK_N,
        **_rope_arguments(q_BTHd, rope_BTp2, k_cache_BGSd, v_cache_BGSd, slot_B1, position_BT),
    )
    return q_BTHd


def _rope_arguments(
    q_BTHd: Tensor, rope_BTp2: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, slot_B1: Tensor, position_BT: Tensor
) -> dict[str, Any]:
    """The arguments that both kernels share. Asserts the layouts that they assume."""
    (_, T, H, d), G = q_BTHd.shape, k_cache_BGSd.shape[1]
    assert k_cache_BGSd.stride() == v_cache_BGSd.stride() and k_cache_BGSd.stride()[2:] == (d, 1)
    assert rope_BTp2.stride()[1:] == (d, 2, 1) and position_BT.stride(1) == 1
    assert rope_BTp2.stride(0) == position_BT.stride(0) * d
    return dict(
        q_ptr=q_BTHd,
        k_ptr=k_cache_BGSd,
        v_ptr=v_cache_BGSd,
        rope_ptr=rope_BTp2,
        slot_ptr=slot_B1,
        position_ptr=position_BT,
        position_stride=position_BT.stride(0),
        slot_stride=k_cache_BGSd.stride(0),
        head_stride=k_cache_BGSd.stride(1),
        T=T,
        H=H,
        G=G,
        d=d,
    )
