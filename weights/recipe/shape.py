"""Shapes and tokenizers of the embedded checkpoint."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from csm.config import CodecConfig, CSMConfig, TransformerConfig

CODEC = CodecConfig(
    dim=128,
    num_filters=16,
    num_layers=4,
    num_heads=4,
    hidden_dim=384,
    context=32,
    codebook_size=1024,
    codebook_dim=64,
    num_codebooks=5,
)
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
PHONES = "ɑæʌɔWəIbʧdðɛɜAfghɪiʤklmnŋOYprsʃtθʊuvwjzʒ"  # as ``csm.pronounce`` writes them
CHARACTERS = "[]0123456789 .,;:?!" + PHONES
MODEL = CSMConfig(
    backbone=TransformerConfig(
        num_layers=6, dim=256, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=672, max_positions=2048
    ),
    depth_decoder=TransformerConfig(
        num_layers=2, dim=192, num_heads=3, num_kv_heads=1, head_dim=64, hidden_dim=512, max_positions=5
    ),
    text_vocab_size=len(CHARACTERS) + len(SPECIAL_TOKENS),
    audio_vocab_size=CODEC.codebook_size + 3,
    num_codebooks=CODEC.num_codebooks,
    codebook_size=CODEC.codebook_size,
)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of 256 bytes and the special tokens, in ``tokenizer.json`` form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def phone_tokenizer() -> Tokenizer:
    """A tokenizer of one token a character of CHARACTERS, and the special tokens; any other character is dropped."""
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(CHARACTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
