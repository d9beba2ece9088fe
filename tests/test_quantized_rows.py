"""Quantised weights in the layout of the Triton kernels: its bytes, models that run with it, and what it needs."""

from dataclasses import replace

import pytest
import torch
from test_frame import Recorder
from test_kernels import randn

from csm import Generator
from csm.bench.launches import shadow_step
from csm.bench.model_setup import forced_ops
from csm.config import CSM_1B, CSMConfig, TransformerConfig
from csm.errors import CSMError
from csm.frame import FrameState, decode_frame
from csm.kernels.launch import launches
from csm.kernels.quantized_rows import KINDS, QuantizedRows, empty_rows, pack_rows, quantize_fp8
from csm.model import CSM
from csm.opchecks import op_checks
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.quantize import (
    PRESETS,
    check_device,
    describe,
    keep_in_cache,
    parse_scheme,
    quantize,
    quantize_model,
    quantize_rows,
    quantized_weights,
    use_rows,
    weight_bytes,
)
from csm.quantized_model import open_quantized, read_quantized, save_quantized
from csm.sampling import SamplingParams
from csm.selfcheck import _key, choose_rung
from csm.weights import open_checkpoint
from csm.weights.layouts import sesame_table
from noise import random_state

CPU = torch.device("cpu")
SIZES = dict(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=48)
SMALL = CSMConfig(
    backbone=TransformerConfig(dim=40, max_positions=256, **SIZES),
    depth_decoder=TransformerConfig(dim=32, max_positions=4, **SIZES),
    text_vocab_size=258,
    audio_vocab_size=67,
    num_codebooks=3,
    codebook_size=64,
)


