"""The native ops against the references' formulas in float64, over kinds of weights, odd sizes and numbers of rows."""

import math
import threading

import pytest
import torch
from test_kernels import TOLERANCE, close, normed, randn

from csm.kernels import (
    BlockWeights,
    attention_linear_add,
    blocks,
    draw_noise,
    linear_add,
    native,
    norm_linear,
    norm_rope_cache,
    norm_swiglu,
    sample,
)
from csm.kernels.attention import attention_reference
from csm.kernels.native import library, ops
from csm.kernels.norm_linear import norm_linear_reference
from csm.kernels.quantized import pack, unpack
from csm.kernels.rope_cache import rope_cache_reference
from csm.quantize import quantize

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [(1, 1), (1, 2), (3, 1), (2, 4), (1, 17)]  # slots, rows of each
SIZES = [(8, 12), (17, 5), (33, 64), (64, 96), (256, 272), (1000, 130)]  # inputs, outputs
# One rounding of an input to 1 of 254 steps of its block's largest value: of a sum of K products this share, in units
# of what each would be if all were largest; float32 rounds once more.
STEP = 1 / 254


@pytest.fixture(autouse=True)
def native_only(monkeypatch):
    """No test passes because an op fell back."""
    monkeypatch.delenv("CSM_OPS", raising=False)
    monkeypatch.setattr(ops, "MAX_ROWS", 64)


def input_rounding(x_BTK, weight_NK):
    """The bound of what rounding the inputs to int8, block by block, changes a product: (B, T, N)."""
    K = x_BTK.shape[-1]
    padded = torch.nn.functional.pad(x_BTK.double().abs(), (0, -K % 32)).unflatten(-1, (-1, 32))
    step = padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :K] * STEP
    return step @ weight_NK.double().abs().T


def check(actual, expected, bound, dtype):
    """Within the bound of the inputs' rounding, and then the output's own."""
    limit = bound * 1.001 + TOLERANCE[dtype] * (4 + expected.abs())
    excess = (actual.double() - expected).abs() - limit
    assert excess.max() <= 0, f"{excess.max():.3g} beyond the bound"
    assert actual.dtype == dtype


