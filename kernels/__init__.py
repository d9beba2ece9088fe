"""The ops of a transformer block, one file each. Installed as ``csm.kernels``.

Each file holds the reference in plain PyTorch: any device, any number of rows, any float dtype.

Shapes: B slots, T rows of this pass, D model dim, E fused q, k and v, F hidden dim, H query heads, G key/value heads,
d head dim, S cache positions that are looked at.
"""

from csm.kernels.attention import attention
from csm.kernels.linear_add import linear_add
from csm.kernels.norm_linear import norm_linear, rms_norm
from csm.kernels.norm_swiglu import norm_swiglu
from csm.kernels.rope_cache import rope_cache

__all__ = ["attention", "linear_add", "norm_linear", "norm_swiglu", "rms_norm", "rope_cache"]
