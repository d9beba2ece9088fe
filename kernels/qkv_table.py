"""A table of q, k and v by code, which replaces the first layer's QKV product of the depth decoder.

From its second pass on, the depth decoder reads one code at a time, and the code of codebook k always at position
k + 1. The first layer's ``norm_rope_cache`` is then a function of codebook and code, so it is computed once for every
code. The kernel of ``sample`` copies the row of the code that it has drawn: q to a buffer, k and v into the cache. The
table is computed by the kernel that it replaces, so every value has the same bits as without the table.

Shapes: K codebooks in the table, V ids of a codebook, E = (H + 2 * G) * d outputs of the QKV product.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.kernels.launch import jit, tl, use_kernels
from csm.kernels.launch_config import MAX_GEMV_ROWS, launch_config
from csm.kernels.quantized import Weight
from csm.kernels.rope_cache import norm_rope_cache, write_heads


class QKVGather(NamedTuple):
    """The table of the drawn code, (V, E), and where its row goes: ``q_B1Hd``, and the cache at the code's position."""

    table_VE: Tensor
    q_B1Hd: Tensor
    k_BGd: Tensor
    v_BGd: Tensor

    @classmethod
    def allocate(cls, table_VE: Tensor, k_BGd: Tensor, v_BGd: Tensor) -> QKVGather:
        """A gather with a new buffer for q. ``k_BGd`` and ``v_BGd`` are views of the cache."""
        B, G, d = k_BGd.shape
        return cls(table_VE, table_VE.new_empty(B, 1, table_VE.shape[1] // d - 2 * G, d), k_BGd, v_BGd)


def can_gather_qkv(qkv_ED: Weight, batch: int) -> bool:
    """Whether a table row has the bits of the product: where ``batch`` single rows run ``norm_rope_cache``'s kernel.

    PyTorch's product and tensor cores (more than MAX_GEMV_ROWS rows) round differently.
    """
    if not use_kernels(qkv_ED, batch) or batch > MAX_GEMV_ROWS:
        return False
    return launch_config("norm_rope_cache", qkv_ED, batch) is not None


def tabulate_qkv(
    x_KVD: Tensor, norm_D: Tensor, qkv_ED: Weight, eps: float, rope_Kp2: Tensor, num_kv_heads: int
) -> Tensor:
    """What ``norm_rope_cache`` computes for each row of ``x_KVD``: (K, V, D) -> (K, V, E), the heads of q, of k, of v.

    Table k is of the position with the rotation ``rope_Kp2[k]``.
    """
    (K, V, _), E, d = x_KVD.shape, qkv_ED.shape[0], 2 * rope_Kp2.shape[1]
    table_KVE = x_KVD.new_empty(K, V, E)
    if x_KVD.is_meta:
        return table_KVE  # thousands of launches, and none runs
    slot_B1 = torch.arange(MAX_GEMV_ROWS, device=x_KVD.device).unsqueeze(1)
    position_11 = slot_B1[:1]  # the rows of the table are caches of one position
    for table, first in product(range(K), range(0, V, MAX_GEMV_ROWS)):
        row_BE, x_BD = (rows_KVX[table, first : first + MAX_GEMV_ROWS] for rows_KVX in (table_KVE, x_KVD))
        head_BHd, B = row_BE.unflatten(1, (-1, d)), row_BE.shape[0]
        q_BHd, k_BGd, v_BGd = head_BHd.split([E // d - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        q_B1Hd = norm_rope_cache(
            x_BTD=x_BD.unsqueeze(1),
            norm_D=norm_D,
            qkv_ED=qkv_ED,
            eps=eps,
            rope_BTp2=rope_Kp2[table].expand(B, 1, -1, -1),
            k_cache_BGSd=k_BGd.unsqueeze(2),
            v_cache_BGSd=v_BGd.unsqueeze(2),
            slot_B1=slot_B1[:B],
            position_BT=position_11.expand(B, 1),
        )
        q_BHd.copy_(q_B1Hd.squeeze(1))
    return table_KVE


def gather_qkv_reference(code_B: Tensor, gather: QKVGather) -> None:
    """Copy the rows of the drawn codes in PyTorch."""
    (_, G, d), H = gather.k_BGd.shape, gather.q_B1Hd.shape[2]
    row_BHd = F.embedding(code_B, gather.table_VE).unflatten(1, (-1, d))
    q_BHd, k_BGd, v_BGd = row_BHd.split([H, G, G], dim=1)
    gather.q_B1Hd.copy_(q_BHd.unsqueeze(1))
    gather.k_BGd.copy_(k_BGd)
    gather.v_BGd.copy_(v_BGd)


@jit
def gather_qkv(
    table_ptr,
    code,
    q_ptr,
    k_ptr,
    v_ptr,
    cache_offset,
    head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    d: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Copy the row of one slot's code."""
    e_E = tl.arange(0, BLOCK_E)
    row_E = tl.load(table_ptr + code * ((H + 2 * G) * d) + e_E, mask=e_E < (H + 2 * G) * d, other=0.0)
    write_heads(row_E, e_E, q_ptr, k_ptr, v_ptr, cache_offset, head_stride, H, G, d)