def quantized(weight, bits, dtype):
    return quantize(weight.float(), bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
class TestLinearOps:
    def make(self, rows, size, dtype, outputs=None):
        (batch, T), (dim, out) = rows, size
        weight = randn(outputs or out, dim, dtype=dtype, seed=2) / math.sqrt(dim)
        return randn(batch, T, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1), weight

    def test_norm_linear(self, rows, size, dtype):
        x, norm, weight = self.make(rows, size, dtype)
        close(norm_linear(x, norm, weight, 1e-5), normed(x, norm, 1e-5) @ weight.double().T, dtype)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_norm_linear_of_a_quantised_weight(self, rows, size, dtype, bits):
        x, norm, weight = self.make(rows, size, dtype)
        weight = quantized(weight, bits, dtype)
        exact, wide = normed(x, norm, 1e-5), dequantized(weight)
        bound = input_rounding(exact, wide)
        bound = bound + TOLERANCE[dtype] * (exact.abs() @ wide.abs().T)  # the norm is rounded to the dtype first
        check(norm_linear(x, norm, weight, 1e-5), exact @ wide.T, bound, dtype)

    def test_norm_swiglu(self, rows, size, dtype):
        hidden = size[1]
        x, norm, gate_up = self.make(rows, size, dtype, 2 * hidden)
        gate, up = (normed(x, norm, 1e-5) @ gate_up.double().T).split(hidden, dim=-1)
        close(norm_swiglu(x, norm, gate_up, 1e-5), gate / (1 + torch.exp(-gate)) * up, dtype)

    def test_linear_add(self, rows, size, dtype):
        x, _, weight = self.make(rows, size, dtype)
        residual = randn(*x.shape[:2], size[1], dtype=dtype, seed=3)
        close(linear_add(x, weight, residual), residual.double() + x.double() @ weight.double().T, dtype)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_linear_add_of_a_quantised_weight(self, rows, size, dtype, bits):
        x, _, weight = self.make(rows, size, dtype)
        residual = randn(*x.shape[:2], size[1], dtype=dtype, seed=3)
        weight = quantized(weight, bits, dtype)
        wide = dequantized(weight)
        expected = residual.double() + x.double() @ wide.T
        check(linear_add(x, weight, residual), expected, input_rounding(x, wide), dtype)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_norm_swiglu_of_a_quantised_weight(self, rows, size, dtype, bits):
        hidden = size[1]
        x, norm, gate_up = self.make(rows, size, dtype, 2 * hidden)
        gate_up = quantized(gate_up, bits, dtype)
        # The two products, as norm_linear gives them in float32, are what SiLU gets.
        gate, up = norm_linear(x, norm, gate_up, 1e-5).double().split(hidden, dim=-1)
        actual = norm_swiglu(x, norm, gate_up, 1e-5)
        torch.testing.assert_close(
            actual.double(), gate / (1 + torch.exp(-gate)) * up, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


def dequantized(weight):
    """In float64, from the values and scales themselves."""
    q, scale = unpack(weight.packed, weight.bits)
    wide = (q.double().unflatten(1, (-1, 32)) * scale.double().unsqueeze(2)).flatten(1)
    return wide[: weight.shape[0], : weight.shape[1]]


HEADS = [(1, 1, 4), (3, 1, 8), (4, 2, 16), (5, 5, 6), (32, 8, 64)]  # query heads, kv heads, head dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("batch", "rows", "context"), [(1, 1, 1), (2, 3, 9), (3, 1, 40), (1, 8, 300)])
@pytest.mark.parametrize("bits", [None, 8, 4])
class TestCacheOps:
    def cache(self, dtype, heads, batch, rows, context):
        _, num_kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(context)
        position = torch.stack([torch.randperm(context, generator=generator)[:rows] for _ in range(batch)])
        angle = position[..., None] * 0.1 ** torch.arange(head_dim // 2)
        rope = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
        shape = (batch + 1, num_kv_heads, context + 3, head_dim)
        return position, rope, randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)

    def test_norm_rope_cache(self, dtype, heads, batch, rows, context, bits):
        num_heads, num_kv_heads, head_dim = heads
        position, rope, k, v = self.cache(dtype, heads, batch, rows, context)
        x, norm = randn(batch, rows, 48, dtype=dtype), randn(48, dtype=dtype, seed=1)
        weight = randn((num_heads + 2 * num_kv_heads) * head_dim, 48, dtype=dtype, seed=2) / 7
        weight = weight if bits is None else quantized(weight, bits, dtype)
        slots = torch.arange(batch).flip(0)[:, None] + 1
        expected_k, expected_v = k.clone(), v.clone()
        qkv = norm_linear(x, norm, weight, 1e-5)  # tested above
        expected_q = rope_cache_reference(qkv, rope, expected_k, expected_v, slots, position)
        q = norm_rope_cache(x, norm, weight, 1e-5, rope, k, v, slots, position)
        for actual, expected in ((q, expected_q), (k, expected_k), (v, expected_v)):
            close(actual, expected.double(), dtype)

    def test_attention_linear_add(self, dtype, heads, batch, rows, context, bits):
        num_heads, _, head_dim = heads
        position, _, k, v = self.cache(dtype, heads, batch, rows, context)
        q = randn(batch, rows, num_heads, head_dim, dtype=dtype)
        bias = torch.zeros(batch, rows, context, dtype=dtype)
        bias.masked_fill_(torch.arange(context) > position[..., None], -math.inf)
        k[:, :, context:], v[:, :, context:] = 1e4, 1e4  # beyond the context: must not be looked at
        residual = randn(batch, rows, 40, dtype=dtype, seed=3)
        weight = randn(40, num_heads * head_dim, dtype=dtype, seed=4) / math.sqrt(num_heads * head_dim)
        weight = weight if bits is None else quantized(weight, bits, dtype)
        wide = weight.double() if bits is None else dequantized(weight)
        mixed = attention_reference(q.double(), k[:batch].double(), v[:batch].double(), bias.double())
        expected = residual.double() + mixed @ wide.T
        bound = TOLERANCE[dtype] * (mixed.abs() @ wide.abs().T)  # attention's result is rounded
        bound = bound if bits is None else bound + input_rounding(mixed, wide)
        actual = attention_linear_add(q, k[:batch], v[:batch], bias, position, weight, residual)
        check(actual, expected, bound, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 8, 4, "both"])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 1), (2, 3)])
def test_blocks_are_their_ops(dtype, bits, batch, rows, monkeypatch):
    run = whole_blocks(dtype, bits, batch, rows)
    native_blocks, calls = ops.blocks, []
    monkeypatch.setattr(ops, "blocks", lambda *args: calls.append(args) or native_blocks(*args))
    whole = run()
    assert len(calls) == 1
    monkeypatch.setattr(ops, "use_native_blocks", lambda *_: False)
    for actual, expected in zip(whole, run(), strict=True):
        assert torch.equal(actual, expected)


SMALL_BLOCK, LARGE_BLOCK = (6, 2, 8, 48, 80, 20), (8, 4, 32, 576, 640, 300)  # H, G, d, dim, hidden, context


