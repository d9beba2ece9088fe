"""The differentiable forward pass of training: all positions of a batch at once, without a KV cache.

It uses the parameters of ``csm.model.CSM`` and not its forward methods: those write into a KV cache in place, which
autograd cannot differentiate. ``tests/test_finetune_loss.py`` compares the two. A block computes
h = x + attention(norm(x)); out = h + mlp(norm(h)).

Shapes: B sequences, T positions, D dim, E fused q, k and v, F hidden dim, H heads, G key/value heads, d head dim,
p = d / 2 rotary pairs (2: cosine, sine).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csm.config import TransformerConfig
from csm.kernels.norm_linear import rms_norm
from csm.kernels.rope_cache import rotate_pairs
from csm.lora import Lora
from csm.model import Block, Transformer

# On a CPU in bfloat16, up to this length, the backward pass of unfused attention takes a third of the fused op's time.
UNFUSED_POSITIONS = 256


def hidden_states(
    transformer: Transformer,
    x_BTD: Tensor,
    part: str,
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
) -> Tensor:
    """Un-normalised hidden states of positions 0 to T - 1: (B, T, D) -> (B, T, D).

    Attention is causal, so padding after a sequence does not affect it. ``part`` is the transformer's name in the
    model and selects its adapters. ``activation_checkpointing`` stores only the blocks' inputs and recomputes the other
    activations in the backward pass.
    """
    rope_1Tp2 = transformer.rope.rope_Sp2[: x_BTD.shape[1]].unsqueeze(0)
    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, Block)
        arguments = (layer, transformer.config, x_BTD, rope_1Tp2, f"{part}.layers.{index}", lora)
        x_BTD = checkpoint(_block, *arguments, use_reentrant=False) if activation_checkpointing else _block(*arguments)
    return x_BTD


def final_norm(transformer: Transformer, x: Tensor) -> Tensor:
    """The norm between the last block and the output heads."""
    return rms_norm(x, transformer.norm, transformer.config.norm_eps)


def _block(
    layer: Block, config: TransformerConfig, x_BTD: Tensor, rope_1Tp2: Tensor, name: str, lora: Lora | None
) -> Tensor:
    attention, mlp = layer.attention, layer.mlp
    normed_BTD = rms_norm(x_BTD, attention.norm, config.norm_eps)
    mixed_BTE = _attend(_linear(normed_BTD, attention.qkv, f"{name}.attention.qkv", lora), rope_1Tp2, config)
    x_BTD = x_BTD + _linear(mixed_BTE, attention.output, f"{name}.attention.output", lora)
    normed_BTD = rms_norm(x_BTD, mlp.norm, config.norm_eps)
    gate_BTF, up_BTF = _linear(normed_BTD, mlp.gate_up, f"{name}.mlp.gate_up", lora).chunk(2, dim=-1)
    return x_BTD + _linear(F.silu(gate_BTF) * up_BTF, mlp.down, f"{name}.mlp.down", lora)


def _linear(x: Tensor, weight: Tensor, name: str, lora: Lora | None) -> Tensor:
    y = F.linear(x, weight)
    delta = None if lora is None else lora.delta(name, x, weight.shape[0])
    return y if delta is None else y + delta


def _attend(qkv_BTE: Tensor, rope_1Tp2: Tensor, config: TransformerConfig) -> Tensor:
    """Causal grouped-query attention: (B, T, E) -> (B, T, H * d)."""
    heads = qkv_BTE.unflatten(-1, (-1, config.head_dim))
    num_rotated = config.num_heads + config.num_kv_heads
    rotated = rotate_pairs(heads[:, :, :num_rotated], rope_1Tp2)
    q_BTHd, k_BTGd = rotated.split([config.num_heads, config.num_kv_heads], dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTGd, heads[:, :, num_rotated:]))
    unfused = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= UNFUSED_POSITIONS
    attend = unfused_attention if unfused else partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def unfused_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
    """Causal grouped-query attention from separate ops, with the softmax in float32: (B, H, T, d) -> (B, H, T, d)."""
    q, k, v = q_BHTd.unflatten(1, (k_BGTd.shape[1], -1)), k_BGTd.unsqueeze(2), v_BGTd.unsqueeze(2)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    later_TT = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(later_TT, float("-inf")).softmax(-1).to(v.dtype) @ v).flatten(1, 2)
