"""All codes of a frame but the first, on a CPU in one native call: the depth decoder's passes, and a head and a draw
after each.

``csm.frame`` runs the same ops one after the other elsewhere. There, the way through Python costs a CPU 4 ms a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from csm.kernels.block import BlockWeights
from csm.kernels.native import ops as native
from csm.kernels.quantized import Weight
from csm.kernels.row_file import Table
from csm.kernels.sample import Noise


class DepthWeights(NamedTuple):
    """The depth decoder's blocks, its last norm and the epsilon of all norms, the heads of codebooks 1 to K - 1, and
    the embeddings of codes, W rows, of which those of codebook k start at row ``k * table_step``."""

    layers: Sequence[BlockWeights]
    norm_D: Tensor
    eps: float
    heads: Sequence[Weight]
    table_WD: Table
    table_step: int


def can_draw_depth_codes(x_B2D: Tensor, weights: DepthWeights, noise: Noise) -> bool:
    """Whether ``depth_codes`` runs: natively, or not at all."""
    if noise.noise_BKV is not None:
        return False
    return native.use_native_depth_codes(x_B2D, weights.layers, weights.heads, weights.table_WD)


def depth_codes(
    x_B2D: Tensor,
    weights: DepthWeights,
    rope_BKp2: Tensor,
    k_cache_LBGSd: Tensor,
    v_cache_LBGSd: Tensor,
    slot_B1: Tensor,
    position_BK: Tensor,
    noise: Noise,
    codes_BK: Tensor,
) -> None:
    """Draw codes 1 to K - 1 of every slot into ``codes_BK``. ``x_B2D`` is the input of depth positions 0 and 1.

    Equal to the loop of ``csm.frame``, bit for bit. Raises OSError where the table's file is too short.
    """
    native.depth_codes(
        x_B2D=x_B2D,
        layers=weights.layers,
        eps=weights.eps,
        rope_BKp2=rope_BKp2,
        k_cache_LBGSd=k_cache_LBGSd,
        v_cache_LBGSd=v_cache_LBGSd,
        slot_B1=slot_B1,
        position_BK=position_BK,
        norm_D=weights.norm_D,
        heads=weights.heads,
        table_WD=weights.table_WD,
        table_step=weights.table_step,
        slots=noise[:4],
        codes_BK=codes_BK,
    )
