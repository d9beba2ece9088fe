"""The comparison of two models."""

import pytest
import torch

from csm import Generator
from csm.__main__ import main
from csm.compare import divergence, greedy_agreement, teacher_forced_logits, weight_errors
from csm.prompt import TextTokenizer, build_prompt
from csm.quantize import quantize_model
from csm.weights import open_checkpoint


@pytest.fixture(scope="module")
def generators():
    plain, quantised = (Generator.from_pretrained("tiny", "cpu", torch.float32, progress=False) for _ in range(2))
    quantize_model(quantised.model, "int4")
    return plain, quantised


def test_teacher_forced_logits_predict_the_codes_that_were_generated_greedily(generators):
    generator = generators[0]
    tokenizer = TextTokenizer(open_checkpoint("tiny").tokenizer_path, generator.config.text_vocab_size)
    code_TK = generator.generate_codes("Good morning.", temperature=0, max_audio_length_ms=1600)
    prompt = build_prompt([], tokenizer.encode(0, "Good morning."), generator.config)
    row_NC = torch.cat((prompt.row_TC, torch.nn.functional.pad(code_TK, (0, 1))))
    mask_NC = torch.ones(row_NC.shape, dtype=torch.bool)
    mask_NC[:, -1] = False
    mask_NC[: len(prompt.row_TC)] = prompt.mask_TC
    logits_TKV = teacher_forced_logits(generator.model, row_NC, mask_NC, len(code_TK))
    assert (logits_TKV.argmax(-1) == code_TK).float().mean() > 0.99


def test_divergence():
    logits = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(0))
    same = divergence(logits, logits + 3)
    assert same.kl_K.abs().max() < 1e-6 and torch.equal(same.agreement_K, torch.ones(3))
    other = divergence(logits, -logits)
    p, q = logits.double().softmax(-1), (-logits).double().softmax(-1)
    torch.testing.assert_close(other.kl_K.double(), (p * (p / q).log()).sum(-1).mean(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(other.agreement_K, torch.zeros(3))


def test_weight_errors_and_greedy_codes(generators):
    plain, quantised = generators
    errors = weight_errors(plain.model, quantised.model)
    assert 0.05 < errors["backbone.layers.0.attention.qkv"] < 0.12  # int4
    assert 0.002 < errors["depth_heads"] < 0.01  # int8
    assert set(weight_errors(plain.model, plain.model).values()) == {0.0}
    num_frames = len(plain.generate_codes("Good morning.", temperature=0, max_audio_length_ms=4000))
    assert greedy_agreement(plain, plain, "Good morning.") == num_frames


def test_the_command(capsys):
    assert main(["compare", "tiny", "--scheme", "int8", "--quiet"]) == 0
    table = capsys.readouterr().out
    assert "KL divergence, codebook 0" in table and "frames until greedy codes differ" in table
