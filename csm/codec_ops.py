"""A transposed convolution for the codec on a CPU, where PyTorch's own is slow on the few steps of one frame.

Shapes: B slots, C and D channels in and out, T steps in, W width of the kernel, S stride.
"""

from __future__ import annotations

from torch import Tensor, nn


class MatmulConvTranspose1d(nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` as one matrix product of steps by weights, for a kernel of twice the stride.

    PyTorch multiplies the transposed weight by the steps. With two steps, the BLAS library needs 50 ms for that product
    in Mimi's first transposed convolution, against 3 ms for this one, which has the steps as rows (docs/log.md).
    """

    def forward(self, x_BCT: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, T) -> (B, D, (T + 1) * S)."""
        assert output_size is None
        (B, _, T), (C, D, W), (S,) = x_BCT.shape, self.weight.shape, self.stride
        y_BTDW = (x_BCT.transpose(1, 2) @ self.weight.view(C, D * W)).view(B, T, D, W)
        y_BDTW = y_BTDW.transpose(1, 2)
        out_BDTS = y_BDTW.new_zeros(B, D, T + 1, S)
        out_BDTS[:, :, :T] = y_BDTW[..., :S]
        out_BDTS[:, :, 1:] += y_BDTW[..., S:]
        out_BDN = out_BDTS.flatten(2)
        return out_BDN if self.bias is None else out_BDN + self.bias[:, None]


def use_matmuls(decoder: nn.Module) -> None:
    """Replace the transposed convolutions of the codec's decoder by ``MatmulConvTranspose1d`` with the same weights.

    Those that it does not compute, with groups or another kernel width, stay as they are.
    """
    for parent in list(decoder.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.ConvTranspose1d and _is_supported(module):
                setattr(parent, name, _matmul_conv(module))


def _is_supported(conv: nn.ConvTranspose1d) -> bool:
    (stride,), (width,) = conv.stride, conv.kernel_size
    plain = conv.groups == 1 and conv.dilation == (1,) and conv.padding == (0,) and conv.output_padding == (0,)
    return plain and width == 2 * stride


def _matmul_conv(conv: nn.ConvTranspose1d) -> MatmulConvTranspose1d:
    (stride,), (width,), bias = conv.stride, conv.kernel_size, conv.bias is not None
    matmul = MatmulConvTranspose1d(conv.in_channels, conv.out_channels, width, stride, bias=bias, device="meta")
    matmul.weight, matmul.bias = conv.weight, conv.bias
    return matmul
