"""Quantised weights: the search for scales, schemes, and models that run with them, with and without a compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kernels import randn

from csm import Generator
from csm.__main__ import main
from csm.errors import CheckpointError, CSMError
from csm.kernels.native import library, ops
from csm.kernels.quantized import dense, huge_page_buffer, packed_shape, unpack
from csm.quantize import (
    PRESETS,
    parse_scheme,
    quantize,
    quantize_blocks,
    quantize_model,
    quantized_weights,
    weight_bytes,
)
from csm.quantized_model import open_quantized, read_quantized
from csm.weights import open_checkpoint


def error(weight, q, scale, importance):
    blocks = torch.nn.functional.pad(q.double(), (0, -q.shape[1] % 32)).unflatten(1, (-1, 32))
    values = (blocks * scale.double().unsqueeze(2)).flatten(1)[:, : q.shape[1]]
    return ((values - weight.double()).square() * importance.double()).sum()


def nearest(weight, bits):
    """GGUF's q8_0 and q4_0 as they are without a search: the scale that the largest value gives."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale = (largest / (127 if bits == 8 else -8)).half().float()
    q = (blocks / scale).nan_to_num(0).round().clamp(-127 if bits == 8 else -8, 127 if bits == 8 else 7)
    return q.flatten(1)[:, : weight.shape[1]], scale.squeeze(2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 100), (64, 1030)])
def test_search_lowers_the_error(bits, shape):
    weight = randn(*shape, dtype=torch.float32) * 0.02
    weight[0, 0] = 0
    importance = 0.1 + randn(shape[1], dtype=torch.float32, seed=1).square()
    q, scale = quantize_blocks(weight, bits, importance)
    found, plain = error(weight, q, scale, importance), error(weight, *nearest(weight, bits), importance)
    assert found <= plain * (1 + 1e-6)
    if bits == 4 and shape[1] >= 64:
        assert found < 0.95 * plain
    assert q.dtype == torch.int8 and scale.dtype == torch.float16


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1, 1e4])
def test_native_search_finds_the_same(bits, dtype, scale):
    weight = (randn(37, 200, dtype=torch.float32) * scale).to(dtype)
    weight[3:5], weight[7, 50] = 0, 30 * scale
    norm = 0.1 + randn(200, dtype=torch.float32, seed=1).abs()
    q, scales = quantize_blocks(weight.float(), bits, norm.square())
    native_q, native_scales = unpack(quantize(weight, bits, dtype, norm).packed, bits)
    expected = error(weight, q, scales, norm.square())
    actual = error(weight, native_q[:37, :200], native_scales[:37, :7], norm.square())
    # Another order of operations rounds other ties and chooses another of two scales that are as good.
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=0)
    assert (native_q[:37, :200] == q).float().mean() > 0.98


def test_scale_of_the_norm_decides_what_counts():
    weight = randn(16, 32, dtype=torch.float32)
    weight[:, 0] = 4.3  # an outlier that takes most of the steps
    ignored = torch.ones(32)
    ignored[0] = 0.01
    counted = quantize(weight, 4, torch.float32).dequantize()
    uncounted = quantize(weight, 4, torch.float32, ignored).dequantize()
    rest = slice(1, None)
    assert (uncounted - weight)[:, rest].square().mean() < (counted - weight)[:, rest].square().mean()


def test_schemes():
    assert parse_scheme("int8") == {"backbone": "int8", "depth": "int8", "heads": "int8"}
    assert parse_scheme("backbone=int4, heads=int8") == {"backbone": "int4", "heads": "int8"}
    for wrong in ("int3", "", "backbone=int2", "tail=int4", "depth=int4,depth=int8", "backbone"):
        with pytest.raises(CSMError, match="int8, int4"):
            parse_scheme(wrong)


