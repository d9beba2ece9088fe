"""Loading checkpoints: layouts, config.json, damaged files and peak memory. Each error names its file and tensor."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import OLD_CONFIG, SESAME_CONFIG, tensors_of, write_sesame
from csm import CheckpointError, CheckpointWarning, Generator
from csm.config import CSM_1B, LLAMA_1B, LLAMA_100M, MIMI, RopeScaling
from csm.pronounce import PRONUNCIATION_FILE
from csm.weights import checkpoint as checkpoint_module
from csm.weights import hub, open_checkpoint, read_codec, read_model
from csm.weights.checkpoint import TINY
from csm.weights.config_json import read_config, write_hf_config
from csm.weights.hub import MIMI_FILE, MIMI_REPO
from csm.weights.layouts import export, hf_table, mimi_table, sesame_table, target_shapes
from csm.weights.recipe import shape as tiny_shape
from noise import CODEC, CONFIG, NOISE, random_state
from oracle import Shape, random_model, save


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save(random_model(Shape()), tmp_path_factory.mktemp("hf"))


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a checkpoint, to damage."""

    def copy(folder):
        return shutil.copytree(folder, tmp_path / "copy")

    return copy


def state(folder, **options):
    return Generator.from_pretrained(folder, device="cpu", **options).model.state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


class TestLayouts:
    def test_shards(self, hf_folder, tmp_path):
        folder = save(random_model(Shape()), tmp_path, max_shard_size="100KB")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        assert same(state(folder), state(hf_folder))

    def test_shards_with_sesames_file_names(self, hf_folder, tmp_path):
        """A folder with both layouts, shards named transformers-*: the HF layout, with its codec, is read."""
        folder = save(random_model(Shape()), tmp_path, max_shard_size="100KB")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for shard in set(index["weight_map"].values()):
            (folder / shard).rename(folder / shard.replace("model-", "transformers-"))
        index["weight_map"] = {k: v.replace("model-", "transformers-") for k, v in index["weight_map"].items()}
        (folder / "transformers.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors").write_bytes(b"not to be read")
        assert open_checkpoint(folder).has_codec
        assert same(state(folder), state(hf_folder))

    @pytest.mark.parametrize("kept", ["backbone", "depth", "both"])
    def test_tied_embedding_under_either_name(self, hf_folder, copy_of, kept):
        folder = copy_of(hf_folder)
        tensors = tensors_of(folder / "model.safetensors")
        names = {
            "backbone": "backbone_model.embed_tokens.embed_audio_tokens.weight",
            "depth": "depth_decoder.model.embed_tokens.weight",
        }
        embedding = next(tensors.pop(name) for name in names.values() if name in tensors)
        for who, name in names.items():
            if kept in (who, "both"):
                tensors[name] = embedding.clone()
        save_file(tensors, folder / "model.safetensors")
        assert same(state(folder), state(hf_folder))

    def test_untied_embeddings_are_rejected(self, hf_folder, copy_of):
        folder = copy_of(hf_folder)
        tensors = tensors_of(folder / "model.safetensors")
        name = "backbone_model.embed_tokens.embed_audio_tokens.weight"
        tensors[name] = tensors["depth_decoder.model.embed_tokens.weight"] + 1
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight.*differs"):
            state(folder)

    def test_an_hf_folder_without_a_codec_fails_only_when_audio_is_requested(self, hf_folder, copy_of):
        folder = copy_of(hf_folder)
        tensors = tensors_of(folder / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("codec_model.")}
        save_file(tensors, folder / "model.safetensors")
        generator = Generator.from_pretrained(folder, device="cpu")
        assert generator.generate_codes("Hi.", 0, max_audio_length_ms=80, seed=0).shape == (1, 8)
        with pytest.raises(CheckpointError, match="kyutai/moshiko-pytorch-bf16"):
            generator.generate("Hi.", 0, max_audio_length_ms=80)

    @pytest.mark.parametrize("table", [sesame_table(CONFIG), hf_table(CONFIG), mimi_table(CODEC)], ids=len)
    def test_tables_are_inverses(self, table):
        """Export through a table and import again: every parameter, every row."""
        original = random_state(table, seed=3)
        exported = dict(export(original, table))
        rebuilt = {name: torch.full(shape, torch.nan) for name, shape in target_shapes(table).items()}
        for entry in table:
            rows = rebuilt[entry.target][entry.first : entry.first + entry.target_shape[0]]
            assert torch.isnan(rows).all()  # no two entries fill the same rows
            assert exported[entry.source].shape == entry.shape
            rows.copy_(entry.to_target(exported[entry.source]))
        assert same(original, rebuilt)

    def test_tensor_counts_of_the_published_files(self):
        assert len(sesame_table(CSM_1B)) == 187
        assert sum(len(entry.names) for entry in hf_table(CSM_1B)) + len(mimi_table(MIMI)) == 538
        parameters = sum(torch.Size(shape).numel() for shape in target_shapes(sesame_table(CSM_1B)).values())
        assert round(parameters / 1e9, 3) == 1.553

    def test_the_tiny_checkpoint_has_the_shapes_of_its_recipe(self):
        checkpoint = open_checkpoint("tiny")
        # The recipe reads phones. Weights without a text stage are of its first edition, which read bytes.
        reads_phones = (TINY / PRONUNCIATION_FILE).is_file()
        model = tiny_shape.MODEL if reads_phones else replace(tiny_shape.MODEL, text_vocab_size=258)
        assert (checkpoint.config, checkpoint.codec_config) == (model, tiny_shape.CODEC)
        assert sum(path.stat().st_size for path in TINY.iterdir()) < 25e6

    def test_transformers_reads_the_tiny_checkpoint(self):
        from transformers import CsmForConditionalGeneration

        theirs, report = CsmForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
        assert not any(report.values())
        ours = read_model(open_checkpoint("tiny"), torch.device("cpu"), torch.bfloat16)["audio_embedding"]
        depth, backbone = theirs.depth_decoder.model, theirs.backbone_model
        for embedding in (depth.embed_tokens, backbone.embed_tokens.embed_audio_tokens):
            assert torch.equal(embedding.weight.bfloat16(), ours)  # a missing one of the two is not reported


