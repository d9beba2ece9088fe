"""The blocks of a transformer, four ops each; on a CPU all of them in one native call.

On a CPU the way through Python costs about 10 us an op, and a frame of CSM-1B has 560 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from csm.kernels.attention_linear_add import attention_linear_add
from csm.kernels.linear_add import linear_add
from csm.kernels.native import ops as native
from csm.kernels.norm_swiglu import norm_swiglu
from csm.kernels.quantized import Weight
from csm.kernels.rope_cache import norm_rope_cache


class BlockWeights(NamedTuple):
    """The weights of a block: attention's norm, projections and output projection, the MLP's norm and projections."""

    attention_norm_D: Tensor
    qkv_ED: Weight
    output_DE: Weight
    mlp_norm_D: Tensor
    gate_up_2FD: Weight
    down_DF: Weight


def block(
    x_BTD: Tensor,
    weights: BlockWeights,
    eps: float,
    rope_BTp2: Tensor,
    bias_BTS: Tensor | None,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
    context: int | None = None,
    q_BTHd: Tensor | None = None,
) -> Tensor:
    """``h = x + attention(norm(x))``, then ``h + mlp(norm(h))``: (B, T, D) -> (B, T, D). Writes into the caches.

    If ``q_BTHd`` is given, the rows' keys and values are in the caches already (``csm.kernels.qkv_table``).
    """
    attention_norm_D, qkv_ED, output_DE, mlp_norm_D, gate_up_2FD, down_DF = weights
    keys = (k_cache_BGSd, v_cache_BGSd)
    if q_BTHd is None:
        q_BTHd = norm_rope_cache(x_BTD, attention_norm_D, qkv_ED, eps, rope_BTp2, *keys, slot_B1, position_BT)
    h_BTD = attention_linear_add(q_BTHd, *keys, bias_BTS, position_BT, output_DE, residual_BTD=x_BTD, context=context)
    hidden_BTF = norm_swiglu(h_BTD, mlp_norm_D, gate_up_2FD, eps)
    return linear_add(hidden_BTF, down_DF, residual_BTD=h_BTD)


def blocks(
    x_BTD: Tensor,
    layers: Sequence[BlockWeights],
    eps: float,
    rope_BTp2: Tensor,
    bias_BTS: Tensor | None,
    k_cache_LBGSd: Tensor,
    v_cache_LBGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
    context: int | None = None,
    q_BTHd: Tensor | None = None,
) -> Tensor:
    """One ``block`` after another, each with its layer of the caches. ``q_BTHd`` is of the first."""
    where = (slot_B1, position_BT)
    if q_BTHd is None and native.use_native_blocks(x_BTD, x_BTD.shape[0] * x_BTD.shape[1], layers):
        return native.blocks(x_BTD, layers, eps, rope_BTp2, k_cache_LBGSd, v_cache_LBGSd, *where)
    for index, weights in enumerate(layers):
        keys = (k_cache_LBGSd[index], v_cache_LBGSd[index])
        x_BTD = block(x_BTD, weights, eps, rope_BTp2, bias_BTS, *keys, *where, context, q_BTHd)
        q_BTHd = None
    return x_BTD
