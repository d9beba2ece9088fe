"""ggml's quantised blocks as tensors: q8_0 and q4_0 to values and scales and back, and q4_k from weights.

The layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. A block is little-endian bytes along the
inputs of one output.

Shapes: N outputs, K inputs, J blocks of 32 inputs, U super-blocks of 256 inputs, S = 8 sub-blocks, B = 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, SUPER = 32, 256
SUB_BLOCKS = SUPER // BLOCK
MAX_Q4, MAX_SCALE = 15, 63  # of a q4_k value; of a sub-block's scale and minimum
STEPS = torch.arange(MAX_Q4 - 1, MAX_Q4 + 1.01, 0.1)  # what a sub-block's largest value may become
BITS = {"Q8_0": 8, "Q4_0": 4}


def unpack_blocks(data_Nb: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bytes of q8_0 or q4_0, (N, J * block bytes) uint8, to values (N, K) int8 and scales (N, J) float16."""
    block_NJb = data_Nb.unflatten(1, (-1, 2 + BLOCK * bits // 8))
    scale_NJ = block_NJb[..., :2].contiguous().view(torch.float16).squeeze(-1)
    if bits == 8:
        return block_NJb[..., 2:].contiguous().view(torch.int8).flatten(1), scale_NJ
    value_NJh = block_NJb[..., 2:]
    value_NJB = torch.cat((value_NJh & 15, value_NJh >> 4), dim=-1)
    return (value_NJB.to(torch.int8) - 8).flatten(1), scale_NJ


def pack_blocks(q_NK: Tensor, scale_NJ: Tensor, bits: int) -> Tensor:
    """The inverse of ``unpack_blocks``."""
    q_NJB = q_NK.contiguous().unflatten(1, (-1, BLOCK))
    if bits == 8:
        value_NJb = q_NJB.view(torch.uint8)
    else:
        value_NJB = (q_NJB + 8).to(torch.uint8)
        value_NJb = value_NJB[..., : BLOCK // 2] | (value_NJB[..., BLOCK // 2 :] << 4)
    scale_NJ2 = scale_NJ.half().unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat((scale_NJ2, value_NJb), dim=-1).flatten(1)


def quantize_q4_k(weight_NK: Tensor, importance_K: Tensor) -> Tensor:
    """Quantise a weight to q4_k: (N, U * 144) uint8. K must be a multiple of 256.

    A value is d * scale * q - d_min * minimum, with q from 0 to 15, a 6-bit scale and minimum for each sub-block, and
    float16 d and d_min for each super-block. ``importance_K`` weights the squared errors of the inputs.
    """
    w_NUSB = weight_NK.float().unflatten(1, (-1, SUB_BLOCKS, BLOCK))
    scale_NUS, minimum_NUS = _fit(w_NUSB, importance_K.float().unflatten(0, (-1, SUB_BLOCKS, BLOCK)))
    d_NU1, d_min_NU1 = (x_NUS.amax(2, keepdim=True).div(MAX_SCALE).half() for x_NUS in (scale_NUS, minimum_NUS))
    scale_NUS, minimum_NUS = _six_bits(scale_NUS, d_NU1), _six_bits(minimum_NUS, d_min_NU1)
    step_NUS1 = (d_NU1.float() * scale_NUS).unsqueeze(3)
    offset_NUS1 = (d_min_NU1.float() * minimum_NUS).unsqueeze(3)
    q_NUSB = ((w_NUSB + offset_NUS1) / step_NUS1).nan_to_num(0, 0, 0).round().clamp(0, MAX_Q4).to(torch.uint8)
    value_NUb = (q_NUSB[:, :, 0::2] | (q_NUSB[:, :, 1::2] << 4)).flatten(2)
    ends_NU4 = torch.cat((d_NU1, d_min_NU1), dim=2).view(torch.uint8)
    return torch.cat((ends_NU4, _pack_six_bits(scale_NUS, minimum_NUS), value_NUb), dim=2).flatten(1)


def _fit(w_NUSB: Tensor, importance_USB: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each sub-block, both at least 0, with which scale * q - minimum has the least error.

    For several steps the nearest values are taken, and then the line that fits these best (least squares).
    """
    p_NUSB = importance_USB.expand_as(w_NUSB)
    low_NUS1 = w_NUSB.amin(3, keepdim=True).clamp(max=0)
    range_NUS1 = w_NUSB.amax(3, keepdim=True) - low_NUS1
    best_scale, best_minimum = torch.zeros_like(low_NUS1), -low_NUS1
    best_error = (p_NUSB * (low_NUS1 - w_NUSB).square()).sum(3, keepdim=True)
    sum_p, sum_w = p_NUSB.sum(3, keepdim=True), (p_NUSB * w_NUSB).sum(3, keepdim=True)
    for largest in STEPS.tolist():
        q_NUSB = ((w_NUSB - low_NUS1) * (largest / range_NUS1)).nan_to_num(0).round().clamp(0, MAX_Q4)
        sum_q, sum_qq = (p_NUSB * q_NUSB).sum(3, keepdim=True), (p_NUSB * q_NUSB.square()).sum(3, keepdim=True)
        sum_qw = (p_NUSB * q_NUSB * w_NUSB).sum(3, keepdim=True)
        determinant = sum_p * sum_qq - sum_q.square()
        scale = (sum_p * sum_qw - sum_q * sum_w) / determinant
        minimum = (sum_q * sum_qw - sum_qq * sum_w) / determinant
        through_zero = ~(minimum > 0)  # a minimum below 0 cannot be stored
        scale = torch.where(through_zero, sum_qw / sum_qq, scale).nan_to_num(0, 0, 0).clamp(min=0)
        minimum = torch.where(through_zero, 0, minimum)
        error = (p_NUSB * (scale * q_NUSB - minimum - w_NUSB).square()).sum(3, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale.squeeze(3), best_minimum.squeeze(3)


def _six_bits(x_NUS: Tensor, d_NU1: Tensor) -> Tensor:
    return (x_NUS / d_NU1.float()).nan_to_num(0, 0, 0).round().clamp(0, MAX_SCALE)


def _pack_six_bits(scale_NUS: Tensor, minimum_NUS: Tensor) -> Tensor:
    """(N, U, 12) uint8: the first four in 6 bits each; above these the upper 2 bits of the others; their lower 4."""
    (scale_low, scale), (minimum_low, minimum) = (
        x_NUS.to(torch.uint8).chunk(2, dim=2) for x_NUS in (scale_NUS, minimum_NUS)
    )
    first = scale_low | (scale >> 4 << 6)
    second = minimum_low | (minimum >> 4 << 6)
    return torch.cat((first, second, (scale & 15) | ((minimum & 15) << 4)), dim=2)
