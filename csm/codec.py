"""The Mimi codec of the moshi package: encodes audio, and decodes codes whole or frame by frame.

Shapes: B slots, K codebooks, T frames of 80 ms (in a latent: steps of 40 ms), C latent channels, N samples of a frame
(or numbers of a slot's state), L transformer layers, H heads, S positions of a key ring, d head dim.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from csm.audio import to_mono
from csm.codec_ops import use_products
from csm.config import CodecConfig
from csm.errors import AudioError, CheckpointError

MOSHI_EPSILON = 1e-5  # the least usage of a code that moshi divides by
# moshi keeps streaming state on its modules: all codecs share one lock for them.
_MOSHI_LOCK = threading.RLock()


class PlainMoshi:
    """moshi without torch.compile and CUDA graphs, in all threads that are inside.

    moshi's own switches are globals that each thread would set back to what it found: the first thread in turns them
    off, and the last one out turns them on again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._switches = ExitStack()

    def __enter__(self) -> None:
        from moshi.utils.compile import no_compile, no_cuda_graph

        with self._lock:
            if self._num_inside == 0:
                self._switches.enter_context(no_compile())
                self._switches.enter_context(no_cuda_graph())
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._switches.close()


_PLAIN_MOSHI = PlainMoshi()


class SkipInit(TorchFunctionMode):
    """Skips torch.nn.init. On the meta device it does nothing but import SymPy: 50 MB and half a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Codec:
    """Mimi in float32 on one device. Thread-safe: calls are serialised (on a CPU, those that encode on their own)."""

    def __init__(self, config: CodecConfig, num_codebooks: int, state: dict[str, Tensor], device: torch.device):
        """``state`` is a state dict with moshi's names. Only the first ``num_codebooks`` codebooks are used.

        Raises CheckpointError if ``state`` does not match ``config``.
        """
        self.config = config
        self.num_codebooks = num_codebooks
        self.device = device
        from moshi.models import loaders  # slow to import, and not needed to generate codes

        with torch.device("meta"), SkipInit():  # the tensors of ``state`` become the weights, without a copy
            self._mimi = loaders.get_mimi(
                None, mimi_config=moshi_config(config), device="meta", num_codebooks=num_codebooks
            )
        try:
            self._mimi.load_state_dict(dict(state), assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"not a Mimi codec of the shape given in config.json: {reason}") from error
        self._mimi.requires_grad_(False)
        if device.type == "cpu":
            with SkipInit():
                use_products(self._mimi.decoder_transformer)
                use_products(self._mimi.decoder)
        self._encoder_lock = threading.Lock()
        for module in self._mimi.modules():  # moshi computes embedding tables lazily: compute them on one stream now
            if hasattr(module, "cluster_usage") and bool((module.cluster_usage == 1).all()):
                module.register_buffer("_embedding", module.embedding_sum, persistent=False)  # no table of its own
            getattr(module, "embedding", None)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, by moshi's names. On a CPU some of them are copies."""
        return {name: tensor.contiguous() for name, tensor in self._mimi.state_dict().items()}

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
        audio_B1N = mono.to(self.device).view(1, 1, -1)
        if self.device.type != "cpu":
            with self._exclusive():
                return self._mimi.encode(audio_B1N)[0].T.cpu()
        with self._encoder_lock, _PLAIN_MOSHI:
            return self._encoder.encode(audio_B1N)[0].T

    @cached_property
    def _encoder(self) -> Any:
        """The same modules once more, with the same tensors: on a CPU a long recording holds up no running stream."""
        with _MOSHI_LOCK:
            return copy.deepcopy(self._mimi, {id(tensor): tensor for tensor in self.buffers().values()})

    @torch.no_grad()
    def decode(self, codes_TK: Tensor) -> Tensor:
        """Decode codes (T, K) to (T * frame_size,) float32 on the CPU, all frames at once. Raises AudioError."""
        codes_TK = check_codes(codes_TK, self.num_codebooks, self.config.codebook_size)
        if codes_TK.shape[0] == 0:
            return torch.zeros(0, dtype=torch.float32)
        with self._exclusive():
            audio_B1N = self._mimi.decode(codes_TK.to(self.device).T.unsqueeze(0))
        return audio_B1N[0, 0].cpu()

    def stream_decoder(self, batch: int = 1, max_frames: int = 1) -> StreamDecoder:
        """A decoder of ``batch`` slots with streaming state of its own. Any number may be in use at once.

        It decodes up to ``max_frames`` frames of every slot at a time.
        """
        with self._exclusive(), self._mimi.streaming(batch):
            state = self._mimi.get_streaming_state()
        return StreamDecoder(self, state, batch, max_frames)

    @contextmanager
    def _exclusive(self, state: dict[str, Any] | None = None) -> Iterator[None]:
        """Lock moshi's modules and, if ``state`` is given, set it as their streaming state for the duration."""
        with _MOSHI_LOCK, _PLAIN_MOSHI:
            if state is None:
                yield
                return
            outer = self._mimi.get_streaming_state()
            self._mimi.set_streaming_state(state)
            try:
                yield
            finally:
                self._mimi.set_streaming_state(outer)

    def buffers(self) -> dict[str, Tensor]:
        """All parameters and buffers of the codec by name."""
        return {**dict(self._mimi.named_parameters()), **dict(self._mimi.named_buffers())}

    @property
    def _latent_steps(self) -> int:
        """Steps of the decoder transformer in one frame: 2 in Mimi."""
        return round(self._mimi.encoder_frame_rate / self._mimi.frame_rate)

    def _decode_frames(self, codes_BKT: Tensor, state: dict[str, Any]) -> Tensor:
        """Decode the next frames of each slot to (B, T * frame_size) samples, and advance the streaming state."""
        mimi = self._mimi
        with self._exclusive(state):
            latent_BCT = mimi.upsample(mimi.decode_latent(codes_BKT))
            return mimi.decoder(mimi.decoder_transformer(latent_BCT)[0])[:, 0]