def small_model(scheme):
    """As small as it can be, because the interpreter is slow."""
    model = CSM.from_state_dict(SMALL, random_state(sesame_table(SMALL), seed=1), CPU)
    quantize_model(model, scheme, rows=True)
    return model


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 100), (3, 20, 33)], ids=str)
def test_rows_have_the_numbers_of_the_cpus_tiles(kind, shape):
    tiles = quantize(randn(*shape, dtype=torch.float32), {"int8": 8, "int4": 4}[kind], torch.float32)
    rows = tiles.to_rows()
    assert rows.shape == tiles.shape and rows.kind == tiles.kind == kind
    assert torch.equal(rows.dequantize(), tiles.dequantize())
    if len(shape) == 3:
        assert torch.equal(rows[1][:7].dequantize(), tiles[1].dequantize()[:7])
    width = -(-shape[-1] // 64) * 64 if kind == "int8" else -(-shape[-1] // 32) * 16
    blocks = -(-shape[-1] // 32)
    assert rows.values.shape == (*shape[:-1], width) and rows.scales.shape == (*shape[:-1], blocks)


def test_a_block_of_int4_has_ggmls_order():
    """block_q4_0 of ggml: the lower halves of the bytes are the first 16 values, the upper halves the last 16."""
    q = torch.arange(32).remainder(16).sub(8).flip(0).to(torch.int8)[None]
    rows = pack_rows(q, torch.ones(1, 1), "int4", torch.float32)
    assert rows.values[0].tolist() == [(int(q[0, i]) + 8) | (int(q[0, i + 16]) + 8) << 4 for i in range(16)]
    assert torch.equal(rows.dequantize(), q.float())


def test_fp8_rounds_to_three_bits_of_mantissa():
    weight = randn(50, 70, dtype=torch.float32) * torch.logspace(-6, 3, 50)[:, None]
    weight[3] = 0
    rows = quantize_fp8(weight, torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((rows.dequantize() - weight).abs() <= weight.abs() / 16 + largest / 448 * 2**-10).all()
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scales.dtype == torch.float32
    assert quantize_rows(weight, "fp8", torch.bfloat16).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_have_the_shapes_of_full_ones(kind):
    full, empty = quantize_rows(randn(2, 5, 70, dtype=torch.float32), kind, torch.float32), None
    empty = empty_rows((2, 5, 70), kind, torch.float32, torch.device("meta"))
    for name in ("values", "scales"):
        assert getattr(full, name).shape == getattr(empty, name).shape
        assert getattr(full, name).dtype == getattr(empty, name).dtype
    with pytest.raises(IndexError):
        full[:2]


def test_a_pair_of_int8_blocks_has_the_order_of_a_fragment():
    """mma.m16n8k32 of the PTX ISA: register 2s + h of thread t has inputs 16s + 4t to 16s + 4t + 3 of block h."""
    q = torch.arange(-64, 64).to(torch.int8).view(2, 64)
    rows = pack_rows(q, torch.ones(2, 2), "int8", torch.float32)
    for t, s, h, i in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(2), torch.arange(4)).tolist():
        at = 16 * t + 4 * (2 * s + h) + i
        assert torch.equal(rows.values[:, at], q[:, 32 * h + 16 * s + 4 * t + i])
    assert torch.equal(rows.dequantize(), q.float())


def test_schemes_by_preset():
    assert parse_scheme("fp8") == dict.fromkeys(("backbone", "depth", "heads"), "fp8")
    assert parse_scheme("int4-depth") == {"backbone": "int8", "depth": "int4", "heads": "int8"}
    assert parse_scheme("backbone=fp8") == {"backbone": "fp8"}


def codes(model, ops, slots, frames=1):
    """Codes of one request per slot, computed together: (slots, frames, K), and the keys of the backbone."""
    state = FrameState.allocate(model.config, len(slots), CPU, model.dtype)
    with forced_ops("reference"):
        for index, slot in enumerate(slots):
            rows = text_rows([256, *b"Hello."[slot:], 257], model.config.num_codebooks)[:2]
            Prefill(model).start(state, index, *rows, SamplingParams(temperature=slot / 2, seed=slot))
    generated = []
    with forced_ops(ops), launches() as seen:
        for _ in range(frames):
            decode_frame(model, state, 256)
            generated.append(state.codes_BK.clone())
    assert bool(seen) == (ops == "triton")
    return torch.stack(generated, dim=1), state.backbone_cache.k_LBGSd


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("scheme", PRESETS)
def test_a_frame_with_kernels_equals_the_reference_and_a_batch_each_alone(scheme):
    model = small_model(scheme)
    expected, keys = codes(model, "reference", [0, 1, 2])
    together, kernel_keys = codes(model, "triton", [0, 1, 2])
    assert torch.equal(together, expected)
    torch.testing.assert_close(kernel_keys, keys, atol=1e-4, rtol=1e-4)
    assert torch.equal(codes(model, "triton", [1])[0][0], together[1])


@pytest.mark.parametrize("scheme", PRESETS)
def test_the_step_waits_for_nothing(scheme):
    """With the references, which dequantise, and with the kernels; nothing that a capture forbids."""
    model = small_model(scheme)
    state = FrameState.allocate(model.config, 2, CPU, model.dtype)
    decode_frame(model, state)
    with forced_ops("reference"), Recorder() as recorder:
        decode_frame(model, state)
    assert any(name == "aten::mul" for name, *_ in recorder.calls)
    step = shadow_step(SMALL, 2, torch.bfloat16, "triton", scheme)
    with forced_ops("triton"), Recorder(), launches() as seen:
        step()
    kinds = {launch.constants["KIND"] for launch in seen if "KIND" in launch.constants}
    assert kinds == set(parse_scheme(scheme).values())


@pytest.mark.parametrize("scheme", ["int8", "int4-depth"])
def test_the_self_check_covers_quantised_ops(scheme, monkeypatch, tmp_path):
    """It launches kernels that read the quantised weights, and its result is kept apart from other weights'."""
    monkeypatch.setenv("CSM_OPS", "triton")
    monkeypatch.setenv("CSM_HOME", str(tmp_path))
    model = small_model(scheme)
    with launches() as seen:
        rung = choose_rung(model)
    assert rung.kernels
    kinds = {launch.constants.get("KIND") for launch in seen}
    assert set(parse_scheme(scheme).values()) <= kinds
    plain = CSM.from_state_dict(SMALL, random_state(sesame_table(SMALL), seed=1), CPU)
    assert _key(model, [1], rung) != _key(plain, [1], rung)
    assert any("linear" in check.name for check in op_checks(model, [1]))


@pytest.mark.parametrize("scheme", ["fp8", "int4-depth"])
def test_a_folder_of_a_preset_is_read_back(scheme, tmp_path):
    """As it was written, and in the layout of a GPU."""
    checkpoint = open_checkpoint("tiny")
    save_quantized(checkpoint, scheme, tmp_path / scheme, torch.float32)
    model = open_quantized(tmp_path / scheme)[1]
    expected = read_quantized(checkpoint, scheme, torch.float32)
    assert describe(model) == describe(expected) and weight_bytes(model) == weight_bytes(expected)
    weights = list(zip(quantized_weights(model), quantized_weights(expected), strict=True))
    assert all(torch.equal(own.value.dequantize(), other.value.dequantize()) for own, other in weights)
    use_rows(model, CPU)
    assert all(isinstance(own.value, QuantizedRows) for own in quantized_weights(model))
    for own, (_, other) in zip(quantized_weights(model), weights, strict=True):
        assert torch.equal(own.value.dequantize(), other.value.dequantize())


def test_fp8_generates_on_a_cpu():
    generator = Generator.from_pretrained("tiny", device="cpu", dtype=torch.float32, progress=False, quantize="fp8")
    request = dict(text="Good morning.", seed=0, max_audio_length_ms=400)
    assert torch.equal(generator.generate_codes(**request), generator.generate_codes(**request))
    assert describe(generator.model) == "backbone=fp8,depth=fp8,heads=fp8"
    with pytest.raises(CSMError, match="quantised already"):
        quantize_model(generator.model, "int8")


def test_a_gpu_without_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(CSMError, match=r"fp8 weights need .* 8\.9 .* NVIDIA A100 has 8\.0: use int8"):
        check_device(["int8", "fp8"], torch.device("cuda"))
    check_device(["int8", "int4"], torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_device(["fp8"], torch.device("cuda"))
    with pytest.raises(CSMError, match="not on mps"):
        check_device(["int8"], torch.device("mps"))


def test_the_cache_keeps_what_fits_of_the_depth_decoder():
    """MLPs first; no more than fits. Of CSM-1B in int4 a 4090 keeps the MLPs."""
    model = small_model("int8")
    depth = [weight for weight in quantized_weights(model) if weight.part == "depth"]
    sizes = {weight.name: weight.value.nbytes for weight in depth}
    mlps = sum(size for name, size in sizes.items() if ".mlp." in name)
    keep_in_cache(model, mlps)
    kept = {weight.name for weight in quantized_weights(model) if weight.value.keep}
    assert kept == {name for name in sizes if ".mlp." in name}
    model = small_model("int8")
    keep_in_cache(model, 0)
    assert not any(weight.value.keep for weight in quantized_weights(model))
    layer, meta = CSM_1B.depth_decoder, torch.device("meta")
    shapes = [(2 * layer.hidden_dim, layer.dim), (layer.dim, layer.hidden_dim)] * layer.num_layers
    assert sum(empty_rows(shape, "int4", torch.bfloat16, meta).nbytes for shape in shapes) <= 0.8 * 72e6


def test_views_keep_what_a_kernel_needs():
    weight = replace(quantize_rows(randn(2, 9, 64, dtype=torch.float32), "int8", torch.float32), keep=True)
    part = weight[1][:4]
    assert part.keep and part.shape == (4, 64) and part.values.is_contiguous() and part.scales.is_contiguous()
