"""RMSNorm, then a linear layer: the codebook heads, and the projection from the backbone to the depth decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import jit, launch, row_stride, tl, use_kernels
from csm.kernels.launch_config import launch_config, weight_arguments
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight, dense
from csm.kernels.tiles import (
    gemv_tile,
    inverse_rms,
    load_input,
    matmul_tile,
    release_next_kernel,
    rms_norm_row,
    wait_for_inputs,
    weight_and_scale,
)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (https://arxiv.org/abs/1910.07467).

    Computed in at least float32, cast back to the dtype of ``x``, then multiplied by the weight. PyTorch's own weighted
    op multiplies before the cast, which rounds once less than the models were trained with.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight_D


def norm_linear_reference(x_BTD: Tensor, norm_D: Tensor, weight_ED: Weight, eps: float) -> Tensor:
    """``norm_linear`` in PyTorch."""
    return F.linear(rms_norm(x_BTD, norm_D, eps), dense(weight_ED))


@jit
def norm_linear_rows(
    x_ptr,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    x_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``norm_linear`` of up to MAX_GEMV_ROWS rows."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_NK, scale = weight_and_scale(weight_ptr, scale_ptr, n_N, N, K, BLOCK_K, KIND, EVICT)
    norm_K = load_input(norm_ptr, K=K, BLOCK_K=BLOCK_K, KIND=KIND)
    wait_for_inputs(PDL)
    for row in tl.range(ROWS, loop_unroll_factor=2, num_stages=1):
        x_K = rms_norm_row(load_input(x_ptr + row * x_stride, K, BLOCK_K, KIND), norm_K, K=K, EPS=EPS)
        out_N = gemv_tile(weight_NK, scale, x_K, KIND)
        tl.store(out_ptr + row * N + n_N, out_N.to(x_ptr.dtype.element_ty), mask=n_N < N)


@jit
def norm_linear_matmul(
    x_ptr,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,
    x_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``norm_linear`` of more rows, on tensor cores."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = tl.arange(0, M)
    wait_for_inputs(PDL)
    scale_M = inverse_rms(x_ptr, x_stride, m_M, ROWS=ROWS, K=K, EPS=EPS, BLOCK_K=BLOCK_K)
    acc_MN = matmul_tile(
        x_ptr, x_stride, scale_M, norm_ptr, weight_ptr, scale_ptr, m_M, n_N, ROWS, N, K, BLOCK_K, True, KIND, EVICT
    )
    mask_MN = (m_M < ROWS)[:, None] & (n_N < N)[None, :]
    tl.store(out_ptr + m_M[:, None] * N + n_N[None, :], acc_MN.to(x_ptr.dtype.element_ty), mask=mask_MN)


def norm_linear(x_BTD: Tensor, norm_D: Tensor, weight_ED: Weight, eps: float) -> Tensor:
    """``rms_norm(x) @ weight.T``: (B, T, D) -> (B, T, E)."""
    (B, T, D), E = x_BTD.shape, weight_ED.shape[0]
    if native.use_native(x_BTD, B * T, weight_ED):
        return native.norm_linear(x_BTD, norm_D, weight_ED, eps)
    config = launch_config("norm_linear", weight_ED, B * T) if use_kernels(x_BTD, B * T) else None
    if config is None:
        return norm_linear_reference(x_BTD, norm_D, weight_ED, eps)
    out_BTE = x_BTD.new_empty(B, T, E)
    launch(
        norm_linear_matmul if "M" in config.constants else norm_linear_rows,
        [config.num_programs(E)],
        x_ptr=x_BTD,
        norm_ptr=norm_D,
        out_ptr=out_BTE,
        x_stride=row_stride(x_BTD),
        ROWS=B * T,
        N=E,
        K=D,
        EPS=eps,
        **weight_arguments(weight_ED),
        **config.options,
    )
    return out_BTE
