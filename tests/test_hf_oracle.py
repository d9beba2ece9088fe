"""Our model against HF Transformers, on random checkpoints saved by Transformers."""

import pytest
import torch

from csm import Generator, Segment, SpeechRequest
from csm.cache import KVCache
from csm.kernels import rms_norm
from oracle import Shape, hf_inputs, random_model, save

SHAPES = [
    Shape(),
    Shape(backbone=(3, 60, 3, 1, 64), depth=(3, 40, 5, 1, 56)),
    Shape(backbone=(1, 48, 6, 2, 128), depth=(1, 32, 2, 2, 48), num_codebooks=5, scaling="blend"),
    Shape(backbone=(2, 64, 5, 5, 64), depth=(2, 48, 2, 1, 64), head_dims=(16, 32), num_codebooks=32, scaling="none"),
]
SECONDS = (1.28, 0.8)  # whole frames; test_codec tests the padding of partial ones


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request, tmp_path_factory):
    """The same checkpoint, loaded by Transformers and by us."""
    hf = random_model(request.param)
    folder = save(hf, tmp_path_factory.mktemp("hf"))
    return hf, Generator.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def turns():
    generator = torch.Generator().manual_seed(3)
    audio = [0.3 * torch.randn(int(24_000 * seconds), generator=generator) for seconds in SECONDS]
    return [("Good morning to you.", audio[0]), ("And to you!", audio[1])]


def segments(turns):
    return [Segment(speaker, text, audio) for speaker, (text, audio) in enumerate(turns)]


def test_greedy_codes_equal(pair, turns):
    hf, ours = pair
    frames = 24
    inputs = hf_inputs(turns, "How are you?", speakers=[0, 1, 0])
    with torch.no_grad():
        expected = hf.generate(
            **inputs, do_sample=False, max_new_tokens=frames, depth_decoder_do_sample=False, output_audio=False
        )
    codes = ours.generate_codes("How are you?", 0, segments(turns), max_audio_length_ms=frames * 80, temperature=0)
    assert codes.shape == (frames, ours.config.num_codebooks)
    assert torch.equal(codes, expected[0, -frames:])
    assert len(codes.unique(dim=0)) > frames // 2  # not just one frame repeated


def test_teacher_forced_logits_agree(pair, turns):
    hf, ours = pair
    inputs = hf_inputs(turns, "How are you?", speakers=[0, 1, 0])
    prompt = ours._request(SpeechRequest("How are you?", 0, segments(turns))).prompt
    model, config = ours.model, ours.config
    with torch.no_grad():
        expected = hf(**inputs, output_hidden_states=True)
        cache = KVCache.allocate(config.backbone, 1, 2048, ours.device, ours.model.dtype)
        num_rows = prompt.row_TC.shape[0]
        meta = model.backbone.attention_metadata(torch.arange(num_rows).unsqueeze(0), context_bucket=num_rows)
        hidden = model.backbone(model.embed_rows(prompt.row_TC[None], prompt.mask_TC[None]), cache, meta)
        normed = rms_norm(hidden, model.backbone.norm, config.backbone.norm_eps)
        torch.testing.assert_close(normed, expected.hidden_states[-1], atol=1e-4, rtol=0)
        logits = model.logits(0, hidden)
        torch.testing.assert_close(logits, expected.logits[..., : config.codebook_size], atol=1e-4, rtol=0)

        # The depth decoder on random codes of a few frames. Position 0 is the backbone's hidden state.
        frames = 6
        codes = torch.randint(config.codebook_size, (frames, config.num_codebooks))
        expected_depth = hf.depth_decoder(
            input_ids=torch.nn.functional.pad(codes[:, :-1], (1, 0)), backbone_last_hidden_state=normed[0, -frames:]
        ).logits
        embedded = torch.stack([model.code_embedding(k)[codes[:, k]] for k in range(config.num_codebooks - 1)], dim=1)
        depth_cache = KVCache.allocate(config.depth_decoder, frames, config.num_codebooks, ours.device, model.dtype)
        positions = torch.arange(config.num_codebooks).expand(frames, -1)
        meta = model.depth_decoder.attention_metadata(positions, context_bucket=config.num_codebooks)
        x = torch.cat((model.enter_depth(hidden[:, -frames:]).transpose(0, 1), embedded), dim=1)
        depth_hidden = model.depth_decoder(x, depth_cache, meta)
        for codebook in range(1, config.num_codebooks):
            ours_logits = model.logits(codebook, depth_hidden[:, codebook : codebook + 1]).squeeze(1)
            expected_logits = expected_depth[:, codebook - 1, : config.codebook_size]
            torch.testing.assert_close(ours_logits, expected_logits, atol=1e-4, rtol=0)


def test_audio_equals(pair, turns):
    """The same codes decoded by Transformers' Mimi and by ours."""
    hf, ours = pair
    codes = ours.generate_codes("How are you?", 0, segments(turns), max_audio_length_ms=1600, seed=4)
    with torch.no_grad():
        expected = hf.codec_model.decode(codes.T.unsqueeze(0)).audio_values[0, 0]
    audio = ours.generate("How are you?", 0, segments(turns), max_audio_length_ms=1600, seed=4)
    assert (audio - expected).norm() / expected.norm() < 1e-3
