"""RMSNorm, the fused gate and up projections, and SiLU(gate) * up: the first half of a SwiGLU MLP."""

import torch.nn.functional as F
from torch import Tensor

from csm.kernels.norm_linear import rms_norm


def norm_swiglu(x_BTD: Tensor, norm_D: Tensor, gate_up_2FD: Tensor, eps: float) -> Tensor:
    """SwiGLU (https://arxiv.org/abs/2002.05202): (B, T, D) -> (B, T, F).

    ``gate_up_2FD`` holds the F rows of the gate (Sesame's w1), then the F rows of up (w3).
    """
    gate_BTF, up_BTF = F.linear(rms_norm(x_BTD, norm_D, eps), gate_up_2FD).chunk(2, dim=-1)
    return F.silu(gate_BTF) * up_BTF
