"""RMSNorm, the fused gate and up projections, and SiLU(gate) * up: the first half of a SwiGLU MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from csm.kernels.int8_product import OUTPUTS
from csm.kernels.launch import jit, launch, row_stride, tl, use_kernels
from csm.kernels.launch_config import launch_config, weight_arguments
from csm.kernels.native import ops as native
from csm.kernels.norm_linear import rms_norm
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


def norm_swiglu_reference(x_BTD: Tensor, norm_D: Tensor, gate_up_2FD: Weight, eps: float) -> Tensor:
    """``norm_swiglu`` in PyTorch."""
    gate_BTF, up_BTF = F.linear(rms_norm(x_BTD, norm_D, eps), dense(gate_up_2FD)).chunk(2, dim=-1)
    return F.silu(gate_BTF) * up_BTF


@jit
def gate_up_rows(first, N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The rows of ``gate_up_2FD`` for the outputs from ``first`` on, GROUP of gate, then of up: (2 * BLOCK_N,)."""
    i_I = tl.arange(0, 2 * BLOCK_N)
    return first + i_I // (2 * GROUP) * GROUP + i_I % GROUP + i_I // GROUP % 2 * N


@jit
def split_gate_up(gate_up_I, GROUP: tl.constexpr):
    """The products with ``gate_up_rows``, gate and up apart: (BLOCK_N,) each."""
    BLOCK_N: tl.constexpr = gate_up_I.shape[0] // 2
    gate, up = tl.split(tl.permute(tl.reshape(gate_up_I, (BLOCK_N // GROUP, 2, GROUP)), (0, 2, 1)))
    return tl.reshape(gate, (BLOCK_N,)), tl.reshape(up, (BLOCK_N,))


@jit
def swiglu(gate, up):
    """SiLU(gate) * up, in float32."""
    return gate * tl.sigmoid(gate) * up


@jit
def norm_swiglu_rows(
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
    """``norm_swiglu`` of up to MAX_GEMV_ROWS rows."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    GROUP: tl.constexpr = OUTPUTS if KIND == "int8" else 1
    row_I = gate_up_rows(tl.program_id(0) * BLOCK_N, N, BLOCK_N, GROUP)
    gate_up_IK, scale = weight_and_scale(weight_ptr, scale_ptr, row_I, 2 * N, K, BLOCK_K, KIND, EVICT)
    norm_K = load_input(norm_ptr, K=K, BLOCK_K=BLOCK_K, KIND=KIND)
    wait_for_inputs(PDL)
    for row in tl.range(ROWS, loop_unroll_factor=2, num_stages=1):
        x_K = rms_norm_row(load_input(x_ptr + row * x_stride, K, BLOCK_K, KIND), norm_K, K=K, EPS=EPS)
        gate_N, up_N = split_gate_up(gemv_tile(gate_up_IK, scale, x_K, KIND), GROUP)
        tl.store(out_ptr + row * N + n_N, swiglu(gate_N, up_N).to(x_ptr.dtype.element_ty), mask=n_N < N)


@jit
def norm_swiglu_matmul(
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
    """``norm_swiglu`` of more rows, on tensor cores."""
    release_next_kernel(PDL)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_I = gate_up_rows(tl.program_id(0) * BLOCK_N, N, BLOCK_N, 1)
    m_M = tl.arange(0, M)
    wait_for_inputs(PDL)
    scale_M = inverse_rms(x_ptr, x_stride, m_M, ROWS=ROWS, K=K, EPS=EPS, BLOCK_K=BLOCK_K)
    acc_MI = matmul_tile(
        x_ptr, x_stride, scale_M, norm_ptr, weight_ptr, scale_ptr, m_M, n_I, ROWS, 2 * N, K, BLOCK_K, True, KIND, EVICT
    )
    gate_MN, up_MN = tl.split(tl.reshape(acc_MI, (M, BLOCK_N, 2)))
    mask_MN = (m_M < ROWS)[:, None] & (n_N < N)[None, :]
    hidden_MN = swiglu(gate_MN, up_MN).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + m_M[:, None] * N + n_N[None, :], hidden_MN, mask=mask_MN)


def norm_swiglu(x_BTD: Tensor, norm_D: Tensor, gate_up_2FD: Weight, eps: float) -> Tensor:
    """SwiGLU (https://arxiv.org/abs/2002.05202): (B, T, D) -> (B, T, F).

    ``gate_up_2FD`` holds the F rows of the gate (Sesame's w1), then the F rows of up (w3).
    """
    (B, T, D), F_ = x_BTD.shape, gate_up_2FD.shape[0] // 2
    if native.use_native(x_BTD, B * T, gate_up_2FD):
        return native.norm_swiglu(x_BTD, norm_D, gate_up_2FD, eps)
    config = launch_config("norm_swiglu", gate_up_2FD, B * T) if use_kernels(x_BTD, B * T) else None
    if config is None:
        return norm_swiglu_reference(x_BTD, norm_D, gate_up_2FD, eps)
    out_BTF = x_BTD.new_empty(B, T, F_)
    launch(
        norm_swiglu_matmul if "M" in config.constants else norm_swiglu_rows,
        [config.num_programs(F_)],
        x_ptr=x_BTD,
        norm_ptr=norm_D,
        out_ptr=out_BTF,
        x_stride=row_stride(x_BTD),
        ROWS=B * T,
        N=F_,
        K=D,
        EPS=eps,
        **weight_arguments(gate_up_2FD),
        **config.options,
    )
    return out_BTF
