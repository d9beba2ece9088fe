"""Name tables of the supported layouts: which tensor of a file fills which rows of which parameter.

A table is a list of ``Entry`` and is complete in both directions: it lists every tensor of the layout and fills every
row of every parameter. ``export`` applies a table in reverse, from the model's names to the file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from csm.config import CodecConfig, CSMConfig, TransformerConfig


class Change(Enum):
    """How a file's tensor is rearranged into the parameter."""

    NONE = "unchanged"
    PAIRS = "rows of each head from rotate-half order (HF) to interleaved pairs (Sesame, moshi)"
    TRANSPOSE = "last two dimensions transposed"


@dataclass(frozen=True)
class Entry:
    """Tensor ``source`` of the file, of shape ``shape``, fills ``target[first : first + target_shape[0]]``.

    ``alias`` is a second name of the same (tied) tensor. A file may contain either name or both.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    first: int = 0
    change: Change = Change.NONE
    head_dim: int = 0
    alias: str | None = None

    def to_target(self, tensor: Tensor) -> Tensor:
        """The file's tensor in the parameter's order. May be a view."""
        if self.change is Change.TRANSPOSE:
            return tensor.transpose(-1, -2)
        if self.change is Change.PAIRS:
            return self._heads(tensor, 2, self.head_dim // 2).transpose(1, 2).flatten(0, 2)
        return tensor

    def to_source(self, tensor: Tensor) -> Tensor:
        """The inverse of ``to_target``."""
        if self.change is Change.TRANSPOSE:
            return tensor.transpose(-1, -2)
        if self.change is Change.PAIRS:
            return self._heads(tensor, self.head_dim // 2, 2).transpose(1, 2).flatten(0, 2)
        return tensor

    @property
    def names(self) -> list[str]:
        """The names that the tensor may have in a file."""
        return [self.source] if self.alias is None else [self.source, self.alias]

    @property
    def target_shape(self) -> tuple[int, ...]:
        if self.change is Change.TRANSPOSE:
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self.shape

    @staticmethod
    def _heads(tensor: Tensor, outer: int, inner: int) -> Tensor:
        return tensor.unflatten(0, (-1, outer, inner))


Table = list[Entry]


def target_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that a table fills."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in table:
        rows = entry.first + entry.target_shape[0]
        known = shapes.get(entry.target, (0,))[0]
        shapes[entry.target] = (max(rows, known), *entry.target_shape[1:])
    return shapes


def export(state: dict[str, Tensor], table: Table) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, contiguous tensor) for every tensor of a layout, tied copies included."""
    for entry in table:
        rows = state[entry.target][entry.first : entry.first + entry.target_shape[0]]
        for name in entry.names:
            yield name, entry.to_source(rows).clone(memory_format=torch.contiguous_format)


def sesame_table(config: CSMConfig) -> Table:
    """``sesame/csm-1b``: model.safetensors and ckpt.pt."""
    table = [
        *_sesame_transformer("backbone", "backbone", config.backbone),
        *_sesame_transformer("decoder", "depth_decoder", config.depth_decoder),
    ]
    names = {
        "text_embedding": "text_embeddings.weight",
        "audio_embedding": "audio_embeddings.weight",
        "projection": "projection.weight",
        "codebook0_head": "codebook0_head.weight",
        "depth_heads": "audio_head",
    }
    return table + _shared_entries(config, names)


def hf_table(config: CSMConfig) -> Table:
    """HF Transformers' CsmForConditionalGeneration without ``codec_model``."""
    table = [
        *_hf_transformer("backbone_model", "backbone", config.backbone),
        *_hf_transformer("depth_decoder.model", "depth_decoder", config.depth_decoder),
    ]
    names = {
        "text_embedding": "embed_text_tokens.weight",
        "audio_embedding": "backbone_model.embed_tokens.embed_audio_tokens.weight",
        "projection": "depth_decoder.model.inputs_embeds_projector.weight",
        "codebook0_head": "lm_head.weight",
        "depth_heads": "depth_decoder.codebooks_head.weight",
    }
    return table + _shared_entries(config, names, tied_audio="depth_decoder.model.embed_tokens.weight")


