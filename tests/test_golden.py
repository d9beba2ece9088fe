"""CSM-1B as it was published: golden codes, token ids, file sizes and config.json.

The tests marked ``golden`` read the published weights: ``make golden MODEL=sesame/csm-1b``, or CSM_MODEL in the
environment. The others need no weights. Those of ``TestComparison`` prove, on a small checkpoint whose golden codes HF
Transformers makes, that the golden test fails when it should.
"""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agreement import Golden, compare
from csm import Generator, UnavailableError
from csm.audio import read_audio
from csm.codec import Codec
from csm.config import CSM_1B, LLAMA_1B, LLAMA_100M, MIMI
from csm.model import rope_frequencies
from csm.prompt import TextTokenizer, build_prompt
from csm.weights import checkpoint as checkpoint_module
from csm.weights import hub
from csm.weights.config_json import read_config
from csm.weights.layouts import Change, export, hf_table, mimi_table, sesame_table, target_shapes
from llama3 import llama3_tokenizers
from noise import CODEC, random_state
from oracle import Shape, hf_inputs, random_model, save

FOLDER = Path(__file__).parent / "golden"
FACTS = json.loads((FOLDER / "csm_1b.json").read_text())
PROMPTS = json.loads((FOLDER / "prompts.json").read_text())
MODEL = os.environ.get("CSM_MODEL")
BFLOAT16_FLOOR = 0.5  # rounding decides near-ties, so the agreement is only reported; below this the weights are wrong

needs_weights = [pytest.mark.golden, pytest.mark.skipif(not MODEL, reason="CSM_MODEL does not name a checkpoint")]


def published():
    greedy = FACTS["greedy"]
    return Golden(greedy["speaker"], greedy["text"], torch.tensor(greedy["frames"]))


class TestWeights:
    """The published weights."""

    pytestmark = needs_weights

    def test_greedy_codes_in_float32(self):
        agreement = self.report(torch.float32)
        assert agreement.failures() == [], agreement

    def test_greedy_codes_in_bfloat16(self):
        agreement = self.report(torch.bfloat16)
        assert agreement.teacher_forced >= BFLOAT16_FLOOR, agreement

    def report(self, dtype):
        generator = Generator.from_pretrained(MODEL, dtype=dtype)
        agreement = compare(generator, published())
        print(f"\n{MODEL} on {generator.device} in {dtype}: {agreement}")
        return agreement

    def test_token_ids(self):
        checkpoint = checkpoint_module.open_checkpoint(MODEL)
        tokenizer = TextTokenizer(checkpoint.tokenizer_path, checkpoint.config.text_vocab_size)
        for case in FACTS["text_ids"]:
            assert tokenizer.encode(case["speaker"], case["text"]) == case["ids"]

    @pytest.mark.parametrize("name", ["conversational_a", "conversational_b"])
    def test_codes_of_sesames_prompts(self, name):
        checkpoint = checkpoint_module.open_checkpoint(MODEL)
        path = recording(checkpoint.folder, f"prompts/{name}.wav")
        device = torch.device("cpu")
        state = checkpoint_module.read_codec(checkpoint, None, device)
        codes_TK = Codec(checkpoint.codec_config, MIMI.num_codebooks, state, device).encode(*read_audio(path))
        expected = FACTS["mimi_codebook0"][name]
        print(f"\n{name}: {codes_TK.shape[0]} frames, codebook 0 begins with {codes_TK[:8, 0].tolist()}")
        if name == "conversational_a":
            assert codes_TK.shape[0] == 375
        equal = sum(ours == theirs for ours, theirs in zip(codes_TK[:, 0].tolist(), expected, strict=False))
        assert equal >= len(expected) - 1  # one may differ: resamplers round differently


def recording(folder, name):
    """A file of the checkpoint's folder, else of its repository. Without it the test is skipped."""
    path = folder / name
    if path.is_file():
        return path
    if Path(MODEL).is_dir():
        pytest.skip(f"{path}: no such file")
    repo, _, revision = MODEL.partition("@")
    try:
        return hub.fetch(repo, name, revision or None)
    except UnavailableError as error:
        pytest.skip(str(error))


