"""The ops of the frame step, one file each: a PyTorch reference, and Triton kernels for small row counts.

A reference runs on any device, with any number of rows and any float dtype. Installed as ``csm.kernels``.

Shapes: B slots, T rows of a slot in this call, D model dim, E fused q, k and v dim, F hidden dim, H query heads,
G key/value heads, R query heads per key/value head, d head dim, S cache positions that attention covers. In a kernel:
N outputs (rows of the weight) and K inputs of a program's weight tile, M rows of a tensor-core tile.
"""

from csm.kernels.advance_frame import advance_frame
from csm.kernels.attention import attention, causal_bias
from csm.kernels.attention_linear_add import attention_linear_add
from csm.kernels.block import BlockWeights, block, blocks
from csm.kernels.depth_codes import DepthWeights, can_draw_depth_codes, depth_codes
from csm.kernels.embed_rows import embed_rows
from csm.kernels.launch import use_kernels
from csm.kernels.linear_add import linear_add
from csm.kernels.norm_linear import norm_linear, rms_norm
from csm.kernels.norm_swiglu import norm_swiglu
from csm.kernels.qkv_table import QKVGather, can_gather_qkv, tabulate_qkv
from csm.kernels.rope_cache import norm_rope_cache, rope_cache
from csm.kernels.sample import draw_noise, sample

__all__ = [
    "BlockWeights",
    "DepthWeights",
    "QKVGather",
    "advance_frame",
    "attention",
    "attention_linear_add",
    "block",
    "blocks",
    "can_draw_depth_codes",
    "can_gather_qkv",
    "causal_bias",
    "depth_codes",
    "draw_noise",
    "embed_rows",
    "linear_add",
    "norm_linear",
    "norm_rope_cache",
    "norm_swiglu",
    "rms_norm",
    "rope_cache",
    "sample",
    "tabulate_qkv",
    "use_kernels",
]