def _shared_entries(config: CSMConfig, names: dict[str, str], tied_audio: str | None = None) -> Table:
    """Tensors that both layouts have: embeddings, projection and heads."""
    backbone_dim, depth_dim, vocab = config.backbone.dim, config.depth_decoder.dim, config.audio_vocab_size
    audio_shape = (config.num_codebooks * vocab, backbone_dim)
    heads_shape = (config.num_codebooks - 1, depth_dim, vocab)
    return [
        Entry(names["text_embedding"], "text_embedding", (config.text_vocab_size, backbone_dim)),
        Entry(names["audio_embedding"], "audio_embedding", audio_shape, alias=tied_audio),
        Entry(names["projection"], "projection", (depth_dim, backbone_dim)),
        Entry(names["codebook0_head"], "codebook0_head", (vocab, backbone_dim)),
        Entry(names["depth_heads"], "depth_heads", heads_shape, change=Change.TRANSPOSE),
    ]


SESAME_BLOCK = {
    "q": "attn.q_proj.weight",
    "k": "attn.k_proj.weight",
    "v": "attn.v_proj.weight",
    "output": "attn.output_proj.weight",
    "gate": "mlp.w1.weight",
    "down": "mlp.w2.weight",
    "up": "mlp.w3.weight",
    "attention_norm": "sa_norm.scale",
    "mlp_norm": "mlp_norm.scale",
}
HF_BLOCK = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "down": "mlp.down_proj.weight",
    "up": "mlp.up_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}


def _sesame_transformer(source: str, target: str, config: TransformerConfig) -> Table:
    blocks = _blocks(source, target, config, SESAME_BLOCK, Change.NONE)
    return [*blocks, Entry(f"{source}.norm.scale", f"{target}.norm", (config.dim,))]


def _hf_transformer(source: str, target: str, config: TransformerConfig) -> Table:
    blocks = _blocks(source, target, config, HF_BLOCK, Change.PAIRS)
    return [*blocks, Entry(f"{source}.norm.weight", f"{target}.norm", (config.dim,))]


def _blocks(source: str, target: str, config: TransformerConfig, names: dict[str, str], rotary: Change) -> Table:
    dim, hidden, head_dim = config.dim, config.hidden_dim, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    table: Table = []
    for layer in range(config.num_layers):
        name = {part: f"{source}.layers.{layer}.{suffix}" for part, suffix in names.items()}
        attention, mlp = f"{target}.layers.{layer}.attention", f"{target}.layers.{layer}.mlp"
        qkv = f"{attention}.qkv"
        table += [
            Entry(name["attention_norm"], f"{attention}.norm", (dim,)),
            Entry(name["q"], qkv, (q_rows, dim), change=rotary, head_dim=head_dim),
            Entry(name["k"], qkv, (kv_rows, dim), first=q_rows, change=rotary, head_dim=head_dim),
            Entry(name["v"], qkv, (kv_rows, dim), first=q_rows + kv_rows),
            Entry(name["output"], f"{attention}.output", (dim, q_rows)),
            Entry(name["mlp_norm"], f"{mlp}.norm", (dim,)),
            Entry(name["gate"], f"{mlp}.gate_up", (hidden, dim)),
            Entry(name["up"], f"{mlp}.gate_up", (hidden, dim), first=hidden),
            Entry(name["down"], f"{mlp}.down", (dim, hidden)),
        ]
    return table


def mimi_table(config: CodecConfig, prefix: str = "codec_model.") -> Table:
    """HF Transformers' MimiModel, as moshi's parameters."""
    kernel = int(2 * config.sample_rate / config.frame_rate / _hop(config))
    return [
        *_seanet(config, prefix),
        *_mimi_transformer("encoder_transformer", config, prefix),
        *_mimi_transformer("decoder_transformer", config, prefix),
        Entry(f"{prefix}downsample.conv.weight", "downsample.conv.conv.conv.weight", (config.dim, config.dim, kernel)),
        Entry(f"{prefix}upsample.conv.weight", "upsample.convtr.convtr.convtr.weight", (config.dim, 1, kernel)),
        *_mimi_quantizer("semantic", "rvq_first", 1, config, prefix),
        *_mimi_quantizer("acoustic", "rvq_rest", config.num_codebooks - 1, config, prefix),
    ]


def _hop(config: CodecConfig) -> int:
    hop = 1
    for ratio in config.ratios:
        hop *= ratio
    return hop


