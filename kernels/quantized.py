"""Weights in int8 or int4: a kind of weight that an op reads where it else reads a tensor.

The numbers are those of GGUF's q8_0 and q4_0 (https://github.com/ggml-org/ggml, docs/gguf.md): along its inputs, a
weight is cut into blocks of 32 that share a float16 scale, and a value is scale * q, with q from -127 to 127, or from
-8 to 7. They are stored in the order in which ``kernels/native`` reads them; ``kernels/native/product.h`` describes it.
``csm.kernels.quantized_rows`` has the same numbers, and fp8, in the order in which Triton kernels read them.

Shapes: N outputs, K inputs, L stacked weights, P tiles, J pairs of blocks, R = 16 outputs of a tile.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.kernels.quantized_rows import BLOCK, QuantizedRows, num_blocks, pack_rows, stack_rows

TILE = 16  # outputs
PAIR = 2 * BLOCK
LARGEST = {8: 127, 4: 7}
LEAST = {8: -127, 4: -8}
SCALE_BYTES = 2 * TILE * 2  # of a tile's pair of blocks
HUGE_PAGE = 1 << 21


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """(N, K), or (L, N, K), as packed bytes: uint8 of (tiles, pairs, bytes of a tile's pair), L before it.

    ``dtype`` is that of its inputs. It answers what ops and model ask of a weight; it cannot be trained.
    """

    packed: Tensor
    shape: torch.Size
    bits: int
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_cuda(self) -> bool:
        return self.packed.is_cuda

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def __getitem__(self, index: int | slice) -> QuantizedWeight:
        """One of the stacked weights, or the first N' outputs of a single one: the same bytes."""
        if len(self.shape) == 3 and isinstance(index, int):
            return QuantizedWeight(self.packed[index], torch.Size(self.shape[1:]), self.bits, self.dtype)
        if len(self.shape) == 2 and isinstance(index, slice) and not index.start and index.step in (None, 1):
            stop = len(range(*index.indices(self.shape[0])))
            return QuantizedWeight(self.packed, torch.Size((stop, self.shape[1])), self.bits, self.dtype)
        raise IndexError(f"a quantised weight of shape {tuple(self.shape)} has no part {index}")

    def to_rows(self) -> QuantizedRows:
        """The same numbers in the layout of the Triton kernels."""
        if len(self.shape) == 3:
            return stack_rows([self[index].to_rows() for index in range(self.shape[0])])
        (N, K), (q_NK, scale_NJ) = self.shape, unpack(self.packed, self.bits)
        return pack_rows(q_NK[:N, :K], scale_NJ[:N, : num_blocks(K)], self.kind, self.dtype)

    def dequantize(self) -> Tensor:
        """The weight as a tensor of ``dtype``: what a reference multiplies."""
        if len(self.shape) == 3:
            return torch.stack([self[index].dequantize() for index in range(self.shape[0])])
        q_NK, scale_NJ = unpack(self.packed, self.bits)
        wide = torch.promote_types(self.dtype, torch.float32)
        weight_NK = (q_NK.to(wide).unflatten(1, (-1, BLOCK)) * scale_NJ.to(wide).unsqueeze(2)).flatten(1)
        return weight_NK[: self.shape[0], : self.shape[1]].to(self.dtype).contiguous()


Weight = Tensor | QuantizedWeight | QuantizedRows


def dense(weight: Weight) -> Tensor:
    """A weight of any kind as a tensor."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def packed_shape(shape: Sequence[int], bits: int) -> tuple[int, ...]:
    """Of a weight (N, K) or (L, N, K): tiles, pairs of blocks, and bytes of a tile's pair; L before them."""
    *stacked, n, k = shape
    return *stacked, -(-n // TILE), -(-k // PAIR), SCALE_BYTES + TILE * PAIR * bits // 8


def huge_page_buffer(num_bytes: int) -> Tensor:
    """Memory, (num_bytes,) uint8, in pages of 2 MB where Linux grants them.

    With pages of 4 KB a core looks up every 4 KB that it reads: reading the depth decoder again and again is half as
    fast.
    """
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    first = -buffer.data_ptr() % HUGE_PAGE
    return buffer[first : first + num_bytes]


def pack(q_NK: Tensor, scale_NJ: Tensor, bits: int) -> Tensor:
    """int8 values and the float16 scales of their blocks, (N, blocks), in the order in which they are read."""
    (N, K), num_pairs = q_NK.shape, -(-q_NK.shape[1] // PAIR)
    filled_NK = q_NK.new_zeros(-(-N // TILE) * TILE, num_pairs * PAIR)
    filled_NK[:N, :K] = q_NK
    filled_NJ = scale_NJ.new_zeros(filled_NK.shape[0], num_pairs * 2, dtype=torch.float16)
    filled_NJ[:N, : scale_NJ.shape[1]] = scale_NJ
    # Of a tile and a pair of blocks: block, 8 inputs, half of these, output, input.
    value_PJ8HR4 = filled_NK.view(-1, TILE, num_pairs, 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
    value_PJ8HR4 = (value_PJ8HR4 + (128 if bits == 8 else 8)).to(torch.uint8)  # int8 wraps around: the same byte
    if bits == 4:
        value_PJ8HR4 = value_PJ8HR4[:, :, :, 0] | (value_PJ8HR4[:, :, :, 1] << 4)
    scale_PJ2R = filled_NJ.view(-1, TILE, num_pairs, 2).permute(0, 2, 3, 1).contiguous()
    return torch.cat((scale_PJ2R.view(torch.uint8).flatten(2), value_PJ8HR4.flatten(2)), dim=2)


def unpack(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``pack``, with the outputs and inputs that it filled up."""
    num_tiles, num_pairs = packed.shape[:2]
    scale_PJ2R = packed[:, :, :SCALE_BYTES].contiguous().view(torch.float16).view(num_tiles, num_pairs, 2, TILE)
    value = packed[:, :, SCALE_BYTES:]
    if bits == 4:
        value = value.reshape(num_tiles, num_pairs, 8, 1, TILE, 4)
        value = torch.cat((value & 15, value >> 4), dim=3)
    value_PJ8HR4 = value.reshape(num_tiles, num_pairs, 8, 2, TILE, 4).to(torch.int16) - (128 if bits == 8 else 8)
    q_NK = value_PJ8HR4.to(torch.int8).permute(0, 4, 1, 2, 3, 5).reshape(num_tiles * TILE, num_pairs * PAIR)
    return q_NK, scale_PJ2R.permute(0, 3, 1, 2).reshape(num_tiles * TILE, num_pairs * 2)