class TestRoundedCodec:
    """A bfloat16 copy of Kyutai's codec inside a checkpoint, as in a mirror. NOISE's codec is Kyutai's here."""

    @pytest.fixture
    def mirror(self, monkeypatch, tmp_path):
        monkeypatch.setattr(checkpoint_module, "MIMI", CODEC)
        exact = random_state(mimi_table(CODEC), seed=1)
        tensors = tensors_of(Path(NOISE) / "model.safetensors")
        tensors |= {name: tensor.bfloat16() for name, tensor in export(exact, mimi_table(CODEC))}
        folder = shutil.copytree(NOISE, tmp_path / "mirror")
        save_file(tensors, folder / "model.safetensors")
        return folder, exact

    def read(self, folder):
        return read_codec(open_checkpoint(folder), None, torch.device("cpu"))

    def test_is_used_with_a_warning(self, mirror):
        folder, exact = mirror
        with pytest.warns(CheckpointWarning, match=f"mirror: .* is bfloat16, .*put {MIMI_FILE}"):
            state = self.read(folder)
        assert same(state, {name: tensor.bfloat16().float() for name, tensor in exact.items()})

    @pytest.mark.parametrize("place", ["in the folder", "in the cache"])
    def test_is_replaced_by_kyutais_file(self, mirror, monkeypatch, tmp_path, recwarn, place):
        folder, exact = mirror
        path = (folder if place == "in the folder" else tmp_path) / MIMI_FILE
        save_file(exact, path)
        if place == "in the cache":
            monkeypatch.setattr(hub, "cached", lambda repo, name: path if repo == MIMI_REPO else None)
        assert same(self.read(folder), exact)
        assert not [warning for warning in recwarn if warning.category is CheckpointWarning]

    def test_another_codec_is_not_replaced(self, mirror):
        """A codec that was trained further is not a rounded copy of Kyutai's."""
        folder, exact = mirror
        name = "decoder.model.0.conv.conv.weight"
        save_file(exact | {name: exact[name] * 1.5}, folder / MIMI_FILE)
        with pytest.warns(CheckpointWarning, match="rounded"):
            state = self.read(folder)
        assert torch.equal(state[name], exact[name].bfloat16().float())

    def test_float32_needs_no_warning(self, mirror, recwarn):
        folder, exact = mirror
        tensors = tensors_of(folder / "model.safetensors") | dict(export(exact, mimi_table(CODEC)))
        save_file(tensors, folder / "model.safetensors")
        assert same(self.read(folder), exact)
        assert not [warning for warning in recwarn if warning.category is CheckpointWarning]


