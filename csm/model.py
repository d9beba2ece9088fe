"""CSM's two transformers, its embeddings and its heads, built from the ops of ``csm.kernels``.

Shapes: B slots, T rows, C columns of a row (K codebooks, then text), K codebooks, D model dim, E fused q, k and v,
F hidden dim, H query heads, G key/value heads, d head dim, p = d / 2 rotary pairs, S cache positions, V audio
vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.cache import KVCache
from csm.config import CSMConfig, RopeScaling, TransformerConfig
from csm.kernels import (
    BlockWeights,
    block,
    blocks,
    can_gather_qkv,
    causal_bias,
    embed_rows,
    norm_linear,
    tabulate_qkv,
    use_kernels,
)
from csm.kernels.quantized import Weight
from csm.kernels.row_file import Table


class AttentionMetadata(NamedTuple):
    """Positions of the rows, their rotary embeddings, and the additive attention mask.

    ``rope_BTp2`` holds cosine and sine. ``bias_BTS`` is 0 at cache positions up to a row's own and -inf beyond (a
    causal mask); it is None if the kernels run, which compare positions. ``context`` is the number of cache positions
    that attention covers.
    """

    position_BT: Tensor
    rope_BTp2: Tensor
    bias_BTS: Tensor | None
    context: int

    def rows(self, first: int, last: int) -> AttentionMetadata:
        """Metadata of rows ``first`` (inclusive) to ``last`` (exclusive)."""
        bias_BTS = None if self.bias_BTS is None else self.bias_BTS[:, first:last]
        return AttentionMetadata(self.position_BT[:, first:last], self.rope_BTp2[:, first:last], bias_BTS, self.context)


class RoPE(nn.Module):
    """Cosine and sine of the rotary angle of every position and pair: (positions, d / 2, 2) float32."""

    rope_Sp2: Tensor

    def __init__(self, config: TransformerConfig, device: torch.device | None = None):
        super().__init__()
        frequency_p = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angle_Sp = torch.arange(config.max_positions, dtype=torch.float64, device="cpu")[:, None] * frequency_p
        rope_Sp2 = torch.stack((angle_Sp.cos(), angle_Sp.sin()), dim=-1).float().to(device or "cpu")
        self.register_buffer("rope_Sp2", rope_Sp2, persistent=False)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Rotary frequencies in radians per position: (d / 2,) float64.

    Llama-3 scaling divides frequencies with a wavelength above original / low by ``factor``, keeps those with a
    wavelength below original / high, and interpolates between them linearly in original / wavelength.
    """
    frequency_p = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling is None:
        return frequency_p
    rotations_p = scaling.original_max_positions * frequency_p / (2 * math.pi)  # original / wavelength
    smooth_p = (rotations_p - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_p = smooth_p.clamp(0, 1)
    return smooth_p * frequency_p + (1 - smooth_p) * frequency_p / scaling.factor


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.qkv = nn.Parameter(torch.empty(config.qkv_dim, config.dim))
        self.output = nn.Parameter(torch.empty(config.dim, config.num_heads * config.head_dim))


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.norm = nn.Parameter(torch.ones(config.dim))
        self.gate_up = nn.Parameter(torch.empty(2 * config.hidden_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.dim, config.hidden_dim))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def weights(self) -> BlockWeights:
        attention, mlp = self.attention, self.mlp
        return BlockWeights(attention.norm, attention.qkv, attention.output, mlp.norm, mlp.gate_up, mlp.down)

    def forward(
        self,
        x_BTD: Tensor,
        k_BGSd: Tensor,
        v_BGSd: Tensor,
        slot_B1: Tensor,
        meta: AttentionMetadata,
        q_BTHd: Tensor | None = None,
    ) -> Tensor:
        return block(
            x_BTD=x_BTD,
            weights=self.weights(),
            eps=self.attention.eps,
            rope_BTp2=meta.rope_BTp2,
            bias_BTS=meta.bias_BTS,
            k_cache_BGSd=k_BGSd,
            v_cache_BGSd=v_BGSd,
            slot_B1=slot_B1,
            position_BT=meta.position_BT,
            context=meta.context,
            q_BTHd=q_BTHd,
        )


class Transformer(nn.Module):
    """The backbone or the depth decoder. Returns un-normalised hidden states; the consumer applies ``norm``."""

    def __init__(self, config: TransformerConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.rope = RoPE(config, device)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.dim))

    @property
    def first_attention(self) -> Attention:
        block = self.layers[0]
        assert isinstance(block, Block)
        return block.attention

    def block_weights(self) -> list[BlockWeights]:
        """The weights of all blocks."""
        return [cast(Block, layer).weights() for layer in self.layers]

    def attention_metadata(
        self, position_BT: Tensor, context_bucket: int, max_rows: int | None = None
    ) -> AttentionMetadata:
        """Metadata of rows at ``position_BT``: causal attention over the first ``context_bucket`` cache positions.

        ``max_rows`` is the most rows per slot that one ``forward`` gets (None: all of them).
        """
        num_rows = position_BT.shape[0] * (max_rows or position_BT.shape[1])
        bias_BTS = None
        if not use_kernels(self.norm, num_rows):
            bias_BTS = causal_bias(position_BT, context_bucket, self.norm.dtype)
        return AttentionMetadata(position_BT, self.rope.rope_Sp2[position_BT], bias_BTS, context_bucket)

    def forward(self, x_BTD: Tensor, cache: KVCache, meta: AttentionMetadata, q_BTHd: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Writes the keys and values of the rows into the cache at ``meta.position_BT``.

        With ``q_BTHd``, the queries of layer 0, that layer's keys and values are in the cache already.
        """
        return blocks(
            x_BTD=x_BTD,
            layers=self.block_weights(),
            eps=self.config.norm_eps,
            rope_BTp2=meta.rope_BTp2,
            bias_BTS=meta.bias_BTS,
            k_cache_LBGSd=cache.k_LBGSd,
            v_cache_LBGSd=cache.v_LBGSd,
            slot_B1=cache.slot_B1,
            position_BT=meta.position_BT,
            context=meta.context,
            q_BTHd=q_BTHd,
        )


class CSM(nn.Module):
    """The whole model. ``csm.frame`` runs its parts in order.

    ``device`` holds the rotary tables. Build the model under ``torch.device("meta")`` and load the parameters with
    ``assign=True``.
    """

    offset_K: Tensor
    depth_embedding: Table
    depth_qkv: Tensor | None

    def __init__(self, config: CSMConfig, device: torch.device | None = None):
        super().__init__()
        backbone_dim, depth_dim = config.backbone.dim, config.depth_decoder.dim
        num_codebooks, vocab = config.num_codebooks, config.audio_vocab_size
        self.config = config
        self.backbone = Transformer(config.backbone, device)
        self.depth_decoder = Transformer(config.depth_decoder, device)
        self.text_embedding = nn.Parameter(torch.empty(config.text_vocab_size, backbone_dim))
        self.audio_embedding = nn.Parameter(torch.empty(num_codebooks * vocab, backbone_dim))
        self.projection = nn.Parameter(torch.empty(depth_dim, backbone_dim))
        self.codebook0_head = nn.Parameter(torch.empty(vocab, backbone_dim))
        self.depth_heads = nn.Parameter(torch.empty(num_codebooks - 1, vocab, depth_dim))
        offset_K = torch.arange(num_codebooks, device=device or "cpu") * vocab
        self.register_buffer("offset_K", offset_K, persistent=False)
        depth_embedding = torch.empty((num_codebooks - 1) * vocab, depth_dim)
        self.register_buffer("depth_embedding", depth_embedding, persistent=False)
        self.register_buffer("depth_qkv", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda model, _: model.precompute_depth_embedding())

    @classmethod
    def from_state_dict(cls, config: CSMConfig, state: dict[str, Tensor], device: torch.device) -> CSM:
        """A model for inference that uses the tensors of ``state`` without a copy. Allocates ``depth_embedding``."""
        with torch.device("meta"):
            model = cls(config, device)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def precompute_depth_embedding(self) -> None:
        """Project the embedding of every code that the depth decoder can read, into ``depth_embedding``.

        Loading a state dict calls this. Call it after changing weights in place: it also discards ``depth_qkv``.
        """
        self.depth_qkv = None
        vocab = self.config.audio_vocab_size
        num_rows = (self.config.num_codebooks - 1) * vocab  # the depth decoder never reads the last codebook
        self.depth_embedding = self.projection.new_empty(num_rows, self.projection.shape[0])
        for rows in (slice(first, first + vocab) for first in range(0, num_rows, vocab)):
            self.depth_embedding[rows] = F.linear(self.audio_embedding[rows], self.projection)

    @torch.no_grad()
    def precompute_depth_qkv(self) -> None:
        """Compute the depth decoder's first q, k and v of every code, into ``depth_qkv``, unless that has been done.

        The table is (K - 2, codebook size, E): the first pass reads codebook 0, and no pass reads the last one. There
        is none where ``can_gather_qkv`` is false, such as on a CPU.
        """
        decoder, attention = self.depth_decoder, self.depth_decoder.first_attention
        if self.depth_qkv is not None or not can_gather_qkv(attention.qkv, batch=1):
            return
        if not isinstance(self.depth_embedding, Tensor):  # rows in a file, on a CPU
            return
        embedding_KVD = self.depth_embedding.unflatten(0, (-1, self.config.audio_vocab_size))
        self.depth_qkv = tabulate_qkv(
            x_KVD=embedding_KVD[1:, : self.config.codebook_size],
            norm_D=attention.norm,
            qkv_ED=attention.qkv,
            eps=attention.eps,
            rope_Kp2=decoder.rope.rope_Sp2[2 : self.config.num_codebooks],
            num_kv_heads=decoder.config.num_kv_heads,
        )

    def code_qkv(self, codebook: int, batch: int) -> Tensor | None:
        """``depth_qkv`` of one codebook, (codebook size, E); None if ``batch`` slots compute q, k and v instead."""
        if self.depth_qkv is None or codebook in (0, self.config.num_codebooks - 1):
            return None
        can_gather = can_gather_qkv(self.depth_decoder.first_attention.qkv, batch)
        return self.depth_qkv[codebook - 1] if can_gather else None

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook0_head.dtype

    @property
    def device(self) -> torch.device:
        return self.codebook0_head.device

    def embed_rows(self, row_BTC: Tensor, mask_BTC: Tensor) -> Tensor:
        """Sum of the embeddings of each row's columns that the mask selects: (B, T, K + 1) -> (B, T, D)."""
        return embed_rows(
            row_BTC, mask_BTC, offset_K=self.offset_K, audio_WD=self.audio_embedding, text_VD=self.text_embedding
        )

    def code_embedding(self, codebook: int) -> Table:
        """Projected embeddings of the codes of one codebook, the depth decoder's input: (V, depth dim)."""
        first = codebook * self.config.audio_vocab_size
        return self.depth_embedding[first : first + self.config.audio_vocab_size]

    def enter_depth(self, hidden_BTD: Tensor) -> Tensor:
        """Norm and project hidden states of the backbone, for depth position 0: (B, T, D) -> (B, T, depth dim)."""
        return norm_linear(hidden_BTD, self.backbone.norm, self.projection, self.config.backbone.norm_eps)

    def logits(self, codebook: int, hidden_BTD: Tensor) -> Tensor:
        """Logits of the codec's ids of one codebook: (B, T, D) -> (B, T, codebook_size).

        ``hidden_BTD`` comes from the backbone for codebook 0, and from the depth decoder for the others.
        """
        transformer = self.backbone if codebook == 0 else self.depth_decoder
        return norm_linear(hidden_BTD, transformer.norm, self.head(codebook), transformer.config.norm_eps)

    def head(self, codebook: int) -> Weight:
        """The weight of the logits of one codebook: (codebook_size, D)."""
        head_VD = self.codebook0_head if codebook == 0 else self.depth_heads[codebook - 1]
        return head_VD[: self.config.codebook_size]