def normalize_codebooks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same codec with a usage of 1 for every code: the sums of the codebooks are the embeddings themselves.

    moshi divides the sums by the usage, and keeps both: 67 MB more for Mimi.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith("cluster_usage")]:
        sums = name.removesuffix("cluster_usage") + "embedding_sum"
        state[sums] = state[sums] / state[name].clamp(min=MOSHI_EPSILON)[:, None]
        state[name] = torch.ones_like(state[name])
    return state


class StreamDecoder:
    """Decodes the next frame, or frames, of every slot. The samples equal those of ``Codec.decode`` on all frames.

    ``run`` decodes one frame of every slot. It reads ``codes_BK`` and ``active_B`` and writes ``audio_BN``, buffers
    with fixed addresses, and never synchronises with the host, so that it can be captured. Slots are independent. Where
    ``active_B`` (initially all true) is false, ``run`` leaves the slot's streaming state as it is, and the slot's audio
    is meaningless.

    The streaming state is three tensors, of which the attributes that moshi reads and writes are views: ``_conv_BN``
    (overlaps of convolutions), ``_offset_BN`` (counts of latent steps), ``_keys_L2BHSd`` (rings of keys and values of
    L layers). So resetting or moving a slot takes one op for each of them.
    """

    def __init__(self, codec: Codec, state: dict[str, Any], batch: int, max_frames: int):
        self._codec = codec
        self._max_frames = max_frames
        self.codes_BK = torch.zeros(batch, codec.num_codebooks, dtype=torch.int64, device=codec.device)
        self.audio_BN = torch.zeros(batch, codec.frame_size, dtype=torch.float32, device=codec.device)
        self.active_B = torch.ones(batch, dtype=torch.bool, device=codec.device)
        # Decoding does not use the encoder's state, which is as large as the decoder's.
        self._state = {name: None if name.startswith(("encoder", "downsample")) else s for name, s in state.items()}
        modules = [module_state for module_state in self._state.values() if module_state is not None]
        rings = [module_state.kv_cache for module_state in modules if hasattr(module_state, "kv_cache")]
        for module_state in modules:
            module_state.exec_mask = self.active_B
        self._keys_L2BHSd = _enlarge_rings(rings, codec._latent_steps * max_frames - 1)
        self._offset_BN = _pack([*modules, *rings], ("offset", "offsets", "end_offset"))
        self._conv_BN = _pack(modules, ("previous", "partial"))

    @torch.no_grad()
    def run(self) -> None:
        """Decode the frame in ``codes_BK`` into ``audio_BN``."""
        self.audio_BN.copy_(self._codec._decode_frames(self.codes_BK.unsqueeze(-1), self._state))

    def step(self, codes_BK: Tensor) -> Tensor:
        """Decode one frame of each slot, (B, K) int64, to (B, frame_size) float32 on the codec's device."""
        self.codes_BK.copy_(codes_BK)
        self.run()
        return self.audio_BN.clone()

    @torch.no_grad()
    def decode(self, codes_BKT: Tensor) -> Tensor:
        """Decode up to ``max_frames`` frames of each slot, (B, K, T) int64, to (B, T, frame_size) float32.

        Weights are read once for all frames, so on a CPU several frames take little longer than one.
        """
        assert codes_BKT.shape[2] <= self._max_frames
        return self._codec._decode_frames(codes_BKT, self._state).unflatten(1, (codes_BKT.shape[2], -1))

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Restart these slots (None: all) in place, without effect on the others. Does not synchronise.

        Keys need no reset: attention does not read beyond a slot's offset.
        """
        for buffer_BN in (self._conv_BN, self._offset_BN):
            for rows in [buffer_BN] if slots is None else [buffer_BN[slot] for slot in slots]:
                rows.zero_()

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Copy the streaming state of slot ``source`` to slot ``target``, which continues the stream exactly.

        ``source`` keeps its state. ``codes_BK``, ``audio_BN`` and ``active_B`` are not copied.
        """
        for buffer_BN in (self._conv_BN, self._offset_BN):
            buffer_BN[target] = buffer_BN[source]
        self._keys_L2BHSd[:, :, target] = self._keys_L2BHSd[:, :, source]

    def narrow(self, batch: int) -> StreamDecoder:
        """The first ``batch`` slots, as views of the same memory."""
        view = copy.copy(self)
        for name in ("codes_BK", "audio_BN", "active_B", "_conv_BN", "_offset_BN"):
            setattr(view, name, getattr(self, name)[:batch])
        view._keys_L2BHSd = self._keys_L2BHSd[:, :, :batch]
        view._state = {name: None if s is None else _narrow(s, batch) for name, s in self._state.items()}
        return view

    def buffers(self) -> dict[str, Tensor]:
        """All tensors that ``run`` reads or writes by name: inputs, outputs, streaming state, and the codec's."""
        named = {"codes_BK": self.codes_BK, "audio_BN": self.audio_BN, "active_B": self.active_B}
        for name, module_state in self._state.items():
            if module_state is not None:
                ring = getattr(module_state, "kv_cache", None)
                tensors = {**vars(module_state), **({} if ring is None else vars(ring))}
                named |= {f"{name}.{key}": value for key, value in tensors.items() if isinstance(value, Tensor)}
        return {**named, **self._codec.buffers()}