def test_huge_page_buffer_is_aligned_memory_that_can_be_written():
    buffer = huge_page_buffer((1 << 21) + 5)
    assert buffer.shape == ((1 << 21) + 5,) and buffer.dtype == torch.uint8
    buffer.fill_(7)
    assert buffer.sum() == 7 * buffer.numel()


@pytest.fixture(scope="module")
def generators():
    """The embedded checkpoint as it is and quantised."""
    plain = Generator.from_pretrained("tiny", device="cpu", dtype=torch.float32, progress=False)
    quantised = {}
    for scheme in PRESETS:
        quantised[scheme] = Generator.from_pretrained("tiny", device="cpu", dtype=torch.float32, progress=False)
        quantize_model(quantised[scheme].model, scheme)
    return plain, quantised


@pytest.mark.parametrize("scheme", PRESETS)
def test_quantised_model_computes_what_its_weights_say(generators, scheme, monkeypatch):
    """Every weight dequantised, and no op native: the same logits up to the rounding of the activations."""
    plain, quantised = generators
    model = quantised[scheme].model
    hidden = randn(1, 3, model.config.backbone.dim, dtype=torch.float32)
    for codebook in (0, 1, model.config.num_codebooks - 1):
        read = hidden if codebook == 0 else hidden[..., : model.config.depth_decoder.dim]
        logits = model.logits(codebook, read)
        assert logits.shape == plain.model.logits(codebook, read).shape
        monkeypatch.setenv("CSM_OPS", "reference")
        expected = model.logits(codebook, read)
        monkeypatch.delenv("CSM_OPS")
        assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
        assert not torch.equal(expected, plain.model.logits(codebook, read))


@pytest.mark.parametrize("scheme", PRESETS)
def test_quantised_model_generates(generators, scheme):
    _, quantised = generators
    model = quantised[scheme].model
    arguments = dict(text="Good morning.", seed=0, max_audio_length_ms=1600)
    codes = quantised[scheme].generate_codes(**arguments)
    assert codes.shape[0] > 1 and torch.equal(codes, quantised[scheme].generate_codes(**arguments))
    batch = quantised[scheme].generate_codes_batch([arguments, {**arguments, "seed": 1}])
    assert torch.equal(batch[0], codes)
    assert model.backbone.layers[0].attention.qkv.kind == PRESETS[scheme]["backbone"]
    assert model.text_embedding.dtype == torch.float32
    with pytest.raises(CSMError, match="already"):
        quantize_model(model, scheme)


def test_scheme_by_part_leaves_the_others():
    model = Generator.from_pretrained("tiny", device="cpu", dtype=torch.bfloat16, progress=False).model
    heads = model.depth_heads
    quantize_model(model, "depth=int4")
    assert model.depth_heads is heads and isinstance(model.backbone.layers[0].mlp.down, torch.nn.Parameter)
    down = model.depth_decoder.layers[0].mlp.down
    assert down.bits == 4 and down.packed.shape == packed_shape(down.shape, 4)


GENERATE = """
import sys, torch, warnings
from csm import Generator
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model, scheme, path = sys.argv[1:]
    generator = Generator.from_pretrained(model, "cpu", torch.float32, progress=False, quantize=scheme or None)
    audio = generator.generate("Good morning.", seed=0, temperature=0, max_audio_length_ms=400)
torch.save(audio, path)
print(len([w for w in said if "C++ compiler" in str(w.message)]))
"""


