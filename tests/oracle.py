"""Random CSM checkpoints written by HF Transformers, and the inputs that Transformers expects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CsmConfig, CsmForConditionalGeneration

from csm.weights.recipe.shape import byte_tokenizer

AUDIO_TOKEN, AUDIO_EOS_TOKEN = 258, 259  # text ids that the byte tokenizer does not use
TEXT_VOCAB = 260


@dataclass(frozen=True)
class Shape:
    """Shape of a random checkpoint: (layers, dim, heads, kv heads, hidden) of the backbone and the depth decoder."""

    backbone: tuple[int, int, int, int, int] = (2, 64, 4, 2, 96)
    depth: tuple[int, int, int, int, int] = (2, 48, 3, 1, 80)
    num_codebooks: int = 8
    codebook_size: int = 64
    head_dims: tuple[int | None, int | None] = (None, None)
    scaling: str = "hf"

    def __str__(self) -> str:
        return f"{self.backbone}-{self.depth}-{self.num_codebooks}"


# HF's form of Sesame's scaling in csm-1b (factor 32, low 1, high 4, original 8192), and one that interpolates.
SCALINGS = {
    "hf": (
        dict(rope_type="llama3", factor=32.0, low_freq_factor=0.125, high_freq_factor=0.5, original=1024),
        dict(rope_type="llama3", factor=32.0, low_freq_factor=0.001953125, high_freq_factor=0.0078125, original=16),
    ),
    "blend": (
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original=64),
        dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original=16),
    ),
    "none": (None, None),
}


def llama(sizes: tuple[int, int, int, int, int], head_dim: int | None, scaling: dict | None) -> dict:
    layers, dim, heads, kv_heads, hidden = sizes
    if scaling is not None:
        scaling = {**scaling, "original_max_position_embeddings": scaling["original"]}
        del scaling["original"]
    return dict(
        num_hidden_layers=layers,
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        head_dim=head_dim or dim // heads,
        rope_scaling=scaling,
        rope_theta=500_000.0,
    )


def hf_config(shape: Shape) -> CsmConfig:
    vocab = shape.codebook_size + 3
    scalings = SCALINGS[shape.scaling]
    shared = dict(num_codebooks=shape.num_codebooks, vocab_size=vocab)
    return CsmConfig(
        **shared,
        **llama(shape.backbone, shape.head_dims[0], scalings[0]),
        text_vocab_size=TEXT_VOCAB,
        max_position_embeddings=2048,
        codebook_pad_token_id=vocab - 1,
        audio_token_id=AUDIO_TOKEN,
        audio_eos_token_id=AUDIO_EOS_TOKEN,
        pad_token_id=TEXT_VOCAB - 1,
        bos_token_id=256,
        depth_decoder_config=dict(
            **shared,
            **llama(shape.depth, shape.head_dims[1], scalings[1]),
            backbone_hidden_size=shape.backbone[1],
            max_position_embeddings=shape.num_codebooks + 1,
        ),
        codec_config=dict(
            model_type="mimi",
            hidden_size=32,
            num_filters=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            codebook_size=shape.codebook_size,
            codebook_dim=16,
            vector_quantization_hidden_dimension=16,
            num_quantizers=shape.num_codebooks,
            upsample_groups=32,
        ),
    )


def random_model(shape: Shape, seed: int = 0) -> CsmForConditionalGeneration:
    """A model with weights large enough that every part affects the logits."""
    torch.manual_seed(seed)
    model = CsmForConditionalGeneration(hf_config(shape)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("codec_model."):
                if name.endswith("layer_scale.scale"):
                    parameter.fill_(0.5)
                continue
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter.shape[-2] if name.endswith("codebooks_head.weight") else parameter.shape[-1]
                scale = 1.0 if "embed" in name and "projector" not in name else 1.5 / fan_in**0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        # Transformers does not mask ids that are not codes. Zero their logits, so that they are never the largest.
        model.lm_head.weight[shape.codebook_size :] = 0
        model.depth_decoder.codebooks_head.weight[:, :, shape.codebook_size :] = 0
        for name, buffer in model.codec_model.named_buffers():
            if name.endswith("embed_sum"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            if name.endswith(("cluster_usage", "initialized")):
                buffer.fill_(1)
    return model


def save(model: CsmForConditionalGeneration, folder: Path, **options: object) -> Path:
    """Save a checkpoint with Transformers, and add tokenizer.json."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def hf_inputs(turns: list[tuple[str, Tensor]], text: str, speakers: list[int]) -> dict[str, Tensor]:
    """Input ids and audio of context turns (text, samples) and of the text to generate, as CsmProcessor makes them."""
    tokenizer = byte_tokenizer()

    def text_ids(speaker: int, words: str) -> list[int]:
        return [256, *tokenizer.encode(f"[{speaker}]{words}", add_special_tokens=False).ids, 257]

    ids: list[int] = []
    for speaker, (words, audio) in zip(speakers, turns, strict=False):
        frames = -(-audio.shape[0] // 1920)
        ids += [*text_ids(speaker, words), *[AUDIO_TOKEN] * frames, AUDIO_EOS_TOKEN]
    ids += text_ids(speakers[len(turns)], text)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if turns:
        inputs["input_values"] = torch.cat([audio for _, audio in turns]).view(1, 1, -1)
        inputs["input_values_cutoffs"] = torch.tensor([[audio.shape[0] for _, audio in turns]]).cumsum(-1)
    return inputs
