"""Text in, audio out: the public face of the package.

Shapes: B slots, T frames, K codebooks, C columns of a row.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm.audio import to_mono
from csm.codec import Codec
from csm.config import CSMConfig
from csm.errors import CSMError, PromptError, SamplingError
from csm.frame import FrameState, decode_frame, prefill, span_of
from csm.model import CSM
from csm.prompt import Prompt, Segment, TextTokenizer, build_prompt, check_codes, check_length
from csm.sampling import SamplingParams
from csm.weights import Checkpoint, open_checkpoint, read_codec, read_model

logger = logging.getLogger("csm")

DEFAULT_MODEL = "sesame/csm-1b"


class Request(NamedTuple):
    """What ``generate`` was asked for, checked."""

    prompt: Prompt
    params: SamplingParams
    max_frames: int


class Generator:
    """A loaded model that speaks. Safe to use from several threads and with several streams open at once."""

    def __init__(self, checkpoint: Checkpoint, model: CSM, codec_file: str | Path | None = None):
        self.config: CSMConfig = model.config
        self.model = model
        self.sample_rate = checkpoint.codec_config.sample_rate
        self._checkpoint = checkpoint
        self._codec_file = codec_file
        self._tokenizer = TextTokenizer(checkpoint.tokenizer_path, model.config.text_vocab_size)
        self._free_states: list[FrameState] = []
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_MODEL,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        codec: str | Path | None = None,
        progress: bool = True,
    ) -> Generator:
        """Load a checkpoint.

        Args:
            name: a hub name (``sesame/csm-1b``, ``unsloth/csm-1b``, with an optional ``@revision``), a folder in
                Sesame's or HF Transformers' layout, or "tiny", the embedded checkpoint (random weights: noise).
            device: where to run; None is a GPU if there is one.
            dtype: of the weights; None is bfloat16 on a GPU and float32 on a CPU.
            codec: a file of Mimi weights in Kyutai's layout; None is the checkpoint's own, else Kyutai's from the hub.
            progress: show a bar where loading takes more than a second.

        Raises:
            CheckpointError: it is damaged or of another shape; the message names the file and the tensor.
            UnavailableError: it cannot be had (gated, no network, no space); the message says what to do.
        """
        where = _device(device)
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        checkpoint = open_checkpoint(name)
        model = CSM.from_state_dict(checkpoint.config, read_model(checkpoint, where, dtype, progress), where)
        return cls(checkpoint, model, codec)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def codec(self) -> Codec:
        """The Mimi codec, loaded when audio is first asked for."""
        with self._lock:
            state = read_codec(self._checkpoint, self._codec_file, self.device)
            return Codec(self._checkpoint.codec_config, self.config.num_codebooks, state, self.device)

    def warmup(self) -> None:
        """Load the codec and run a frame, so that the first request pays for neither."""
        self.generate("Hello.", speaker=0, max_audio_length_ms=80)

    def encode(self, audio: Tensor, sample_rate: int | None = None) -> Tensor:
        """Audio, (samples,) or (channels, samples) at any rate, to codes (T, K) int64. Raises AudioError."""
        return self.codec.encode(audio, sample_rate)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (T, K) to (T * 1920,) float32 samples at ``sample_rate``. Raises AudioError."""
        return self.codec.decode(codes)

    def generate(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
        seed: int | None = None,
    ) -> Tensor:
        """Speak ``text``: (samples,) float32 on the CPU, at ``sample_rate``.

        Args:
            text: what to say.
            speaker: an id of at least 0; the same id as in the context continues that voice.
            context: earlier turns, oldest first, each with audio or codes.
            max_audio_length_ms: stop there even if the speech has not ended.
            temperature: 0 is greedy.
            topk: draw among this many best ids.
            seed: the same seed gives the same speech; None draws one from ``torch``'s generator.

        Raises:
            PromptError, PromptTooLongError, SamplingError, AudioError: an argument is out of range.
        """
        chunks = list(self.stream(text, speaker, context, max_audio_length_ms, temperature, topk, seed))
        return torch.cat(chunks) if chunks else torch.zeros(0)

    def stream(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """``generate``, in chunks of 1920 samples (80 ms) as they are spoken. Arguments are checked at the call."""
        request = self._request(text, speaker, context, max_audio_length_ms, temperature, topk, seed)
        return self._decode_frames(self._speak([request]))

    def generate_codes(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
        seed: int | None = None,
    ) -> Tensor:
        """``generate``, before the codec: codes (T, K) int64 on the CPU."""
        request = self._request(text, speaker, context, max_audio_length_ms, temperature, topk, seed)
        return self._collect_codes([request])[0]

    def generate_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Several requests at once, each a mapping of ``generate``'s arguments; the audio of each, in order.

        A request draws the codes that it would draw alone, up to the rounding of a matrix product over more rows.
        """
        codes = self.generate_codes_batch(requests)
        return [self.decode(codes_TK) for codes_TK in codes]

    def generate_codes_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """``generate_batch``, before the codec: codes (T, K) of each request."""
        return self._collect_codes([self._request(**request) for request in requests])

    def _request(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float = 90_000,
        temperature: float = 0.9,
        topk: int = 50,
        seed: int | None = None,
    ) -> Request:
        """``generate``'s arguments, checked and tokenised."""
        frame_ms = 1000 / self._checkpoint.codec_config.frame_rate
        if not max_audio_length_ms >= frame_ms:
            raise CSMError(f"the audio's limit must be at least one frame, {frame_ms:g} ms, not {max_audio_length_ms}")
        if topk > self.config.codebook_size:
            raise SamplingError(f"top-k must be at most {self.config.codebook_size}, not {topk}")
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        params = SamplingParams(temperature, topk, seed)
        text_ids = self._tokenizer.encode(speaker, text)
        check_length(len(text_ids), self.config)
        prompt = build_prompt([self._turn(segment) for segment in context], text_ids, self.config)
        # The last prompt row is read by the step that speaks the first frame.
        room = self.config.backbone.max_positions - prompt.row_TC.shape[0] + 1
        return Request(prompt, params, int(min(max_audio_length_ms // frame_ms, room)))

    def _turn(self, segment: Segment) -> tuple[list[int], Tensor]:
        """A context turn's text ids and codes."""
        text_ids = self._tokenizer.encode(segment.speaker, segment.text)
        if segment.codes is not None:
            return text_ids, check_codes(segment.codes, self.config)
        if segment.audio is None:
            raise PromptError(
                f"a context turn has neither audio nor codes: speaker {segment.speaker}, {segment.text!r}"
            )
        rate = self.sample_rate if segment.sample_rate is None else segment.sample_rate
        mono = to_mono(segment.audio, rate, self.sample_rate)
        check_length(-(-mono.shape[0] // self._checkpoint.codec_config.frame_size), self.config)
        return text_ids, self.codec.encode(mono)

    def _speak(self, requests: Sequence[Request]) -> Iterator[tuple[int, Tensor]]:
        """The one loop: (slot, frame (K,)) as they are spoken, until every slot has ended."""
        if not requests:
            return
        with self._borrow_state(len(requests)) as state:
            for slot, request in enumerate(requests):
                prefill(self.model, state, slot, request.prompt.row_TC, request.prompt.mask_TC, request.params)
            live = {slot: request.max_frames for slot, request in enumerate(requests)}
            longest, spoken = max(request.prompt.row_TC.shape[0] for request in requests), 0
            while live:
                decode_frame(self.model, state, span_of(longest + spoken, state))
                spoken += 1
                codes_BK = state.codes_BK.cpu()
                for slot, max_frames in list(live.items()):
                    if not codes_BK[slot].any():  # a frame of zeros ends the speech
                        del live[slot]
                        continue
                    yield slot, codes_BK[slot].clone()
                    if spoken == max_frames:
                        del live[slot]
                        logger.info("slot %d: stopped at its limit of %d frames, not by itself", slot, spoken)

    def _collect_codes(self, requests: Sequence[Request]) -> list[Tensor]:
        """Codes (T, K) of each request."""
        frames: list[list[Tensor]] = [[] for _ in requests]
        for slot, frame_K in self._speak(requests):
            frames[slot].append(frame_K)
        nothing = torch.zeros(0, self.config.num_codebooks, dtype=torch.int64)
        return [torch.stack(spoken) if spoken else nothing for spoken in frames]

    def _decode_frames(self, frames: Iterator[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """Samples of the frames of a single slot."""
        decoder = self.codec.stream_decoder()
        for _, frame_K in frames:
            yield decoder.step(frame_K.unsqueeze(0))[0].cpu()

    @contextmanager
    def _borrow_state(self, batch: int) -> Iterator[FrameState]:
        """Buffers of that many slots, kept for the next request of the same size."""
        with self._lock:
            state = next((state for state in self._free_states if state.batch == batch), None)
            if state is not None:
                self._free_states.remove(state)
        if state is None:
            state = FrameState.allocate(self.config, batch, self.device, self.model.dtype)
        try:
            yield state
        finally:
            with self._lock:
                self._free_states = [state, *self._free_states][:2]


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CSMError(f"no device is called {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CSMError(f"device {device} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def load_csm_1b(device: str = "cuda") -> Generator:
    """CSM-1B in bfloat16 on ``device``: the reference implementation's way in."""
    return Generator.from_pretrained(DEFAULT_MODEL, device=device, dtype=torch.bfloat16)
