"""Every op's reference against its formula in float64, over dtypes and odd shapes."""

import math

import pytest
import torch

from csm.kernels import attention, linear_add, norm_linear, norm_swiglu, rms_norm, rope_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1, 8, 12), (2, 3, 17, 5), (3, 1, 33, 64), (17, 1, 64, 96)]  # B, T, D, out


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual, expected, dtype):
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])
    assert actual.dtype == dtype


def normed(x, weight, eps):
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestLinearOps:
    def test_rms_norm(self, shape, dtype):
        batch, rows, dim, _ = shape
        x, weight = 3 * randn(batch, rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
        close(rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5), dtype)

    def test_norm_linear(self, shape, dtype):
        batch, rows, dim, out = shape
        x, norm = randn(batch, rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
        weight = randn(out, dim, dtype=dtype, seed=2) / math.sqrt(dim)
        close(norm_linear(x, norm, weight, 1e-5), normed(x, norm, 1e-5) @ weight.double().T, dtype)

    def test_norm_swiglu(self, shape, dtype):
        batch, rows, dim, hidden = shape
        x, norm = randn(batch, rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
        gate_up = randn(2 * hidden, dim, dtype=dtype, seed=2) / math.sqrt(dim)
        gate, up = (normed(x, norm, 1e-5) @ gate_up.double().T).split(hidden, dim=-1)
        close(norm_swiglu(x, norm, gate_up, 1e-5), gate / (1 + torch.exp(-gate)) * up, dtype)

    def test_linear_add(self, shape, dtype):
        batch, rows, dim, hidden = shape
        x, residual = randn(batch, rows, hidden, dtype=dtype), randn(batch, rows, dim, dtype=dtype, seed=1)
        weight = randn(dim, hidden, dtype=dtype, seed=2) / math.sqrt(hidden)
        close(linear_add(x, weight, residual), residual.double() + x.double() @ weight.double().T, dtype)


HEADS = [(1, 1, 4), (3, 1, 8), (4, 2, 16), (5, 5, 6), (32, 8, 64)]  # query heads, kv heads, head dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("batch", "rows", "context"), [(1, 1, 1), (2, 3, 9), (3, 1, 40)])
class TestCacheOps:
    def test_rope_cache(self, dtype, heads, batch, rows, context):
        num_heads, num_kv_heads, head_dim = heads
        qkv = randn(batch, rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        generator = torch.Generator().manual_seed(context)
        position = torch.stack([torch.randperm(context, generator=generator)[:rows] for _ in range(batch)])
        angle = position[..., None] * 0.1 ** torch.arange(head_dim // 2, dtype=torch.float64)
        poison = torch.full((batch, num_kv_heads, context, head_dim), math.nan, dtype=dtype)
        k_cache, v_cache = poison.clone(), poison.clone()
        rope = torch.stack((angle.cos(), angle.sin()), dim=-1)
        rope = rope if dtype == torch.float64 else rope.float()
        q = rope_cache(qkv, rope, k_cache, v_cache, torch.arange(batch)[:, None], position)

        def rotated(x):
            even, odd = x.double()[..., 0::2], x.double()[..., 1::2]
            cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
            return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

        parts = qkv.view(batch, rows, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        close(q, rotated(parts[0]), dtype)
        for b in range(batch):
            close(k_cache[b][:, position[b]], rotated(parts[1])[b].transpose(0, 1), dtype)
            assert torch.equal(v_cache[b][:, position[b]], parts[2][b].transpose(0, 1))
        written = torch.zeros(batch, context, dtype=torch.bool).scatter(1, position, True)
        untouched = k_cache.transpose(1, 2)[~written], v_cache.transpose(1, 2)[~written]
        assert all(torch.isnan(rest).all() for rest in untouched)

    def test_attention(self, dtype, heads, batch, rows, context):
        num_heads, num_kv_heads, head_dim = heads
        q = randn(batch, rows, num_heads, head_dim, dtype=dtype)
        k = randn(batch, num_kv_heads, context + 3, head_dim, dtype=dtype, seed=1)
        v = randn(batch, num_kv_heads, context + 3, head_dim, dtype=dtype, seed=2)
        position = torch.randint(context, (batch, rows), generator=torch.Generator().manual_seed(rows))
        masked = torch.arange(context) > position[..., None]
        bias = torch.zeros(masked.shape, dtype=dtype).masked_fill(masked, -math.inf)
        k[:, :, context:], v[:, :, context:] = 1e4, 1e4  # beyond the context: must not be read
        attended = attention(q, k, v, bias, position)
        for b in range(batch):
            for t in range(rows):
                for h in range(num_heads):
                    length, g = int(position[b, t]) + 1, h // (num_heads // num_kv_heads)
                    keys, values = k[b, g, :length].double(), v[b, g, :length].double()
                    weights = (keys @ q[b, t, h].double() / math.sqrt(head_dim)).softmax(0)
                    close(attended[b, t].view(num_heads, head_dim)[h], weights @ values, dtype)
