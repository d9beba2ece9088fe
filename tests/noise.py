"""NOISE, a small checkpoint of random weights: it never generates an EOS frame, and its codes depend on all inputs.

For tests that compare computations, whatever the output. Tests of speech use the embedded checkpoint, "tiny".
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from csm.config import CodecConfig, CSMConfig, TransformerConfig
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import Table, export, hf_table, mimi_table, target_shapes
from csm.weights.recipe.shape import byte_tokenizer

CODEC = CodecConfig(
    dim=64,
    num_filters=8,
    num_layers=2,
    num_heads=4,
    hidden_dim=128,
    codebook_size=256,
    codebook_dim=32,
    num_codebooks=8,
)
CONFIG = CSMConfig(
    backbone=TransformerConfig(
        num_layers=4, dim=128, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=384, max_positions=2048
    ),
    depth_decoder=TransformerConfig(
        num_layers=2, dim=96, num_heads=3, num_kv_heads=1, head_dim=32, hidden_dim=256, max_positions=8
    ),
    text_vocab_size=258,
    audio_vocab_size=259,
    num_codebooks=8,
    codebook_size=256,
)


def random_state(table: Table, seed: int) -> dict[str, Tensor]:
    """Random weights for every parameter of a table. Matrices preserve the variance of their input."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(target_shapes(table).items()):
        if name.endswith((".norm", "norm1.weight", "norm2.weight", "cluster_usage", "_initialized")):
            state[name] = torch.ones(shape)
        elif name.endswith(".scale"):
            state[name] = torch.full(shape, 0.1)
        elif name.endswith(".bias"):
            state[name] = torch.zeros(shape)
        else:
            noise = torch.randn(shape, generator=generator)
            unit = name.endswith(("embedding", "embedding_sum"))
            state[name] = noise if unit else noise / math.sqrt(math.prod(shape[1:]))
    return state


def write(folder: Path) -> None:
    """A small CSM, a small Mimi and a byte-level tokenizer in HF Transformers' layout."""
    tensors: dict[str, Tensor] = {}
    for seed, table in enumerate((hf_table(CONFIG), mimi_table(CODEC))):
        tensors |= dict(export(random_state(table, seed), table))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = write_hf_config(CONFIG, CODEC)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    byte_tokenizer().save(str(folder / "tokenizer.json"))


_folder = tempfile.TemporaryDirectory(prefix="csm-noise-")  # removed when the tests end
NOISE = _folder.name
write(Path(NOISE))
