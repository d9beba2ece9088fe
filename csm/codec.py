"""The Mimi codec of the moshi package: encodes audio, and decodes codes whole or frame by frame.

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

# moshi keeps streaming state on its modules, and its compile switch in a global: all codecs share one lock.
_MOSHI_LOCK = threading.RLock()


class Codec:
    """Mimi in float32 on one device. Thread-safe: calls are serialised."""

    def __init__(self, config: CodecConfig, num_codebooks: int, state: dict[str, Tensor], device: torch.device):
        """``state`` is a state dict with moshi's names. Only the first ``num_codebooks`` codebooks are used.

        Raises CheckpointError if ``state`` does not match ``config``.
        """
        self.config = config
        self.num_codebooks = num_codebooks
        self.device = device
        from moshi.models import loaders  # slow to import, and not needed to generate codes

        self._mimi = loaders.get_mimi(
            None, mimi_config=moshi_config(config), device=device, num_codebooks=num_codebooks
        )
        try:
            self._mimi.load_state_dict(dict(state))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"not a Mimi codec of the shape given in config.json: {reason}") from error
        self._mimi.requires_grad_(False)
        for module in self._mimi.modules():  # moshi computes embedding tables lazily: compute them on one stream now
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
        """Encode (samples,) or (channels, samples) at any rate to codes (T, K) int64 on the CPU.

        The last frame is padded with silence. ``sample_rate`` None means the codec's. Raises AudioError.
        """
        mono = to_mono(audio, self.sample_rate if sample_rate is None else sample_rate, self.sample_rate)
        with self._exclusive():
            codes_BKT = self._mimi.encode(mono.to(self.device).view(1, 1, -1))
        return codes_BKT[0].T.cpu()

    @torch.no_grad()
    def decode(self, codes_TK: Tensor) -> Tensor:
        """Decode codes (T, K) to (T * frame_size,) float32 on the CPU, all frames at once. Raises AudioError."""
        codes_TK = check_codes(codes_TK, self.num_codebooks, self.config.codebook_size)
        if codes_TK.shape[0] == 0:
            return torch.zeros(0, dtype=torch.float32)
        with self._exclusive():
            audio_B1N = self._mimi.decode(codes_TK.to(self.device).T.unsqueeze(0))
        return audio_B1N[0, 0].cpu()

    def stream_decoder(self, batch: int = 1) -> StreamDecoder:
        """A decoder of ``batch`` slots with streaming state of its own. Any number may be in use at once."""
        with self._exclusive(), self._mimi.streaming(batch):
            state = self._mimi.get_streaming_state()
        return StreamDecoder(self, state, batch)

    @contextmanager
    def _exclusive(self, state: dict[str, Any] | None = None) -> Iterator[None]:
        """Lock moshi's modules and, if ``state`` is given, set it as their streaming state for the duration."""
        from moshi.utils.compile import no_compile, no_cuda_graph

        with _MOSHI_LOCK, no_compile(), no_cuda_graph():
            if state is None:
                yield
                return
            outer = self._mimi.get_streaming_state()
            self._mimi.set_streaming_state(state)
            try:
                yield
            finally:
                self._mimi.set_streaming_state(outer)

    def _decode_frame(self, codes_BK: Tensor, state: dict[str, Any]) -> Tensor:
        """Decode one frame of each slot to (B, frame_size) samples, and advance the streaming state."""
        mimi = self._mimi
        with self._exclusive(state):
            latent_BCT = mimi.upsample(mimi.decode_latent(codes_BK.unsqueeze(-1)))
            # One latent step at a time: with two, moshi's ring of `context` keys would overwrite a key that the first
            # of them attends to, and beyond 10 s the stream would differ from decoding all frames at once.
            steps = [mimi.decoder_transformer(step)[0] for step in latent_BCT.split(1, dim=-1)]
            return mimi.decoder(torch.cat(steps, dim=-1))[:, 0]


class StreamDecoder:
    """Decodes one frame of every slot at a time. The samples equal those of ``Codec.decode`` on all frames.

    ``run`` reads ``codes_BK`` and writes ``audio_BN``, buffers with fixed addresses, and never synchronises with the
    host, so that it can be captured.
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
        """Decode one frame of each slot, (B, K) int64, to (B, frame_size) float32 on the codec's device."""
        self.codes_BK.copy_(codes_BK)
        self.run()
        return self.audio_BN.clone()

    @torch.no_grad()
    def reset(self) -> None:
        """Restart every slot, in place."""
        all_slots_B = torch.ones(self.codes_BK.shape[0], dtype=torch.bool, device=self.codes_BK.device)
        for name, state in self._state.items():
            if not name.startswith(("encoder", "downsample")):  # not used by decoding
                state.reset(all_slots_B)


def moshi_config(config: CodecConfig) -> dict[str, Any]:
    """``config`` as the ``mimi_config`` of moshi.models.loaders.get_mimi."""
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
    """Arguments of the convolutional encoder and decoder (SEANet)."""
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
    """Codes as (T, K) int64 on the CPU; T may be 0. Raises AudioError for another shape, dtype or range."""
    try:
        codes_TK = torch.as_tensor(codes_TK).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"codes must be a tensor or an array of integers, not {type(codes_TK).__name__}") from error
    is_integer = not (codes_TK.is_floating_point() or codes_TK.is_complex() or codes_TK.dtype == torch.bool)
    if codes_TK.ndim != 2 or codes_TK.shape[1] != num_codebooks or not is_integer:
        kind = f"{codes_TK.dtype} of shape {tuple(codes_TK.shape)}"
        raise AudioError(f"codes must be integers of shape (frames, {num_codebooks}), not {kind}")
    codes_TK = codes_TK.to(torch.int64)
    if codes_TK.numel():
        low, high = codes_TK.aminmax()
        if low < 0 or high >= codebook_size:
            raise AudioError(f"codes must be from 0 to {codebook_size - 1}, not {low.item()} to {high.item()}")
    return codes_TK
