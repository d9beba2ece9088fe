"""The model as training sees it: every position of a batch in one differentiable pass, no cache, nothing folded.

Reads the parameters of ``csm.model.CSM``, whose own forward writes into a cache in place and cannot be trained through.
``tests/test_finetune_loss.py`` holds the two together.

Shapes: B sequences, T positions, D dim, E fused q, k and v, F hidden dim, H heads, G key/value heads, d head dim,
p = d / 2 rotary pairs, cosine and sine each.
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

# Up to here attention op by op, on a CPU in bfloat16, has a backward pass that takes a third of the fused op's time.
PLAIN_POSITIONS = 256


def hidden_states(
    transformer: Transformer, x_BTD: Tensor, part: str, lora: Lora | None = None, checkpointing: bool = False
) -> Tensor:
    """Causal pass over positions 0..T-1 of each sequence: (B, T, D) -> (B, T, D), before the final norm.

    Padding goes behind a sequence, where no position of it looks. ``part`` is the transformer's name in the model, by
    which its adapters are found. ``checkpointing`` keeps the blocks' inputs alone and computes the rest again in the
    backward pass.
    """
    rope_1Tp2 = transformer.rope.rope_Sp2[: x_BTD.shape[1]].unsqueeze(0)
    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, Block)
        arguments = (layer, transformer.config, x_BTD, rope_1Tp2, f"{part}.layers.{index}", lora)
        x_BTD = checkpoint(_block, *arguments, use_reentrant=False) if checkpointing else _block(*arguments)
    return x_BTD


def final_norm(transformer: Transformer, x: Tensor) -> Tensor:
    """The norm between the last block and a head."""
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
    added = None if lora is None else lora.added(name, x, weight.shape[0])
    return y if added is None else y + added


def _attend(qkv_BTE: Tensor, rope_1Tp2: Tensor, config: TransformerConfig) -> Tensor:
    """Grouped-query attention of each position to itself and before: (B, T, E) -> (B, T, H * d)."""
    heads = qkv_BTE.unflatten(-1, (-1, config.head_dim))
    num_rotated = config.num_heads + config.num_kv_heads
    rotated = rotate_pairs(heads[:, :, :num_rotated], rope_1Tp2)
    q_BTHd, k_BTGd = rotated.split([config.num_heads, config.num_kv_heads], dim=2)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTGd, heads[:, :, num_rotated:]))
    plain = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] <= PLAIN_POSITIONS
    attend = plain_attention if plain else partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def plain_attention(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
    """Causal attention op by op, the softmax in float32."""
    q, k, v = q_BHTd.unflatten(1, (k_BGTd.shape[1], -1)), k_BGTd.unsqueeze(2), v_BGTd.unsqueeze(2)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    later_TT = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(later_TT, float("-inf")).softmax(-1).to(v.dtype) @ v).flatten(1, 2)
