"""Every Triton kernel against its op in float64: dtypes, few and many rows, odd shapes, outputs filled with NaN.

Without a GPU the kernels run in Triton's interpreter; with one (``make gpu``) they are compiled.
"""

import math

import pytest
import torch

from csm.frame import FrameState, decode_frame
from csm.kernels import (
    advance_frame,
    attention,
    attention_linear_add,
    embed_rows,
    launch_config,
    linear_add,
    norm_linear,
    norm_rope_cache,
    norm_swiglu,
    rope_cache,
    sample,
)
from csm.kernels import launch as launch_module
from csm.kernels.advance_frame import advance_frame_reference
from csm.kernels.launch import MAX_ROWS, launches, use_kernels
from csm.kernels.sample import Noise, draw_ids, gumbel_noise
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
if DEVICE.type != "cuda":  # on a GPU each case compiles its kernels
    DTYPES.append(pytest.param(torch.float16, marks=pytest.mark.slow))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROWS = [(1, 1), (1, 2), (3, 1), (4, 2), (17, 1)]  # slots, rows of each: 1, 2, 3, 8, 17 in all
SHAPES = [(33, 20), (64, 96), (130, 66)]  # inputs, outputs

pytestmark = [pytest.mark.cuda] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Force the kernels; few programs (the interpreter runs one at a time); unwritten outputs are NaN."""
    monkeypatch.setenv("CSM_OPS", "triton")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(launch_config, "MIN_PROGRAMS", 3)
        monkeypatch.setattr(launch_config, "PROGRAM_WEIGHT_BYTES", 1 << 18)
        launch_config._launch_config.cache_clear()
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def randn(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def wide(*tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in tensors]


def names(seen):
    return [launch.name for launch in seen]


def kernel_for(op, rows):
    return f"{op}_rows" if math.prod(rows) <= launch_config.MAX_GEMV_ROWS else f"{op}_matmul"


def close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestProducts:
    def test_norm_linear(self, dtype, rows, shape):
        x, norm = 3 * randn(*rows, shape[0], dtype=dtype), randn(shape[0], dtype=dtype, seed=1)
        weight = randn(shape[1], shape[0], dtype=dtype, seed=2) / math.sqrt(shape[0])
        with launches() as seen:
            result = norm_linear(x, norm, weight, 1e-5)
        close(result, norm_linear(*wide(x, norm, weight), 1e-5), dtype)
        assert names(seen) == [kernel_for("norm_linear", rows)]

    def test_norm_swiglu(self, dtype, rows, shape):
        x, norm = randn(*rows, shape[0], dtype=dtype), randn(shape[0], dtype=dtype, seed=1)
        gate_up = randn(2 * shape[1], shape[0], dtype=dtype, seed=2) / math.sqrt(shape[0])
        with launches() as seen:
            result = norm_swiglu(x, norm, gate_up, 1e-5)
        close(result, norm_swiglu(*wide(x, norm, gate_up), 1e-5), dtype)
        assert names(seen) == [kernel_for("norm_swiglu", rows)]

    def test_linear_add(self, dtype, rows, shape):
        x, residual = randn(*rows, shape[0], dtype=dtype), randn(*rows, shape[1], dtype=dtype, seed=1)
        weight = randn(shape[1], shape[0], dtype=dtype, seed=2) / math.sqrt(shape[0])
        with launches() as seen:
            result = linear_add(x, weight, residual)
        close(result, linear_add(*wide(x, weight, residual)), dtype)
        assert names(seen) == [kernel_for("linear_add", rows)]

    def test_strided_rows(self, dtype, rows, shape):
        """The last row of each slot, as the heads read it."""
        x, norm = randn(rows[0], 3, shape[0], dtype=dtype)[:, -1:], randn(shape[0], dtype=dtype, seed=1)
        weight = randn(shape[1], shape[0], dtype=dtype, seed=2) / math.sqrt(shape[0])
        close(norm_linear(x, norm, weight, 1e-5), norm_linear(*wide(x, norm, weight), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["norm_linear", "norm_swiglu", "linear_add"])
def test_a_row_does_not_depend_on_its_batch(op, dtype):
    """Up to eight rows: bit for bit."""
    x, norm = randn(8, 1, 48, dtype=dtype), randn(48, dtype=dtype, seed=1)
    weight, residual = randn(40, 48, dtype=dtype, seed=2), randn(8, 1, 40, dtype=dtype)

    def run(first, last):
        if op == "linear_add":
            return linear_add(x[first:last], weight, residual[first:last])
        return {"norm_linear": norm_linear, "norm_swiglu": norm_swiglu}[op](x[first:last], norm, weight, 1e-5)

    together = run(0, 8)
    for first, last in ((0, 1), (5, 6), (2, 5)):
        assert torch.equal(run(first, last), together[first:last])


HEADS = [(1, 1, 4), (3, 1, 8), (4, 2, 16), (5, 5, 6), (12, 3, 10)]  # query heads, key heads, head dim

QUERIES, CONTEXTS = [(1, 1), (1, 2), (3, 2), (17, 1)], [2, 32, 65, 200]  # slots and rows of each; cache positions
CASES = [(heads, rows, CONTEXTS[(i + j) % 4]) for i, heads in enumerate(HEADS) for j, rows in enumerate(QUERIES)]
CASES += [(heads, (1, 1), context) for heads in HEADS for context in (7, 31)]
CSM_1B_HEADS = (8, 2, 128), (32, 8, 64)
CASES += [(CSM_1B_HEADS[0], (1, 1), 32), (CSM_1B_HEADS[0], (1, 2), 32)]
CASES += [(CSM_1B_HEADS[1], (1, 1), 30), (CSM_1B_HEADS[1], (2, 1), 130)]
CASES = CASES[::3] if DEVICE.type == "cuda" else CASES
SLOW_CASES = [one for one in CASES if one[1] == (17, 1) and one[2] >= 65]  # seconds each in the interpreter
MARKED_CASES = [pytest.param(*one, marks=[pytest.mark.slow] if one in SLOW_CASES else []) for one in CASES]


def attention_metadata(batch, rows, context, head_dim):
    """Ascending positions of each slot's rows (the last position is among them), their RoPE rows, and the bias."""
    generator = torch.Generator().manual_seed(context + batch)
    position = torch.stack([torch.randperm(context, generator=generator)[:rows].sort().values for _ in range(batch)])
    position[0, -1] = context - 1
    angle = position[..., None] * 0.1 ** torch.arange(head_dim // 2, dtype=torch.float64)
    rope = torch.stack((angle.cos(), angle.sin()), dim=-1).float()
    masked = torch.arange(context) > position[..., None]
    bias = torch.zeros(masked.shape, dtype=torch.float64).masked_fill(masked, -math.inf)
    return position.to(DEVICE), rope.to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "rows", "context"), MARKED_CASES, ids=str)
