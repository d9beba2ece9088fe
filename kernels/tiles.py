"""Building blocks of the kernels: weight tiles, normalised rows, products.

There are two ways to multiply a few rows by a weight (N, K). *Rows* (up to 8 rows): a program loads BLOCK_N whole rows
of the weight once and, with programmatic dependent launch, before the previous kernel has ended. It then multiplies the
tile by one row of ``x`` after another in float32, always in the same order, so a row's result does not depend on the
batch. int8 weights are multiplied in integers (``int8_product``). *Matmul*: tensor cores, over blocks of K.
"""

from __future__ import annotations

from csm.kernels import quantized_rows
from csm.kernels.int8_product import int8_product, int8_row, int8_scale_tile, int8_weight_tile
from csm.kernels.launch import INTERPRETED, constexpr, constexpr_function, gdc_launch_dependents, gdc_wait, jit, tl

QUANT_BLOCK = constexpr(quantized_rows.BLOCK)
num_blocks, row_width = constexpr_function(quantized_rows.num_blocks), constexpr_function(quantized_rows.row_width)
NIBBLE_ZERO = constexpr(quantized_rows.NIBBLE_ZERO)
# Byte i of a word becomes the lowest of 0x4B000000, which is 2**23 as a float32.
PERMUTE = "prmt.b32 ${out}, {word}, 0x4B000000, 0x744{byte};"
BYTES_ASM = constexpr(" ".join(PERMUTE.format(out=i, word="$4", byte=i) for i in range(4)))
NIBBLES_ASM = constexpr(
    "{ .reg .b32 lower, upper; and.b32 lower, $8, 0x0F0F0F0F; shr.b32 upper, $8, 4; and.b32 upper, upper, 0x0F0F0F0F; "
    + " ".join(PERMUTE.format(out=i, word=("lower", "upper")[i // 4], byte=i % 4) for i in range(8))
    + " }"
)


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
def weight_tile(
    weight_ptr,
    n_N,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Rows ``n_N`` of a weight (N, K), zero outside it: (BLOCK_N, BLOCK_K), int4 (BLOCK_N, BLOCK_K // 2).

    int8: in the order of ``int8_weight_tile``. Weights do not fit the L2 cache from one use to the next: they are
    evicted first, so that activations and the KV cache stay. Those that are kept in it are evicted last.
    """
    WIDTH: tl.constexpr = row_width(K, KIND)
    if KIND == "int8":
        tile = int8_weight_tile(weight_ptr, n_N, N, WIDTH, BLOCK_K, EVICT)
    else:
        k_K = tl.arange(0, BLOCK_K // 2 if KIND == "int4" else BLOCK_K)
        mask_NK = (n_N < N)[:, None] & (k_K < WIDTH)[None, :]
        weight_ptr_NK = weight_ptr + n_N[:, None] * WIDTH + k_K[None, :]
        tile = tl.load(weight_ptr_NK, mask=mask_NK, other=0.0, eviction_policy=EVICT)
    return tile


@jit
def scale_tile(
    scale_ptr,
    n_N,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The scales of ``weight_tile``: fp8 (BLOCK_N,), int4 one for every 16 bytes, (BLOCK_N, C); dense 1.

    int8: in the order of ``int8_scale_tile``. int4: the order of the pointers makes Triton give a thread the scales of
    its own bytes. Threads follow each other along the first dimension where neither is contiguous, which the compiler
    is kept from seeing.
    """
    scale = 1.0
    if KIND == "fp8":
        scale = tl.load(scale_ptr + n_N, mask=n_N < N, other=0.0)
    if KIND == "int8":
        scale = int8_scale_tile(scale_ptr, n_N, N, num_blocks(K), BLOCK_K, EVICT)
    if KIND == "int4":
        BLOCKS: tl.constexpr = num_blocks(K)
        j_C = tl.arange(0, BLOCK_K // QUANT_BLOCK) * 2 // 2
        mask_CN = (j_C < BLOCKS)[:, None] & (n_N < N)[None, :]
        scale_ptr_CN = scale_ptr + n_N[None, :] * BLOCKS + j_C[:, None]
        scale = tl.trans(tl.load(scale_ptr_CN, mask=mask_CN, other=0.0, eviction_policy=EVICT))
    return scale


@jit
def unpack_bytes(byte, ZERO: tl.constexpr):
    """uint8 values minus ZERO, in float32.

    The byte becomes the lowest of 2**23 in float32, whose step is 1 there. That is exact, and it avoids the conversion
    of integers, which runs on the slow units for special functions.
    """
    if INTERPRETED:
        value = byte.to(tl.float32) - ZERO
    else:
        wide = tl.inline_asm_elementwise(BYTES_ASM, "=r,=r,=r,=r,r", [byte], dtype=tl.float32, is_pure=True, pack=4)
        value = wide - (8388608.0 + ZERO)
    return value


@jit
def unpack_nibbles(byte):
    """Both halves of bytes, minus 8, in float32: a last dimension of 2, the lower half first. See ``unpack_bytes``."""
    if INTERPRETED:
        value = tl.join(byte & 15, byte >> 4).to(tl.float32) - NIBBLE_ZERO
    else:
        lower, upper = tl.inline_asm_elementwise(
            NIBBLES_ASM,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
        value = tl.join(lower, upper) - (8388608.0 + NIBBLE_ZERO)
    return value


@jit
def weight_and_scale(
    weight_ptr,
    scale_ptr,
    n_N,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """``weight_tile`` and ``scale_tile``."""
    weight_NK = weight_tile(weight_ptr, n_N, N, K, BLOCK_K, KIND, EVICT)
    return weight_NK, scale_tile(scale_ptr, n_N, N, K, BLOCK_K, KIND, EVICT)


@jit
def load_row(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row of K elements, padded with zeros: (BLOCK_K,)."""
    k_K = tl.arange(0, BLOCK_K)
    return tl.load(x_ptr + k_K, mask=k_K < K, other=0.0)


@jit
def load_input(x_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr):
    """``load_row`` of a product's input, in the threads that a weight of its kind needs it in."""
    return int8_row(x_ptr, K, BLOCK_K) if KIND == "int8" else load_row(x_ptr, K, BLOCK_K)


@jit
def rms_norm_row(x_K, norm_K, K: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of a row, rounded where the reference rounds: (BLOCK_K,) float32."""
    wide_K = x_K.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide_K * wide_K, axis=0) / K + EPS)
    rounded_K = (wide_K * scale).to(x_K.dtype).to(tl.float32)
    return (rounded_K * norm_K.to(tl.float32)).to(x_K.dtype).to(tl.float32)


@jit
def gemv_tile(weight_NK, scale, x_K, KIND: tl.constexpr):
    """A weight tile with its scales times a row: (BLOCK_N,) float32.

    int4: a thread sums the products of the 16 bytes that it loaded, and multiplies the sum with their scale.
    """
    if KIND == "int8":
        out_N = int8_product(weight_NK, scale, x_K)
    elif KIND == "int4":
        BLOCKS: tl.constexpr = x_K.shape[0] // QUANT_BLOCK
        x_K2 = tl.reshape(tl.permute(tl.reshape(x_K, (BLOCKS, 2, 16)), (0, 2, 1)), (BLOCKS * 16, 2))
        product_NK2 = unpack_nibbles(weight_NK) * x_K2[None, :, :]
        part_NC = tl.sum(tl.reshape(product_NK2, (weight_NK.shape[0], BLOCKS, QUANT_BLOCK)), axis=2)
        out_N = tl.sum(part_NC * scale.to(tl.float32), axis=1)
    else:
        out_N = tl.sum(weight_NK.to(tl.float32) * x_K[None, :], axis=1)
        if KIND == "fp8":
            out_N *= scale
    return out_N


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
def int8_input(at):
    """Which input a row of int8 weights holds at ``at``: thread, half, block, byte become block, half, thread, byte."""
    return at // 64 * 64 + at // 4 % 2 * 32 + at // 8 % 2 * 16 + at // 16 % 4 * 4 + at % 4


@jit
def dense_tile(
    weight_ptr,
    scale_ptr,
    k_K,
    n_N,
    N: tl.constexpr,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Inputs ``k_K``, of whole blocks, and outputs ``n_N`` of a weight (N, K) in DTYPE: (BLOCK_K, BLOCK_N).

    fp8 is not scaled yet: ``matmul_tile`` scales the products.
    """
    WIDTH: tl.constexpr = row_width(K, KIND)
    at_K = k_K // QUANT_BLOCK * 16 + k_K % 16 if KIND == "int4" else k_K
    mask_KN = (at_K < WIDTH)[:, None] & (n_N < N)[None, :]
    weight_ptr_KN = weight_ptr + n_N[None, :] * WIDTH + at_K[:, None]
    weight_KN = tl.load(weight_ptr_KN, mask=mask_KN, other=0.0, eviction_policy=EVICT)
    if KIND == "int8":  # loaded in the order of memory, and put in order at last
        k_K = int8_input(at_K)
        mask_KN = (k_K < K)[:, None] & (n_N < N)[None, :]
    if KIND == "int8" or KIND == "int4":
        if KIND == "int4":
            shift_K = (k_K % QUANT_BLOCK // 16 * 4).to(tl.uint8)
            value_KN = unpack_bytes((weight_KN >> shift_K[:, None]) & 15, NIBBLE_ZERO)
        else:
            value_KN = unpack_bytes(weight_KN.to(tl.uint8, bitcast=True) ^ 128, 128)
        scale_ptr_KN = scale_ptr + n_N[None, :] * num_blocks(K) + (k_K // QUANT_BLOCK)[:, None]
        scale_KN = tl.load(scale_ptr_KN, mask=mask_KN, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dense_KN = (value_KN * scale_KN).to(DTYPE)
        if KIND == "int8":
            dense_PTSH4N = tl.reshape(dense_KN, (k_K.shape[0] // 64, 4, 2, 2, 4, n_N.shape[0]))
            dense_KN = tl.reshape(tl.permute(dense_PTSH4N, (0, 3, 2, 1, 4, 5)), dense_KN.shape)
    else:
        dense_KN = weight_KN.to(DTYPE)
    return dense_KN


@jit
def matmul_tile(
    x_ptr,
    x_stride,
    scale_M,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    m_M,
    n_N,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    EVICT: tl.constexpr,
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
        weight_KN = dense_tile(weight_ptr, scale_ptr, k_K, n_N, N, K, x_MK.dtype, KIND, EVICT)
        if INTERPRETED:
            x_MK, weight_KN = x_MK.to(tl.float32), weight_KN.to(tl.float32)
        acc_MN = tl.dot(x_MK, weight_KN, acc_MN, input_precision="ieee")
    if KIND == "fp8":
        acc_MN *= scale_tile(scale_ptr, n_N, N, K, BLOCK_K, KIND, EVICT)[None, :]
    return acc_MN
