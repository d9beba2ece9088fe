"""Quantised models through the generator: quantised while loading, and from a folder that was quantised before."""

import gzip
import json
import shutil
import string

import pytest
import torch

from csm import CSMError, Generator
from csm.__main__ import main
from csm.fingerprint import fingerprint
from noise import NOISE

REQUEST = dict(text="Hello.", max_audio_length_ms=800, seed=1, temperature=0)


@pytest.fixture(scope="module")
def loaded():
    return Generator.from_pretrained(NOISE, device="cpu", quantize="int8")


def test_int8_weights_give_nearly_the_logits_of_the_full_ones(loaded, noisy):
    """Int8 rounds a weight by at most 1/254 of its block's largest; on random weights codes part after some frames."""
    first = [generator.generate_codes(**REQUEST)[0] for generator in (noisy, loaded)]
    assert (first[0] == first[1]).float().mean() >= 0.5


def test_a_quantised_folder_gives_the_same_codes(loaded, tmp_path):
    arguments = ["--scheme", "int8", "--dtype", "float32", "--out", str(tmp_path / "int8")]
    assert main(["quantize", str(NOISE), *arguments]) == 0
    again = Generator.from_pretrained(tmp_path / "int8", device="cpu")
    assert torch.equal(again.generate_codes(**REQUEST), loaded.generate_codes(**REQUEST))
    with pytest.raises(CSMError, match="quantised already"):
        Generator.from_pretrained(tmp_path / "int8", device="cpu", quantize="int4")


def test_a_quantised_folder_has_the_defaults_and_phones_of_the_checkpoint(tmp_path):
    """A model that was trained on phones needs its pronunciation file; a file of an earlier model is removed."""
    source, out = tmp_path / "source", tmp_path / "int8"
    shutil.copytree(NOISE, source)
    phones = {"lexicon": {"hello": "hɛloʊ"}, "rules": {letter: letter for letter in string.ascii_lowercase}}
    (source / "pronunciation.json.gz").write_bytes(gzip.compress(json.dumps(phones).encode()))
    (source / "generation_config.json").write_text('{"temperature": 0.25}')
    assert main(["quantize", str(source), "--scheme", "int8", "--out", str(out)]) == 0
    full, quantised = (Generator.from_pretrained(folder, device="cpu") for folder in (source, out))
    assert quantised.defaults == full.defaults and quantised.defaults.temperature == 0.25
    prompts = [generator._tokenizer.encode(0, "Hello.") for generator in (full, quantised)]
    assert prompts[0] == prompts[1]
    assert main(["quantize", str(NOISE), "--scheme", "int8", "--out", str(out)]) == 0
    assert not (out / "pronunciation.json.gz").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quantize="int3"), "int3"),
        (dict(quantize="int8", lora="adapter"), "either lora or quantize"),
        (dict(threads=0), "at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(CSMError, match=message):
        Generator.from_pretrained(NOISE, device="cpu", **options)


def test_a_book_knows_models_of_other_types_apart():
    """A state dict lacks quantised weights: the fingerprint of a book's model has them."""
    prints = [
        fingerprint(Generator.from_pretrained("tiny", "cpu", progress=False, quantize=scheme), [])
        for scheme in (None, "int8", "int4", "int8")
    ]
    assert prints[1] == prints[3] and len(set(prints)) == 3


def test_the_kernels_read_a_quantised_folder_on_a_cpu(loaded, tmp_path, monkeypatch):
    """In Triton's interpreter: embeddings that stay in their file are gathered beside the kernels."""
    monkeypatch.setenv("CSM_OPS", "triton")
    main(["quantize", str(NOISE), "--scheme", "int8", "--dtype", "float32", "--out", str(tmp_path / "int8"), "--quiet"])
    generator = Generator.from_pretrained(tmp_path / "int8", device="cpu")
    one_frame = REQUEST | dict(max_audio_length_ms=80)
    codes_TK = generator.generate_codes(**one_frame)
    monkeypatch.delenv("CSM_OPS")
    assert torch.equal(codes_TK, loaded.generate_codes(**one_frame))
