"""Rotary embedding of queries and keys, and the write of keys and values into the cache."""

import torch
from torch import Tensor


def rotate_pairs(x_BTHd: Tensor, turn_BTp: Tensor) -> Tensor:
    """Turn the interleaved pairs (x0, x1), (x2, x3)... by the angle of their position (RoFormer, eq. 34).

    ``turn_BTp`` holds exp(i angle) of each of the d / 2 pairs: a pair is a complex number, its turn a product. Computed
    in float32 at least, cast back.
    """
    x_wide = x_BTHd.to(torch.promote_types(x_BTHd.dtype, turn_BTp.real.dtype))
    pairs_BTHp = torch.view_as_complex(x_wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_BTHp * turn_BTp.unsqueeze(2)).flatten(-2).to(x_BTHd.dtype)


def rope_cache(
    qkv_BTE: Tensor,
    turn_BTp: Tensor,
    k_cache_BGSd: Tensor,
    v_cache_BGSd: Tensor,
    slot_B1: Tensor,
    position_BT: Tensor,
) -> Tensor:
    """Rotate q and k, write k and v at ``position_BT`` of their slot, and return q as (B, T, H, d).

    ``qkv_BTE`` holds the heads of q, then of k, then of v. The caches are written in place; positions are read on the
    device, so a captured call follows them.
    """
    num_kv_heads, head_dim = k_cache_BGSd.shape[1], k_cache_BGSd.shape[3]
    heads = qkv_BTE.unflatten(-1, (-1, head_dim))
    num_rotated = heads.shape[2] - num_kv_heads
    rotated = rotate_pairs(heads[:, :, :num_rotated], turn_BTp)
    q_BTHd, k_BTGd = rotated.split([num_rotated - num_kv_heads, num_kv_heads], dim=2)
    k_cache_BGSd[slot_B1, :, position_BT] = k_BTGd
    v_cache_BGSd[slot_B1, :, position_BT] = heads[:, :, num_rotated:]
    return q_BTHd
