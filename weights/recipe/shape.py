"""The codec's shape, and the two files that carry a trained one: codec.safetensors and codec.json."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from csm.config import CodecConfig

CONFIG = CodecConfig(
    dim=128,
    num_filters=16,
    num_layers=2,
    num_heads=4,
    hidden_dim=384,
    context=32,
    codebook_size=1024,
    codebook_dim=64,
    num_codebooks=8,
)


def load_codec(folder: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    """What ``export`` wrote, in float32, as ``csm.codec.Codec`` takes it."""
    values = json.loads((folder / "codec.json").read_text(encoding="utf-8"))["config"]
    config = CodecConfig(**(values | {"ratios": tuple(values["ratios"])}))
    state = load_file(folder / "codec.safetensors")
    return config, {name: tensor.float() for name, tensor in state.items()}
