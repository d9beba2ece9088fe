"""The cached model against the uncached mathematics of ``naive.py``, and Sesame's layout against HF's."""

import json

import pytest
import torch
from safetensors.torch import save_file

from conftest import SESAME_CONFIG, write_sesame
from csm import Generator
from csm.config import LLAMA_1B, LLAMA_100M
from csm.frame import FrameState, decode_frame
from csm.model import rope_frequencies
from csm.prefill import Prefill
from csm.sampling import SamplingParams
from csm.weights.config_json import write_hf_config
from csm.weights.recipe.shape import byte_tokenizer
from naive import frequencies, next_frame
from noise import CODEC

SIZES = {
    "backbone": (3, 6, 2),
    "depth": (2, 5, 1),
    "vocab": 259,
    "codebook_size": 256,
    "num_codebooks": 8,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_model_equals_naive_mathematics(sesame_folder, sesame_state, dtype):
    """A prompt of text, audio and text, then eight greedy frames, each recomputed in full by ``next_frame``."""
    ours = Generator.from_pretrained(sesame_folder, device="cpu", dtype=dtype)
    weights = {name: tensor.double() for name, tensor in sesame_state.items()}
    codes = torch.randint(256, (7, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"text": i} for i in (256, 10, 200, 30, 257)]
    rows += [{"codes": frame} for frame in codes.tolist()] + [{"codes": [0] * 8}]
    rows += [{"text": i} for i in (256, 99, 257)]

    row_TC = torch.zeros(len(rows), 9, dtype=torch.int64)
    mask_TC = torch.zeros(len(rows), 9, dtype=torch.bool)
    for t, row in enumerate(rows):
        if "text" in row:
            row_TC[t, -1], mask_TC[t, -1] = row["text"], True
        else:
            row_TC[t, :-1], mask_TC[t, :-1] = torch.tensor(row["codes"]), True
    state = FrameState.allocate(SESAME_CONFIG, 1, torch.device("cpu"), dtype)
    Prefill(ours.model).start(state, 0, row_TC, mask_TC, SamplingParams(temperature=0))
    for _ in range(8):
        expected = next_frame(rows, weights, SIZES)
        decode_frame(ours.model, state)
        assert state.codes_BK[0].tolist() == expected
        rows.append({"codes": expected})


@pytest.mark.parametrize("config", [LLAMA_1B, LLAMA_100M, SESAME_CONFIG.backbone])
def test_rope_scaling_in_sesames_form(config):
    ours = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, torch.tensor(frequencies(config.head_dim), dtype=torch.float64))
    if config.head_dim >= 64:
        assert not torch.allclose(ours, rope_frequencies(config.head_dim, config.rope_theta, None))


def hf_names(weights, config):
    """Sesame's state dict under HF's names, with the rows of q and k permuted for rotate-half."""
    result = {}
    heads = {
        "backbone": (config.backbone.num_heads, config.backbone.num_kv_heads),
        "decoder": (config.depth_decoder.num_heads, config.depth_decoder.num_kv_heads),
    }
    rules = [
        ("text_embeddings", "embed_text_tokens"),
        ("audio_embeddings", "backbone_model.embed_tokens.embed_audio_tokens"),
        ("codebook0_head", "lm_head"),
        ("audio_head", "depth_decoder.codebooks_head.weight"),
        ("projection", "depth_decoder.model.inputs_embeds_projector"),
        ("backbone.", "backbone_model."),
        ("decoder.", "depth_decoder.model."),
        ("attn.output_proj", "self_attn.o_proj"),
        ("attn.", "self_attn."),
        ("mlp.w1", "mlp.gate_proj"),
        ("mlp.w2", "mlp.down_proj"),
        ("mlp.w3", "mlp.up_proj"),
        ("sa_norm.scale", "input_layernorm.weight"),
        ("mlp_norm.scale", "post_attention_layernorm.weight"),
        ("norm.scale", "norm.weight"),
    ]
    for name, tensor in weights.items():
        if ".q_proj" in name or ".k_proj" in name:
            count = heads[name.split(".")[0]][".k_proj" in name]
            rows, dim = tensor.shape
            tensor = tensor.view(count, rows // count // 2, 2, dim).transpose(1, 2).reshape(rows, dim)
        for old, new in rules:
            if name.startswith(old) or (old not in ("backbone.", "decoder.") and f".{old}" in name):
                name = name.replace(old, new, 1)
        result[name] = tensor.contiguous()
    return result


def test_sesame_layout_converted_to_hf_names_is_the_same_model(sesame_folder, sesame_state, tmp_path):
    save_file(hf_names(sesame_state, SESAME_CONFIG), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(write_hf_config(SESAME_CONFIG, CODEC)))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    one = Generator.from_pretrained(sesame_folder, device="cpu").model.state_dict()
    other = Generator.from_pretrained(tmp_path, device="cpu").model.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_ckpt_pt_is_the_same_model(sesame_folder, sesame_state, tmp_path):
    write_sesame(tmp_path, sesame_state, file="ckpt.pt")
    one = Generator.from_pretrained(sesame_folder, device="cpu").model.state_dict()
    other = Generator.from_pretrained(tmp_path, device="cpu").model.state_dict()
    for name in one:
        assert torch.equal(one[name], other[name]), name