@pytest.mark.parametrize("quantised", ["no", "while loading", "in a folder"])
def test_without_a_compiler_it_generates_audio_and_says_once_what_is_missing(quantised, tmp_path, folder):
    """The audio is that of this process, which has native ops: rounding changes none of the greedy codes."""
    model = str(folder) if quantised == "in a folder" else "tiny"
    scheme = "int4" if quantised == "while loading" else ""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CSM_OPS")}
    environment |= {"PATH": "", "CSM_HOME": str(tmp_path)}
    command = [sys.executable, "-c", GENERATE, model, scheme, str(tmp_path / "audio.pt")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == ["1"]
    audio = torch.load(tmp_path / "audio.pt")
    generator = Generator.from_pretrained(model, "cpu", torch.float32, progress=False, quantize=scheme or None)
    expected = generator.generate("Good morning.", seed=0, temperature=0, max_audio_length_ms=400)
    assert audio.shape == expected.shape == (9600,)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(audio, expected, atol=2e-3, rtol=0)


def test_without_a_compiler_a_model_gets_the_quantised_values(monkeypatch):
    generators = [Generator.from_pretrained("tiny", device="cpu", dtype=torch.float32, progress=False) for _ in "ab"]
    models = [generator.model for generator in generators]
    quantize_model(models[0], "int4")
    monkeypatch.setattr(ops, "_ops", lambda: None)
    quantize_model(models[1], "int4")
    assert isinstance(models[1].projection, torch.nn.Parameter)
    for index in range(2):
        qkv = [model.backbone.layers[index].attention.qkv for model in models]
        different = (dense(qkv[0]) != dense(qkv[1])).float().mean().item()
        assert different < 0.02  # blocks where the search meets a tie


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded checkpoint, written as int4 by the command."""
    out = tmp_path_factory.mktemp("quantised") / "tiny-int4"
    assert main(["quantize", "tiny", "--scheme", "int4", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
class TestFolder:
    def test_it_generates_what_the_model_quantised_on_load_does(self, folder):
        checkpoint, model = open_quantized(folder)
        generator = Generator(checkpoint, model)
        loaded = Generator.from_pretrained("tiny", device="cpu", dtype=torch.bfloat16, progress=False)
        quantize_model(loaded.model, "int4")
        arguments = dict(text="Good morning.", seed=0, max_audio_length_ms=800)
        codes = generator.generate_codes(**arguments)
        assert torch.equal(codes, loaded.generate_codes(**arguments))
        audio = generator.decode(codes)
        torch.testing.assert_close(audio, loaded.decode(codes))

    def test_a_model_read_weight_by_weight_is_the_same(self, folder):
        checkpoint = open_checkpoint("tiny")
        streamed = read_quantized(checkpoint, "backbone=int8,heads=int4", torch.float32)
        whole = Generator.from_pretrained("tiny", device="cpu", dtype=torch.float32, progress=False).model
        quantize_model(whole, "backbone=int8,heads=int4")
        assert weight_bytes(streamed) == weight_bytes(whole)
        for ours, expected in zip(quantized_weights(streamed), quantized_weights(whole), strict=True):
            assert torch.equal(dense(ours.value), dense(expected.value))
        for name, parameter in whole.named_parameters():
            assert torch.equal(streamed.get_parameter(name), parameter)
        assert torch.equal(streamed.depth_embedding, whole.depth_embedding)

    def test_other_folders_are_not_opened(self, tmp_path):
        assert open_quantized("tiny") is None and open_quantized(tmp_path) is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("projection"), "missing tensor projection"),
            (lambda tensors: tensors.update(more=torch.zeros(1)), "unexpected tensor more"),
            (lambda tensors: tensors.update(projection=torch.zeros(3)), "tensor projection: expected shape"),
        ],
    )
    def test_a_wrong_file_is_named(self, folder, tmp_path, change, message):
        tensors = load_file(folder / "quantized.safetensors")
        change(tensors)
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
        metadata = {"csm.scheme": "int4", "csm.dtype": "bfloat16"}
        save_file(tensors, tmp_path / "quantized.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            open_quantized(tmp_path)

    def test_a_damaged_file_is_named(self, folder, tmp_path):
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
        whole = (folder / "quantized.safetensors").read_bytes()
        (tmp_path / "quantized.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            open_quantized(tmp_path)


def test_the_command_names_a_wrong_scheme(tmp_path, capsys):
    assert main(["quantize", "tiny", "--scheme", "int5", "--out", str(tmp_path), "--quiet"]) == 2
    assert "int5" in capsys.readouterr().err
