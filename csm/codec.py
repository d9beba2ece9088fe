"""The Mimi codec, from the moshi package: audio to codes and back, whole or frame by frame.

Shapes: B slots, K codebooks, T frames of 80 ms, C latent channels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from csm.audio import to_mono
from csm.config import CodecConfig
from csm.errors import AudioError, CheckpointError

# moshi keeps streaming state on its modules, and whether to compile in a global: one call at a time, over all codecs.
_MOSHI = threading.RLock()


class Codec:
    """Mimi in float32 on one device. Calls from several threads take turns."""

    def __init__(self, config: CodecConfig, num_codebooks: int, state: dict[str, Tensor], device: torch.device):
        """``state`` is a state dict in moshi's names; ``num_codebooks`` of the codec's codebooks are used."""
        self.config = config
        self.num_codebooks = num_codebooks
        self.device = device
        from moshi.models import loaders  # here, because codes alone do not need it and it brings a good deal along

        self._mimi = loaders.get_mimi(
            None, mimi_config=moshi_config(config), device=device, num_codebooks=num_codebooks
        )
        try:
            self._mimi.load_state_dict(dict(state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"not a Mimi of the shape in config.json: {reason}") from error
        self._mimi.requires_grad_(False)
        for module in self._mimi.modules():  # moshi computes its codebooks when they are first read: now, on one stream
            getattr(module, "embedding", None)

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.config.frame_size

    @torch.no_grad()
    def encode(self, audio: Tensor, sample_rate: int | None = None) -> Tensor:
        """(samples,) or (channels, samples) at any rate to codes (T, K) int64 on the CPU.

        The last frame is padded with silence. ``sample_rate`` None means the codec's own. Raises AudioError.
        """
        mono = to_mono(audio, self.sample_rate if sample_rate is None else sample_rate, self.sample_rate)
        with self._exclusive():
            codes_BKT = self._mimi.encode(mono.to(self.device).view(1, 1, -1))
        return codes_BKT[0].T.cpu()

    @torch.no_grad()
    def decode(self, codes_TK: Tensor) -> Tensor:
        """Codes (T, K) to (T * frame_size,) float32 on the CPU, in one pass. Raises AudioError."""
        codes_TK = check_codes(codes_TK, self.num_codebooks, self.config.codebook_size)
        if codes_TK.shape[0] == 0:
            return torch.zeros(0, dtype=torch.float32)
        with self._exclusive():
            audio_B1N = self._mimi.decode(codes_TK.to(self.device).T.unsqueeze(0))
        return audio_B1N[0, 0].cpu()

    def stream_decoder(self, batch: int = 1) -> StreamDecoder:
        """A decoder that carries its own state from frame to frame; any number may be in use at once."""
        with self._exclusive(), self._mimi.streaming(batch):
            state = self._mimi.get_streaming_state()
        return StreamDecoder(self, state, batch)

    @contextmanager
    def _exclusive(self, state: dict[str, Any] | None = None) -> Iterator[None]:
        """The modules to oneself, with a streaming state put in for the time and taken out again."""
        from moshi.utils.compile import no_compile, no_cuda_graph

        with _MOSHI, no_compile(), no_cuda_graph():
            if state is None:
                yield
                return
            nothing = self._mimi.get_streaming_state()
            self._mimi.set_streaming_state(state)
            try:
                yield
            finally:
                self._mimi.set_streaming_state(nothing)

    def _decode_frame(self, codes_BK: Tensor, state: dict[str, Any]) -> Tensor:
        """One frame of each slot to (B, frame_size) samples, from and into a streaming state."""
        mimi = self._mimi
        with self._exclusive(state):
            latent_BCT = mimi.upsample(mimi.decode_latent(codes_BK.unsqueeze(-1)))
            # One latent step at a time: moshi's ring of `context` keys would drop, for two steps at once, a key that
            # the first of them still sees, and beyond 10 s the stream would no longer equal the whole.
            steps = [mimi.decoder_transformer(step)[0] for step in latent_BCT.split(1, dim=-1)]
            return mimi.decoder(torch.cat(steps, dim=-1))[:, 0]


class StreamDecoder:
    """Decodes frame after frame; the samples are those of ``Codec.decode`` on all frames.

    ``codes_BK`` and ``audio_BN`` are buffers at fixed addresses, and ``run`` turns the one into the other without a
    sync, so that it can be captured.
    """

    def __init__(self, codec: Codec, state: dict[str, Any], batch: int):
        self._codec = codec
        self._state = state
        self.codes_BK = torch.zeros(batch, codec.num_codebooks, dtype=torch.int64, device=codec.device)
        self.audio_BN = torch.zeros(batch, codec.frame_size, dtype=torch.float32, device=codec.device)

    @torch.no_grad()
    def run(self) -> None:
        """Decode the frame in ``codes_BK`` into ``audio_BN``."""
        self.audio_BN.copy_(self._codec._decode_frame(self.codes_BK, self._state))

    def step(self, codes_BK: Tensor) -> Tensor:
        """One frame of each slot, (B, K) int64, to (B, frame_size) float32 on the codec's device."""
        self.codes_BK.copy_(codes_BK)
        self.run()
        return self.audio_BN.clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again, in every slot and in the same buffers."""
        everything = torch.ones(self.codes_BK.shape[0], dtype=torch.bool, device=self.codes_BK.device)
        for name, state in self._state.items():
            if not name.startswith(("encoder", "downsample")):  # what decoding leaves alone
                state.reset(everything)


def moshi_config(config: CodecConfig) -> dict[str, Any]:
    """``config`` as the arguments that moshi builds its Mimi from (moshi.models.loaders)."""
    return {
        "sample_rate": config.sample_rate,
        "channels": 1,
        "frame_rate": config.frame_rate,
        "seanet": _seanet_config(config),
        "quantizer": {
            "dimension": config.codebook_dim,
            "n_q": config.num_codebooks,
            "bins": config.codebook_size,
            "input_dimension": config.dim,
            "output_dimension": config.dim,
        },
        "transformer": {
            "d_model": config.dim,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "causal": True,
            "layer_scale": 0.01,
            "context": config.context,
            "conv_layout": True,
            "max_period": config.rope_theta,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": config.hidden_dim,
            "input_dimension": config.dim,
            "output_dimensions": [config.dim],
        },
    }


def _seanet_config(config: CodecConfig) -> dict[str, Any]:
    """The convolutional encoder's and decoder's."""
    return {
        "channels": 1,
        "dimension": config.dim,
        "causal": True,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "activation": "ELU",
        "compress": config.compress,
        "dilation_base": config.dilation_base,
        "disable_norm_outer_blocks": 0,
        "kernel_size": config.kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": list(config.ratios),
        "true_skip": True,
    }


def check_codes(codes_TK: Tensor, num_codebooks: int, codebook_size: int) -> Tensor:
    """Codes as (T, K) int64 on the CPU, T of 0 or more. Raises AudioError for what cannot be codes."""
    try:
        codes_TK = torch.as_tensor(codes_TK).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"codes must be a tensor or an array of integers, not {type(codes_TK).__name__}") from error
    whole = not (codes_TK.is_floating_point() or codes_TK.is_complex() or codes_TK.dtype == torch.bool)
    if codes_TK.ndim != 2 or codes_TK.shape[1] != num_codebooks or not whole:
        kind = f"{codes_TK.dtype} of shape {tuple(codes_TK.shape)}"
        raise AudioError(f"codes must be integers of shape (frames, {num_codebooks}), not {kind}")
    codes_TK = codes_TK.to(torch.int64)
    if codes_TK.numel():
        low, high = codes_TK.aminmax()
        if low < 0 or high >= codebook_size:
            raise AudioError(f"codes must be within 0 and {codebook_size - 1}, not {low.item()} to {high.item()}")
    return codes_TK
