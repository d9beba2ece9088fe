"""Products of one row with int8 weights on tensor cores, for tiles of whole rows of the weight.

An instruction multiplies the 16 rows of a fragment by 8 columns over 32 inputs, in integers. The rows are blocks 2p and
2p + 1 of eight outputs. The columns are x as an integer of 23 bits, cut into three signed bytes: its inputs of block 2p
in columns 0 to 2, those of block 2p + 1 in columns 4 to 6. Columns 3 and 7 repeat the last byte and are not used, nor
are the products of one block's values with the other block's inputs.

The inputs of a warp share a step, a power of two. So an activation in bfloat16 is exact if it is at least 2**-14 of the
largest of them; others are off by at most 2**-22 of the largest. Sums over a block are exact: integers of less than 28
bits for the two lower bytes, of less than 20 for the highest. All other sums are float32.

A row of the weight is stored (``csm.kernels.quantized_rows``) so that the 16 bytes which a thread loads of a pair of
blocks are its four registers of a fragment. The order of the dimensions makes Triton load them in the threads that need
them: weights pass through no shared memory. x does.

Shapes: N outputs = R groups of O = 8; K inputs = P pairs of H = 2 blocks of B = 32, of which a warp (W) has I that
follow each other; T = 4 threads of a fragment's row; S = 2 halves of a block; C = 4 columns of a block.
"""

from __future__ import annotations

from csm.kernels.launch import INTERPRETED, constexpr, constexpr_function, jit, num_warps, tl
from csm.kernels.quantized_rows import BLOCK

PAIR = constexpr(2 * BLOCK)
OUTPUTS = constexpr(8)  # of a fragment
BITS = constexpr(21)  # the largest magnitude becomes 2**21 to 2**22
# Added to an integer of less than 2**22, it makes a float32 from 2**23 to 2**24, whose step is 1. Of its lower 23 bits,
# bytes 0 and 1 hold a digit of x plus 128, and byte 2 holds one plus 64.
OFFSET = constexpr(float(0x800000 + 0x408080))
MARGIN = constexpr(1.02)  # the offset leaves no room above 0x3F7F7F
SMALLEST = constexpr(22)  # biased exponent of 2**-105: what is smaller counts as this large
BYTES_ASM = constexpr(
    "{ .reg .b32 ab, cd, low, mid, high; "
    "prmt.b32 ab, $3, $4, 0x5140; prmt.b32 cd, $5, $6, 0x5140; "
    "prmt.b32 low, ab, cd, 0x5410; prmt.b32 mid, ab, cd, 0x7632; "
    "prmt.b32 ab, $3, $4, 0x0062; prmt.b32 cd, $5, $6, 0x0062; prmt.b32 high, ab, cd, 0x5410; "
    "add.u32 high, high, 0x40404040; "
    "xor.b32 $0, low, 0x80808080; xor.b32 $1, mid, 0x80808080; xor.b32 $2, high, 0x80808080; }"
)


def _smaller(a: int, b: int) -> int:
    return min(a, b)


smaller = constexpr_function(_smaller)


