"""The table of the depth decoder's first q, k and v: the same bits as without it, and only where that can be.

Without a GPU the kernels run in Triton's interpreter; with one (``make gpu``) they are compiled.
"""

import math

import pytest
import torch
from test_frame import Recorder

from csm.bench.launches import count_launches
from csm.config import CSM_1B, CSMConfig, TransformerConfig
from csm.engine import Engine
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, GraphError
from csm.kernels import QKVGather, launch_config, norm_rope_cache, sample, tabulate_qkv
from csm.kernels.launch import enable_kernels, launches
from csm.kernels.launch_config import MAX_GEMV_ROWS
from csm.kernels.sample import Noise
from csm.lora import Lora, LoraConfig
from csm.model import CSM
from csm.prefix_cache import PrefixCache
from csm.quantize import quantize_model, weight_bytes
from csm.runner import BatchRunner
from csm.weights.layouts import sesame_table, target_shapes
from noise import random_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOW_BATCH = pytest.param(8, torch.bfloat16, None, marks=pytest.mark.slow)
SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=32)
CONFIG = CSMConfig(
    backbone=TransformerConfig(dim=32, max_positions=256, **{**SIZES, "num_layers": 1}),
    depth_decoder=TransformerConfig(dim=24, max_positions=4, **SIZES),
    text_vocab_size=258,
    audio_vocab_size=23,
    num_codebooks=4,
    codebook_size=20,
)

pytestmark = [pytest.mark.cuda] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def kernels(monkeypatch, one_thread):
    """Force the kernels; few programs, because the interpreter runs one at a time."""
    monkeypatch.setenv("CSM_OPS", "triton")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(launch_config, "MIN_PROGRAMS", 3)
        monkeypatch.setattr(launch_config, "PROGRAM_WEIGHT_BYTES", 1 << 18)
        launch_config._launch_config.cache_clear()
    yield
    launch_config._launch_config.cache_clear()


def csm(dtype=torch.float32):
    state = {name: tensor.to(DEVICE, dtype) for name, tensor in random_state(sesame_table(CONFIG), seed=1).items()}
    return CSM.from_state_dict(CONFIG, state, DEVICE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def random_slots(model, batch):
    """Slots in the middle of different requests, sampled and greedy. Alone, it is a sampled one."""
    state = FrameState.allocate(model.config, batch, DEVICE, model.dtype, 256)
    state.pending_row_BC.copy_(torch.arange(batch * 5).view(batch, 5) % 20)
    state.pending_mask_BC[:, :-1] = True
    state.position_B.copy_(10 + 7 * torch.arange(batch))
    state.seed_B.copy_(torch.arange(batch) + 5)
    state.temperature_B.copy_(torch.tensor([0.0, 0.9, 1.5, 0.0] * 3)[1 : batch + 1])
    state.top_k_B.fill_(12)
    for cache_LBGSd in (state.backbone_cache.k_LBGSd, state.backbone_cache.v_LBGSd):
        cache_LBGSd.copy_(randn(*cache_LBGSd.shape))
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_a_row_has_the_bits_of_the_product(dtype, batch):
    """For any number of rows at once; and it is the float64 product, rotated."""
    x, norm = randn(2, 17, 24).to(dtype), randn(24, seed=1).to(dtype)
    weight = (randn(64, 24, seed=2) / math.sqrt(24)).to(dtype)
    angle_Kp = torch.tensor([[2.0], [3.0]]) * torch.tensor([1.0, 0.3, 0.1, 0.02])
    rope_Kp2 = torch.stack((angle_Kp.cos(), angle_Kp.sin()), dim=-1).to(DEVICE)
    with launches() as seen:
        table = tabulate_qkv(x, norm, weight, 1e-5, rope_Kp2, num_kv_heads=2)
    assert {launch.name for launch in seen} == {"norm_rope_cache_rows"} and len(seen) == 2 * 3
    wide = tabulate_qkv(x.double(), norm.double(), weight.double(), 1e-5, rope_Kp2.double(), num_kv_heads=2)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(table.double(), wide, atol=tolerance, rtol=tolerance)
    slot_B1 = torch.arange(batch, device=DEVICE)[:, None]
    for k, position in enumerate((2, 3)):
        caches = torch.full((2, batch, 2, 5, 8), math.nan, dtype=dtype, device=DEVICE)
        position_B1 = torch.full((batch, 1), position, device=DEVICE)
        rope_B1p2 = rope_Kp2[k].repeat(batch, 1, 1, 1)
        ids = torch.arange(batch, device=DEVICE) * 2 + 1
        q_B1Hd = norm_rope_cache(x[k, ids, None], norm, weight, 1e-5, rope_B1p2, *caches, slot_B1, position_B1)
        computed = torch.cat((q_B1Hd[:, 0], *caches[:, :, :, position]), dim=1)
        assert torch.equal(computed.flatten(1), table[k, ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ops", ["triton", "reference"])
@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 1, 6), (8, 2, 16)], ids=str)
def test_the_sampler_copies_the_row_of_its_code(monkeypatch, dtype, ops, heads):
    """Into the slot's position of the cache, and nowhere else."""
    monkeypatch.setenv("CSM_OPS", ops)
    (H, G, d), size, batch, position = heads, 37, 5, 2
    logits, table_VE = randn(batch, size).to(dtype), randn(size, (H + 2 * G) * d, seed=1).to(dtype)
    caches = torch.full((2, batch + 1, G, 4, d), math.nan, dtype=dtype, device=DEVICE)
    gather = QKVGather.allocate(table_VE, *caches[:, :batch, :, position])
    codes = torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    zeros, noise_BKV = torch.zeros(batch, device=DEVICE), torch.zeros(batch, 3, size, device=DEVICE)
    ones = torch.ones_like(codes[:, 0])
    noise = Noise(ones, ones, zeros, ones, noise_BKV if ops == "reference" else None)
    embedding_VD = randn(size, 10, seed=2).to(dtype)
    rows = sample(logits, 1, noise, codes, embedding_VD, qkv=gather)
    code_B = logits.argmax(dim=1)
    assert codes[:, 1].tolist() == code_B.tolist() and torch.equal(rows, embedding_VD[code_B])
    q, k, v = table_VE[code_B].view(batch, -1, d).split([H, G, G], dim=1)
    assert torch.equal(gather.q_B1Hd[:, 0], q)
    assert torch.equal(caches[0, :batch, :, position], k) and torch.equal(caches[1, :batch, :, position], v)
    assert caches.isfinite().sum() == 2 * batch * G * d


