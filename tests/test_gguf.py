"""GGUF files: every type, round trips with the package gguf, models that keep their blocks, and damaged files."""

import gzip
import json
import shutil
import struct
import tracemalloc
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_quantized_rows import codes

import csm.generator
import generate
from csm import CSMError, Generator
from csm.__main__ import main
from csm.bench import command as bench
from csm.bench.model_setup import load
from csm.compare import compare_sentence
from csm.errors import CheckpointError
from csm.finetune.export import save_model
from csm.gguf_model import read_gguf_model
from csm.kernels.native import library
from csm.kernels.quantized import QuantizedWeight, dense, unpack
from csm.kernels.quantized_rows import QuantizedRows, quantize_fp8
from csm.lora import Lora, LoraConfig, save_adapter
from csm.model import CSM
from csm.opchecks import op_checks
from csm.prompt import TextTokenizer
from csm.quantize import describe, quantized_weights, set_weight
from csm.quantized_model import open_quantized, read_gguf
from csm.weights import hub, open_checkpoint, read_model
from csm.weights.gguf import open_gguf
from csm.weights.gguf_blocks import quantize_q4_k
from csm.weights.gguf_header import read_header
from csm.weights.layouts import export, hf_table, sesame_table
from ggml_types import TYPES, bf16, decode, gguf_bytes, pair, random_blocks, string, tensor_info
from noise import CONFIG, NOISE