class TestCacheOps:
    @pytest.mark.parametrize("fused", [True, False])
    def test_rope_cache(self, dtype, heads, rows, context, fused):
        (num_heads, num_kv_heads, head_dim), (batch, num_rows) = heads, rows
        position, rope, _ = attention_metadata(batch, num_rows, context, head_dim)
        caches = torch.full((2, batch + 1, num_kv_heads, context, head_dim), math.nan, dtype=dtype, device=DEVICE)
        expected = caches.double()
        slot = torch.arange(batch, device=DEVICE)[:, None]
        num_out = (num_heads + 2 * num_kv_heads) * head_dim
        if fused:
            x, norm = randn(*rows, 24, dtype=dtype), randn(24, dtype=dtype, seed=1)
            weight = randn(num_out, 24, dtype=dtype, seed=2) / math.sqrt(24)
            q = norm_rope_cache(x, norm, weight, 1e-5, rope, *caches[:, :batch], slot, position)
            inputs = (*wide(x, norm, weight), 1e-5)
            expected_q = norm_rope_cache(*inputs, rope.double(), *expected[:, :batch], slot, position)
        else:
            qkv = randn(*rows, num_out, dtype=dtype)
            q = rope_cache(qkv, rope, *caches[:, :batch], slot, position)
            expected_q = rope_cache(qkv.double(), rope.double(), *expected[:, :batch], slot, position)
        close(q, expected_q, dtype)
        written = ~expected.isnan()
        assert torch.equal(~caches.isnan(), written)
        close(caches[written], expected[written], dtype)

    def test_attention(self, dtype, heads, rows, context):
        """Alone, and with output projection and residual: one kernel for a single row and a short context."""
        (num_heads, num_kv_heads, head_dim), (batch, num_rows) = heads, rows
        position, _, bias = attention_metadata(batch, num_rows, context, head_dim)
        q = randn(*rows, num_heads, head_dim, dtype=dtype)
        k, v = (randn(batch, num_kv_heads, context + 3, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        ahead = torch.arange(context + 3, device=DEVICE) > position[:, -1:]
        beyond = ahead[:, None, :, None].expand_as(k)
        expected = attention(*wide(q, k, v), bias, position)
        k[beyond], v[beyond] = math.nan, math.nan  # must not be read
        close(attention(q, k, v, bias, position), expected, dtype)
        weight = randn(20, num_heads * head_dim, dtype=dtype, seed=3) / math.sqrt(num_heads * head_dim)
        residual = randn(*rows, 20, dtype=dtype, seed=4)
        with launches() as seen:
            result = attention_linear_add(q, k, v, None, position, weight, residual, context=context)
        close(result, linear_add(expected, *wide(weight, residual)), dtype)
        assert (names(seen) == ["attention_linear_add_row"]) == (context <= 32 and rows == (1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_does_not_depend_on_the_context(dtype):
    """Nor on the batch: bit for bit."""
    q, k, v = (randn(3, heads, rows, 16, dtype=dtype) for heads, rows in ((1, 4), (2, 300), (2, 300)))
    position = torch.tensor([[63], [64], [130]], device=DEVICE)
    short, long = (attention(q, k, v, torch.zeros(3, 1, context, device=DEVICE), position) for context in (131, 300))
    assert torch.equal(short, long)
    alone = attention(q[1:2], k[1:2], v[1:2], torch.zeros(1, 1, 131, device=DEVICE), position[1:2])
    assert torch.equal(alone[0], short[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "codebooks", "dim"), [(1, 2, 5), (3, 8, 70), (17, 32, 64)])
def test_embed_rows(dtype, batch, codebooks, dim):
    generator = torch.Generator().manual_seed(batch)
    row = torch.randint(11, (batch, 1, codebooks + 1), generator=generator).to(DEVICE)
    mask = (torch.rand(batch, 1, codebooks + 1, generator=generator) < 0.6).to(DEVICE)
    audio, text = randn(codebooks * 11, dim, dtype=dtype), randn(11, dim, dtype=dtype, seed=1)
    offset = torch.arange(codebooks, device=DEVICE) * 11
    row = torch.where(mask, row, 10**6 * (torch.arange(codebooks + 1, device=DEVICE) == codebooks))  # must not be read
    expected = embed_rows(torch.where(mask, row, 0), mask, offset, *wide(audio, text))
    close(embed_rows(row, mask, offset, audio, text), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 12, 256, 2048])
def test_sample(dtype, size):
    """The same ids as the reference draws from the same logits, and their rows of the table."""
    batch, codebooks = 24, 3
    logits = 3 * randn(batch, size, dtype=dtype)
    logits[::5] = logits[::5].round()  # ties
    generator = torch.Generator().manual_seed(size)
    seed = torch.randint(2**62, (batch,), generator=generator).to(DEVICE)
    frame = torch.randint(1000, (batch,), generator=generator).to(DEVICE)
    temperature = torch.tensor([0.0, 0.5, 0.9, 2.0] * 6, device=DEVICE)
    top_k = torch.tensor([1, 2, 3, 5, size, 50] * 4, device=DEVICE).clamp(max=size)
    table = randn(size + 3, 20, dtype=dtype)
    noise_BKV = gumbel_noise(seed, frame, codebooks, size) * temperature[:, None, None]
    codes = torch.full((batch, codebooks), -1, device=DEVICE)
    noise = Noise(seed, frame, temperature, top_k, None)
    for codebook in range(codebooks):
        expected = draw_ids(logits, noise_BKV[:, codebook], top_k)
        rows = sample(logits, codebook, noise, codes, table if codebook else None)
        assert codes[:, codebook].tolist() == expected.tolist()
        assert rows is None if codebook == 0 else torch.equal(rows, table[expected])
        assert (codes[:, codebook + 1 :] == -1).all()


def test_sample_terminates_on_nan_and_infinite_logits():
    noise = Noise(*(torch.ones(1, dtype=torch.int64, device=DEVICE) for _ in range(4)), None)
    noise = noise._replace(temperature_B=torch.ones(1, device=DEVICE))
    codes = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for value in (math.nan, math.inf, -math.inf):
        sample(torch.full((1, 8), value, device=DEVICE), 0, noise, codes, None)
        assert 0 <= codes.item() < 8


@pytest.mark.parametrize(("batch", "codebooks"), [(1, 4), (3, 7), (5, 32)])
def test_advance_frame(batch, codebooks):
    """The same state as the reference, with one slot at the last position."""
    generator = torch.Generator().manual_seed(batch)
    codes = torch.randint(2051, (batch, codebooks), generator=generator).to(DEVICE)
    row = torch.randint(9, (batch, codebooks + 1), generator=generator).to(DEVICE)
    mask = torch.zeros(batch, codebooks + 1, dtype=torch.bool, device=DEVICE)
    mask[:, -1] = True
    position = torch.arange(10, 10 - batch, -1, device=DEVICE)
    state = (codes, row, mask, position, torch.arange(batch, device=DEVICE))
    actual, expected = ([tensor.clone() for tensor in state] for _ in range(2))
    with launches() as seen:
        advance_frame(*actual, 10, torch.zeros(1, device=DEVICE))
    assert names(seen) == ["advance_slot"]
    advance_frame_reference(*expected, 10)
    assert all(torch.equal(own, other) for own, other in zip(actual, expected, strict=True))
    assert actual[3].tolist() == [min(p + 1, 10) for p in position.tolist()]


def test_use_kernels(monkeypatch):
    def run(x, rows=1):
        return use_kernels(x, rows)

    x = torch.zeros(1, device=DEVICE)
    assert run(x) and run(x, MAX_ROWS)
    assert not run(x, MAX_ROWS + 1) and not run(x.double()) and not run(x.long())
    monkeypatch.setenv("CSM_OPS", "reference")
    assert not run(x)
    monkeypatch.delenv("CSM_OPS")
    assert run(x) == x.is_cuda
    monkeypatch.setenv("CSM_OPS", "fast")
    with pytest.raises(ValueError, match="CSM_OPS"):
        run(x)


@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [((9, 0), 12030, True), ((12, 0), 13000, True), ((9, 0), 12020, False), ((8, 9), 12080, False)],
)
def test_dependent_launch_needs_hopper_and_a_driver_of_cuda_12_3(monkeypatch, capability, driver, expected):
    monkeypatch.setattr(launch_module, "_capability", lambda device: capability)
    monkeypatch.setattr(launch_module, "driver_version", lambda: driver)
    assert launch_module.supports_pdl.__wrapped__(torch.device("cuda", 7)) is expected
    assert not launch_module.supports_pdl(torch.device("cpu"))


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_frame_with_kernels_equals_the_reference(noisy, monkeypatch, batch):
    """One frame of the random checkpoint, float32, at several temperatures."""
    model = noisy.model.to(DEVICE)
    codes = []
    for ops in ("reference", "triton"):
        monkeypatch.setenv("CSM_OPS", "reference")
        state = FrameState.allocate(model.config, batch, DEVICE, model.dtype)
        for slot in range(batch):
            rows = text_rows([256, *b"[0]Hello."[slot:], 257], model.config.num_codebooks)[:2]
            Prefill(model).start(state, slot, *rows, SamplingParams(temperature=slot / 2, seed=slot))
        monkeypatch.setenv("CSM_OPS", ops)
        with launches() as seen:
            decode_frame(model, state, 256)
        assert bool(seen) == (ops == "triton")
        codes.append((state.codes_BK, state.backbone_cache.k_LBGSd))
    assert torch.equal(codes[0][0], codes[1][0])
    torch.testing.assert_close(codes[0][1], codes[1][1], atol=1e-4, rtol=1e-4)
