"""Watermarks: inaudible marks that say audio was generated, and that survive MP3 and resampling (docs/watermark.md).

Each method is a package of its own, which is imported when a watermark is loaded: ``perth`` is Resemble AI's Perth
(the extra ``watermark``), ``silentcipher`` is the one of Sesame's reference implementation, with Sesame's public key.

A file is marked whole. A stream is marked segment by segment: each segment is marked together with some audio from
before it, and segments overlap by ``OVERLAP_SECONDS``, in which one mark fades into the next.

Shapes: N samples, float32 within -1 and 1.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from csm.audio import to_mono
from csm.errors import CSMError, UnavailableError

WATERMARKS = ("perth", "silentcipher")
CSM_1B_KEY = [212, 211, 146, 56, 201]  # public: CSM_1B_GH_WATERMARK in SesameAILabs/csm, watermarking.py
RATE = 24_000  # Hz, at which files are searched for a mark
WHOLE_SECONDS = 60.0  # longer audio is marked and searched in blocks of this length, so that memory stays bounded
CONTEXT_SECONDS = 0.32  # audio from before a segment that is marked with it, and dropped
OVERLAP_SECONDS = 0.02
PADDING_SECONDS = 0.08  # of silence, since a spectrogram loses part of its last window
FOUND = 0.5  # confidence from which a mark counts as found
# Of Perth's mark, which has no setting for it: a whole mark costs a recogniser words, and this much is still found
# everywhere (docs/watermark.md).
PERTH_STRENGTH = 0.6


class Detection(NamedTuple):
    """Whether a mark was found, how sure the detector is (0 to 1), and in how many blocks of those with sound."""

    found: bool
    confidence: float
    num_marked: int
    num_blocks: int


class Method(Protocol):
    """A package that marks and detects. ``segment_seconds`` is the length of a stream's segments."""

    segment_seconds: float

    def mark(self, audio_N: Tensor, sample_rate: int) -> Tensor:
        """The audio with the mark; at least N samples."""

    def confidence(self, audio_N: Tensor, sample_rate: int) -> float:
        """How sure the detector is that there is a mark, 0 to 1; NaN where there is no sound to tell by."""