class TestPublishedFiles:
    """What is known of the published files, without the weights."""

    def test_config_is_accepted(self):
        path = FOLDER / "config.json"
        content = path.read_bytes()
        assert len(content) == FACTS["file_bytes"]["config.json"]
        assert hashlib.sha256(content).hexdigest() == FACTS["sha256"]["config.json"]
        config, codec = read_config(path)
        assert codec == MIMI
        presets = {"backbone": LLAMA_1B, "depth_decoder": LLAMA_100M}
        assert replace(config, **presets) == CSM_1B
        for part, preset in presets.items():
            ours = getattr(config, part)
            assert replace(ours, rope_scaling=preset.rope_scaling) == preset
            # HF writes the same scaling relative to another original context.
            frequencies = [rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling) for c in (ours, preset)]
            torch.testing.assert_close(*frequencies, rtol=1e-12, atol=0)

    def test_sizes_in_sesames_layout(self):
        shapes = {entry.source: entry.shape for entry in sesame_table(CSM_1B)}
        assert safetensors_bytes(shapes, metadata=None) == FACTS["file_bytes"]["model.safetensors"]

    def test_sizes_in_hf_layout(self):
        """Two shards: tensors in the order of HF's modules, until 5 GB are full."""
        table = hf_table(CSM_1B) + mimi_table(MIMI)
        shapes = {name: entry.shape for entry in table for name in entry.names}
        assert shapes.keys() == set(hf_names())
        shards, full = [[]], 0
        for name in hf_names():
            full += 4 * math.prod(shapes[name])
            if full > 5e9:
                shards.append([])
                full = 4 * math.prod(shapes[name])
            shards[-1].append(name)
        sizes = [safetensors_bytes({name: shapes[name] for name in shard}, {"format": "pt"}) for shard in shards]
        files = [f"transformers-0000{index}-of-00002.safetensors" for index in (1, 2)]
        assert sizes == [FACTS["file_bytes"][file] for file in files]

    def test_size_of_kyutais_mimi(self):
        shapes = {kyutai_name(name): shape for name, shape in target_shapes(mimi_table(MIMI)).items()}
        size = FACTS["file_bytes"]["mimi (tokenizer-e351c8d8-checkpoint125.safetensors)"]
        assert safetensors_bytes(shapes, metadata=None) == size

    def test_kyutais_names_are_read(self, tmp_path):
        state = random_state(mimi_table(CODEC), seed=1)
        path = tmp_path / "mimi.safetensors"
        save_file({kyutai_name(name): tensor for name, tensor in state.items()}, path)
        device = torch.device("cpu")
        checkpoint = checkpoint_module.open_checkpoint("tiny")  # only the file is read
        read = checkpoint_module.read_codec(checkpoint, path, device)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)

    def test_token_ids(self):
        tokenizer, _ = llama3_tokenizers()
        for case in FACTS["text_ids"]:
            assert tokenizer.encode(case["speaker"], case["text"]) == case["ids"]

    def test_rows_of_a_prompt_with_a_voice(self):
        tokenizer, _ = llama3_tokenizers()
        voice = (tokenizer.encode(0, PROMPTS["conversational_a"]), torch.zeros(375, 32, dtype=torch.int64))
        prompt = build_prompt([voice], tokenizer.encode(0, "Hey how are you doing?"), CSM_1B)
        assert prompt.row_TC.shape == (FACTS["prompt_rows"]["rows"], 33)
        assert len(voice[0]) == 111


def safetensors_bytes(shapes, metadata):
    """Size of a float32 .safetensors file: 8 bytes of length, a compact JSON header padded to 8 bytes, the data."""
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name in sorted(shapes):
        begin, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + end


def hf_names():
    """Names of HF Transformers' state dict, in the order of its modules."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    with torch.device("meta"):
        return list(CsmForConditionalGeneration(CsmConfig.from_json_file(FOLDER / "config.json")).state_dict())


def kyutai_name(name):
    """The names of moshi's first release, which Kyutai's file has."""
    return name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight")


TEXT = "The golden codes of a small checkpoint."
END = 12  # frames that the small checkpoint generates before the frame of zeros


def end_after(hf, frames):
    """Rename the codes of a model so that its frame ``frames`` + 1 becomes the frame of zeros.

    In each codebook the ids 0 and the one generated there change places, in the embedding and in the head. Everything
    else that the model generates stays the same but for these names.
    """
    inputs = hf_inputs([], TEXT, speakers=[0])
    with torch.no_grad():
        frame = hf.generate(**inputs, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=frames + 1)[0, -1]
        vocab = hf.config.vocab_size
        tied = {hf.backbone_model.embed_tokens.embed_audio_tokens.weight, hf.depth_decoder.model.embed_tokens.weight}
        for codebook, code in enumerate(frame.tolist()):
            for embedding in tied:
                swap(embedding[codebook * vocab :], code)
            swap(hf.lm_head.weight if codebook == 0 else hf.depth_decoder.codebooks_head.weight[codebook - 1].T, code)


def swap(weight, code):
    """Swap rows 0 and ``code``, in place."""
    weight[[0, code]] = weight[[code, 0]]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A checkpoint in HF's layout and its golden codes, both made by HF Transformers."""
    # A short original context, so that the scaling of RoPE matters within a few dozen positions.
    hf = random_model(Shape(scaling="blend"), seed=5)
    end_after(hf, END)
    inputs = hf_inputs([], TEXT, speakers=[0])
    with torch.no_grad():
        codes = hf.generate(**inputs, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=END + 20)[0]
    assert codes.shape[0] == END + 1
    assert not codes[-1].any()
    assert len(codes.unique(dim=0)) > END // 2  # a varied sequence
    return save(hf, tmp_path_factory.mktemp("hf")), Golden(0, TEXT, codes[:-1])