def _narrow(module_state: Any, batch: int) -> Any:
    """A module's streaming state with the first ``batch`` slots of its tensors."""
    view = copy.copy(module_state)
    view.batch_size = batch
    for name, value in vars(module_state).items():
        if isinstance(value, Tensor):
            setattr(view, name, value[:batch])
    if getattr(module_state, "kv_cache", None) is not None:
        view.kv_cache = copy.copy(module_state.kv_cache)
        view.kv_cache.cache = module_state.kv_cache.cache[:, :batch]
        view.kv_cache.end_offset = module_state.kv_cache.end_offset[:batch]
    return view


def _enlarge_rings(rings: Sequence[Any], extra: int) -> Tensor:
    """Give moshi's RingKVCaches ``extra`` more positions, in one tensor (L, 2, B, H, S, d), which is returned.

    moshi's rings hold ``context`` keys. If a call advances the transformer by n steps, the last one overwrites a key
    that the first one attends to, and beyond ``context`` steps the stream differs from decoding all frames at once.
    With ``context + n - 1`` keys none is overwritten too early. moshi masks keys outside ``context`` by position.
    """
    _, *sizes, capacity, head_dim = rings[0].cache.shape
    keys_L2BHSd = rings[0].cache.new_zeros(len(rings), 2, *sizes, capacity + extra, head_dim)
    for ring, keys_2BHSd in zip(rings, keys_L2BHSd, strict=True):
        ring.capacity, ring.cache = capacity + extra, keys_2BHSd
    return keys_L2BHSd


def _pack(owners: Sequence[object], names: Sequence[str]) -> Tensor:
    """Copy the tensors (B, ...) of these attributes to one tensor (B, N), and make the attributes views of it."""
    attributes = [(owner, name) for owner in owners for name in names if name in vars(owner)]
    tensors = [getattr(owner, name) for owner, name in attributes]
    packed_BN = torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1) for tensor in tensors], dim=1)
    parts = packed_BN.split([tensor[0].numel() for tensor in tensors], dim=1)
    for (owner, name), tensor, part_BN in zip(attributes, tensors, parts, strict=True):
        setattr(owner, name, part_BN.view(tensor.shape))
    return packed_BN


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