CPU = torch.device("cpu")
NATIVE = pytest.mark.skipif(library() is None, reason="no C++ compiler")
REQUEST = dict(text="Good morning.", seed=0, temperature=0, max_audio_length_ms=800)
EXPECTED = {"Q8_0": {8}, "Q4_0": {4, 8}, "Q4_K": {8}}  # bits of the weights that stay in blocks; heads are q8_0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """NOISE, written in every scheme by the command."""
    folder = tmp_path_factory.mktemp("gguf")
    for scheme in ("q8_0", "q4_0", "q4_k"):
        assert main(["quantize", NOISE, "--scheme", scheme, "--out", str(folder / f"{scheme}.gguf"), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """The embedded checkpoint, written in every scheme."""
    folder = tmp_path_factory.mktemp("tiny")
    for scheme in ("q8_0", "q4_0", "q4_k"):
        assert main(["quantize", "tiny", "--scheme", scheme, "--out", str(folder / f"{scheme}.gguf"), "--quiet"]) == 0
    return folder


def noise_state():
    return read_model(open_checkpoint(NOISE), CPU, torch.float32)


def write_model(path, tensors, kind_of, codec=True, extra=()):
    """A file of these tensors with the package's own blocks and NOISE's config and tokenizer beside it."""
    writer = GGUFWriter(path, "csm")
    for key, value in extra:
        writer.add_string(key, value)
    for name, tensor in tensors:
        kind = kind_of(name, tensor)
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(f"{NOISE}/{name}", path.parent / name)
    return path


def q8_matrices(name, tensor):
    matrix = tensor.ndim == 2 and "embed_" not in name and "embeddings" not in name
    return GGMLQuantizationType.Q8_0 if matrix else GGMLQuantizationType.F16


def values(tensor):
    """A tensor of GGUFReader, dequantised by the package."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).view(shape)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_as_ggml_defines_it(kind, tmp_path):
    number, block, _, _ = TYPES[kind]
    data = random_blocks(kind, 3 * 512 // block)
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([], [("text_embeddings.weight", (3, 512), number, data)]))
    actual = open_gguf(tmp_path / "x.gguf").read("text_embeddings.weight")
    expected = torch.from_numpy(decode(kind, data)).view(3, 512)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(actual.float(), values(GGUFReader(tmp_path / "x.gguf").tensors[0]).float())


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q4_k"])
def test_a_written_file_is_read_back_by_the_package_and_by_ours(files, scheme):
    reader, ours = GGUFReader(files / f"{scheme}.gguf"), open_checkpoint(files / f"{scheme}.gguf")
    expected = dict(export(noise_state(), sesame_table(CONFIG)))
    assert {tensor.name for tensor in reader.tensors} == expected.keys() == ours.file_of.keys()
    for tensor in reader.tensors:
        dequantized = values(tensor)
        assert dequantized.shape == expected[tensor.name].shape
        assert torch.equal(ours.read(tensor.name).float(), dequantized)
        kind, error = tensor.tensor_type.name, (dequantized - expected[tensor.name]).norm()
        assert error <= {"F16": 1e-3, "Q8_0": 0.01, "Q4_0": 0.12, "Q4_K": 0.1}[kind] * expected[tensor.name].norm()
        multiplied = tensor.name.startswith(("backbone.layers", "decoder.layers", "projection", "codebook0"))
        assert (kind != "F16") == (multiplied and dequantized.ndim == 2)
        assert len(tensor.name) < 64  # ggml's limit
    assert scheme.upper() in {tensor.tensor_type.name for tensor in reader.tensors}
    assert reader.get_field("general.architecture").contents() == "csm"


def test_config_and_tokenizer_are_in_the_metadata(files, tmp_path):
    shutil.copyfile(files / "q8_0.gguf", tmp_path / "alone.gguf")
    checkpoint = open_checkpoint(tmp_path / "alone.gguf")
    original = open_checkpoint(NOISE)
    assert (checkpoint.config, checkpoint.codec_config) == (original.config, original.codec_config)
    assert checkpoint.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    folder = checkpoint.config_folder
    assert str(tmp_path / "alone.gguf").endswith(folder.name)
    del checkpoint
    assert not folder.exists()


def test_generation_defaults_and_pronunciation_go_along(tmp_path):
    source = shutil.copytree(NOISE, tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    with gzip.open(source / "pronunciation.json.gz", "wt") as file:
        file.write('{"words": "any"}')
    out = tmp_path / "x.gguf"
    assert main(["quantize", str(source), "--scheme", "q8_0", "--out", str(out), "--quiet"]) == 0
    folder = (checkpoint := open_checkpoint(out)).config_folder
    assert json.loads((folder / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert gzip.decompress((checkpoint.tokenizer_path.with_name("pronunciation.json.gz")).read_bytes()) == (
        b'{"words": "any"}'
    )


@NATIVE
@pytest.mark.parametrize("layout", ["sesame", "hf"])
def test_the_packages_q8_0_loads_bit_for_bit(layout, tmp_path):
    """Also from HF's names, whose rows of q and k are in another order."""
    table = {"sesame": sesame_table, "hf": hf_table}[layout](CONFIG)
    tensors = [
        (name, tensor) for name, tensor in export(noise_state(), table) if "model.embed_tokens.weight" not in name
    ]
    path = write_model(tmp_path / "x.gguf", tensors, q8_matrices)
    model = Generator.from_pretrained(path, device="cpu").model
    raw = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(path).tensors}
    weights = {weight.name: weight.value for weight in quantized_weights(model)}
    for name, weight in weights.items():
        entries = sorted((entry for entry in table if entry.target == name), key=lambda entry: entry.first)
        if len(weight.shape) == 3:
            assert weight.dtype == torch.bfloat16 and isinstance(weight, torch.nn.Parameter)
            continue
        q, scale = unpack(weight.packed, 8)
        for entry in entries:
            rows = slice(entry.first, entry.first + entry.shape[0])
            data = raw[entry.source].view(entry.shape[0], -1, 34)
            scales, q_bytes = entry.to_target(data[..., :2].flatten(1)), entry.to_target(data[..., 2:].flatten(1))
            assert torch.equal(q[rows, : entry.shape[1]].contiguous().view(torch.uint8), q_bytes)
            our_scales = scale[rows, : entry.shape[1] // 32].contiguous().view(torch.uint8)
            assert torch.equal(our_scales, scales)


@NATIVE
@pytest.mark.parametrize("scheme", EXPECTED)
def test_only_blocks_that_ops_read_stay(files, scheme):
    model = Generator.from_pretrained(files / f"{scheme.lower()}.gguf", device="cpu").model
    kept = [weight.value for weight in quantized_weights(model) if isinstance(weight.value, QuantizedWeight)]
    assert {weight.bits for weight in kept} == EXPECTED[scheme]
    assert model.depth_heads.dtype == model.text_embedding.dtype == torch.bfloat16
    assert (len(kept) == 26) == (scheme != "Q4_K")


@NATIVE
def test_greedy_codes_equal_those_of_the_same_weights_through_int8(files, tmp_path):
    """The values of a q8_0 file as a float32 checkpoint, quantised on load.

    Where a block has both 127 and -127, the sign of its scale and those of its values may be swapped.
    """
    path = files / "q8_0.gguf"
    dequantized = {tensor.name: values(tensor).float() for tensor in GGUFReader(path).tensors}
    save_file(dequantized, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(f"{NOISE}/{name}", tmp_path / name)
    options = dict(device="cpu", dtype=torch.float32, quantize="int8", progress=False)
    ours, expected = (Generator.from_pretrained(name, **options) for name in (path, tmp_path))
    for own, other in zip(quantized_weights(ours.model), quantized_weights(expected.model), strict=True):
        assert torch.equal(dense(own.value), dense(other.value)), own.name
    codes = ours.generate_codes(**REQUEST)
    assert len(codes) == 10 and torch.equal(codes, expected.generate_codes(**REQUEST))


@NATIVE
def test_written_blocks_are_those_of_quantize(files):
    """A file's int8 and int4 weights are those that the original gets when it is quantised on load."""
    for scheme, quantize in (("q8_0", "int8"), ("q4_0", "int4")):
        ours = Generator.from_pretrained(files / f"{scheme}.gguf", device="cpu", dtype=torch.float32, progress=False)
        original = Generator.from_pretrained(NOISE, device="cpu", quantize=quantize, progress=False)
        for own, other in zip(quantized_weights(ours.model), quantized_weights(original.model), strict=True):
            assert own.name == "depth_heads" or torch.equal(own.value.packed, other.value.packed), own.name


@NATIVE
def test_a_scheme_requantises_on_request_only(files, tmp_path):
    model = Generator.from_pretrained(files / "q4_k.gguf", device="cpu", quantize="backbone=int4,heads=int8").model
    bits = {weight.name: getattr(weight.value, "bits", None) for weight in quantized_weights(model)}
    assert bits["backbone.layers.0.mlp.down"] == 4 and bits["depth_heads"] == bits["projection"] == 8
    assert bits["depth_decoder.layers.0.mlp.down"] is None  # q4_k: dequantised
    assert bits["depth_decoder.layers.0.attention.qkv"] == 8  # rows of 96: q8_0 in the file
    assert main(["quantize", str(files / "q8_0.gguf"), "--scheme", "int8", "--out", str(tmp_path), "--quiet"]) == 0
    assert main(["quantize", str(files / "q8_0.gguf"), "--scheme", "depth=int4", "--out", str(tmp_path / "part")]) == 0
    part = {w.name: getattr(w.value, "bits", None) for w in quantized_weights(open_quantized(tmp_path / "part")[1])}
    assert part["depth_decoder.layers.0.mlp.down"] == 4 and part["backbone.layers.0.mlp.down"] is None
    saved = Generator.from_pretrained(tmp_path, device="cpu")
    ours = Generator.from_pretrained(files / "q8_0.gguf", device="cpu", quantize="int8")
    assert torch.equal(saved.generate_codes(**REQUEST), ours.generate_codes(**REQUEST))
    assert saved.decode(saved.generate_codes(**REQUEST)).shape == (19200,)


def test_fp8_is_made_of_a_files_values(files):
    model = Generator.from_pretrained(files / "q8_0.gguf", device="cpu", quantize="backbone=fp8").model
    state = read_model(open_checkpoint(files / "q8_0.gguf"), CPU, torch.bfloat16)
    assert describe(model) == ("backbone=fp8,depth=int8,heads=int8" if library() else "backbone=fp8")
    expected = quantize_fp8(state["backbone.layers.1.mlp.down"], torch.bfloat16)
    assert torch.equal(model.backbone.layers[1].mlp.down.dequantize(), expected.dequantize())


# On a GPU. The meta device takes the same way, and Triton's interpreter runs the kernels.


def file_bytes(path, entries):
    """Scales and values of a weight, as the package reads them: (N, blocks, 2) and (N, blocks, 16 or 32) uint8."""
    raw = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    parts = []
    for entry in entries:
        assert raw[entry.source].tensor_type.name in ("Q8_0", "Q4_0")
        data = torch.from_numpy(np.array(raw[entry.source].data)).view(entry.shape[0], entry.shape[1] // 32, -1)
        parts.append(entry.to_target(data.flatten(1)).view(data.shape))
    return torch.cat(parts).split([2, parts[0].shape[2] - 2], dim=2)


# Which input of two blocks a byte holds, by thread, half of a block, block and byte of a register.
FRAGMENT = [32 * h + 16 * s + 4 * t + i for t in range(4) for s in range(2) for h in range(2) for i in range(4)]


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_the_layout_of_a_gpu_has_the_bytes_of_the_file(files, scheme):
    path = files / f"{scheme}.gguf"
    checkpoint = open_checkpoint(path)
    model = read_gguf_model(checkpoint, None, torch.bfloat16, rows=True)
    found = {weight.name: weight.value for weight in quantized_weights(model)}
    assert found.pop("depth_heads").dtype == torch.bfloat16  # f16 in the file
    assert {weight.kind for weight in found.values()} == ({"int8"} if scheme == "q8_0" else {"int8", "int4"})
    for name, weight in found.items():
        entries = sorted((e for e in checkpoint.table if e.target == name), key=lambda entry: entry.first)
        scales, values = file_bytes(path, entries)
        assert torch.equal(weight.scales.view(torch.uint8), scales.flatten(1)), name
        expected = values.flatten(1)
        if weight.kind == "int8":
            expected = torch.nn.functional.pad(expected, (0, -expected.shape[1] % 64)).view(torch.int8)
            expected = expected.unflatten(1, (-1, 64))[:, :, FRAGMENT].flatten(1)
        assert torch.equal(weight.values, expected), name


@pytest.mark.parametrize("quantize", [None, "fp8", "depth=int4"])
def test_a_gpu_gets_the_blocks_and_what_was_asked_for(files, quantize, monkeypatch):
    monkeypatch.setenv("CSM_OPS", "triton")
    monkeypatch.setattr("csm.generator.find_device", lambda name: torch.device("meta"))
    model = Generator.from_pretrained(files / "q8_0.gguf", quantize=quantize, progress=False).model
    assert all(parameter.is_meta for parameter in model.parameters()) and model.offset_K.is_meta
    weights = {weight.name: weight.value for weight in quantized_weights(model)}
    rows = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedRows)}
    assert weights.keys() - rows.keys() == (set() if quantize == "fp8" else {"depth_heads"})
    assert all(weight.values.is_meta and weight.scales.is_meta for weight in rows.values())
    expected = {None: "int8", "fp8": "fp8", "depth=int4": "int4"}[quantize]
    assert rows["depth_decoder.layers.0.mlp.down"].kind == expected


def test_a_device_without_kernels_gets_dequantised_weights(files, monkeypatch):
    monkeypatch.setenv("CSM_OPS", "reference")
    monkeypatch.setattr("csm.generator.find_device", lambda name: torch.device("meta"))
    model = Generator.from_pretrained(files / "q8_0.gguf", progress=False).model
    assert all(weight.value.dtype == torch.float32 for weight in quantized_weights(model))
    assert describe(model) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not csm.generator._reads_blocks(torch.device("cuda"), torch.float16)
    with pytest.raises(CSMError, match="not on mps"):
        read_gguf(open_checkpoint(files / "q8_0.gguf"), "int8", torch.float32, device=torch.device("mps"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_kernels_generate_the_codes_of_a_file(files):
    """int4 blocks, int8 blocks and dense heads in one frame. Also what the self-check of such a model covers."""
    model = read_gguf_model(open_checkpoint(files / "q4_0.gguf"), None, torch.float32, rows=True)
    expected, keys = codes(model, "reference", [1])
    actual, kernel_keys = codes(model, "triton", [1])
    assert torch.equal(actual, expected)
    torch.testing.assert_close(kernel_keys, keys, atol=1e-4, rtol=1e-4)


def test_the_self_check_covers_layers_of_different_types(files):
    model = read_gguf_model(open_checkpoint(files / "q8_0.gguf"), None, torch.float32, rows=True)
    same = len(list(op_checks(model, [1])))
    down = model.backbone.layers[2].mlp.down
    set_weight(model, "backbone.layers.2.mlp.down", torch.nn.Parameter(down.dequantize(), requires_grad=False))
    assert len(list(op_checks(model, [1]))) == same + 4


def test_without_native_ops_weights_are_dequantised(files, monkeypatch):
    monkeypatch.setattr("csm.gguf_model.is_available", lambda: False)
    model = Generator.from_pretrained(files / "q8_0.gguf", device="cpu", dtype=torch.float32).model
    state = read_model(open_checkpoint(files / "q8_0.gguf"), CPU, torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_types_may_differ_within_a_weight(tmp_path):
    """q, k and v are one weight of the model. Of two types they are dequantised."""
    tensors = export(noise_state(), sesame_table(CONFIG))

    def kind_of(name, tensor):
        if name == "backbone.layers.0.attn.v_proj.weight":
            return GGMLQuantizationType.Q5_1
        return q8_matrices(name, tensor)

    checkpoint = open_checkpoint(write_model(tmp_path / "x.gguf", tensors, kind_of))
    model = Generator.from_pretrained(tmp_path / "x.gguf", device="cpu", dtype=torch.float32).model
    qkv = model.backbone.layers[0].attention.qkv
    assert torch.equal(qkv, read_model(checkpoint, CPU, torch.float32)["backbone.layers.0.attention.qkv"])
    assert isinstance(model.backbone.layers[1].attention.qkv, QuantizedWeight) == (library() is not None)


def test_q4_k_is_close_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 512, generator=generator)
    weight[1], weight[2], weight[3], weight[4, :300] = 0, -0.5, 0.25, 1e-4
    weight[5, 7] = 40.0
    data = quantize_q4_k(weight, torch.ones(512))
    actual = torch.from_numpy(gguf.quants.dequantize(data.numpy(), GGMLQuantizationType.Q4_K))
    assert np.allclose(decode("Q4_K", data.numpy().tobytes()).reshape(40, 512), actual, rtol=1e-6, atol=1e-6)
    assert torch.equal(actual[1], weight[1])
    torch.testing.assert_close(actual[2:4], weight[2:4], rtol=1e-3, atol=0)
    # A uniform quantiser of 16 levels over the range of 32 normal values has an error of about 8 %.
    assert (actual[6:] - weight[6:]).norm() < 0.075 * weight[6:].norm()
    importance = torch.ones(512)
    importance[::2] = 0.001
    weighted = torch.from_numpy(
        gguf.quants.dequantize(quantize_q4_k(weight, importance).numpy(), GGMLQuantizationType.Q4_K)
    )
    assert (weighted - weight)[6:, 1::2].norm() < (actual - weight)[6:, 1::2].norm()


@pytest.mark.parametrize(("scheme", "most"), [("q8_0", 0.003), ("q4_k", 0.05), ("q4_0", 0.12)])
def test_the_embedded_voice_speaks_from_a_file(tiny, tiny_files, scheme, most):
    """Its codec is beside the file. The divergence from the original is that of the rounding."""
    generator = Generator.from_pretrained(tiny_files / f"{scheme}.gguf", device="cpu", progress=False)
    audio = generator.generate("Good morning.", seed=0, max_audio_length_ms=1200)
    assert 0.01 < audio.square().mean().sqrt() < 0.5
    tokenizer = TextTokenizer(tiny._checkpoint.tokenizer_path, tiny.config.text_vocab_size)
    divergence = compare_sentence(tiny, generator, tokenizer, "Good morning.", seed=0)
    assert divergence.kl_K.mean() < most


def test_commands_take_a_file(files, tmp_path, capsys, monkeypatch):
    path = str(files / "q8_0.gguf")
    out = tmp_path / "out.wav"
    assert generate.main(["--model", path, "--text", "Hello.", "--max-seconds", "0.3", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
    monkeypatch.setattr("csm.compare.SENTENCES", ("Hello.",))
    assert main(["compare", path, NOISE, "--quiet"]) == 0
    assert "KL divergence" in capsys.readouterr().out
    assert main(["quantize", path, "--scheme", "q4_0", "--out", str(tmp_path / "x.gguf")]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert main(["quantize", NOISE, "--scheme", "q4_0", "--out", str(tmp_path / "x")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err
    assert main(["quantize", NOISE, "--scheme", "int4", "--out", str(tmp_path / "x.gguf")]) == 2
    assert "q8_0, q4_0, q4_k" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_an_adapter_merges_into_dequantised_weights(files, tmp_path):
    save_adapter(Lora(CONFIG, LoraConfig()), tmp_path / "adapter")
    generator = Generator.from_pretrained(files / "q8_0.gguf", device="cpu", lora=tmp_path / "adapter")
    assert not any(isinstance(weight.value, QuantizedWeight) for weight in quantized_weights(generator.model))
    assert len(generator.generate_codes(**REQUEST)) == 10


COMMANDS = {
    "generate": ["generate", "--text", "Hello."],
    "batch": ["batch", "lines.txt", "out"],
    "read": ["read", "lines.txt", "--out", "out.wav"],
    "serve": ["serve"],
    "eval": ["eval", "--sentences", "lines.txt"],
    "voice": ["voice", "say", "anna", "--text", "Hello."],
    "finetune": ["finetune", "--data", "data"],
    "bench": ["--count"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_tokenizer_of_a_file(command, tmp_path, monkeypatch, capsys):
    """The name of a tokenizer that is not there reaches the reader of the file."""
    path = write_model(tmp_path / "x.gguf", export(noise_state(), sesame_table(CONFIG)), q8_matrices)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("csm.evaluate.command.Evaluator", lambda *arguments: None)  # without a recogniser
    (tmp_path / "lines.txt").write_text('{"id": "a", "text": "Hello."}\n')
    program = bench.main if command == "bench" else main
    assert program([*COMMANDS[command], "--model", str(path), "--tokenizer", "nowhere.json"]) == 2
    assert "nowhere.json: no such file; pass a tokenizer.json" in capsys.readouterr().err


def test_both_files_of_a_comparison_take_the_tokenizer(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    path = str(write_model(folder / "x.gguf", export(noise_state(), sesame_table(CONFIG)), q8_matrices))
    (tmp_path / "files").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "files" / "tokenizer.json")
    monkeypatch.setattr("csm.compare.SENTENCES", ("Hello.",))
    assert main(["compare", NOISE, path, "--quiet"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["compare", NOISE, path, "--quiet", "--tokenizer", str(tmp_path / "files")]) == 0
    assert main(["compare", path, "--scheme", "int4", "--quiet", "--tokenizer", str(tmp_path / "files")]) == 0
    assert capsys.readouterr().out.count("| speech: KL divergence, codebook 0 |") == 2


def test_config_and_tokenizer_beside_the_file_or_named(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    path = write_model(model / "x.gguf", export(noise_state(), sesame_table(CONFIG)), q8_matrices)
    assert open_checkpoint(path).tokenizer_path.is_file()
    files = tmp_path / "files"
    files.mkdir()
    (model / "tokenizer.json").rename(files / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"x.gguf: no tokenizer in its metadata.*--tokenizer"):
        _ = open_checkpoint(path).tokenizer_path
    for tokenizer in (files, files / "tokenizer.json"):
        checkpoint = open_checkpoint(path, tokenizer=tokenizer)
        assert checkpoint.tokenizer_path.is_file()
    (model / "config.json").rename(files / "config.json")
    assert open_checkpoint(path, tokenizer=files).config == CONFIG
    with pytest.raises(CheckpointError, match=r"x.gguf: no config in its metadata, and no config.json beside it"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"none.json: no such file"):
        open_checkpoint(path, tokenizer=files / "none.json")
    with pytest.raises(CheckpointError, match="for a GGUF file only"):
        open_checkpoint(NOISE, tokenizer=files)


def test_a_codec_that_is_not_beside_the_file_is_named(files, tmp_path):
    shutil.copyfile(files / "q8_0.gguf", tmp_path / "alone.gguf")
    generator = Generator.from_pretrained(tmp_path / "alone.gguf", device="cpu")
    with pytest.raises(CheckpointError, match=r"alone.codec.safetensors: no such file; this model's codec"):
        _ = generator.codec
    codec = files / "q8_0.codec.safetensors"
    named = Generator.from_pretrained(tmp_path / "alone.gguf", device="cpu", codec=codec)
    assert named.decode(torch.zeros(2, 8, dtype=torch.int64)).shape == (3840,)


# Damage: files of a few tensors. The header is checked before config.json is looked for.

WEIGHT = ("text_embeddings.weight", (4, 64), 8, b"\0" * 4 * 2 * 34)
NORM = ("backbone.norm.scale", (8,), 1, b"\0" * 16)
NAME = pair("general.name", 8, string("x"))
GOOD = gguf_bytes([NAME], [WEIGHT, NORM])


def at(offset, data, whole=GOOD):
    return whole[:offset] + data + whole[offset + len(data) :]


def header(metadata=(), infos=(), counts=None, after=b""):
    """A header of any content."""
    counts = counts or (len(infos), len(metadata))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(metadata) + b"".join(infos) + after


def infos(*tensors):
    return header(infos=[tensor_info(*tensor) for tensor in tensors], after=b"\0" * 4096)


HUGE = 1 << 63
DAMAGED = {
    "empty": (b"", "empty"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a zip": (b"PK\3\4" + b"\0" * 60, r"a zip or \.pt file"),
    "safetensors": (struct.pack("<Q", 70) + b'{"a": {}}', "safetensors"),
    "noise": (bytes(range(7, 90)), "another kind of file"),
    "ends in the magic": (b"GG", "not a GGUF file"),
    "ends in the version": (b"GGUF\3\0", "truncated in the version"),
    "ends in the counts": (GOOD[:14], "truncated in the count of the tensors"),
    "ends in the metadata": (GOOD[:40], "truncated in the tensors"),
    "ends in a value": (gguf_bytes([NAME], [])[:51], "truncated in metadata 'general.name'"),
    "ends in the tensor infos": (GOOD[:90], "truncated in tensor text_embeddings.weight"),
    "ends in the data": (GOOD[:-20], "truncated: tensor backbone.norm.scale ends at byte"),
    "version 1": (at(4, struct.pack("<I", 1)), "version 1 is not supported"),
    "version 4": (at(4, struct.pack("<I", 4)), "version 4 is not supported"),
    "big-endian": (at(4, struct.pack(">I", 3)), "big-endian"),
    "more tensors than there are": (at(8, struct.pack("<Q", 3)), "name of tensor 3 of 3|tensor"),
    "more metadata than there is": (at(16, struct.pack("<Q", 2)), "a string of 1125899906842624 bytes"),
    "duplicate key": (gguf_bytes([NAME, NAME], [WEIGHT]), "duplicate metadata key 'general.name'"),
    "duplicate tensor": (gguf_bytes([], [WEIGHT, WEIGHT]), "duplicate tensor text_embeddings.weight"),
    "unknown value type": (gguf_bytes([pair("a.b", 13, b"\0" * 8)], [WEIGHT]), "'a.b': unknown value type 13"),
    "boolean of 2": (gguf_bytes([pair("a.b", 7, b"\2")], [WEIGHT]), "'a.b': a boolean must be 0 or 1, not 2"),
    "text that is not UTF-8": (gguf_bytes([pair("a.b", 8, string(b"\xff\xfe"))], [WEIGHT]), "'a.b': not valid UTF-8"),
    "name that is not UTF-8": (gguf_bytes([], [(b"\xff\xfe", *WEIGHT[1:])]), "name of tensor 1 of 1: not valid UTF-8"),
    "array of arrays": (gguf_bytes([pair("a.b", 9, struct.pack("<IQ", 9, 1))], [WEIGHT]), "arrays of value type 9"),
    "alignment of 0": (gguf_bytes([pair("general.alignment", 4, b"\0" * 4)], [WEIGHT]), "power of two, not 0"),
    "alignment of 24": (gguf_bytes([pair("general.alignment", 4, b"\x18\0\0\0")], [WEIGHT]), "power of two, not 24"),
    "alignment as text": (gguf_bytes([pair("general.alignment", 8, string("32"))], [WEIGHT]), "power of two, not '32'"),
    "no dimension": (infos(("x", (), 0, 0)), "tensor x: 0 dimensions"),
    "five dimensions": (infos(("x", (1, 1, 1, 1, 1), 0, 0)), "tensor x: 5 dimensions"),
    "dimension of 0": (infos(("x", (4, 0), 0, 0)), "tensor x: shape .4, 0. has a dimension of 0"),
    "rows that end in a block": (infos(("x", (4, 33), 8, 0)), "tensor x: rows of 33 are no multiple of Q8_0's block"),
    "unknown type": (infos(("x", (4, 32), 99, 0)), "tensor x: type 99 of ggml is not supported; f32"),
    "type of integers": (infos(("x", (4, 32), 24, 0)), "tensor x: type 24"),
    "type without support": (infos(("x", (4, 256), 10, 0)), "tensor x: type 10"),
    "offset out of line": (infos(("x", (4, 32), 0, 8)), "tensor x: offset 8 is no multiple of the alignment, 32"),
    "offset beyond the file": (infos(("x", (4, 32), 0, 1 << 40)), "truncated: tensor x ends at byte"),
    "overlap": (infos(("x", (4, 32), 0, 0), ("y", (4, 32), 0, 256)), "tensors x and y overlap"),
    "no tensors": (gguf_bytes([NAME], []), "no tensors"),
    "another model": (
        gguf_bytes([], [("blk.0.attn_q.weight", *WEIGHT[1:])]),
        "blk.0.attn_q.weight, .*not those of CSM",
    ),
    "llama.cpp's CSM": (
        gguf_bytes([pair("general.architecture", 8, string("llama-csm"))], [("token_embd.weight", *WEIGHT[1:])]),
        "llama.cpp's CSM example.*csm quantize sesame/csm-1b",
    ),
    "llama.cpp's CSM decoder": (gguf_bytes([], [("audio_embd.weight", *WEIGHT[1:])]), "llama.cpp's CSM example"),
    "part of a split file": (
        gguf_bytes([pair("split.count", 2, b"\2\0")], [WEIGHT]),
        "one of 2 parts.*llama-gguf-split",
    ),
    "metadata of the wrong type": (gguf_bytes([pair("csm.config_json", 4, b"\0" * 4)], [WEIGHT]), "expected a string"),
    "config that is not JSON": (
        gguf_bytes([pair("csm.config_json", 8, string("{"))], [WEIGHT]),
        "invalid JSON",
    ),
    "config of another model": (gguf_bytes([pair("csm.config_json", 8, string("{}"))], [WEIGHT]), "not a CSM model"),
    "no config": (GOOD, "no config in its metadata"),
}
BOMBS = {
    "tensors": (header(counts=(HUGE, 0)), "the tensors: 9223372036854775808 entries"),
    "metadata": (header(counts=(0, HUGE)), "the metadata: 9223372036854775808 entries"),
    "counts within limits": (header(counts=(16384, 0)), "truncated in the tensors"),
    "key": (header([struct.pack("<Q", 4 << 30)], counts=(0, 1), after=b"\0" * 64), "a string of 4294967296 bytes"),
    "string": (gguf_bytes([pair("a.b", 8, struct.pack("<Q", HUGE))], [WEIGHT]), "'a.b': a string of 92233"),
    "string of 4 GB": (gguf_bytes([pair("a.b", 8, struct.pack("<Q", 4 << 30))], [WEIGHT]), "a string of 4294967296"),
    "string beyond the file": (
        gguf_bytes([pair("a.b", 8, struct.pack("<Q", 60 << 20))], [WEIGHT]),
        "truncated in meta",
    ),
    "array": (gguf_bytes([pair("a.b", 9, struct.pack("<IQ", 10, HUGE))], [WEIGHT]), "truncated in metadata 'a.b'"),
    "array of strings": (gguf_bytes([pair("a.b", 9, struct.pack("<IQ", 8, HUGE))], [WEIGHT]), "array of 92233720"),
    "shape": (infos(("x", (1 << 62, 1 << 62), 0, 0)), "truncated: tensor x ends at byte"),
    "shape whose product is 0 in 64 bits": (infos(("x", (1 << 32, 1 << 32), 0, 0)), "truncated: tensor x ends at byte"),
    "dimensions": (header(infos=[string("x") + struct.pack("<I", 1 << 31)], after=b"\0" * 64), "2147483648 dimensions"),
}


def test_there_are_thirty_damaged_files():
    assert len(DAMAGED) >= 30


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_has_a_named_error(name, tmp_path):
    data, message = DAMAGED[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"bad.gguf.*({message})"):
        open_checkpoint(tmp_path / "bad.gguf")


@pytest.mark.parametrize("name", BOMBS)
def test_a_claim_of_gigabytes_does_not_allocate(name, tmp_path):
    """The file is sparse where the claim must be within its size."""
    data, message = BOMBS[name]
    (tmp_path / "bomb.gguf").write_bytes(data)
    with (tmp_path / "bomb.gguf").open("r+b") as file:
        if "truncated" not in message:
            file.truncate(5 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "bomb.gguf")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_sparse_header_of_gigabytes_ends_at_its_limit(tmp_path):
    """Strings that are each allowed, of a file that is large enough for all of them."""
    key = (string(f"k{index}") + struct.pack("<IQ", 9, 0) for index in range(8))
    entries = [part[:-8] + struct.pack("<IQ", 0, 1 << 29) for part in key]
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 8))
        for entry in entries:
            file.write(entry)
            file.seek(1 << 29, 1)
        file.truncate(5 << 30)
    with pytest.raises(CheckpointError, match="the header has more than"):
        read_header(tmp_path / "x.gguf")


def test_a_wrong_tensor_is_named(tmp_path):
    state = dict(export(noise_state(), sesame_table(CONFIG)))
    cases = {
        "missing tensor projection.weight": {name: state[name] for name in state if name != "projection.weight"},
        "unexpected tensor more": state | {"more": torch.ones(32)},
        r"tensor audio_head: expected shape .7, 96, 259., got .7, 259, 96.": state
        | {"audio_head": state["audio_head"].transpose(1, 2).contiguous()},
        "missing tensor audio_head": {name: state[name] for name in state if name != "audio_head"},
    }
    for message, tensors in cases.items():
        path = write_model(tmp_path / "x.gguf", tensors.items(), q8_matrices)
        with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}"):
            Generator.from_pretrained(path, device="cpu")


def test_values_that_are_not_finite_are_named(tmp_path):
    data = struct.pack("<e", float("nan")) + b"\1" * 32
    for content in (data * 8, struct.pack("<e", float("inf")) * 256):
        kind = 8 if len(content) == 272 else 1
        (tmp_path / "x.gguf").write_bytes(gguf_bytes([], [("text_embeddings.weight", (4, 64), kind, content)]))
        file = open_gguf(tmp_path / "x.gguf")
        for read in [file.read, *([file.read_blocks] if kind == 8 else [])]:
            with pytest.raises(CheckpointError, match=r"tensor text_embeddings.weight: values that are not finite"):
                read("text_embeddings.weight")


def test_a_name_of_a_file_that_is_not_there(tmp_path):
    for name in (tmp_path / "no.gguf", "models/no.gguf"):
        with pytest.raises(CheckpointError, match=r"no.gguf: no such file"):
            open_checkpoint(name)


def test_a_repository_of_gguf_files_says_what_to_download(monkeypatch):
    monkeypatch.setattr(
        hub, "_list_files", lambda *_: {"a-q8_0.gguf": hub.RemoteFile(1), "README.md": hub.RemoteFile(1)}
    )
    with pytest.raises(CheckpointError, match=r"hf download owner/csm-GGUF a-q8_0.gguf"):
        open_checkpoint("owner/csm-GGUF")


def test_a_file_is_recognised_by_its_content(files, tmp_path):
    shutil.copyfile(files / "q8_0.gguf", tmp_path / "model.bin")
    assert open_checkpoint(tmp_path / "model.bin").config == CONFIG


def test_without_the_package_the_error_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CSMError, match="pip install gguf"):
        open_checkpoint(files / "q4_k.gguf").read("decoder.layers.0.mlp.w2.weight")


# Any damage gives a CheckpointError or leaves a file that is whole.
DAMAGE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARRAYS = [
    pair("tokens", 9, struct.pack("<IQ", 8, 3) + string("a") + string("bc") + string("")),
    pair("scores", 9, struct.pack("<IQ", 6, 3) + b"\0" * 12),
]
MORE = [("x", (2, 256), 14, b"\0" * 420), ("y", (3, 1), 30, bf16(np.ones(3, "f4")))]
WHOLE = gguf_bytes([NAME, *ARRAYS], [WEIGHT, NORM, *MORE])


def read_all(path):
    file = open_gguf(path)
    for name in file.shapes:
        file.read(name)


@DAMAGE
@given(length=st.integers(0, len(WHOLE) - 33))
def test_any_truncation(tmp_path, length):
    (tmp_path / "x.gguf").write_bytes(WHOLE[:length])
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        read_all(tmp_path / "x.gguf")


@DAMAGE
@given(bits=st.lists(st.integers(0, 8 * len(WHOLE) - 1), min_size=1, max_size=4))
def test_any_flipped_bits(tmp_path, bits):
    data = bytearray(WHOLE)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        read_all(tmp_path / "x.gguf")
    except CheckpointError as error:
        assert "x.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_tensors_follow_each_other_at_the_alignment(files):
    tensors = read_header(files / "q8_0.gguf").tensors.values()
    assert all(tensor.offset % 32 == 0 for tensor in tensors)
    for tensor, following in pairwise(sorted(tensors, key=lambda tensor: tensor.offset)):
        assert 0 <= following.offset - tensor.offset - tensor.num_bytes < 32


def test_a_dense_reading_of_a_file_has_its_values(files, tmp_path):
    """What training and the benchmark read. A model that was trained from a file is saved with its codec."""
    state = load(str(files / "q8_0.gguf"), "cpu", "float32").weights
    checkpoint = open_checkpoint(files / "q8_0.gguf")
    save_model(CSM.from_state_dict(CONFIG, dict(state), CPU), tmp_path, checkpoint)
    again = open_checkpoint(tmp_path)
    assert again.has_codec and again.tokenizer_path.read_bytes() == checkpoint.tokenizer_path.read_bytes()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_model(again, CPU, torch.float32).items())
    model = Generator.from_pretrained(files / "q8_0.gguf", device="cpu", dtype=torch.float32).model
    for weight in quantized_weights(model):
        assert torch.equal(dense(weight.value), state[weight.name]), weight.name
