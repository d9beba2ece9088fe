"""Weights in int8, int4 or fp8, row by row: the layout that the Triton kernels read.

- ``int8``: blocks of 32 inputs with one float16 scale, the numbers of GGUF's q8_0. A pair of blocks is 64 bytes, in
  the order of a tensor core's fragments (``csm.kernels.int8_product``): byte 16 t + 8 s + 4 h + i holds input
  16 s + 4 t + i of block h.
- ``int4``: the same with values of 4 bits, q4_0. A block is 16 bytes, in the order of ggml: byte i holds input i in its
  lower half and input i + 16 in its upper half, each plus 8.
- ``fp8``: e4m3 (torch.float8_e4m3fn) with one float32 scale per output.

Values and scales are tensors of their own, so that a thread loads 16 bytes of values at once, and its rows begin at
multiples of 16 bytes: inputs are filled up with zeros to a multiple of 32, of 64 in int8.

Shapes: N outputs, K inputs, L stacked weights, J blocks, W elements of ``values`` that a row takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale
HALF = BLOCK // 2
PAIR = 2 * BLOCK
NIBBLE_ZERO = 8  # what int4 stores for a 0
FP8 = torch.float8_e4m3fn
TYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": FP8}  # of values
KINDS = ("int8", "int4", "fp8")


def num_blocks(k: int) -> int:
    """Blocks of a row of ``k`` inputs."""
    return -(-k // BLOCK)


def row_width(k: int, kind: str) -> int:
    """Elements that a row of ``k`` inputs takes in ``values``; ``dense`` is a weight that is not quantised."""
    if kind == "int8":
        return -(-k // PAIR) * PAIR
    return k if kind == "dense" else -(-k // BLOCK) * (HALF if kind == "int4" else BLOCK)


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """(N, K), or (L, N, K): ``values`` (N, W) and ``scales``, float16 (N, J) or float32 (N,), L before.

    ``values`` are int8, uint8 (int4) or e4m3, ``dtype`` is that of the weight's inputs. With ``keep``, kernels ask the
    GPU to keep the weight in its L2 cache. It answers what ops and model ask of a weight; it cannot be trained.
    """

    values: Tensor
    scales: Tensor
    shape: torch.Size
    kind: str
    dtype: torch.dtype
    keep: bool = False

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, index: int | slice) -> QuantizedRows:
        """One of the stacked weights, or some outputs of a single one: views of the same memory."""
        if len(self.shape) == 3 and isinstance(index, int):
            shape = torch.Size(self.shape[1:])
        elif len(self.shape) == 2 and isinstance(index, slice):
            shape = torch.Size((len(range(*index.indices(self.shape[0]))), self.shape[1]))
        else:
            raise IndexError(f"a quantised weight of shape {tuple(self.shape)} has no part {index}")
        return replace(self, values=self.values[index], scales=self.scales[index], shape=shape)

    def to(self, device: torch.device) -> QuantizedRows:
        """The same weight on a device."""
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    def dequantize(self) -> Tensor:
        """The weight as a tensor of ``dtype``: what a reference multiplies."""
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.kind == "fp8":
            weight = self.values.to(wide) * self.scales.to(wide).unsqueeze(-1)
        else:
            q = _block_values(self.values, self.kind)[..., : self.scales.shape[-1], :].to(wide)
            weight = (q * self.scales.to(wide).unsqueeze(-1)).flatten(-2)
        return weight[..., : self.shape[-1]].to(self.dtype).contiguous()


def _block_values(values: Tensor, kind: str) -> Tensor:
    """The values of a weight's blocks: (..., W) -> (..., J, 32) int8."""
    if kind == "int8":
        return values.unflatten(-1, (-1, 4, 2, 2, 4)).transpose(-4, -2).flatten(-3).flatten(-3, -2)
    byte = values.unflatten(-1, (-1, HALF))
    return torch.cat((byte & 15, byte >> 4), dim=-1).to(torch.int8) - NIBBLE_ZERO


def pack_rows(q_NK: Tensor, scale_NJ: Tensor, kind: str, dtype: torch.dtype) -> QuantizedRows:
    """A weight of int8 values and the scales of their blocks; ``kind`` is int8 or int4."""
    filled_NK = torch.nn.functional.pad(q_NK, (0, -q_NK.shape[1] % (PAIR if kind == "int8" else BLOCK)))
    if kind == "int8":
        values = filled_NK.unflatten(1, (-1, 2, 2, 4, 4)).transpose(-4, -2)  # h, s, t, i: t, s, h, i
    else:
        q_NJB = filled_NK.unflatten(1, (-1, BLOCK))
        nibble = (q_NJB + NIBBLE_ZERO).to(torch.uint8)
        values = nibble[..., :HALF] | (nibble[..., HALF:] << 4)
    return QuantizedRows(values.flatten(1), scale_NJ.half().contiguous(), q_NK.shape, kind, dtype)


def quantize_fp8(weight_NK: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """A weight in e4m3: of each output, the largest value becomes the largest of the format, 448."""
    wide_NK, largest = weight_NK.float(), torch.finfo(FP8).max
    scale_N = wide_NK.abs().amax(dim=1) / largest
    scale_N = torch.where(scale_N > 0, scale_N, 1.0)
    values_NK = (wide_NK / scale_N.unsqueeze(1)).clamp(-largest, largest)
    filled_NW = torch.nn.functional.pad(values_NK, (0, -weight_NK.shape[1] % BLOCK)).to(FP8)
    return QuantizedRows(filled_NW, scale_N, weight_NK.shape, "fp8", dtype)


def stack_rows(parts: Sequence[QuantizedRows]) -> QuantizedRows:
    """(N, K) weights of one shape, stacked: (L, N, K)."""
    values, scales = (torch.stack([getattr(part, name) for part in parts]) for name in ("values", "scales"))
    return replace(parts[0], values=values, scales=scales, shape=torch.Size((len(parts), *parts[0].shape)))


def empty_rows(shape: Sequence[int], kind: str, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
    """A weight with memory that is not filled."""
    *outputs, k = shape
    values = torch.empty(*outputs, row_width(k, kind), dtype=TYPES[kind], device=device)
    if kind == "fp8":
        scales = torch.empty(*outputs, dtype=torch.float32, device=device)
    else:
        scales = torch.empty(*outputs, num_blocks(k), dtype=torch.float16, device=device)
    return QuantizedRows(values, scales, torch.Size(shape), kind, dtype)
