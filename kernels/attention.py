"""Grouped-query attention of a few query rows against the cache."""

import torch.nn.functional as F
from torch import Tensor


def attention(q_BTHd: Tensor, k_cache_BGSd: Tensor, v_cache_BGSd: Tensor, bias_BTS: Tensor) -> Tensor:
    """Softmax attention with scale 1/sqrt(d): (B, T, H, d) -> (B, T, H * d).

    Only the cache positions that ``bias_BTS`` spans are looked at; it is added to the scores, 0 or -inf. The H / G
    query heads that share a key head are laid out as further rows, so that no key is repeated in memory.
    """
    B, T, H, d = q_BTHd.shape
    G, S = k_cache_BGSd.shape[1], bias_BTS.shape[-1]
    R = H // G
    q = q_BTHd.unflatten(2, (G, R)).permute(0, 2, 3, 1, 4).reshape(B, G, R * T, d)
    bias = bias_BTS.unsqueeze(1).expand(B, R, T, S).reshape(B, 1, R * T, S)
    k, v = k_cache_BGSd[:, :, :S], v_cache_BGSd[:, :, :S]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.unflatten(2, (R, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H * d)
