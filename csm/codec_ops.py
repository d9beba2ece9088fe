"""Products of the codec's decoder on a CPU, where PyTorch is slow on the few steps of one frame.

They run as native ops where these can be built (docs/cpu.md), with the pool of threads that the model's ops have: an
OpenMP thread that waits for work, spinning, would take its core from the pool.

Shapes: B slots, C and D channels in and out, T steps in, W width of the kernel, S stride.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from csm.kernels.native import ops as native

MAX_ROWS = 512  # native products of more rows are slower than PyTorch's, and a convolution's input grows by its width


def linear(x_BTC: Tensor, weight_DC: Tensor) -> Tensor:
    """``F.linear`` without a bias: (B, T, C) -> (B, T, D)."""
    if x_BTC.shape[0] * x_BTC.shape[1] <= MAX_ROWS and native.use_native_linear(x_BTC, weight_DC):
        return native.linear(x_BTC.contiguous(), weight_DC)
    return F.linear(x_BTC, weight_DC)


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, D)."""
        return linear(input, self.weight)


class Conv1d(nn.Conv1d):
    """``nn.Conv1d`` of stride 1. Of few steps it is one product: the rows are the windows of the input."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T + W - 1) -> (B, D, T)."""
        (B, C, length), (D, _, W) = input.shape, self.weight.shape
        if B * (length - W + 1) > MAX_ROWS or not native.use_native_linear(input, self.weight):
            return super().forward(input)
        window_BTCW = input.unfold(2, W, 1).transpose(1, 2)
        out_BDT = linear(window_BTCW.flatten(2), self.weight.view(D, C * W)).transpose(1, 2)
        return out_BDT if self.bias is None else out_BDT + self.bias[:, None]


class ConvTranspose1d(nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` as one product of steps by weights, for a kernel of twice the stride.

    PyTorch multiplies the transposed weight by the steps. With two steps, the BLAS library needs 50 ms for that product
    in Mimi's first transposed convolution, against 3 ms for this one, which has the steps as rows (docs/log.md). The
    weight is in memory as that product reads it, by outputs; its shape stays PyTorch's.
    """

    def store_by_outputs(self) -> None:
        """Reorder the weight in memory."""
        weight_DWC = self.weight.detach().permute(1, 2, 0).contiguous()
        self.weight = nn.Parameter(weight_DWC.permute(2, 0, 1), requires_grad=False)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, T) -> (B, D, (T + 1) * S)."""
        assert output_size is None
        (B, _, T), (C, D, W), (S,) = input.shape, self.weight.shape, self.stride
        y_BTDW = linear(input.transpose(1, 2), self.weight.permute(1, 2, 0).view(D * W, C)).view(B, T, D, W)
        y_BDTW = y_BTDW.transpose(1, 2)
        out_BDTS = y_BDTW.new_zeros(B, D, T + 1, S)
        out_BDTS[:, :, :T] = y_BDTW[..., :S]
        out_BDTS[:, :, 1:] += y_BDTW[..., S:]
        out_BDN = out_BDTS.flatten(2)
        return out_BDN if self.bias is None else out_BDN + self.bias[:, None]


def use_products(module: nn.Module) -> None:
    """Replace the linear layers and convolutions in ``module`` by those of this file, with the same weights.

    Those that they do not compute (with a bias, groups, another stride or kernel width) stay as they are.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            replacement = _as_product(child)
            if replacement is not None:
                setattr(parent, name, replacement)


def _as_product(layer: nn.Module) -> nn.Module | None:
    if type(layer) is nn.Linear and layer.bias is None:
        linear_layer = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear_layer.weight = layer.weight
        return linear_layer
    if type(layer) not in (nn.Conv1d, nn.ConvTranspose1d):
        return None
    assert isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)
    channels, (width,), (stride,) = (layer.in_channels, layer.out_channels), layer.kernel_size, layer.stride
    has_bias = layer.bias is not None
    if not _is_plain(layer):
        return None
    if type(layer) is nn.Conv1d and stride == 1:
        conv = Conv1d(*channels, width, bias=has_bias, device="meta")
        conv.weight, conv.bias = layer.weight, layer.bias
        return conv
    if type(layer) is nn.ConvTranspose1d and width == 2 * stride:
        transposed = ConvTranspose1d(*channels, width, stride, bias=has_bias, device="meta")
        transposed.weight, transposed.bias = layer.weight, layer.bias
        transposed.store_by_outputs()
        return transposed
    return None


def _is_plain(conv: nn.Conv1d | nn.ConvTranspose1d) -> bool:
    """Without groups, dilation and padding."""
    padded = conv.padding != (0,) or conv.output_padding != (0,)
    return conv.groups == 1 and conv.dilation == (1,) and not padded
