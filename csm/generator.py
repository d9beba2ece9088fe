"""Text in, audio out: the public face of the package.

Shapes: B slots, T frames, K codebooks, C columns of a row.
"""

from __future__ import annotations

import numbers
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm.align import word_frames
from csm.audio import read_audio, to_mono
from csm.cache import kv_bytes_per_position
from csm.codec import Codec, check_codes
from csm.config import CSMConfig
from csm.engine import Engine, Frame, Request
from csm.errors import AudioError, CheckpointError, CSMError, PromptError, RoomWarning, SamplingError, VoiceError
from csm.guards import DEFAULT_GUARDS, NO_GUARDS, GuardedTicket, Guards, Opener, guarded_frames
from csm.kernels import use_kernels
from csm.lora import load_adapter
from csm.model import CSM
from csm.prefix_cache import PrefixCache
from csm.prompt import Prompt, Segment, TextTokenizer, build_prompt, check_length
from csm.quantized_model import open_quantized, read_gguf, read_quantized
from csm.request import SpeechRequest
from csm.sampling import SamplingParams
from csm.selfcheck import MIN_CAPABILITY, default_dtype
from csm.stream import Speech, SpeechStream, TicketKeeper
from csm.threads import ThreadChoice
from csm.voices import SESAME_PROMPTS, Voice, find_voice, load_voice
from csm.weights import Checkpoint, open_checkpoint, read_codec, read_generation_defaults, read_model
from csm.worker import Worker

DEFAULT_MODEL = "sesame/csm-1b"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_STREAMS = 8  # requests at a time, unless the caller says otherwise
MAX_UNREAD = 25  # chunks that a stream may be ahead of its reader: 2 s
PREFIX_POSITIONS = 8192  # positions that the prefix cache holds: 32 KB each for CSM-1B in bfloat16