class TestConfig:
    def write(self, folder, values):
        path = folder / "config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    def test_old_form(self, tmp_path):
        assert read_config(self.write(tmp_path, OLD_CONFIG)) == (CSM_1B, MIMI)

    def test_hf_form_as_transformers_writes_it(self, tmp_path):
        """Transformers' defaults are CSM-1B's, except for the RoPE scaling, which the published file contains."""
        from transformers import CsmConfig

        scaling = dict(rope_type="llama3", factor=32.0)
        backbone = dict(**scaling, low_freq_factor=0.125, high_freq_factor=0.5, original_max_position_embeddings=1024)
        depth = dict(
            **scaling, low_freq_factor=0.001953125, high_freq_factor=0.0078125, original_max_position_embeddings=16
        )
        CsmConfig(rope_scaling=backbone, depth_decoder_config=dict(rope_scaling=depth)).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        config, codec = read_config(
            self.write(tmp_path, OLD_CONFIG | values)
        )  # the published file has the keys of both forms
        assert codec == MIMI
        assert config.backbone.rope_scaling == RopeScaling(32.0, 0.125, 0.5, 1024)
        assert config.depth_decoder.rope_scaling == RopeScaling(32.0, 0.001953125, 0.0078125, 16)
        for ours, preset in ((config.backbone, LLAMA_1B), (config.depth_decoder, LLAMA_100M)):
            assert {**vars(ours), "rope_scaling": None} == {**vars(preset), "rope_scaling": None}

    def test_rope_parameters_of_transformers_5(self, tmp_path):
        values = write_hf_config(CONFIG, CODEC)
        for part in (values, values["depth_decoder_config"]):
            part["rope_parameters"] = {**part.pop("rope_scaling"), "rope_theta": part.pop("rope_theta")}
        values["codec_config"]["rope_parameters"] = {"rope_theta": values["codec_config"].pop("rope_theta")}
        assert read_config(self.write(tmp_path, values)) == (CONFIG, CODEC)

    def test_extra_keys_of_published_files(self, tmp_path):
        """Keys that Transformers 4.46 to 5, sesame/csm-1b and unsloth/csm-1b are known to contain."""
        values = write_hf_config(CSM_1B, MIMI)
        values |= OLD_CONFIG | {
            "transformers_weights": "transformers.safetensors.index.json",
            "torch_dtype": "float32",
            "transformers_version": "4.52.0.dev0",
            "unsloth_fixed": True,
            "audio_token_id": 128_002,
            "eos_token_id": None,
        }
        values["codec_config"] |= {
            "_attn_implementation_autoset": True,
            "_name_or_path": "kyutai/mimi",
            "normalize": False,
            "frame_rate": 12.5,
            "num_codebooks": 32,
            "chunk_length_s": None,
            "torch_dtype": "float32",
        }
        assert read_config(self.write(tmp_path, values)) == (CSM_1B, MIMI)

    def test_write_is_the_inverse_of_read(self, tmp_path):
        assert read_config(self.write(tmp_path, write_hf_config(CONFIG, CODEC))) == (CONFIG, CODEC)
        assert read_config(self.write(tmp_path, write_hf_config(CSM_1B, MIMI))) == (CSM_1B, MIMI)

    def test_unknown_scalars_are_ignored_with_one_warning(self, tmp_path):
        values = write_hf_config(CONFIG, CODEC) | {"colour": "red", "auto_map": {"AutoModel": "x.Y"}, "qkv_bias": False}
        values["depth_decoder_config"]["novelty"] = 1
        values["codec_config"]["novelty"] = True
        path = self.write(tmp_path, values)
        with pytest.warns(CheckpointWarning) as caught:
            assert read_config(path) == (CONFIG, CODEC)
        message = f"{path}: unknown keys 'colour', 'qkv_bias', 'depth_decoder_config.novelty', 'codec_config.novelty', "
        message += "'auto_map' are ignored"
        assert [str(warning.message).startswith(message) for warning in caught] == [True]

    BAD = {
        "unknown object": (OLD_CONFIG | {"colour": {"red": 1}}, "unknown key 'colour'"),
        "missing key": ({"backbone_flavor": "llama-1B"}, "missing key 'audio_num_codebooks'"),
        "unknown flavor": (OLD_CONFIG | {"backbone_flavor": "llama-7B"}, "unknown flavor 'llama-7B'"),
        "neither form": ({"model_type": "bert"}, "no key depth_decoder_config"),
        "not an object": ([1, 2], "expected a JSON object, got list"),
        "not JSON": ("{", "invalid JSON"),
        "a string for a number": (OLD_CONFIG | {"text_vocab_size": "many"}, "expected an integer"),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_configs_are_named(self, tmp_path, name):
        values, message = self.BAD[name]
        with pytest.raises(CheckpointError, match=message) as caught:
            read_config(self.write(tmp_path, values))
        assert "config.json" in str(caught.value)

    BAD_HF = {
        ("hidden_size",): (128.7, "hidden_size: expected an integer, got 128.7"),
        ("num_hidden_layers",): (True, "num_hidden_layers: expected an integer"),
        ("rms_norm_eps",): (float("nan"), "rms_norm_eps: expected a finite number"),
        ("rope_scaling",): ("x", "expected an object"),
        ("depth_decoder_config",): (None, "depth_decoder_config: expected an object"),
        ("depth_decoder_config", "num_attention_heads"): (0, "num_heads must be positive"),
        ("codec_config",): ("x", "codec_config: expected an object"),
        ("codec_config", "num_attention_heads"): (0, "num_key_value_heads: expected 0"),
        ("codec_config", "normalize"): (True, "codec_config.normalize"),
        ("hidden_act",): ("gelu", "hidden_act: expected 'silu', got 'gelu'"),
        ("novelty",): ([1], "unknown key 'novelty'"),
        ("quantization_config",): ({"bits": 4}, "quantization_config: quantized weights are not supported"),
        ("quantization",): ("int8", "quantization: quantized weights are not supported"),
        ("qkv_bias",): (True, "qkv_bias: expected False, got True; biases"),
        ("rope_scaling", "beta_fast"): (32, "unknown key 'rope_scaling.beta_fast'"),
        ("tie_codebooks_embeddings",): (False, "tie_codebooks_embeddings"),
        ("num_key_value_heads",): (3, "multiple of num_kv_heads"),
        ("depth_decoder_config", "num_hidden_layers"): (0, "num_layers must be positive"),
        ("head_dim",): (31, "head_dim must be even"),
        ("rope_scaling", "rope_type"): ("yarn", "rope_type"),
        ("depth_decoder_config", "num_codebooks"): (9, "num_codebooks: expected 8, got 9"),
        ("depth_decoder_config", "mlp_bias"): (True, "depth_decoder_config.mlp_bias: expected False"),
        ("depth_decoder_config", "colour"): (["red"], "unknown key 'depth_decoder_config.colour'"),
        ("codec_config", "pad_mode"): ("replicate", "codec_config.pad_mode"),
        ("codec_config", "num_quantizers"): (4, "num_quantizers: expected at least 8, got 4"),
        ("codec_config", "colour"): (["red"], "unknown key 'codec_config.colour'"),
        ("codec_config", "codebook_size"): (300, r"codebook_size must be .*, not 300"),
    }

    @pytest.mark.parametrize("keys", BAD_HF, ids=".".join)
    def test_bad_hf_configs_are_named(self, tmp_path, keys):
        value, message = self.BAD_HF[keys]
        values = part = write_hf_config(CONFIG, CODEC)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        with pytest.raises(CheckpointError, match=message):
            read_config(self.write(tmp_path, values))


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestDamage:
    """Each error names its file and its tensor."""

    def damage(self, folder, change):
        tensors = tensors_of(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    @pytest.mark.parametrize("layout", ["sesame", "hf"])
    def test_missing_unexpected_and_wrongly_shaped_tensors(self, layout, sesame_folder, hf_folder, copy_of):
        folder = copy_of(sesame_folder if layout == "sesame" else hf_folder)
        pristine = tensors_of(folder / "model.safetensors")
        block = "backbone.layers.1.mlp.w3" if layout == "sesame" else "backbone_model.layers.1.mlp.up_proj"
        name = f"{block}.weight"
        faults = [
            (lambda tensors: tensors.pop(name), "missing tensor"),
            (lambda tensors: tensors.update({"intruder.weight": torch.zeros(2)}), "unexpected tensor"),
            (lambda tensors: tensors.update({name: torch.zeros(2, 3)}), r"expected shape \(.*\), got \(2, 3\)"),
            (lambda tensors: tensors.update({name: torch.zeros_like(tensors[name], dtype=torch.int8)}), "int8"),
        ]
        for change, message in faults:
            tensors = dict(pristine)
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
            with pytest.raises(CheckpointError, match=message) as caught:
                state(folder)
            assert ("intruder.weight" if message == "unexpected tensor" else name) in str(caught.value)
            assert str(folder / "model.safetensors") in str(caught.value)

    def test_codec_tensors_are_checked_too(self, hf_folder, copy_of):
        folder = copy_of(hf_folder)
        self.damage(folder, lambda tensors: tensors.pop("codec_model.upsample.conv.weight"))
        with pytest.raises(CheckpointError, match=r"missing tensor codec_model\.upsample\.conv\.weight"):
            state(folder)

    @pytest.mark.parametrize("keep", [0, 4, 500, -1])
    def test_truncated_safetensors(self, sesame_folder, copy_of, keep):
        folder = copy_of(sesame_folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
            state(folder)

    @pytest.mark.parametrize("keep", [0, 100, 5000, -1])
    def test_truncated_pt(self, sesame_state, tmp_path, keep):
        folder = write_sesame(tmp_path / "pt", sesame_state, file="ckpt.pt")
        path = folder / "ckpt.pt"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
            state(folder)

    def test_code_in_a_pickle_is_not_run(self, sesame_state, tmp_path):
        trap = tmp_path / "written"
        folder = write_sesame(tmp_path / "pt", {**sesame_state, "trap": Trap(trap)}, file="ckpt.pt")
        with pytest.raises(CheckpointError, match=r"ckpt\.pt.*never run"):
            state(folder)
        assert not trap.exists()

    def test_an_old_style_pickle_is_not_run_either(self, sesame_folder, copy_of, tmp_path):
        folder, trap = copy_of(sesame_folder), tmp_path / "written"
        (folder / "model.safetensors").unlink()
        (folder / "ckpt.pt").write_bytes(pickle.dumps(Trap(trap)))
        with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
            state(folder)
        assert not trap.exists()

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"step": {"nested": torch.zeros(1)}}], ids=str)
    def test_a_pt_file_without_a_state_dict(self, sesame_folder, copy_of, content):
        folder = copy_of(sesame_folder)
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "ckpt.pt")
        with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
            state(folder)

    def test_a_zip_that_is_not_a_checkpoint(self, sesame_folder, copy_of):
        folder = copy_of(sesame_folder)
        (folder / "model.safetensors").unlink()
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.txt", "a")
        (folder / "ckpt.pt").write_bytes(buffer.getvalue())
        with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
            state(folder)

    @pytest.mark.parametrize(
        "index",
        ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 1}}'],
    )
    def test_bad_indexes(self, sesame_folder, copy_of, index):
        folder = copy_of(sesame_folder)
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            state(folder)

    def test_a_tensor_in_two_shards(self, sesame_folder, sesame_state, copy_of):
        folder = copy_of(sesame_folder)
        save_file({"projection.weight": sesame_state["projection.weight"]}, folder / "more.safetensors")
        index = {"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"more\.safetensors: duplicate tensor projection\.weight, also in"):
            state(folder)

    def test_a_missing_shard(self, sesame_folder, copy_of):
        folder = copy_of(sesame_folder)
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: no such file"):
            state(folder)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_a_missing_file(self, sesame_folder, copy_of, name):
        folder = copy_of(sesame_folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            state(folder)

    def test_weights_of_another_model(self, sesame_folder, copy_of):
        folder = copy_of(sesame_folder)
        save_file({"bert.pooler": torch.zeros(2)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"missing tensor text_embeddings\.weight"):
            state(folder)

    @pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "/nowhere/at/all", "a/b/c", "../x/y"])
    def test_names_that_are_neither_folder_nor_hub_name(self, name):
        with pytest.raises(CheckpointError, match="no folder"):
            open_checkpoint(name)

    def test_a_file_is_not_a_folder(self, sesame_folder):
        with pytest.raises(CheckpointError, match="is a file"):
            open_checkpoint(sesame_folder / "model.safetensors")


MEASURE = """
import sys, torch
from pathlib import Path
from csm import Generator

def memory(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))

Generator.from_pretrained("tiny", "cpu")  # imports do not count as the model's memory
before = memory("VmRSS")
model = Generator.from_pretrained(sys.argv[1], "cpu", getattr(torch, sys.argv[2])).model
size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1024
print(size, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("file", ["model.safetensors", "ckpt.pt"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float32", "bfloat16"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_loading(tmp_path, file, stored, wanted):
    """At most 1.15 times the size of the loaded model (60 M parameters), for every dtype of the file."""
    backbone = replace(CONFIG.backbone, num_layers=12, dim=512, num_heads=8, head_dim=64, hidden_dim=2048)
    config = type(CONFIG)(
        backbone,
        CONFIG.depth_decoder,
        text_vocab_size=20_000,
        audio_vocab_size=2051,
        num_codebooks=8,
        codebook_size=256,
    )
    weights = {entry.source: torch.ones(entry.shape, dtype=getattr(torch, stored)) for entry in sesame_table(config)}
    folder = write_sesame(tmp_path / "m", weights, config, file)
    run = subprocess.run([sys.executable, "-c", MEASURE, folder, wanted], capture_output=True, text=True, check=True)
    size, peak = map(float, run.stdout.split())
    assert size > 100_000
    assert peak < 1.15 * size


def test_sesame_config_beside_sesame_weights(sesame_folder):
    """As in sesame/csm-1b: HF's config.json and weights in Sesame's layout."""
    checkpoint = open_checkpoint(sesame_folder)
    assert checkpoint.config == SESAME_CONFIG
    assert not checkpoint.has_codec
