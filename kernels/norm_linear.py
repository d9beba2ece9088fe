"""RMSNorm, then a linear layer: the fused query, key and value projection of a block."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (https://arxiv.org/abs/1910.07467).

    Computed in float32 at least, cast back to the dtype of ``x``, and only then multiplied by the weight: PyTorch's own
    op would multiply first, which rounds once less than the models that were trained.
    """
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight_D


def norm_linear(x_BTD: Tensor, norm_D: Tensor, weight_ED: Tensor, eps: float) -> Tensor:
    """``rms_norm(x) @ weight.T``: (B, T, D) -> (B, T, E)."""
    return F.linear(rms_norm(x_BTD, norm_D, eps), weight_ED)
