"""A linear layer added to the residual stream: attention output and MLP down projection."""

import torch.nn.functional as F
from torch import Tensor


def linear_add(x_BTF: Tensor, weight_DF: Tensor, residual_BTD: Tensor) -> Tensor:
    """``residual + x @ weight.T``: (B, T, F), (B, T, D) -> (B, T, D)."""
    return residual_BTD + F.linear(x_BTF, weight_DF)
