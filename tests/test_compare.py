"""The comparison of two models."""

from importlib.util import find_spec

import pytest
import torch

from csm import Generator
from csm.__main__ import main
from csm.compare import (
    compare_random,
    divergence,
    greedy_agreement,
    layer_errors,
    teacher_forced_logits,
    weight_errors,
)
from csm.prompt import TextTokenizer, build_prompt
from csm.quantize import quantize_model
from csm.weights import open_checkpoint

needs_models = pytest.mark.skipif(
    not all(find_spec(name) for name in ("moonshine_voice", "resemblyzer", "jiwer", "num2words")),
    reason="the extra eval is missing",
)


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


def test_random_rows_and_layers(generators):
    plain, quantised = generators
    same, other = compare_random(plain, plain), compare_random(plain, quantised)
    assert same.kl_K.abs().max() < 1e-6 and (same.agreement_K == 1).all()
    assert 0.01 < other.kl_K.mean() < 1 and other.agreement_K.shape == (plain.config.num_codebooks,)
    layers = layer_errors({"a.layers.0.x.q": 1.0, "a.layers.0.y.d": 2.0, "a.layers.1.x.q": 4.0, "head": 0.5})
    assert layers == {"a.layers.0": 1.5, "a.layers.1": 4.0, "head": 0.5}


def test_the_command(capsys):
    assert main(["compare", "tiny", "--scheme", "int8", "--quiet"]) == 0
    rows = dict(line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:])
    layers = [name for name in rows if name.startswith("weight error, ") and ".layers." in name]
    assert len(layers) == 8  # 6 of the backbone, 2 of the depth decoder
    assert {"speech: KL divergence, codebook 0", "random rows: same best code, codebooks 1 on"} <= rows.keys()
    assert len(rows["frames until greedy codes differ"].split(", ")) == 4


@needs_models
def test_sentences_are_transcribed(capsys, tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("Good morning, how are you today?\nThe train leaves at nine.\n", encoding="utf-8")
    assert main(["compare", "tiny", "--scheme", "int8", "--sentences", str(path), "--seeds", "2", "--quiet"]) == 0
    *_, a, b, _, ratio = capsys.readouterr().out.strip().splitlines()
    for name, row in (("A", a), ("B", b)):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [name, "4"] and 0 <= float(cells[2].rstrip("%")) < 60
    assert 0.7 < float(ratio.split()[3]) < 1.4


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--sentences", "nowhere.txt"], "nowhere.txt: cannot be read"), (["--seeds", "0"], "--seeds must be at least 1")],
)
def test_bad_options(options, message, capsys):
    assert main(["compare", "tiny", *options]) == 2
    assert message in capsys.readouterr().err