def whole_blocks(dtype, bits, batch, rows, size=SMALL_BLOCK, layers=3):
    """A function that runs blocks over a part of larger caches: their output, and their keys and values."""
    H, G, d, dim, hidden, context = size
    shapes = (((H + 2 * G) * d, dim), (dim, H * d), (2 * hidden, dim), (dim, hidden))

    def layer(number):
        """Weights of its own; of two kinds of quantised weights every other layer has the other."""
        weights = [
            randn(*shape, dtype=dtype, seed=10 * number + i) / math.sqrt(shape[1]) for i, shape in enumerate(shapes)
        ]
        own = bits if bits != "both" else (8, 4)[number % 2]
        qkv, output, gate_up, down = (w if own is None else quantized(w, own, dtype) for w in weights)
        norms = [1 + randn(dim, dtype=dtype, seed=10 * number + i) / 4 for i in range(2)]
        return BlockWeights(norms[0], qkv, output, norms[1], gate_up, down)

    parts = [layer(number) for number in range(layers)]
    x = randn(batch, 2 * rows, dim, dtype=dtype)[:, ::2]  # rows that are not contiguous
    x = x if batch == 1 else x.contiguous()
    position = (torch.arange(rows) + torch.arange(batch)[:, None] + context - 15).contiguous()
    angle = position[..., None] * 0.1 ** torch.arange(d // 2)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
    bias = torch.zeros(batch, rows, context, dtype=dtype)
    bias.masked_fill_(torch.arange(context) > position[..., None], -math.inf)
    slots = torch.arange(batch)[:, None]

    def run():
        k, v = (randn(layers + 1, batch + 1, G, context, d, dtype=dtype, seed=i)[1:, 1:] for i in range(2))
        with torch.no_grad():
            return blocks(x, parts, 1e-5, rope, bias, k, v, slots, position), k, v

    return run


@pytest.mark.parametrize("name", BlockWeights._fields)
@pytest.mark.parametrize("spoil", [lambda w: w.repeat_interleave(2, -1)[..., ::2], torch.Tensor.double])
def test_blocks_that_cannot_be_read_are_not(spoil, name):
    """A weight or a norm that is strided or of another dtype, in a later layer than the first."""
    shapes = ((16,), (24, 16), (16, 16), (16,), (8, 16), (16, 4))
    x, *weights = (randn(*shape, dtype=torch.float32) for shape in ((1, 1, 16), *shapes))
    layer = BlockWeights(*weights)
    spoilt = layer._replace(**{name: spoil(getattr(layer, name))})
    with torch.no_grad():
        assert ops.use_native_blocks(x, 1, [layer, layer])
        assert not ops.use_native_blocks(x, 1, [layer, spoilt])


def test_blocks_of_several_callers_are_those_of_one():
    """Where the threads are taken by another caller, a caller computes alone: the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [whole_blocks(torch.float32, None, 1, rows, layers=2) for rows in (6, 7, 8)]
        expected, different = [run() for run in runs], []

        def call(number):
            torch.set_num_threads(2)
            for _ in range(400):
                got = runs[number]()
                different.extend(number for a, b in zip(got, expected[number], strict=True) if not torch.equal(a, b))

        callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert different == []
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def with_threads():
    """Results of a function with several numbers of threads."""
    before = torch.get_num_threads()

    def run(function):
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (3, 1), (2, 3)])
def test_a_block_does_not_depend_on_the_number_of_threads(kind, batch, rows, with_threads):
    """All of its ops: norm, product, rotation and cache; attention, output and residual; the MLP's two.

    Each product has at least 32 tiles of 16 outputs, and a thread takes at least 4; attention is beyond the size up to
    which one thread does all of it.
    """
    bits = int(kind[3:]) if kind.startswith("int") else None
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    first, *others = with_threads(whole_blocks(dtype, bits, batch, rows, LARGE_BLOCK))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_heads_and_sampling_do_not_depend_on_the_number_of_threads(kind, with_threads):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x, norm, head = randn(4, 1, 320, dtype=dtype), torch.ones(320, dtype=dtype), randn(1000, 320, dtype=dtype, seed=1)
    head = quantized(head, int(kind[3:]), dtype) if kind.startswith("int") else head
    fours, ones = torch.full((4,), 4), torch.ones(4)

    def run():
        logits = norm_linear(x, norm, head, 1e-5).squeeze(1)
        codes = torch.zeros(4, 1, dtype=torch.int64)
        noise = draw_noise(torch.arange(4), fours, ones, 50 * fours, 1, 1000, x)
        sample(logits, 0, noise, codes, None)
        return logits, codes

    (logits, codes), *others = with_threads(run)
    assert len(set(codes[:, 0].tolist())) > 1
    assert all(torch.equal(logits, other[0]) and torch.equal(codes, other[1]) for other in others)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_gradients_go_through_frozen_weights(bits):
    """Native ops have no backward: they leave the work to PyTorch's where an input needs a gradient."""
    x, norm = randn(1, 2, 64, dtype=torch.float32).requires_grad_(), torch.ones(64)
    weight = randn(40, 64, dtype=torch.float32, seed=1)
    weight = weight if bits is None else quantized(weight, bits, torch.float32)
    norm_linear(x, norm, weight, 1e-5).sum().backward()
    wide = weight.double() if bits is None else dequantized(weight)
    y = x.detach().double().requires_grad_()
    (normed(y, norm, 1e-5) @ wide.T).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)