@jit
def int8_weight_tile(weight_ptr, n_N, N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr):
    """Rows ``n_N`` of a weight whose rows have WIDTH bytes, zero outside it: (P, R * H * O, 32) int8, P as (I, W)."""
    R: tl.constexpr = n_N.shape[0] // OUTPUTS
    P: tl.constexpr = BLOCK_K // PAIR
    W: tl.constexpr = smaller(num_warps(), P)
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    w = tl.arange(0, W)[None, None, :, None, None, None]
    i = tl.arange(0, P // W)[None, None, None, :, None, None]
    n = tl.trans(tl.reshape(n_N, (R, OUTPUTS)))[None, :, None, None, :, None]
    at = (w * (P // W) + i) * PAIR + t * 16 + tl.arange(0, 16)[None, None, None, None, None, :]
    value_TOWIR16 = tl.load(weight_ptr + n * WIDTH + at, mask=(n < N) & (at < WIDTH), other=0, eviction_policy=EVICT)
    value_TOWIRSH4 = tl.reshape(value_TOWIR16, (4, OUTPUTS, W, P // W, R, 2, 2, 4))
    return tl.reshape(tl.permute(value_TOWIRSH4, (3, 2, 4, 6, 1, 5, 0, 7)), (P, R * 2 * OUTPUTS, PAIR // 2))


@jit
def int8_scale_tile(scale_ptr, n_N, N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr):
    """The scales that a thread multiplies its sums with: (I, W, R, O, T), those of block T // 2 of a pair."""
    R: tl.constexpr = n_N.shape[0] // OUTPUTS
    P: tl.constexpr = BLOCK_K // PAIR
    W: tl.constexpr = smaller(num_warps(), P)
    t = tl.arange(0, 4)[:, None, None, None, None]
    w = tl.arange(0, W)[None, None, :, None, None]
    i = tl.arange(0, P // W)[None, None, None, :, None]
    n = tl.trans(tl.reshape(n_N, (R, OUTPUTS)))[None, :, None, None, :]
    j = (w * (P // W) + i) * 2 + t // 2
    scale_TOWIR = tl.load(scale_ptr + n * BLOCKS + j, mask=(n < N) & (j < BLOCKS), other=0.0, eviction_policy=EVICT)
    return tl.permute(scale_TOWIR, (3, 2, 4, 1, 0))


@jit
def int8_row(ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row of K elements, padded with zeros: (BLOCK_K,). The order of the dimensions gives a warp its own inputs."""
    W: tl.constexpr = smaller(num_warps(), BLOCK_K // PAIR)
    CHUNK: tl.constexpr = smaller(BLOCK_K // W, 256)  # 16 bytes a thread
    w, j = tl.arange(0, W)[:, None, None], tl.arange(0, BLOCK_K // W // CHUNK)[None, :, None]
    k = w * (BLOCK_K // W) + j * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    return tl.reshape(tl.load(ptr + k, mask=k < K, other=0.0), (BLOCK_K,))


@jit
def larger(a, b):
    """The larger of two, NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def largest(x_K):
    """The largest magnitude of each warp's inputs, NaN if one is NaN: (W,)."""
    W: tl.constexpr = smaller(num_warps(), x_K.shape[0] // PAIR)
    magnitude_WK = tl.reshape(tl.abs(x_K), (W, x_K.shape[0] // W))
    if INTERPRETED:  # its maximum leaves out NaN
        bound_W = tl.max(magnitude_WK, axis=1) + tl.sum(magnitude_WK * 0.0, axis=1)
    else:
        bound_W = tl.reduce(magnitude_WK, 1, larger)
    return bound_W


@jit
def powers_of_two(bound_W):
    """The factor that makes x an integer, and its reciprocal, NaN if ``bound`` is not finite: (W,) each."""
    exponent = tl.maximum((bound_W * MARGIN).to(tl.int32, bitcast=True) >> 23, SMALLEST)
    up = ((0 - exponent + (254 + BITS)) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - BITS) << 23).to(tl.float32, bitcast=True)
    return up, down + bound_W * 0.0


@jit
def three_bytes(x_K, up_W):
    """round(x * up) as int8 digits to the base 256, the lowest first: three times (BLOCK_K,)."""
    W: tl.constexpr = up_W.shape[0]
    shifted_K = tl.reshape(tl.reshape(x_K, (W, x_K.shape[0] // W)) * up_W[:, None] + OFFSET, x_K.shape)
    if INTERPRETED:
        bits_K = shifted_K.to(tl.int32, bitcast=True)
        low_K, mid_K = ((bits_K & 255) - 128).to(tl.int8), ((bits_K >> 8 & 255) - 128).to(tl.int8)
        high_K = ((bits_K >> 16 & 127) - 64).to(tl.int8)
    else:
        low_K, mid_K, high_K = tl.inline_asm_elementwise(
            BYTES_ASM, "=r,=r,=r,r,r,r,r", [shifted_K], dtype=(tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low_K, mid_K, high_K


@jit
def in_order(x_K, P: tl.constexpr):
    """A row in the order of ``int8_weight_tile``: (P, H, 1, 32)."""
    W: tl.constexpr = smaller(num_warps(), P)
    x_IWHB = tl.permute(tl.reshape(x_K, (W, P // W, 2, PAIR // 2)), (1, 0, 2, 3))
    return tl.reshape(x_IWHB, (P, 2, 1, PAIR // 2))


@jit
def int8_product(weight_PMB, scale_IWROT, x_K):
    """A tile of weights, (P, R * H * O, B), and its scales times a row (BLOCK_K,): (N,) float32."""
    P: tl.constexpr = weight_PMB.shape[0]
    R: tl.constexpr = weight_PMB.shape[1] // (2 * OUTPUTS)
    W: tl.constexpr = smaller(num_warps(), P)
    up_W, down_W = powers_of_two(largest(x_K))
    low_K, mid_K, high_K = three_bytes(x_K, up_W)
    c = tl.arange(0, 4)[None, None, :, None]
    low, mid, high = in_order(low_K, P), in_order(mid_K, P), in_order(high_K, P)
    x_PHCB = tl.where(c == 0, low, tl.where(c == 1, mid, high))
    sum_PMC = tl.dot(weight_PMB, tl.trans(tl.reshape(x_PHCB, (P, 8, PAIR // 2)), (0, 2, 1)), out_dtype=tl.int32)
    even, odd = tl.split(tl.permute(tl.reshape(sum_PMC, (P, R, 2, OUTPUTS, 4, 2)), (0, 1, 3, 4, 5, 2)))
    t = tl.arange(0, 4)
    first, second = tl.split(tl.where((t < 2)[:, None], even, odd))
    is_low = t % 2 == 0
    sum_PROT = (first + second * tl.where(is_low, 256, 0)).to(tl.float32)
    part_WROT = tl.sum(tl.reshape(sum_PROT, (P // W, W, R, OUTPUTS, 4)) * scale_IWROT.to(tl.float32), axis=0)
    part_WROT *= tl.where(is_low, 1.0, 65536.0) * down_W[:, None, None, None]
    return tl.sum(tl.reshape(tl.permute(part_WROT, (1, 2, 0, 3)), (R * OUTPUTS, W * 4)), axis=1)
