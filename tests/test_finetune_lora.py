"""Adapters: unmerged and merged results, files, and errors for adapters that do not fit the model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune_train import micro_model

import generate
from conftest import tensors_of
from csm import CheckpointError, Generator
from csm.__main__ import main
from csm.finetune.batches import Example, Turn, collate
from csm.finetune.loss import Trainee
from csm.lora import PARTS, TARGETS, Lora, LoraConfig, adapted_layers, load_adapter, save_adapter
from micro import MICRO, random_examples, write_data
from noise import CONFIG, NOISE

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "Merged or not."


def adapter(config=CONFIG, seed=5, **options):
    """A random adapter whose B is not zero, so that it changes the output."""
    lora = Lora(config, LoraConfig(**{"rank": 4, "alpha": 8.0} | options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in lora.b.values():
            b.copy_(torch.randn(b.shape, generator=generator) / math.sqrt(b.shape[1]))
    return lora.eval()


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapter(), tmp_path / "adapter", base=NOISE)
    return tmp_path / "adapter"


def greedy_unmerged(model, lora, text_ids, num_frames):
    """Greedy codes (T, K) with unmerged adapters and without a KV cache: everything is recomputed for each code."""
    trainee, config = Trainee(model, lora).eval(), model.config
    codes = torch.zeros(0, config.num_codebooks, dtype=torch.int64)
    for _ in range(num_frames):
        frame = torch.zeros(1, config.num_codebooks, dtype=torch.int64)
        batch = collate([Example((Turn(text_ids, codes),))], ["all"], depth_share=1.0)
        h_1D = trainee.predicting_states(batch)[-1:]
        frame[0, 0] = (h_1D @ model.codebook0_head.T)[0, : config.codebook_size].argmax()
        for codebook in range(1, config.num_codebooks):
            logits_V = trainee.depth_logits(h_1D, frame)[codebook - 1, 0]
            frame[0, codebook] = logits_V[: config.codebook_size].argmax()
        codes = torch.cat((codes, frame))
    return codes


def test_merged_and_unmerged_generate_the_same_codes(noisy, folder):
    frames = 12
    plain = noisy.generate_codes(TEXT, max_audio_length_ms=frames * 80, temperature=0)
    with torch.no_grad():
        unmerged = greedy_unmerged(noisy.model, load_adapter(folder, CONFIG), noisy._tokenizer.encode(0, TEXT), frames)
    merged = Generator.from_pretrained(NOISE, device="cpu", lora=folder)
    codes = merged.generate_codes(TEXT, max_audio_length_ms=frames * 80, temperature=0)
    assert torch.equal(codes, unmerged)
    assert not torch.equal(codes, plain)


def test_unmerging_restores_the_exact_weights(folder):
    generator = Generator.from_pretrained(NOISE, device="cpu")
    model, lora = generator.model, load_adapter(folder, CONFIG)

    def generate_codes():
        return generator.generate_codes(TEXT, max_audio_length_ms=800, temperature=0)

    before, plain = {name: p.clone() for name, p in model.named_parameters()}, generate_codes()
    with lora.merged(model):
        assert not torch.equal(generate_codes(), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(generate_codes(), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_with_unmerged_adapters_equals_merged(dropout):
    """For adapters of all layers and of some; dropout has no effect in evaluation."""
    batch = collate(random_examples(3), "abc", 1.0)
    for targets, parts in ((TARGETS, PARTS), (("k", "up"), ("backbone",)), (("v", "gate", "down"), ("depth_decoder",))):
        model = micro_model()
        lora = adapter(MICRO, targets=targets, parts=parts, dropout=dropout)
        with torch.no_grad():
            unmerged, plain = Trainee(model, lora).eval()(batch), Trainee(model)(batch)
            lora.merge(model)
            merged = Trainee(model)(batch)
        for mine, theirs, without in zip(unmerged, merged, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
            assert parts == ("depth_decoder",) or not torch.allclose(mine, without, rtol=1e-4)


def test_dropout_is_random_in_training():
    lora = adapter(MICRO, dropout=0.5).train()
    trainee, batch = Trainee(micro_model(), lora).train(), collate(random_examples(2), "ab", 1.0)
    assert trainee(batch).codebook0 != trainee(batch).codebook0


def test_the_file_holds_only_the_adapter(folder):
    tensors = load_file(folder / "adapter.safetensors")
    layers = adapted_layers(CONFIG, LoraConfig(rank=4))
    assert len(layers) == 7 * (CONFIG.backbone.num_layers + CONFIG.depth_decoder.num_layers)
    assert tensors.keys() == {f"{layer.name}.{part}" for layer in layers for part in "AB"}
    assert tensors["backbone.layers.0.mlp.up.B"].shape == (CONFIG.backbone.hidden_dim, 4)
    values = json.loads((folder / "adapter_config.json").read_text())
    assert (values["rank"], values["alpha"], values["base_model"]) == (4, 8.0, NOISE)


def test_an_adapter_of_another_shape_is_refused_by_tensor_name(tmp_path, capsys):
    save_adapter(adapter(MICRO), tmp_path / "other")
    name = r"tensor backbone.layers.0.attention.q.A has shape \(4, 48\), the model needs \(4, 128\)"
    with pytest.raises(CheckpointError, match=name):
        Generator.from_pretrained(NOISE, device="cpu", lora=tmp_path / "other")
    arguments = ["--model", NOISE, "--text", "No.", "--lora", tmp_path / "other", "--out", tmp_path / "no.wav"]
    assert generate.main(list(map(str, arguments))) == 2
    message = capsys.readouterr().err
    assert "backbone.layers.0.attention.q.A" in message and str(tmp_path / "other") in message
    assert not (tmp_path / "no.wav").exists()


def test_damaged_adapter_files_are_refused_by_tensor_name(folder):
    path, good = folder / "adapter.safetensors", tensors_of(folder / "adapter.safetensors")
    name = "depth_decoder.layers.1.mlp.down.B"

    def refused(tensors, match):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=match):
            load_adapter(folder, CONFIG)

    refused({key: value for key, value in good.items() if key != name}, f"missing tensor {name}")
    refused(good | {"backbone.layers.4.mlp.up.A": torch.zeros(4, 128)}, "unexpected tensor backbone.layers.4.mlp.up.A")
    refused(good | {name: torch.full_like(good[name], math.nan)}, f"{name} contains values that are not finite floats")
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="adapter.safetensors: cannot read the adapter's weights"):
        load_adapter(folder, CONFIG)
    path.unlink()
    with pytest.raises(CheckpointError, match="adapter.safetensors"):
        load_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 0}, "the adapter's rank must be at least 1"),
        ({"targets": ["q", "w"]}, "the adapter's targets must be among"),
        ({"adapter": "peft"}, "not an adapter configuration of this package"),
        ({"alpha": "much"}, "cannot read the adapter configuration"),
    ],
)
def test_a_bad_adapter_configuration_is_refused(folder, change, match):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        load_adapter(folder, CONFIG)


def test_from_finetune_lora_to_generate(tmp_path, capsys):
    """``finetune --lora`` to ``generate.py --lora``; the model that ``--merge`` writes gives the same audio."""
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    arguments = ["--data", data, "--model", NOISE, "--out", out, "--steps", 6, "--lora", "--rank", 2, "--merge"]
    arguments += ["--targets", "q", "v", "down", "--learning-rate", 0.02, "--warmup", 0, "--ema", 0.5]
    assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0
    adapted = Generator.from_pretrained(NOISE, device="cpu", lora=out / "adapter")
    merged = Generator.from_pretrained(out / "model", device="cpu")
    for name, parameter in adapted.model.named_parameters():
        torch.testing.assert_close(parameter, dict(merged.model.named_parameters())[name], atol=1e-6, rtol=0)
    changed = load_file(out / "adapter" / "adapter.safetensors")
    assert {name.split(".")[4] for name in changed} == {"q", "v", "down"}
    assert all(tensor.any() for tensor in changed.values())

    def generated(*model):
        wav = tmp_path / "out.wav"
        arguments = [*model, "--text", TEXT, "--out", wav, "--max-seconds", 0.8, "--temperature", 0, "--device", "cpu"]
        assert generate.main([*map(str, arguments), "--quiet"]) == 0
        return wav.read_bytes()

    wavs = [generated("--model", NOISE, "--lora", out / "adapter"), generated("--model", out / "model")]
    assert wavs[0] == wavs[1] != generated("--model", NOISE)


def test_adapters_train_over_bfloat16_weights(tmp_path):
    """Frozen weights are bfloat16, adapters and optimizer state float32; audio samples do not change the training."""
    data = write_data(tmp_path / "data")
    options = [
        "--data",
        data,
        "--model",
        NOISE,
        "--lora",
        "--precision",
        "bfloat16",
        "--activation-checkpointing",
        "--steps",
        3,
    ]
    options += ["--eval-every", 0, "--warmup", 0, "--sample-seconds", 0.2]
    tensors = []
    for name, more in (("without_samples", []), ("with_samples", ["--sample-every", 1])):
        arguments = [*options, "--out", tmp_path / name, *more]
        assert main(["finetune", *map(str, arguments), "--device", "cpu", "--quiet"]) == 0
        tensors.append(tensors_of(tmp_path / name / "adapter" / "adapter.safetensors"))
    assert len(list((tmp_path / "with_samples" / "samples").iterdir())) == 3
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors[0].values())
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