def _seanet(config: CodecConfig, prefix: str) -> Table:
    """Convolutions of the encoder and the decoder. A stage: residual blocks, an activation, a strided convolution."""
    table: Table = []
    width, stage = config.num_filters, 1

    def conv(side: str, layer: str, shape: tuple[int, ...], bias: int, kind: str = "conv") -> None:
        source, target = f"{prefix}{side}.layers.{layer}.conv", f"{side}.model.{layer}.{kind}.{kind}"
        table.append(Entry(f"{source}.weight", f"{target}.weight", shape))
        table.append(Entry(f"{source}.bias", f"{target}.bias", (bias,)))

    def residual(side: str, layer: int, width: int) -> None:
        inner = width // config.compress
        conv(side, f"{layer}.block.1", (inner, width, config.residual_kernel_size), inner)
        conv(side, f"{layer}.block.3", (width, inner, 1), width)

    conv("encoder", "0", (width, 1, config.kernel_size), width)
    for ratio in reversed(config.ratios):
        for block in range(config.num_residual_layers):
            residual("encoder", stage + block, width)
        stage += config.num_residual_layers + 2
        conv("encoder", str(stage - 1), (2 * width, width, 2 * ratio), 2 * width)
        width *= 2
    conv("encoder", str(stage + 1), (config.dim, width, config.last_kernel_size), config.dim)

    conv("decoder", "0", (width, config.dim, config.kernel_size), width)
    stage = 2
    for ratio in config.ratios:
        conv("decoder", str(stage), (width, width // 2, 2 * ratio), width // 2, kind="convtr")
        width //= 2
        for block in range(config.num_residual_layers):
            residual("decoder", stage + 1 + block, width)
        stage += config.num_residual_layers + 2
    conv("decoder", str(stage), (1, width, config.last_kernel_size), 1)
    return table


def _mimi_transformer(side: str, config: CodecConfig, prefix: str) -> Table:
    dim, hidden = config.dim, config.hidden_dim
    table: Table = []
    for layer in range(config.num_layers):
        source, target = f"{prefix}{side}.layers.{layer}", f"{side}.transformer.layers.{layer}"
        for row, (part, change) in enumerate((("q", Change.PAIRS), ("k", Change.PAIRS), ("v", Change.NONE))):
            name, qkv = f"{source}.self_attn.{part}_proj.weight", f"{target}.self_attn.in_projs.0.weight"
            table.append(Entry(name, qkv, (dim, dim), first=row * dim, change=change, head_dim=config.head_dim))
        rest: list[tuple[str, str, tuple[int, ...]]] = [
            ("self_attn.o_proj.weight", "self_attn.out_projs.0.weight", (dim, dim)),
            ("mlp.fc1.weight", "linear1.weight", (hidden, dim)),
            ("mlp.fc2.weight", "linear2.weight", (dim, hidden)),
            ("input_layernorm.weight", "norm1.weight", (dim,)),
            ("input_layernorm.bias", "norm1.bias", (dim,)),
            ("post_attention_layernorm.weight", "norm2.weight", (dim,)),
            ("post_attention_layernorm.bias", "norm2.bias", (dim,)),
            ("self_attn_layer_scale.scale", "layer_scale_1.scale", (dim,)),
            ("mlp_layer_scale.scale", "layer_scale_2.scale", (dim,)),
        ]
        table += [Entry(f"{source}.{name}", f"{target}.{ours}", shape) for name, ours, shape in rest]
    return table


def _mimi_quantizer(kind: str, ours: str, count: int, config: CodecConfig, prefix: str) -> Table:
    source, target = f"{prefix}quantizer.{kind}_residual_vector_quantizer", f"quantizer.{ours}"
    size, dim = config.codebook_size, config.codebook_dim
    table = [
        Entry(f"{source}.input_proj.weight", f"{target}.input_proj.weight", (dim, config.dim, 1)),
        Entry(f"{source}.output_proj.weight", f"{target}.output_proj.weight", (config.dim, dim, 1)),
    ]
    for layer in range(count):
        codebook, ours_codebook = f"{source}.layers.{layer}.codebook", f"{target}.vq.layers.{layer}._codebook"
        table += [
            Entry(f"{codebook}.initialized", f"{ours_codebook}._initialized", (1,)),
            Entry(f"{codebook}.cluster_usage", f"{ours_codebook}.cluster_usage", (size,)),
            Entry(f"{codebook}.embed_sum", f"{ours_codebook}.embedding_sum", (size, dim)),
        ]
    return table


def empty_state(table: Table, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised tensors of every parameter of a table."""
    return {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in target_shapes(table).items()}
