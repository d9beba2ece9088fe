"""Rotary embedding of queries and keys, and the write of keys and values into the cache."""

import torch
from torch import Tensor


def rotate_pairs(x_BTHd: Tensor, cos_BTp: Tensor, sin_BTp: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x0, x1), (x2, x3)... by the angle of their position (RoFormer, eq. 34).

    ``cos`` and ``sin`` are (B, T, d / 2), one entry a pair. Computed in float32 at least, cast back.
    """
    x_wide = x_BTHd.to(torch.promote_types(x_BTHd.dtype, cos_BTp.dtype))
    even, odd = x_wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BTp.unsqueeze(2), sin_BTp.unsqueeze(2)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x_BTHd.dtype)


def rope_cache(
    qkv_BTE: Tensor,
    cos_BTp: Tensor,
    sin_BTp: Tensor,
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
    rotated = rotate_pairs(heads[:, :, :num_rotated], cos_BTp, sin_BTp)
    q_BTHd, k_BTGd = rotated.split([num_rotated - num_kv_heads, num_kv_heads], dim=2)
    k_cache_BGSd[slot_B1, :, position_BT] = k_BTGd
    v_cache_BGSd[slot_B1, :, position_BT] = heads[:, :, num_rotated:]
    return q_BTHd