@pytest.mark.parametrize(
    ("batch", "dtype", "scheme"),
    [
        (1, torch.float32, None),
        (1, torch.bfloat16, None),
        pytest.param(4, torch.float16, None, marks=pytest.mark.slow),
        SLOW_BATCH,
        pytest.param(1, torch.bfloat16, "int8", marks=pytest.mark.slow),
        pytest.param(4, torch.float32, "int4", marks=pytest.mark.slow),
        (1, torch.float32, "int4"),
        (1, torch.float32, "fp8"),
    ],
    ids=str,
)
def test_a_frame_with_the_table_equals_one_without(batch, dtype, scheme):
    """Codes, and both caches, bit for bit; greedy and sampled slots."""
    model, states, counts = csm(dtype), [], []
    if scheme is not None:
        quantize_model(model, scheme, rows=True)
    for with_table in (False, True):
        if with_table:
            model.precompute_depth_qkv()
        state = random_slots(model, batch)
        with launches() as seen:
            decode_frame(model, state, 256)
        states.append(state.buffers())
        counts.append(len(seen))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["codes_BK"].unique().numel() > 2
    assert counts[0] - counts[1] == CONFIG.num_codebooks - 2  # every depth pass but the first


def test_the_table_is_what_a_frame_reads():
    """Another table gives other codes: the equality above is not one of two frames that both compute."""
    model = csm()
    model.precompute_depth_qkv()
    codes = []
    for scale in (1, -1):
        model.depth_qkv.mul_(scale)
        state = random_slots(model, 4)
        decode_frame(model, state, 256)
        codes.append(state.codes_BK.clone())
    assert torch.equal(codes[0][:, :2], codes[1][:, :2])  # from codebook 2 on, the table is read
    assert not torch.equal(codes[0], codes[1])


def frame_launches(model, batch):
    state = random_slots(model, batch)
    with launches() as seen:
        decode_frame(model, state, 256)
    return [launch.name for launch in seen]


def test_more_rows_than_the_kernel_of_the_table_takes_are_computed():
    """Tensor cores round differently, so the table's bits would not be theirs."""
    model = csm()
    model.precompute_depth_qkv()
    depth_rows = CONFIG.depth_decoder.num_layers * (CONFIG.num_codebooks - 1)
    assert frame_launches(model, MAX_GEMV_ROWS + 1).count("rope_cache_row") >= depth_rows


