"""Building blocks of the kernels: weight tiles, normalised rows, products.

There are two ways to multiply a few rows by a weight (N, K). *Rows* (up to 8 rows): a program loads BLOCK_N whole rows
of the weight once and, with programmatic dependent launch, before the previous kernel has ended. It then multiplies the
tile by one row of ``x`` after another in float32, always in the same order, so a row's result does not depend on the
batch. *Matmul*: tensor cores, over blocks of K.
"""

from __future__ import annotations

from csm.kernels.launch import INTERPRETED, gdc_launch_dependents, gdc_wait, jit, tl


@jit
def release_next_kernel(PDL: tl.constexpr):
    """Let the next kernel start. Call it first: the trigger fires when every program has reached it.

    After loads it would be late, because the compiler may convert what was loaded, and so wait for it, before it.
    """
    if PDL:
        gdc_launch_dependents()


@jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the results of earlier kernels are visible."""
    if PDL:
        gdc_wait()


@jit
def weight_tile(weight_ptr, n_N, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows ``n_N`` of a weight (N, K), zero outside it: (BLOCK_N, BLOCK_K).

    Weights do not fit the L2 cache from one use to the next: they are evicted first, so that activations and the KV
    cache stay.
    """
    k_K = tl.arange(0, BLOCK_K)
    mask_NK = (n_N < N)[:, None] & (k_K < K)[None, :]
    weight_ptr_NK = weight_ptr + n_N[:, None] * K + k_K[None, :]
    return tl.load(weight_ptr_NK, mask=mask_NK, other=0.0, eviction_policy="evict_first")


@jit
def load_row(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row of K elements, padded with zeros: (BLOCK_K,)."""
    k_K = tl.arange(0, BLOCK_K)
    return tl.load(x_ptr + k_K, mask=k_K < K, other=0.0)


@jit
def rms_norm_row(x_K, norm_K, K: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of a row, rounded where the reference rounds: (BLOCK_K,) float32."""
    wide_K = x_K.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide_K * wide_K, axis=0) / K + EPS)
    rounded_K = (wide_K * scale).to(x_K.dtype).to(tl.float32)
    return (rounded_K * norm_K.to(tl.float32)).to(x_K.dtype).to(tl.float32)


@jit
def gemv_tile(weight_NK, x_K):
    """A weight tile times a row: (BLOCK_N,) float32."""
    return tl.sum(weight_NK.to(tl.float32) * x_K[None, :], axis=1)


@jit
def inverse_rms(x_ptr, stride, m_M, ROWS: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / RMS of each of the rows ``m_M``: (M,) float32."""
    total_M = tl.zeros_like(m_M).to(tl.float32)
    for first in range(0, K, BLOCK_K):
        k_K = first + tl.arange(0, BLOCK_K)
        mask_MK = (m_M < ROWS)[:, None] & (k_K < K)[None, :]
        x_MK = tl.load(x_ptr + m_M[:, None] * stride + k_K[None, :], mask=mask_MK, other=0.0).to(tl.float32)
        total_M += tl.sum(x_MK * x_MK, axis=1)
    return tl.math.rsqrt(total_M / K + EPS)


@jit
def matmul_tile(
    x_ptr,
    x_stride,
    scale_M,
    norm_ptr,
    weight_ptr,
    m_M,
    n_N,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """Rows ``m_M`` of x times rows ``n_N`` of a weight (N, K): (M, BLOCK_N) float32.

    With NORM, x is first scaled by ``scale_M`` and the norm's weight; without, both are ignored.
    """
    acc_MN = tl.zeros((m_M.shape[0], n_N.shape[0]), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k_K = first + tl.arange(0, BLOCK_K)
        mask_MK = (m_M < ROWS)[:, None] & (k_K < K)[None, :]
        x_MK = tl.load(x_ptr + m_M[:, None] * x_stride + k_K[None, :], mask=mask_MK, other=0.0)
        if NORM:
            norm_K = tl.load(norm_ptr + k_K, mask=k_K < K, other=0.0).to(tl.float32)
            rounded_MK = (x_MK.to(tl.float32) * scale_M[:, None]).to(x_MK.dtype).to(tl.float32)
            x_MK = (rounded_MK * norm_K[None, :]).to(x_MK.dtype)
        mask_KN = (k_K < K)[:, None] & (n_N < N)[None, :]
        weight_ptr_KN = weight_ptr + n_N[None, :] * K + k_K[:, None]
        weight_KN = tl.load(weight_ptr_KN, mask=mask_KN, other=0.0, eviction_policy="evict_first")
        if INTERPRETED:
            x_MK, weight_KN = x_MK.to(tl.float32), weight_KN.to(tl.float32)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision="ieee")
    return acc_MN