class Generator:
    """A loaded model that speaks. Safe to use from several threads and with several streams open at once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: CSM,
        codec_file: str | Path | None = None,
        graphs: bool = True,
        max_streams: int = MAX_STREAMS,
        progress: bool = False,
        threads: int | None = None,
    ):
        self.config: CSMConfig = model.config
        self.model = model
        self.sample_rate = checkpoint.codec_config.sample_rate
        self.defaults = read_generation_defaults(checkpoint.config_folder)
        self._checkpoint = checkpoint
        self._codec_file = codec_file
        self._tokenizer = TextTokenizer(checkpoint.tokenizer_path, model.config.text_vocab_size)
        self._codec: Codec | None = None
        self._max_streams = max_streams
        self._graphs = graphs
        self._progress = progress
        self._choose_threads = ThreadChoice(model, threads)
        self._worker: Worker | None = None
        self._prefix_cache = PrefixCache(PREFIX_POSITIONS * kv_bytes_per_position(model.config.backbone, model.dtype))
        self._voices: dict[tuple[Path, int], Voice] = {}
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
        graphs: bool = True,
        max_streams: int = MAX_STREAMS,
        quantize: str | None = None,
        threads: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> Generator:
        """Load a checkpoint.

        Args:
            name: a hub name (``sesame/csm-1b``, ``unsloth/csm-1b``, with an optional ``@revision``), a folder in
                Sesame's or HF Transformers' layout, a GGUF file (docs/gguf.md), or "tiny", the embedded checkpoint (a
                demonstration voice).
            device: where to run; None is a GPU if there is one.
            dtype: of the weights; None is bfloat16 on a GPU (float16 if it has no bfloat16) and float32 on
                a CPU (bfloat16 for a GGUF file).
            codec: a file of Mimi weights in Kyutai's layout; None is the checkpoint's own, else Kyutai's from the hub.
            progress: show a bar where loading takes more than a second.
            lora: the folder of an adapter (``python -m csm finetune --lora``), which is merged into the weights.
            graphs: on a GPU, capture each frame as a CUDA graph on first use; False runs eagerly.
            max_streams: how many requests are generated at a time; further ones wait. Each takes KV cache for all
                positions (64 MB for CSM-1B in bfloat16).
            quantize: weights in "int8", "fp8", "int4-depth", "int4" or by part, "backbone=int4,depth=int4,heads=int8"
                (docs/quantization.md). A folder that ``python -m csm quantize`` wrote is quantised already.
            threads: on a CPU, compute threads; None is ``CSM_THREADS``, else ``OMP_NUM_THREADS``, else one for a small
                model and the cores that are free for a large one.
            tokenizer: the tokenizer.json of a GGUF file that has no tokenizer, or its folder.

        Raises:
            CheckpointError: it is damaged or of another shape; the message names the file and the tensor.
            UnavailableError: it cannot be had (gated, no network, no space); the message says what to do.
        """
        where = find_device(device)
        if dtype is not None and dtype not in DTYPES:
            raise CSMError(f"dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype}")
        if lora is not None and quantize is not None:
            raise CSMError("an adapter cannot be merged into quantised weights: give either lora or quantize")
        quantized = _open_quantized(name, where, quantize)
        if quantized is not None:
            checkpoint, model = quantized
        else:
            checkpoint = open_checkpoint(name, progress, tokenizer)
            model = _read_model(checkpoint, where, dtype, quantize, progress, keep_blocks=lora is None)
        if lora is not None:
            load_adapter(lora, checkpoint.config).merge(model)
        return cls(checkpoint, model, codec, graphs, max_streams, progress, threads)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

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
        """Load the codec and prepare for these numbers of requests at a time: capture CUDA graphs and run each once.

        Without it, the first request that needs a batch size captures it. A size between two captured ones takes the
        larger.
        """
        if not batches or min(batches) < 1:
            raise CSMError(f"batch sizes must be at least 1, not {list(batches)}")
        _ = self.codec
        self._worker_for(max(batches)).engine.warmup(batches)
        for batch in batches:
            self.generate_batch([SpeechRequest("Hello.", max_audio_length_ms=160)] * batch)

    def encode(self, audio: Tensor, sample_rate: int | None = None) -> Tensor:
        """Audio, (samples,) or (channels, samples) at any rate, to codes (T, K) int64. Raises AudioError."""
        return self.codec.encode(audio, sample_rate)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (T, K) to (T * 1920,) float32 samples at ``sample_rate``. Raises AudioError."""
        return self.codec.decode(codes)

    def voice(self, name: str | Voice) -> Voice:
        """A voice by name, read from its file unless that is unchanged.

        Raises VoiceError, also for a voice that another codec encoded.
        """
        if isinstance(name, Voice):
            return self._checked_voice(name)
        path = find_voice(name, self._checkpoint.folder)
        key = path, path.stat().st_mtime_ns
        with self._lock:
            if key not in self._voices:
                voice = load_voice(path) if path.suffix == ".safetensors" else self._prompt_voice(name, path)
                self._voices[key] = self._checked_voice(voice)
            return self._voices[key]

    def _checked_voice(self, voice: Voice) -> Voice:
        try:
            for codes_TK in voice.codes:
                check_codes(codes_TK, self.config.num_codebooks, self.config.codebook_size)
        except AudioError as error:
            raise VoiceError(f"the voice {voice.name!r} was made for another model: {error}") from error
        return voice

    def _prompt_voice(self, name: str, path: Path) -> Voice:
        """One of Sesame's prompts, encoded."""
        text = SESAME_PROMPTS[name]
        return Voice(name, (text,), (self.encode(*read_audio(path)),), int(name.endswith("_b")))

    def prepare(self, turn: Segment) -> Segment:
        """A context turn with codes for audio: encode a reference once, however many sentences follow it."""
        return Segment(turn.speaker, turn.text, codes=self._turn(turn)[1])

    def generate(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Voice | None = None,
        guards: Guards = DEFAULT_GUARDS,
    ) -> Tensor:
        """Speak ``text``: (samples,) float32 on the CPU, at ``sample_rate``.

        Args:
            text: what to say.
            speaker: an id of at least 0; the same id as in the context continues that voice.
            context: earlier turns, oldest first, each with audio or codes.
            max_audio_length_ms: stop there even if the speech has not ended. Speech also stops where the backbone's
                positions end; a prompt that leaves less room than this gives a RoomWarning.
            temperature: 0 is greedy.
            topk: sample among this many most likely ids.
            seed: the same seed gives the same speech; None draws one from ``torch``'s generator.
            voice: a voice, or the name of one (``python -m csm voice list``). Its clips, as turns of ``speaker``, come
                before the context.
            guards: when to stop speech that runs on, and to generate again what is empty or far too short.

        ``max_audio_length_ms``, ``temperature`` and ``topk`` of None are the checkpoint's defaults
        (``generation_config.json``; without one 90,000, 0.9 and 50).

        Raises:
            PromptError, PromptTooLongError, SamplingError, AudioError, VoiceError: an argument is out of range.
        """
        speech = SpeechRequest(text, speaker, context, max_audio_length_ms, temperature, topk, seed, voice)
        return self.generate_batch([speech], guards)[0]

    def stream(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Voice | None = None,
        guards: Guards = DEFAULT_GUARDS,
    ) -> SpeechStream[Tensor]:
        """``generate``, in chunks of 1920 samples (80 ms) as they are generated.

        Arguments are checked at the call. Generation starts with the first chunk that is asked for, runs at most
        ``MAX_UNREAD`` chunks ahead of the reader, and is cancelled when the iterator is closed. The iterator's
        ``metrics`` say what it took.
        """
        speech = SpeechRequest(text, speaker, context, max_audio_length_ms, temperature, topk, seed, voice)
        return SpeechStream(self._opener(speech, guards, max_unread=MAX_UNREAD), _samples)

    def stream_frames(
        self, speech: SpeechRequest, guards: Guards = DEFAULT_GUARDS, hold: bool = False
    ) -> SpeechStream[Frame]:
        """``stream`` with the codes (K,) of each chunk.

        ``hold`` hands all frames out at the end, as ``generate`` does: without the silence that a guard has ended.
        """
        return SpeechStream(self._opener(speech, guards, hold=hold, max_unread=MAX_UNREAD), lambda frame: frame)

    def submit(
        self,
        speech: SpeechRequest,
        guards: Guards = DEFAULT_GUARDS,
        max_unread: int | None = MAX_UNREAD,
        notify: Callable[[], None] | None = None,
        hold: bool = False,
    ) -> GuardedTicket:
        """Start to generate; frames of codes and samples arrive at the ticket. For event loops, which must not block.

        ``notify`` is called from the engine's thread when the ticket may have a frame or has ended. ``max_unread``
        pauses the request while its reader is so many frames behind. ``hold`` hands frames out only once the request
        has ended, so that the guards may replace a take; the reader must take frames nevertheless.
        """
        return self._opener(speech, guards, hold=hold, max_unread=max_unread)(notify)

    def generate_codes(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Voice | None = None,
    ) -> Tensor:
        """``generate`` before the codec and without guards: codes (T, K) int64 on the CPU."""
        speech = SpeechRequest(text, speaker, context, max_audio_length_ms, temperature, topk, seed, voice)
        return self.generate_codes_batch([speech])[0]

    def generate_batch(
        self, requests: Sequence[SpeechRequest | Mapping[str, Any]], guards: Guards = DEFAULT_GUARDS
    ) -> list[Tensor]:
        """Several requests at once, each a SpeechRequest or a mapping of its fields; the audio of each, in order.

        A request draws the codes that it would draw alone, up to the rounding of a matrix product over more rows.
        """
        return [speech.audio for speech in self.generate_speech(requests, guards)]

    def generate_speech(
        self, requests: Sequence[SpeechRequest | Mapping[str, Any]], guards: Guards = DEFAULT_GUARDS
    ) -> list[Speech]:
        """``generate_batch`` with the metrics, the seed and the end of each request."""
        openers = [TicketKeeper(self._opener(SpeechRequest.of(request), guards, hold=True)) for request in requests]
        chunks: list[list[Tensor]] = [[] for _ in openers]
        for index, frame in self._run(openers):
            chunks[index].append(_samples(frame))
        speeches = []
        for parts, opener in zip(chunks, openers, strict=True):
            assert opener.ticket is not None
            audio = torch.cat(parts) if parts else torch.zeros(0)
            reason = opener.ticket.finish_reason or "end"
            speeches.append(Speech(audio, opener.ticket.metrics, opener.ticket.seed, reason))
        return speeches

    def generate_codes_batch(self, requests: Sequence[SpeechRequest | Mapping[str, Any]]) -> list[Tensor]:
        """``generate_batch`` before the codec and without guards: codes (T, K) of each request."""
        openers = [self._opener(SpeechRequest.of(request), NO_GUARDS, audio=False) for request in requests]
        codes: list[list[Tensor]] = [[] for _ in openers]
        for index, frame in self._run(openers):
            codes[index].append(frame.codes_K)
        empty = torch.zeros(0, self.config.num_codebooks, dtype=torch.int64)
        return [torch.stack(frames) if frames else empty for frames in codes]

    def word_times(self, turn: Segment) -> list[tuple[str, float, float]]:
        """Each word of a turn with its first and last moment, as shares of the turn's length (0 to 1).

        One pass of the backbone over the turn; its attention tells the times (``csm.align``). Empty where words cannot
        be told apart. Raises as a context turn does.
        """
        text_ids, codes_TK = self._turn(turn)
        words = self._tokenizer.words(turn.speaker, turn.text)
        frames = word_frames(self.model, text_ids, words, codes_TK)
        num_frames = codes_TK.shape[0]
        return [
            (word.text, first / num_frames, last / num_frames)
            for word, (first, last) in zip(words, frames, strict=False)  # no frames: no times
        ]

    def room_ms(self, speech: SpeechRequest) -> float:
        """The most audio, in milliseconds, that the positions left by a request's prompt hold."""
        return self._room(self._prompt(speech)) * self.frame_ms

    def num_positions(self, turn: Segment) -> int:
        """Positions of the backbone that a context turn takes; without audio and codes, those of its text."""
        if turn.audio is None and turn.codes is None:
            return len(self._tokenizer.encode(turn.speaker, turn.text))
        text_ids, codes_TK = self._turn(turn)
        return len(text_ids) + codes_TK.shape[0] + 1

    def num_frames(self, milliseconds: float) -> int:
        """Whole frames in so much audio."""
        return int(min(milliseconds / self.frame_ms, 2**31) + 1e-6)  # 16.08 s are 201 frames despite binary fractions

    @property
    def frame_ms(self) -> float:
        """Milliseconds of audio in a frame."""
        return 1000 / self._checkpoint.codec_config.frame_rate

    def _room(self, prompt: Prompt) -> int:
        """Frames that fit behind a prompt. The step that generates the first frame reads the prompt's last row."""
        return self.config.backbone.max_positions - prompt.row_TC.shape[0] + 1

    def _prompt(self, speech: SpeechRequest) -> Prompt:
        """The rows of a request: its voice, its context, its text."""
        text_ids = self._tokenizer.encode(speech.speaker, speech.text)
        check_length(len(text_ids), self.config)
        voice = [] if speech.voice is None else self.voice(speech.voice).segments(speech.speaker)
        turns = [self._turn(segment) for segment in (*voice, *speech.context)]
        return build_prompt(turns, text_ids, self.config)

    def _request(self, speech: SpeechRequest, audio: bool = True) -> Request:
        """A checked and tokenised request. ``audio`` asks for samples, not codes alone."""
        frame_ms = self.frame_ms
        limit_ms = (
            self.defaults.max_audio_length_ms if speech.max_audio_length_ms is None else speech.max_audio_length_ms
        )
        if not isinstance(limit_ms, numbers.Real) or not limit_ms >= frame_ms:
            raise CSMError(f"the audio's limit must be at least one frame, {frame_ms:g} ms, not {limit_ms!r}")
        seed = int(torch.randint(2**63 - 1, ())) if speech.seed is None else speech.seed
        temperature = self.defaults.temperature if speech.temperature is None else speech.temperature
        topk = self.defaults.top_k if speech.topk is None else speech.topk
        params = SamplingParams(temperature, topk, seed)
        if topk > self.config.codebook_size:
            raise SamplingError(f"top-k must be at most {self.config.codebook_size}, not {topk}")
        prompt = self._prompt(speech)
        room = self._room(prompt)
        asked = limit_ms / frame_ms + 1e-6  # 16.08 s are 201 frames despite binary fractions
        if room < asked:
            message = (
                f"the prompt leaves room for {room * frame_ms / 1000:.2f} s of audio, "
                f"of the {limit_ms / 1000:g} s that were asked for"
            )
            warnings.warn(message, RoomWarning, stacklevel=5)
        return Request(prompt, params, int(min(asked, room)), audio, keep=not speech.repeatable)

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

    def _opener(
        self,
        speech: SpeechRequest,
        guards: Guards,
        audio: bool = True,
        hold: bool = False,
        max_unread: int | None = None,
    ) -> Opener:
        """Check a request; the result submits it. ``hold`` hands frames out only once the request has ended."""
        request = self._request(speech, audio)
        rate = self._checkpoint.codec_config.frame_rate

        def open_ticket(notify: Callable[[], None] | None) -> GuardedTicket:
            return GuardedTicket(self._worker_for(1), request, speech.text, guards, rate, hold, max_unread, notify)

        return open_ticket

    def _run(self, openers: Sequence[Opener]) -> Iterator[tuple[int, Frame]]:
        """Frames of all requests as they are generated, each with the index of its request."""
        if openers:
            self._worker_for(len(openers))  # with slots for all of them
            yield from guarded_frames(openers)

    def _worker_for(self, num_slots: int) -> Worker:
        """The engine's worker. An idle engine with fewer slots is replaced by a larger one; a busy one queues."""
        with self._lock:
            worker = self._worker
            if worker is None or (worker.engine.max_slots < num_slots and worker.engine.idle):
                num_slots = max(num_slots, self._max_streams)
                frame_size = self._checkpoint.codec_config.frame_size
                engine = Engine(
                    self.model,
                    lambda: self.codec,
                    frame_size,
                    num_slots,
                    self._prefix_cache,
                    None,
                    self._graphs,
                    self._progress,
                )
                worker = self._worker = Worker(engine, self._choose_threads)
            return worker


