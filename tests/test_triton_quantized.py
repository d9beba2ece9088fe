"""The Triton kernels with int8, int4 and fp8 weights, against float64: the weight dequantised, then multiplied."""

import math
import re
import struct

import pytest
import torch
from test_triton import (  # noqa: F401
    DEVICE,
    ROWS,
    SHAPES,
    attention_metadata,
    close,
    kernel_for,
    kernels,
    names,
    randn,
    wide,
)

from csm.kernels import (
    attention,
    attention_linear_add,
    int8_product,
    linear_add,
    norm_linear,
    norm_rope_cache,
    norm_swiglu,
    tiles,
)
from csm.kernels.launch import launches
from csm.kernels.quantized_rows import KINDS, QuantizedRows, pack_rows, quantize_fp8, stack_rows

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = [pytest.mark.cuda] if torch.cuda.is_available() else []


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu", "linear_add"])
def test_a_row_does_not_depend_on_its_batch(op, kind):
    """Up to eight rows: bit for bit."""
    x, norm = randn(8, 1, 48, dtype=torch.bfloat16), randn(48, dtype=torch.bfloat16, seed=1)
    weight, residual = quantized(40, 48, kind, torch.bfloat16), randn(8, 1, 40, dtype=torch.bfloat16)

    def run(first, last):
        if op == "linear_add":
            return linear_add(x[first:last], weight, residual[first:last])
        return {"norm_linear": norm_linear, "norm_swiglu": norm_swiglu}[op](x[first:last], norm, weight, 1e-5)

    together = run(0, 8)
    for first, last in ((0, 1), (2, 5)):
        assert torch.equal(run(first, last), together[first:last])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_views_of_stacked_weights(kind):
    """As the model reads them: one of several, without the ids that no codec knows."""
    heads = stack_rows([quantized(35, 40, kind, torch.float32, seed) for seed in range(3)])
    x, norm = randn(1, 1, 40, dtype=torch.float32), randn(40, dtype=torch.float32, seed=1)
    for index in range(3):
        head = heads[index][:32]
        assert head.values.data_ptr() == heads.values[index].data_ptr()
        close(norm_linear(x, norm, head, 1e-5), norm_linear(*wide(x, norm), exact(head), 1e-5), torch.float32)


HEADS = [(8, 2, 128), (4, 2, 16), (3, 1, 8)]  # the last is padded in the kernel


def cost(kind, heads):
    """The interpreter takes half a minute for the products of int8 at the depth decoder's size."""
    return [pytest.mark.slow] if (kind, heads) == ("int8", HEADS[0]) else []


@pytest.mark.parametrize(
    ("kind", "heads"),
    [pytest.param(kind, heads, marks=cost(kind, heads), id=f"{heads}-{kind}") for kind in KINDS for heads in HEADS],
)
@pytest.mark.parametrize("rows", [(1, 1), (3, 2)], ids=str)
class TestAttention:
    def test_norm_rope_cache(self, kind, heads, rows):
        (num_heads, num_kv_heads, head_dim), (batch, num_rows), context = heads, rows, 7
        dtype = torch.float32
        position, rope, _ = attention_metadata(batch, num_rows, context, head_dim)
        caches = torch.full((2, batch, num_kv_heads, context, head_dim), math.nan, dtype=dtype, device=DEVICE)
        expected, slot = caches.double(), torch.arange(batch, device=DEVICE)[:, None]
        x, norm = randn(*rows, 40, dtype=dtype), randn(40, dtype=dtype, seed=1)
        weight = quantized((num_heads + 2 * num_kv_heads) * head_dim, 40, kind, dtype)
        with launches() as seen:
            q = norm_rope_cache(x, norm, weight, 1e-5, rope, *caches, slot, position)
        expected_q = norm_rope_cache(*wide(x, norm), exact(weight), 1e-5, rope.double(), *expected, slot, position)
        close(q, expected_q, dtype)
        written = ~expected.isnan()
        close(caches[written], expected[written], dtype)
        assert names(seen) == ["norm_rope_cache_rows"]

    def test_attention_linear_add(self, kind, heads, rows):
        """One kernel for a single row, except where heads are padded."""
        (num_heads, num_kv_heads, head_dim), (batch, num_rows), context = heads, rows, 9
        dtype = torch.float32
        position, _, bias = attention_metadata(batch, num_rows, context, head_dim)
        q = randn(*rows, num_heads, head_dim, dtype=dtype)
        k, v = (randn(batch, num_kv_heads, context, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        weight, residual = quantized(20, num_heads * head_dim, kind, dtype), randn(*rows, 20, dtype=dtype, seed=4)
        with launches() as seen:
            result = attention_linear_add(q, k, v, None, position, weight, residual, context=context)
        attended = attention(*wide(q, k, v), bias, position)
        close(result, linear_add(attended, exact(weight), residual.double()), dtype)
        assert (names(seen) == ["attention_linear_add_row"]) == (rows == (1, 1) and heads != (3, 1, 8))


def permuted(asm, word):
    """What the inline assembly computes from a word: its outputs as float32, by their numbers."""
    registers, outputs = {"$4": word, "$8": word}, {}
    for statement in re.findall(r"(?:and|shr|prmt)\.b32 [^;]+", asm):
        name, operands = statement.split(" ", 1)
        target, source, *numbers = [part.strip() for part in operands.split(",")]
        numbers = [int(number, 0) for number in numbers]
        if name == "and.b32":
            registers[target] = registers[source] & numbers[0]
        elif name == "shr.b32":
            registers[target] = registers[source] >> numbers[0]
        else:  # PTX ISA, prmt: each selector names one of the eight bytes of both operands
            pool = registers[source].to_bytes(4, "little") + numbers[0].to_bytes(4, "little")
            result = bytes(pool[numbers[1] >> 4 * i & 7] for i in range(4))
            outputs[int(target[1:])] = struct.unpack("<f", result)[0]
    return [outputs[i] for i in range(len(outputs))]


def test_the_assembly_unpacks_every_value():
    """The interpreter does not run it: its statements are computed here."""
    for first in range(0, 256, 4):
        word = int.from_bytes(bytes(range(first, first + 4)), "little")
        assert [x - 2**23 for x in permuted(tiles.BYTES_ASM.value, word)] == list(range(first, first + 4))
        lower = [byte & 15 for byte in range(first, first + 4)]
        upper = [byte >> 4 for byte in range(first, first + 4)]
        assert [x - 2**23 for x in permuted(tiles.NIBBLES_ASM.value, word)] == lower + upper


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="what the interpreter does instead of a GPU")


@interpreted
@pytest.mark.parametrize("warps", [2, 4])
def test_int8_inputs_divided_among_warps(warps, monkeypatch):
    """The interpreter has one warp; a GPU's divide the inputs among them, and each has a step of its own."""
    monkeypatch.setattr(int8_product, "num_warps", lambda: warps)
    x, residual = randn(1, 1, 250, dtype=torch.float32), randn(1, 1, 20, dtype=torch.float32, seed=1)
    x[:, :, 200:] *= 1e-4
    weight = quantized(20, 250, "int8", torch.float32)
    close(linear_add(x, weight, residual), linear_add(*wide(x), exact(weight), *wide(residual)), torch.float32)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30], ids=str)
