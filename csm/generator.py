"""Text in, audio out: the public face of the package.

Shapes: B slots, T frames, K codebooks, C columns of a row.
"""

from __future__ import annotations

import numbers
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm.audio import to_mono
from csm.cache import PrefixCache
from csm.codec import Codec, check_codes
from csm.config import CSMConfig
from csm.engine import Engine, Frame, Request
from csm.errors import AudioError, CheckpointError, CSMError, PromptError, RoomWarning, SamplingError
from csm.lora import load_adapter
from csm.model import CSM
from csm.prompt import Segment, TextTokenizer, build_prompt, check_length
from csm.sampling import SamplingParams
from csm.weights import Checkpoint, open_checkpoint, read_codec, read_model

DEFAULT_MODEL = "sesame/csm-1b"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PREFIX_POSITIONS = 8192  # cached positions of context turns: 32 KB each for CSM-1B in bfloat16
MAX_SPARE_ENGINES = 2  # idle ones that were not captured


class Generator:
    """A loaded model that speaks. Safe to use from several threads and with several streams open at once."""

    def __init__(self, checkpoint: Checkpoint, model: CSM, codec_file: str | Path | None = None):
        self.config: CSMConfig = model.config
        self.model = model
        self.sample_rate = checkpoint.codec_config.sample_rate
        self._checkpoint = checkpoint
        self._codec_file = codec_file
        self._tokenizer = TextTokenizer(checkpoint.tokenizer_path, model.config.text_vocab_size)
        self._codec: Codec | None = None
        self._engines: list[Engine] = []
        self._prefixes = PrefixCache(PREFIX_POSITIONS)
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_MODEL,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        codec: str | Path | None = None,
        progress: bool = True,
        lora: str | Path | None = None,
    ) -> Generator:
        """Load a checkpoint.

        Args:
            name: a hub name (``sesame/csm-1b``, ``unsloth/csm-1b``, with an optional ``@revision``), a folder in
                Sesame's or HF Transformers' layout, or "tiny", the embedded checkpoint (a demonstration voice).
            device: where to run; None is a GPU if there is one.
            dtype: of the weights; None is bfloat16 on a GPU and float32 on a CPU.
            codec: a file of Mimi weights in Kyutai's layout; None is the checkpoint's own, else Kyutai's from the hub.
            progress: show a bar where loading takes more than a second.
            lora: the folder of an adapter (``python -m csm finetune --lora``), which is merged into the weights.

        Raises:
            CheckpointError: it is damaged or of another shape; the message names the file and the tensor.
            UnavailableError: it cannot be had (gated, no network, no space); the message says what to do.
        """
        where = find_device(device)
        if dtype is not None and dtype not in DTYPES:
            raise CSMError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        checkpoint = open_checkpoint(name, progress)
        model = CSM.from_state_dict(checkpoint.config, read_model(checkpoint, where, dtype, progress), where)
        if lora is not None:
            load_adapter(lora, checkpoint.config).merge(model)
        return cls(checkpoint, model, codec)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def codec(self) -> Codec:
        """The Mimi codec, loaded when audio is first asked for."""
        with self._lock:
            if self._codec is None:
                with torch.inference_mode(False):  # its buffers are written by later calls, in whatever mode
                    self._codec = self._load_codec()
            return self._codec

    def _load_codec(self) -> Codec:
        state = read_codec(self._checkpoint, self._codec_file, self.device)
        try:
            return Codec(self._checkpoint.codec_config, self.config.num_codebooks, state, self.device)
        except CheckpointError as error:
            raise CheckpointError(f"{self._codec_file or self._checkpoint.folder}: {error}") from error

    def warmup(self, batches: Sequence[int] = (1,)) -> None:
        """Load the codec, capture the CUDA graphs of these batch sizes, and run: the first request pays for nothing.

        Without it everything runs eagerly. A batch of another size takes the next larger one that was captured.
        """
        if not batches or min(batches) < 1:
            raise CSMError(f"batch sizes must be at least 1, not {list(batches)}")
        engine = Engine(self.model, lambda: self.codec, max(batches), self._prefixes)
        engine.capture(batches)
        with self._lock:
            self._engines.insert(0, engine)
        for batch in batches:
            self.generate_batch([{"text": "Hello.", "max_audio_length_ms": 160}] * batch)

    def encode(self, audio: Tensor, sample_rate: int | None = None) -> Tensor:
        """Audio, (samples,) or (channels, samples) at any rate, to codes (T, K) int64. Raises AudioError."""
        return self.codec.encode(audio, sample_rate)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (T, K) to (T * 1920,) float32 samples at ``sample_rate``. Raises AudioError."""
        return self.codec.decode(codes)

    def prepare(self, turn: Segment) -> Segment:
        """A context turn with codes for audio: encode a reference once, however many sentences follow it."""
        return Segment(turn.speaker, turn.text, codes=self._turn(turn)[1])

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
            max_audio_length_ms: stop there even if the speech has not ended. Speech also stops where the backbone's
                positions end; a prompt that leaves less room than this gives a RoomWarning.
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
        return (frame.audio_N for frame in self._run([request], audio=True) if frame.audio_N is not None)

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
        checked = [self._request(**request) for request in requests]
        chunks: list[list[Tensor]] = [[] for _ in checked]
        for frame in self._run(checked, audio=True):
            assert frame.audio_N is not None
            chunks[frame.slot].append(frame.audio_N)
        return [torch.cat(spoken) if spoken else torch.zeros(0) for spoken in chunks]

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
        if not isinstance(max_audio_length_ms, numbers.Real) or not max_audio_length_ms >= frame_ms:
            raise CSMError(
                f"the audio's limit must be at least one frame, {frame_ms:g} ms, not {max_audio_length_ms!r}"
            )
        params = SamplingParams(temperature, topk, int(torch.randint(2**63 - 1, ())) if seed is None else seed)
        if topk > self.config.codebook_size:
            raise SamplingError(f"top-k must be at most {self.config.codebook_size}, not {topk}")
        text_ids = self._tokenizer.encode(speaker, text)
        check_length(len(text_ids), self.config)
        prompt = build_prompt([self._turn(segment) for segment in context], text_ids, self.config)
        # The last prompt row is read by the step that speaks the first frame.
        room = self.config.backbone.max_positions - prompt.row_TC.shape[0] + 1
        asked = max_audio_length_ms / frame_ms + 1e-6  # 16.08 s are 201 frames, whatever binary fractions make of it
        if room < asked:
            left, wanted = room * frame_ms / 1000, max_audio_length_ms / 1000
            message = f"the prompt leaves room for {left:.2f} s of audio, of the {wanted:g} s that were asked for"
            warnings.warn(message, RoomWarning, stacklevel=3)
        return Request(*prompt, params, int(min(asked, room)))

    def _turn(self, segment: Segment) -> tuple[list[int], Tensor]:
        """A context turn's text ids and codes."""
        text_ids = self._tokenizer.encode(segment.speaker, segment.text)
        if segment.codes is not None:
            codes_TK = check_codes(segment.codes, self.config.num_codebooks, self.config.codebook_size)
            if not codes_TK.shape[0]:
                raise AudioError("a context turn's codes are empty")
            return text_ids, codes_TK
        if segment.audio is None:
            raise PromptError(
                f"a context turn has neither audio nor codes: speaker {segment.speaker}, {segment.text!r}"
            )
        rate = self.sample_rate if segment.sample_rate is None else segment.sample_rate
        mono = to_mono(segment.audio, rate, self.sample_rate)
        check_length(-(-mono.shape[0] // self._checkpoint.codec_config.frame_size), self.config)
        return text_ids, self.codec.encode(mono)

    def _run(self, requests: Sequence[Request], audio: bool) -> Iterator[Frame]:
        """Frames of all requests as they are spoken, from an engine that nobody else uses meanwhile."""
        if requests:
            with self._borrow_engine(len(requests)) as engine:
                yield from engine.run(requests, audio)

    def _collect_codes(self, requests: Sequence[Request]) -> list[Tensor]:
        """Codes (T, K) of each request."""
        frames: list[list[Tensor]] = [[] for _ in requests]
        for frame in self._run(requests, audio=False):
            frames[frame.slot].append(frame.codes_K)
        nothing = torch.zeros(0, self.config.num_codebooks, dtype=torch.int64)
        return [torch.stack(spoken) if spoken else nothing for spoken in frames]

    @contextmanager
    def _borrow_engine(self, batch: int) -> Iterator[Engine]:
        """An engine with so many slots, captured rather than not and small rather than large, else a new one.

        Captured engines are kept, of the others the last few.
        """
        with self._lock:
            fitting = [engine for engine in self._engines if engine.max_batch >= batch]
            fitting.sort(key=lambda engine: (not engine.captured_batch_sizes, engine.max_batch))
            engine = fitting[0] if fitting else Engine(self.model, lambda: self.codec, batch, self._prefixes)
            self._engines = [other for other in self._engines if other is not engine]
        try:
            yield engine
        finally:
            with self._lock:
                engines = [engine, *self._engines]
                spare = [other for other in engines if not other.captured_batch_sizes][:MAX_SPARE_ENGINES]
                self._engines = [other for other in engines if other.captured_batch_sizes] + spare


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None is a GPU if there is one. Raises CSMError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise CSMError(f"no device is called {name!r}") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in count:
        raise CSMError(f"device {device} is of a kind that is not supported; {', '.join(count)} are")
    if (device.index or 0) >= count[device.type]:
        raise CSMError(f"device {device} was asked for, but PyTorch sees {count[device.type]} of its kind")
    return device


def load_csm_1b(device: str = "cuda") -> Generator:
    """CSM-1B in bfloat16 on ``device``: the reference implementation's way in."""
    return Generator.from_pretrained(DEFAULT_MODEL, device=device, dtype=torch.bfloat16)
