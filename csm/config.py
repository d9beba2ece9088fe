"""Shapes of the model and of the codec, as frozen dataclasses. Independent of any file format."""

from __future__ import annotations

from dataclasses import dataclass

from csm.errors import CheckpointError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of the rotary frequencies (Llama 3.1 model card).

    Only the ratios of ``low_freq_factor`` and ``high_freq_factor`` to ``original_max_positions`` matter.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class TransformerConfig:
    """A Llama-style transformer: RMSNorm, grouped-query attention with rotary embeddings, SwiGLU, no biases."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = RopeScaling(32.0, 1.0, 4.0, 8192)

    def __post_init__(self) -> None:
        for name in ("num_layers", "dim", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "max_positions"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim must be even (rotary embeddings act on pairs), not {self.head_dim}")

    @property
    def qkv_dim(self) -> int:
        """Output features of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class CSMConfig:
    """CSM: a backbone over text and audio rows, and a depth decoder over the codebooks of one frame.

    ``audio_vocab_size`` is the number of rows of a codebook's embedding. Only ids below ``codebook_size`` are codes of
    the codec; the rest (2048..2050 in CSM-1B) are never sampled.
    """

    backbone: TransformerConfig
    depth_decoder: TransformerConfig
    text_vocab_size: int
    audio_vocab_size: int
    num_codebooks: int
    codebook_size: int

    def __post_init__(self) -> None:
        _require(self.num_codebooks >= 2, f"num_codebooks must be at least 2, not {self.num_codebooks}")
        _require(self.text_vocab_size > 0, f"text_vocab_size must be positive, not {self.text_vocab_size}")
        _require(
            0 < self.codebook_size <= self.audio_vocab_size,
            f"codebook_size must be from 1 to audio_vocab_size ({self.audio_vocab_size}), not {self.codebook_size}",
        )
        _require(
            self.depth_decoder.max_positions >= self.num_codebooks,
            f"the depth decoder's max_positions must be at least num_codebooks ({self.num_codebooks}), "
            f"not {self.depth_decoder.max_positions}",
        )


@dataclass(frozen=True)
class CodecConfig:
    """Shapes of a Mimi codec (https://arxiv.org/abs/2410.00037, section 3.3). The defaults are Kyutai's."""

    sample_rate: int = 24_000
    frame_rate: float = 12.5
    dim: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    num_layers: int = 8
    num_heads: int = 8
    hidden_dim: int = 2048
    context: int = 250
    rope_theta: float = 10_000.0
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_codebooks: int = 32

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers"):
            _require(getattr(self, name) > 0, f"codec: {name} must be positive, not {getattr(self, name)}")
        _require(self.num_codebooks >= 2, f"codec: num_codebooks must be at least 2, not {self.num_codebooks}")
        _require(
            self.dim % self.num_heads == 0,
            f"codec: dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def frame_size(self) -> int:
        """Samples per frame: 1920 at 24 kHz and 12.5 Hz."""
        return int(self.sample_rate / self.frame_rate)


LLAMA_1B = TransformerConfig(
    num_layers=16, dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, hidden_dim=8192, max_positions=2048
)
LLAMA_100M = TransformerConfig(
    num_layers=4, dim=1024, num_heads=8, num_kv_heads=2, head_dim=128, hidden_dim=8192, max_positions=32
)
CSM_1B = CSMConfig(
    backbone=LLAMA_1B,
    depth_decoder=LLAMA_100M,
    text_vocab_size=128_256,
    audio_vocab_size=2051,
    num_codebooks=32,
    codebook_size=2048,
)
MIMI = CodecConfig()