def test_int8_products_are_as_exact_as_in_float32(magnitude):
    """Of 1,000 inputs an element is off by at most half a step of 2**-21 of the largest."""
    x = randn(1, 1, 1000, dtype=torch.float32) * magnitude
    weight, zero = quantized(16, 1000, "int8", torch.float32), torch.zeros(1, 1, 16, device=DEVICE)
    error = (linear_add(x, weight, zero).double() - linear_add(*wide(x), exact(weight), zero.double())).abs()
    assert (error <= 2**-22 * x.abs().max() * exact(weight).abs().sum(1)).all()
    rms = (exact(weight) ** 2).sum(1).sqrt() * x.double().square().mean().sqrt()
    assert (error <= 2e-6 * rms).all()


def test_int8_products_of_bfloat16_are_exact():
    """Activations of 8 bits over 14 powers of two: with integers as weights, the result is the integer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 129, (1, 1, 64), generator=generator).bfloat16() * 2.0 ** (torch.arange(64) % 7 - 7)
    x[0, 0, 0] = 128
    q = torch.randint(-127, 128, (16, 64), generator=generator, dtype=torch.int8)
    weight = pack_rows(q, torch.ones(16, 2), "int8", torch.float32).to(DEVICE)
    result = linear_add(x.float().to(DEVICE), weight, torch.zeros(1, 1, 16, device=DEVICE))
    assert torch.equal(result[0, 0].double(), exact(weight) @ x[0, 0].double().to(DEVICE))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_int8_products_keep_what_is_not_finite(value):
    x, weight = randn(1, 1, 64, dtype=torch.float32), quantized(16, 64, "int8", torch.float32)
    x[0, 0, 5] = value
    assert not linear_add(x, weight, torch.zeros(1, 1, 16, device=DEVICE)).isfinite().any()
    zero = linear_add(torch.zeros_like(x), weight, torch.ones(1, 1, 16, device=DEVICE))
    assert torch.equal(zero, torch.ones_like(zero))


def assembled(asm, inputs, first):
    """What inline assembly makes of words: its outputs, ``first`` of them, by their numbers."""
    registers = {f"${first + i}": word for i, word in enumerate(inputs)}
    for statement in re.findall(r"(?:xor|add|prmt)\.[bu]32 [^;]+", asm):
        name, operands = statement.split(" ", 1)
        target, *sources = [part.strip() for part in operands.split(",")]
        a, b, *selector = [registers[part] if part in registers else int(part, 0) for part in sources]
        if name == "prmt.b32":
            pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            registers[target] = int.from_bytes(bytes(pool[selector[0] >> 4 * i & 7] for i in range(4)), "little")
        else:
            registers[target] = (a ^ b if name == "xor.b32" else a + b) & 0xFFFFFFFF
    return [registers[f"${i}"].to_bytes(4, "little") for i in range(first)]


def test_the_assembly_cuts_integers_into_bytes():
    """The statements computed here, for integers over the whole range: the digits give the integer again."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-0x3F7F7F, 0x3F7F80, (400,), generator=generator).tolist()
    integers += [0, 1, -1, 127, 128, -128, -129, 0x7FFF, 0x8000, -0x8000, 0x3F7F7F, -0x3F7F7F]
    for first in range(0, len(integers), 4):
        group = integers[first : first + 4]
        words = [struct.unpack("<I", struct.pack("<f", n + int8_product.OFFSET.value))[0] for n in group]
        digits = [struct.unpack("<4b", word) for word in assembled(int8_product.BYTES_ASM.value, words, first=3)]
        assert [low + 256 * mid + 65536 * high for low, mid, high in zip(*digits, strict=True)] == group
