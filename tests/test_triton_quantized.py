"""The Triton kernels with int8, int4 and fp8 weights, against float64: the weight dequantised, then multiplied."""

import math

import pytest
import torch
from test_triton import DEVICE, DTYPES, ROWS, SHAPES, close, kernel_for, kernels, names, randn, wide  # noqa: F401

from csm.kernels import linear_add, norm_linear, norm_swiglu
from csm.kernels.launch import launches
from csm.kernels.quantized_rows import KINDS, QuantizedRows, pack_rows, quantize_fp8


def quantized(n, k, kind, dtype, seed=2):
    """A random weight, with values over the whole range of its kind."""
    generator = torch.Generator().manual_seed(seed + n + k)
    if kind == "fp8":
        return quantize_fp8(torch.randn(n, k, generator=generator) / math.sqrt(k), dtype).to(DEVICE)
    low, high = (-127, 128) if kind == "int8" else (-8, 8)
    q = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(n, -(-k // 32), generator=generator)) / (high * math.sqrt(k))
    scale[0] = -scale[0]
    return pack_rows(q, scale, kind, dtype).to(DEVICE)


def exact(weight):
    """Dequantised in float64, not rounded."""
    return QuantizedRows(weight.values, weight.scales, weight.shape, weight.kind, torch.float64).dequantize()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestProducts:
    def test_norm_linear(self, kind, dtype, rows, shape):
        x, norm = 3 * randn(*rows, shape[0], dtype=dtype), randn(shape[0], dtype=dtype, seed=1)
        weight = quantized(shape[1], shape[0], kind, dtype)
        with launches() as seen:
            result = norm_linear(x, norm, weight, 1e-5)
        close(result, norm_linear(*wide(x, norm), exact(weight), 1e-5), dtype)
        assert names(seen) == [kernel_for("norm_linear", rows)]

    def test_norm_swiglu(self, kind, dtype, rows, shape):
        x, norm = randn(*rows, shape[0], dtype=dtype), randn(shape[0], dtype=dtype, seed=1)
        gate_up = quantized(2 * shape[1], shape[0], kind, dtype)
        with launches() as seen:
            result = norm_swiglu(x, norm, gate_up, 1e-5)
        close(result, norm_swiglu(*wide(x, norm), exact(gate_up), 1e-5), dtype)
        assert names(seen) == [kernel_for("norm_swiglu", rows)]

    def test_linear_add(self, kind, dtype, rows, shape):
        x, residual = randn(*rows, shape[0], dtype=dtype), randn(*rows, shape[1], dtype=dtype, seed=1)
        weight = quantized(shape[1], shape[0], kind, dtype)
        with launches() as seen:
            result = linear_add(x, weight, residual)
        close(result, linear_add(*wide(x), exact(weight), *wide(residual)), dtype)
        assert names(seen) == [kernel_for("linear_add", rows)]
