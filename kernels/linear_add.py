"""A linear layer added to the residual stream: the attention output and the MLP's down projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import jit, launch, row_stride, tl, use_kernels
from csm.kernels.launch_config import launch_config, weight_arguments
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight, dense
from csm.kernels.tiles import (
    gemv_tile,
    load_input,
    matmul_tile,
    release_next_kernel,
    wait_for_inputs,
    weight_and_scale,
)


def linear_add_reference(x_BTF: Tensor, weight_DF: Weight, residual_BTD: Tensor) -> Tensor:
    """``linear_add`` in PyTorch."""
    return residual_BTD + F.linear(x_BTF, dense(weight_DF))


@jit
def linear_add_rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``linear_add`` of up to MAX_GEMV_ROWS rows."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_NK, scale = weight_and_scale(weight_ptr, scale_ptr, n_N, N, K, BLOCK_K, KIND, EVICT)
    wait_for_inputs(PDL)
    for row in tl.range(ROWS, loop_unroll_factor=2, num_stages=1):
        residual_N = tl.load(residual_ptr + row * residual_stride + n_N, mask=n_N < N, other=0.0).to(tl.float32)
        x_K = load_input(x_ptr + row * x_stride, K=K, BLOCK_K=BLOCK_K, KIND=KIND).to(tl.float32)
        out_N = residual_N + gemv_tile(weight_NK, scale, x_K, KIND)
        tl.store(out_ptr + row * N + n_N, out_N.to(x_ptr.dtype.element_ty), mask=n_N < N)


@jit
def linear_add_matmul(
    x_ptr,
    weight_ptr,
    scale_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """``linear_add`` of more rows, on tensor cores."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = tl.arange(0, M)
    wait_for_inputs(PDL)
    mask_MN = (m_M < ROWS)[:, None] & (n_N < N)[None, :]
    residual_ptr_MN = residual_ptr + m_M[:, None] * residual_stride + n_N[None, :]
    residual_MN = tl.load(residual_ptr_MN, mask=mask_MN, other=0.0).to(tl.float32)
    acc_MN = matmul_tile(
        x_ptr, x_stride, 1.0, x_ptr, weight_ptr, scale_ptr, m_M, n_N, ROWS, N, K, BLOCK_K, False, KIND, EVICT
    )
    acc_MN += residual_MN
    tl.store(out_ptr + m_M[:, None] * N + n_N[None, :], acc_MN.to(x_ptr.dtype.element_ty), mask=mask_MN)


def linear_add(x_BTF: Tensor, weight_DF: Weight, residual_BTD: Tensor) -> Tensor:
    """``residual + x @ weight.T``: (B, T, F), (B, T, D) -> (B, T, D)."""
    B, T, D = residual_BTD.shape
    if native.use_native(x_BTF, B * T, weight_DF):
        return native.linear_add(x_BTF, weight_DF, residual_BTD)
    config = launch_config("linear_add", weight_DF, B * T) if use_kernels(x_BTF, B * T) else None
    if config is None:
        return linear_add_reference(x_BTF, weight_DF, residual_BTD)
    out_BTD = x_BTF.new_empty(B, T, D)
    launch(
        linear_add_matmul if "M" in config.constants else linear_add_rows,
        [config.num_programs(D)],
        x_ptr=x_BTF,
        residual_ptr=residual_BTD,
        out_ptr=out_BTD,
        x_stride=row_stride(x_BTF),
        residual_stride=row_stride(residual_BTD),
        ROWS=B * T,
        N=D,
        K=x_BTF.shape[2],
        **weight_arguments(weight_DF),
        **config.options,
    )
    return out_BTD