def _samples(frame: Frame) -> Tensor:
    assert frame.audio_N is not None
    return frame.audio_N


def _open_quantized(name: str | Path, device: torch.device, quantize: str | None) -> tuple[Checkpoint, CSM] | None:
    """``open_quantized``, and an error for weights that would be quantised twice."""
    quantized = open_quantized(name, device)
    if quantized is not None and quantize is not None:
        raise CSMError(f"{name} is quantised already: load it without quantize={quantize!r}")
    return quantized


def _read_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None,
    progress: bool,
    keep_blocks: bool,
) -> CSM:
    """See ``Generator.from_pretrained``. ``keep_blocks`` keeps the blocks of a GGUF file where ops read them."""
    if dtype is None:
        dtype = torch.bfloat16 if checkpoint.gguf is not None and device.type == "cpu" else default_dtype(device)
    if checkpoint.gguf is not None and keep_blocks and (quantize is not None or _reads_blocks(device, dtype)):
        return read_gguf(checkpoint, quantize, dtype, progress, device)
    if quantize is not None:
        return read_quantized(checkpoint, quantize, dtype, progress, device)
    return CSM.from_state_dict(checkpoint.config, read_model(checkpoint, device, dtype, progress), device)


def _reads_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ops read int8 and int4 weights there. PyTorch's would dequantise them at every step."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    return device.type == "cpu" or use_kernels(torch.empty(0, dtype=dtype, device=device), 1)


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
