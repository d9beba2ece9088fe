"""The weights that training from scratch begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csm.config import CSMConfig
from csm.weights.layouts import hf_table, target_shapes

EMBEDDING = 0.1  # of a row's embedding; small, so that a few hundred steps move it where they want
HEAD = 0.02  # near zero: the first guesses are near uniform


def initial_state(config: CSMConfig, seed: int) -> dict[str, Tensor]:
    """Random weights in float32: matrices keep the variance of what they read, and 2 n blocks that add to one stream
    each add 1 / (2 n) of it (GPT-2, section 2.3)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(target_shapes(hf_table(config)).items()):
        if len(shape) == 1:
            state[name] = torch.ones(shape)
        else:
            state[name] = _scale(name, shape, config) * torch.randn(shape, generator=generator)
    return state


def _scale(name: str, shape: tuple[int, ...], config: CSMConfig) -> float:
    if name == "text_embedding":
        return EMBEDDING
    if name == "audio_embedding":
        return EMBEDDING / math.sqrt(config.num_codebooks)
    if name in ("codebook0_head", "depth_heads"):
        return HEAD
    scale = 1 / math.sqrt(shape[-1])
    if name.endswith((".output", ".down")):
        part = config.backbone if name.startswith("backbone") else config.depth_decoder
        scale /= math.sqrt(2 * part.num_layers)
    return scale