def test_without_kernels_there_is_no_table(monkeypatch):
    model = csm()
    monkeypatch.setenv("CSM_OPS", "reference")
    model.precompute_depth_qkv()
    assert model.depth_qkv is None
    monkeypatch.setenv("CSM_OPS", "triton")
    model.precompute_depth_qkv()
    assert model.depth_qkv is not None and model.code_qkv(1, 1) is not None
    enable_kernels(model.device, False)
    try:
        assert model.code_qkv(1, 1) is None
        assert frame_launches(model, 1) == []
    finally:
        enable_kernels(model.device, True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="weights that are packed for a CPU")
def test_weights_that_are_packed_for_a_cpu_have_no_table():
    model = csm()
    quantize_model(model, "depth=int8")
    if isinstance(model.depth_decoder.layers[0].attention.qkv, torch.Tensor):
        pytest.skip("no C++ compiler: the weights are dequantised")
    model.precompute_depth_qkv()
    assert model.depth_qkv is None


def test_changed_weights_discard_the_table():
    """Merged adapters get a table of their own."""
    model = csm()
    model.precompute_depth_qkv()
    before = model.depth_qkv
    lora = Lora(CONFIG, LoraConfig(rank=2), DEVICE)
    for b in lora.b.values():
        b.data.normal_()
    with lora.merged(model):
        assert model.depth_qkv is None
        model.precompute_depth_qkv()
        assert not torch.equal(model.depth_qkv, before)
        expected = random_slots(model, 1)
        decode_frame(model, expected, 256)
    assert model.depth_qkv is None
    decode_frame(model, random_slots(model, 1), 256)  # computes q, k and v
    model.precompute_depth_qkv()
    assert torch.equal(model.depth_qkv, before)


def test_the_step_waits_for_nothing():
    """On the meta device, where an op that needs a value fails as well."""
    meta = torch.device("meta")
    shapes = target_shapes(sesame_table(CONFIG))
    model = CSM.from_state_dict(CONFIG, {name: torch.empty(shape, device=meta) for name, shape in shapes.items()}, meta)
    model.precompute_depth_qkv()
    state = FrameState.allocate(CONFIG, 2, meta, model.dtype, 256)
    with Recorder() as recorder, launches() as seen:
        decode_frame(model, state, 256)
    assert recorder.calls
    assert sum(launch.constants.get("BLOCK_E", 0) > 0 for launch in seen) == CONFIG.num_codebooks - 2


def test_a_captured_frame_names_a_table_that_moved(captures):
    model = csm()
    model.precompute_depth_qkv()
    state = random_slots(model, 1)
    runner = BatchRunner(model, state, frame_size=1920)
    graph = Graph(lambda: decode_frame(model, state, 256), runner._buffers, DEVICE)
    graph.check()
    kept, model.depth_qkv = model.depth_qkv, model.depth_qkv.clone()
    with pytest.raises(GraphError, match="buffer depth_qkv: address was"):
        graph.check()
    model.depth_qkv = kept
    model.precompute_depth_embedding()
    with pytest.raises(GraphError, match="buffer depth_"):
        graph.check()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs the stand-in for captures")
def test_an_engine_has_one_table_for_all_its_batch_sizes(monkeypatch, captures):
    """It is computed before the first capture, and captured frames read it."""
    monkeypatch.setenv("CSM_SELFCHECK", "0")
    model = csm()
    engine = Engine(model, lambda: None, 1920, 4, PrefixCache(0))
    monkeypatch.setattr(engine, "_audio_decoder", lambda: None)
    engine.warmup([1])
    table = model.depth_qkv
    assert table is not None
    with launches() as seen:
        engine.warmup([2, 4])
    assert model.depth_qkv is table
    assert not seen
    assert len(captures) > 2


def test_the_memory_of_the_table_is_counted():
    model = csm(torch.bfloat16)
    before = weight_bytes(model)["bfloat16"]
    model.precompute_depth_qkv()
    assert model.depth_qkv.shape == (2, 20, 64)
    assert weight_bytes(model)["bfloat16"] - before == model.depth_qkv.nbytes == 2 * 2 * 20 * 64


def test_csm_1b_has_636_launches_and_a_table_of_189_mb():
    assert count_launches(CSM_1B, "triton")["norm_rope_cache_rows"] == 16 + 31 * 4 - 30
    shapes = target_shapes(sesame_table(CSM_1B))
    meta = torch.device("meta")
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=meta) for name, shape in shapes.items()}
    model = CSM.from_state_dict(CSM_1B, weights, meta)
    model.precompute_depth_qkv()
    assert model.depth_qkv.nbytes == 188_743_680
    for batch, launched in ((1, 636), (4, 756), (8, 760)):
        assert count_launches(CSM_1B, "triton", batch).total() == launched