def test_without_a_home_folder_the_ops_run_in_pytorch(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CSM_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", home)
    with pytest.warns(native.NativeUnavailableWarning, match="Could not determine home directory"):
        assert library.__wrapped__() is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (35, 100), (48, 32)])
def test_packed_weights_hold_what_was_packed(bits, shape):
    generator = torch.Generator().manual_seed(0)
    low = {8: -127, 4: -8}[bits]
    q = torch.randint(low, 128 if bits == 8 else 8, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape[0], -(-shape[1] // 32), generator=generator).half()
    unpacked, scales = unpack(pack(q, scale, bits), bits)
    assert torch.equal(unpacked[: shape[0], : shape[1]], q)
    assert torch.equal(scales[: shape[0], : scale.shape[1]], scale)


def test_a_row_is_the_same_alone_and_among_others():
    x, norm, weight = randn(1, 9, 96, dtype=torch.float32), torch.ones(96), randn(40, 96, dtype=torch.float32)
    for kind in (weight, quantized(weight, 8, torch.float32), quantized(weight, 4, torch.float32)):
        together = norm_linear(x, norm, kind, 1e-5)
        alone = torch.cat([norm_linear(x[:, i : i + 1], norm, kind, 1e-5) for i in range(9)], dim=1)
        assert torch.equal(together, alone)


def test_parts_of_a_quantised_weight_are_the_same_bytes():
    weight = randn(3, 40, 64, dtype=torch.float32)
    whole = quantized(weight, 8, torch.float32)
    assert whole.shape == (3, 40, 64)
    part = whole[1][:37]
    assert part.shape == (37, 64) and part.packed.data_ptr() == whole.packed[1].data_ptr()
    assert torch.equal(part.dequantize(), whole.dequantize()[1, :37])
    x, norm = randn(1, 1, 64, dtype=torch.float32), torch.ones(64)
    assert torch.equal(norm_linear(x, norm, part, 1e-5), norm_linear(x, norm, whole[1], 1e-5)[..., :37])
    with pytest.raises(IndexError, match="no part"):
        whole[1][3:]


def test_the_reference_is_asked_for_by_name(monkeypatch):
    x, norm = randn(1, 1, 64, dtype=torch.float32), torch.ones(64)
    weight = quantized(randn(40, 64, dtype=torch.float32), 4, torch.float32)
    monkeypatch.setenv("CSM_OPS", "reference")
    assert torch.equal(norm_linear(x, norm, weight, 1e-5), norm_linear_reference(x, norm, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 64, 2048])
def test_sampling_draws_what_the_reference_draws(dtype, size, monkeypatch):
    slots, codebooks, dim = 7, 3, 6
    generator = torch.Generator().manual_seed(size)
    seeds = torch.randint(2**63 - 1, (slots,), generator=generator)
    frames = torch.randint(1000, (slots,), generator=generator)
    temperatures = torch.tensor([0.0, 0.7, 0.9, 1.0, 0.01, 5.0, 1e6])
    top_k = torch.tensor([1, 1, 2, 50, size, size, size]).clamp(max=size)
    logits = (4 * torch.randn(codebooks, slots, size, generator=generator)).to(dtype)
    logits[:, 3, ::3] = logits[:, 3].amax()  # ties
    tables = torch.randn(codebooks, size, dim, generator=generator).to(dtype)

    def run():
        codes = torch.zeros(slots, codebooks, dtype=torch.int64)
        noise = draw_noise(seeds, frames, temperatures, top_k, codebooks, size, tables[0])
        rows = [sample(logits[k], k, noise, codes, tables[k]) for k in range(codebooks - 1)]
        assert sample(logits[-1], codebooks - 1, noise, codes, None) is None
        return noise.noise_BKV is None, codes, torch.stack(rows)

    native, codes, rows = run()
    monkeypatch.setenv("CSM_OPS", "reference")
    reference, expected_codes, expected_rows = run()
    assert native and not reference
    assert torch.equal(codes, expected_codes) and torch.equal(rows, expected_rows)


def test_sampling_of_logits_that_are_no_numbers_gives_an_id():
    logits = torch.full((2, 100), torch.nan)
    logits[1, :50] = torch.randn(50, generator=torch.Generator().manual_seed(0))
    logits[1, 60] = -torch.inf
    codes, one = torch.full((2, 1), -1), torch.ones(2)
    noise = draw_noise(one.long(), one.long(), one, one.long(), 1, 100, logits)
    sample(logits, 0, noise, codes, None)
    assert codes[:, 0].tolist() == [0, 50]
