"""Initial weights for training from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csm.config import CSMConfig
from csm.weights.layouts import hf_table, target_shapes

EMBEDDING_STD = 0.1  # of a position's embedding; small, so that it is learned within a few hundred steps
HEAD_STD = 0.02  # near zero, so that the first predictions are nearly uniform


def initial_state(config: CSMConfig, seed: int) -> dict[str, Tensor]:
    """Random weights in float32, by parameter name.

    Matrices preserve the variance of their input. The 2 n output matrices of n blocks are scaled by 1 / sqrt(2 n), so
    that the residual stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(target_shapes(hf_table(config)).items()):
        if len(shape) == 1:
            state[name] = torch.ones(shape)
        else:
            state[name] = _std(name, shape, config) * torch.randn(shape, generator=generator)
    return state


def _std(name: str, shape: tuple[int, ...], config: CSMConfig) -> float:
    if name == "text_embedding":
        return EMBEDDING_STD
    if name == "audio_embedding":
        return EMBEDDING_STD / math.sqrt(config.num_codebooks)
    if name in ("codebook0_head", "depth_heads"):
        return HEAD_STD
    std = 1 / math.sqrt(shape[-1])
    if name.endswith((".output", ".down")):
        part = config.backbone if name.startswith("backbone") else config.depth_decoder
        std /= math.sqrt(2 * part.num_layers)
    return std