def load(folder):
    return Generator.from_pretrained(folder, device="cpu")


def q_or_k_not_permuted(name):
    def fault(folder, monkeypatch):
        def table(config):
            return [replace(e, change=Change.NONE) if e.source == name else e for e in hf_table(config)]

        assert len([entry for entry in hf_table(CSM_1B) if entry.source == name]) == 1
        monkeypatch.setattr(checkpoint_module, "hf_table", table)
        return load(folder)

    return fault


def rope_factor_changed(part, key, value):
    def fault(folder, monkeypatch):
        path = folder / "config.json"
        original = path.read_text()
        values = json.loads(original)
        scaling = (values if part is None else values[part])["rope_scaling"]
        assert scaling[key] != value
        scaling[key] = value
        path.write_text(json.dumps(values))
        try:
            return load(folder)
        finally:
            path.write_text(original)

    return fault


def depth_head_off_by_one(folder, monkeypatch):
    generator = load(folder)
    generator.model.depth_heads.data.copy_(generator.model.depth_heads.roll(1, dims=0))
    return generator


def begin_token_left_out(folder, monkeypatch):
    encode = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, speaker, text: encode(self, speaker, text)[1:])
    return load(folder)


FAULTS = {
    "q of a backbone layer": q_or_k_not_permuted("backbone_model.layers.1.self_attn.q_proj.weight"),
    "k of a backbone layer": q_or_k_not_permuted("backbone_model.layers.0.self_attn.k_proj.weight"),
    "q of a depth layer": q_or_k_not_permuted("depth_decoder.model.layers.0.self_attn.q_proj.weight"),
    "k of a depth layer": q_or_k_not_permuted("depth_decoder.model.layers.1.self_attn.k_proj.weight"),
    "RoPE factor of the backbone": rope_factor_changed(None, "factor", 32.0),
    "RoPE low frequency of the backbone": rope_factor_changed(None, "low_freq_factor", 2.0),
    "RoPE factor of the depth decoder": rope_factor_changed("depth_decoder_config", "factor", 32.0),
    "depth head off by one": depth_head_off_by_one,
    "begin token left out": begin_token_left_out,
}


class TestComparison:
    """The golden test passes for the right weights and fails for each fault of loading or of arithmetic."""

    def test_right_weights_pass(self, stand_in):
        folder, golden = stand_in
        agreement = compare(load(folder), golden)
        assert agreement.failures() == []
        assert (agreement.first_difference, agreement.teacher_forced) == (None, 1)
        assert agreement.generated_frames == END

    def test_sesames_layout_passes(self, stand_in, tmp_path):
        folder, golden = stand_in
        generator = load(folder)
        table = sesame_table(generator.config)
        save_file(dict(export(generator.model.state_dict(), table)), tmp_path / "model.safetensors")
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        assert compare(load(tmp_path), golden).failures() == []

    @pytest.mark.parametrize("name", FAULTS)
    def test_fails_for(self, stand_in, monkeypatch, name):
        folder, golden = stand_in
        agreement = compare(FAULTS[name](folder, monkeypatch), golden)
        print(f"\n{name}: {agreement}")
        assert agreement.failures() != []

    def test_fails_for_wrong_codes_after_frame_1(self, stand_in):
        folder, golden = stand_in
        codes_TK = golden.codes_TK.clone()
        codes_TK[1:-1] = codes_TK[1:-1].roll(1, dims=1)
        agreement = compare(load(folder), replace(golden, codes_TK=codes_TK))
        assert agreement.first_difference == 2
        assert any("teacher-forced agreement is" in failure for failure in agreement.failures())

    def test_fails_where_the_speech_does_not_end(self, stand_in):
        folder, golden = stand_in
        agreement = compare(load(folder), replace(golden, codes_TK=golden.codes_TK[:-1]))
        assert agreement.failures() == [f"the frame after frame {END - 1} is not all zeros"]