class Perth:
    """Perth's implicit watermark: one mark for all, in the spectrogram below 2 kHz. Its weights are in its wheel."""

    segment_seconds = 0.48

    def __init__(self, device: str = "cpu"):
        try:
            import perth
        except ImportError as error:
            raise CSMError(
                "the watermark perth needs the package resemble-perth: pip install 'csm[watermark]'"
            ) from error
        if perth.PerthImplicitWatermarker is None:  # perth hides the reason
            raise CSMError(
                "the watermark perth needs librosa, PyYAML and setuptools < 81 beside resemble-perth: "
                "pip install 'csm[watermark]'"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it was loaded; stdout may be audio
            self._perth = perth.PerthImplicitWatermarker(device=device)

    def mark(self, audio_N: Tensor, sample_rate: int) -> Tensor:
        """See Method. The mark is added at ``PERTH_STRENGTH``."""
        marked_N = torch.from_numpy(self._perth.apply_watermark(audio_N.numpy(), sample_rate=sample_rate))
        return torch.lerp(audio_N, marked_N[: audio_N.shape[0]], PERTH_STRENGTH)

    def confidence(self, audio_N: Tensor, sample_rate: int) -> float:
        """See Method."""
        return float(self._perth.get_watermark(audio_N.numpy(), sample_rate=sample_rate, round=False))


class SilentCipher:
    """Sony's SilentCipher with Sesame's public key, as in Sesame's reference implementation.

    Its weights are on the hub (sony/silentcipher), so it could not be tried where this was written: a test replaces the
    package.
    """

    segment_seconds = 6.0  # the message takes seconds

    def __init__(self, device: str = "cpu"):
        try:
            import silentcipher
        except ImportError as error:
            raise CSMError(
                "the watermark silentcipher needs Sesame's fork of the package (the one on PyPI pins torch 2.0): "
                'pip install "silentcipher @ git+https://github.com/SesameAILabs/silentcipher@master"'
            ) from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._model = silentcipher.get_model(model_type="44.1k", device=device)
        except OSError as error:  # huggingface_hub's errors, and those of the network
            raise UnavailableError(f"the weights of silentcipher (sony/silentcipher) cannot be had: {error}") from error

    def mark(self, audio_N: Tensor, sample_rate: int) -> Tensor:
        """See Method."""
        with contextlib.redirect_stdout(io.StringIO()):
            marked_N, _ = self._model.encode_wav(
                audio_N.numpy(), sample_rate, CSM_1B_KEY, calc_sdr=False, message_sdr=36
            )
        return torch.from_numpy(marked_N).float()

    def confidence(self, audio_N: Tensor, sample_rate: int) -> float:
        """See Method: the decoder's confidence where the message is Sesame's key, else 0."""
        if not audio_N.any():
            return math.nan
        with contextlib.redirect_stdout(io.StringIO()):
            result: dict[str, Any] = self._model.decode_wav(audio_N.numpy(), sample_rate, phase_shift_decoding=True)
        is_key = result["status"] and list(result["messages"][0]) == CSM_1B_KEY
        return float(result["confidences"][0]) if is_key else 0.0


METHODS: dict[str, type[Perth] | type[SilentCipher]] = {"perth": Perth, "silentcipher": SilentCipher}


class Watermark:
    """A loaded watermark. Safe to use from several threads."""

    def __init__(self, name: str, method: Method):
        self.name = name
        self._method = method

    def apply(self, audio: Tensor, sample_rate: int) -> Tensor:
        """(samples,) with the mark; as many samples. It is marked whole, above ``WHOLE_SECONDS`` in such blocks."""
        if audio.shape[0] <= WHOLE_SECONDS * sample_rate:
            return self.mark_block(audio, sample_rate)
        marker = StreamMarker(self, sample_rate, WHOLE_SECONDS)
        return torch.cat((marker.write(audio), marker.close()))

    @torch.no_grad()
    def mark_block(self, audio: Tensor, sample_rate: int) -> Tensor:
        """``apply`` in one piece, whatever the length."""
        if not audio.any():
            return audio  # nothing can be hidden in silence
        padded = torch.cat((audio.float(), audio.new_zeros(round(PADDING_SECONDS * sample_rate))))
        return self._method.mark(padded, sample_rate)[: audio.shape[0]]

    def stream(self, chunks: Iterable[Tensor], sample_rate: int, live: bool = True) -> Iterator[Tensor]:
        """The chunks with the mark. ``live`` marks short segments, since somebody listens; else long blocks."""
        marker = self.marker(sample_rate, live)
        for chunk in chunks:
            marked = marker.write(chunk)
            if marked.shape[0]:
                yield marked
        rest = marker.close()
        if rest.shape[0]:
            yield rest

    def marker(self, sample_rate: int, live: bool = True) -> StreamMarker:
        """A marker for one stream; see ``stream``."""
        return StreamMarker(self, sample_rate, self._method.segment_seconds if live else WHOLE_SECONDS)

    @torch.no_grad()
    def detect(self, audio: Tensor, sample_rate: int) -> Detection:
        """Search (samples,) or (channels, samples) for the mark, in blocks of ``WHOLE_SECONDS``. Raises AudioError."""
        mono = to_mono(audio, sample_rate, RATE)
        blocks = mono.split(round(WHOLE_SECONDS * RATE))
        if len(blocks) > 1 and blocks[-1].shape[0] < RATE:  # too short to tell by
            blocks = blocks[:-1]
        confidences = [self._confidence(block) for block in blocks]
        heard = [confidence for confidence in confidences if not math.isnan(confidence)]
        mean = sum(heard) / len(heard) if heard else 0.0
        return Detection(mean >= FOUND, mean, sum(one >= FOUND for one in heard), len(heard))

    def _confidence(self, block: Tensor) -> float:
        padded = torch.cat((block, block.new_zeros(round(PADDING_SECONDS * RATE))))
        return self._method.confidence(padded, RATE) if block.any() else math.nan


class StreamMarker:
    """Marks one stream, segment by segment. The samples do not depend on how the stream is cut into chunks."""

    def __init__(self, watermark: Watermark, sample_rate: int, segment_seconds: float):
        self._watermark = watermark
        self._rate = sample_rate
        self._segment = round(segment_seconds * sample_rate)
        self._overlap = round(OVERLAP_SECONDS * sample_rate)
        self._context = torch.zeros(0)  # unmarked audio from before the pending samples
        self._pending = torch.zeros(0)
        self._faded = torch.zeros(0)  # the overlap, as the segment before marked it

    def write(self, chunk: Tensor) -> Tensor:
        """The samples that are complete once these are in; maybe none."""
        self._pending = torch.cat((self._pending, chunk.float()))
        parts = [torch.zeros(0)]
        while self._pending.shape[0] >= self._segment + self._overlap:
            marked = self._mark(self._pending[: self._segment + self._overlap])
            parts.append(marked[: self._segment])
            self._faded = marked[self._segment :]
            before = torch.cat((self._context, self._pending[: self._segment]))
            self._context = before[-round(CONTEXT_SECONDS * self._rate) :]
            self._pending = self._pending[self._segment :]
        return torch.cat(parts)

    def close(self) -> Tensor:
        """The rest of the stream."""
        rest = self._mark(self._pending) if self._pending.shape[0] else self._pending
        self._pending = torch.zeros(0)
        return rest

    def _mark(self, audio: Tensor) -> Tensor:
        """Mark a segment with its context, and fade over from the segment before."""
        length = self._context.shape[0]
        marked = self._watermark.mark_block(torch.cat((self._context, audio)), self._rate)[length:].clone()
        overlap = min(self._faded.shape[0], marked.shape[0])
        if overlap:
            ramp = torch.arange(1, overlap + 1) / (overlap + 1)
            marked[:overlap] = self._faded[:overlap] * (1 - ramp) + marked[:overlap] * ramp
        return marked


class AudioOutput(Protocol):
    """Where audio goes: a file, a pipe, a sound device, a meter."""

    def begin(self, sample_rate: int) -> None:
        """Called once, before the first samples."""

    def write(self, audio: Tensor) -> None:
        """(samples,)."""


class MarkedOutput:
    """An output that marks audio and passes it on to others. A context manager: leaving it writes what it held back.

    ``live`` is for listeners: short segments, little delay. Otherwise the audio is marked whole.
    """

    def __init__(self, outputs: Sequence[AudioOutput], watermark: Watermark, live: bool):
        self._outputs = outputs
        self._watermark = watermark
        self._live = live
        self._marker: StreamMarker | None = None

    def begin(self, sample_rate: int) -> None:
        """Set the sample rate of all outputs."""
        self._marker = self._watermark.marker(sample_rate, self._live)
        for output in self._outputs:
            output.begin(sample_rate)

    def write(self, audio: Tensor) -> None:
        """Mark, and write what is complete."""
        assert self._marker is not None, "call begin() first"
        self._pass_on(self._marker.write(audio))

    def _pass_on(self, audio: Tensor) -> None:
        for output in self._outputs if audio.shape[0] else ():
            output.write(audio)

    def __enter__(self) -> MarkedOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._marker is not None:
            self._pass_on(self._marker.close())


def marked(
    stack: ExitStack, outputs: Sequence[AudioOutput], watermark: Watermark | None, live: bool = False
) -> Sequence[AudioOutput]:
    """The outputs, behind a watermark if there is one. ``live``: somebody hears them while they are written."""
    return outputs if watermark is None else [stack.enter_context(MarkedOutput(outputs, watermark, live))]


def load_watermark(name: str, device: str = "cpu") -> Watermark:
    """The watermark of this name, with its weights.

    Raises CSMError if its package is missing, and UnavailableError if its weights cannot be had.
    """
    if name not in METHODS:
        raise CSMError(f"no watermark is called {name!r}; there are {', '.join(WATERMARKS)}")
    return Watermark(name, METHODS[name](device))
