"""A checkpoint's own defaults, from its generation_config.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from csm import Generator
from csm.errors import CheckpointError
from csm.weights import GenerationDefaults, read_generation_defaults
from noise import NOISE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, GenerationDefaults(0.9, 50, 90_000)),
        ({}, GenerationDefaults(0.9, 50, 90_000)),
        ({"temperature": 0.6, "top_k": None, "max_new_tokens": 125}, GenerationDefaults(0.6, 50, 90_000)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults(0.0, 50, 90_000)),
        ({"top_k": 20, "max_audio_length_ms": 8000}, GenerationDefaults(0.9, 20, 8000)),
    ],
)
def test_defaults_are_read(tmp_path, values, expected):
    if values is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert read_generation_defaults(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "must be a JSON object, not list"),
        ('{"temperature": -1}', "temperature must be a number of at least 0, not -1"),
        ('{"temperature": "hot"}', "temperature must be a number"),
        ('{"top_k": 0}', "top_k must be a number of at least 1, not 0"),
        ('{"max_audio_length_ms": true}', "max_audio_length_ms must be a number of at least 80, not True"),
    ],
)
def test_a_bad_value_is_named(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_generation_defaults(tmp_path)


def test_a_caller_s_value_wins(tmp_path):
    folder = tmp_path / "noise"
    shutil.copytree(Path(NOISE), folder)
    plain = Generator.from_pretrained(folder, device="cpu")
    defaults = {"temperature": 0.3, "top_k": 5, "max_audio_length_ms": 400}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    generator = Generator.from_pretrained(folder, device="cpu")
    codes = generator.generate_codes("Hello.", seed=0)
    assert codes.shape[0] <= 5
    given = {"temperature": 0.3, "topk": 5, "max_audio_length_ms": 400}
    assert torch.equal(codes, plain.generate_codes("Hello.", seed=0, **given))
    asked = {"temperature": 0.9, "topk": 50, "max_audio_length_ms": 800}
    assert torch.equal(
        generator.generate_codes("Hello.", seed=0, **asked), plain.generate_codes("Hello.", seed=0, **asked)
    )
    assert not torch.equal(codes, plain.generate_codes("Hello.", seed=0, max_audio_length_ms=400))
