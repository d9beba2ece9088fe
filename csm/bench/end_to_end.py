"""From text to audio through ``Generator``: time per frame, first audio, ten sentences.

Random weights come without a tokenizer and a codec: text goes through the embedded checkpoint's tokenizer, and the
codec gets random weights too. Their audio is noise; only its time is measured.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from csm.bench.model_setup import Setup, small_setup, synchronize
from csm.bench.stepping import CHECKED_FRAMES, FrameRunner, eager_step, stepping
from csm.codec import Codec
from csm.errors import CSMError
from csm.generator import Generator
from csm.model import CSM
from csm.prompt import Segment, TextTokenizer, build_prompt
from csm.weights import Checkpoint, open_checkpoint
from csm.weights.layouts import mimi_table, target_shapes

FRAME_MS = 80
CONTEXT_ROWS = 100
SENTENCES = (
    "Good morning.",
    "The train to the coast leaves at nine.",
    "I would not have believed it if I had not seen it.",
    "Could you pass me the salt, please?",
    "She counted the steps twice, and each time there was one more.",
    "It rained.",
    "Every good answer begins with a better question.",
    "They painted the door green, then blue, then green again.",
    "Nothing in the letter explained why it had been sent.",
    "See you on Thursday, unless the bridge is closed.",
)
TEXT = SENTENCES[1]


class BenchGenerator(Generator):
    """A generator around a setup's weights, with a codec of random weights, which is never downloaded."""

    def __init__(self, setup: Setup):
        super().__init__(checkpoint_of(setup), CSM.from_state_dict(setup.config, setup.weights, setup.device))
        self._setup = setup
        self._random_codec: Codec | None = None

    @property
    def codec(self) -> Codec:
        if self._random_codec is None:
            codec_config = self._setup.codec_config
            with torch.inference_mode(False):  # its buffers are written by later calls, in any mode
                shapes = target_shapes(mimi_table(codec_config))
                weights = {name: torch.randn(shape, device=self.device) / 50 for name, shape in shapes.items()}
                self._random_codec = Codec(codec_config, self._setup.config.num_codebooks, weights, self._setup.device)
        return self._random_codec


def checkpoint_of(setup: Setup) -> Checkpoint:
    """The setup's checkpoint. For random weights the embedded one, with the setup's shapes: it has the tokenizer."""
    if setup.checkpoint is not None:
        return setup.checkpoint
    return dataclasses.replace(open_checkpoint("tiny"), config=setup.config, codec_config=setup.codec_config)


def requests(batch: int, frames: int) -> list[dict[str, Any]]:
    """``batch`` equal greedy requests for that many frames."""
    return [dict(text=TEXT, max_audio_length_ms=frames * FRAME_MS, temperature=0, seed=0) for _ in range(batch)]


def runner(setup: Setup, batch: int) -> FrameRunner:
    """A frame runner through the generator, codec included. It returns no codes, only the milliseconds of each frame.

    One slot on a GPU is timed from chunk to chunk. On a CPU, where the codec decodes several frames at once, and of a
    larger batch every frame gets the mean time of the run; on a CPU the first chunk is left out of it.
    """
    generator = BenchGenerator(setup)
    if setup.device.type == "cuda":
        generator.warmup([batch])
    nothing = torch.empty(0)

    def stream(frames: int) -> list[tuple[float, Tensor]]:
        moments = [time.perf_counter()]
        moments += [time.perf_counter() for _ in generator.stream(**requests(1, frames)[0])]
        times_ms = [1000 * (after - before) for before, after in pairwise(moments)]
        if setup.device.type == "cpu" and len(times_ms) > 1:
            times_ms[1:] = [sum(times_ms[1:]) / (len(times_ms) - 1)] * (len(times_ms) - 1)
        return [(ms, nothing) for ms in times_ms]

    def together(frames: int) -> list[tuple[float, Tensor]]:
        started = time.perf_counter()
        audio = generator.generate_batch(requests(batch, frames))
        elapsed_ms = 1000 * (time.perf_counter() - started)
        generated = min(samples.shape[0] for samples in audio) // setup.codec_config.frame_size
        return [(elapsed_ms / max(1, generated), nothing)] * generated

    return stream if batch == 1 else together


def differing_frame(setup: Setup, batch: int) -> int | None:
    """The first frame whose greedy codes are not the eager step's for the same text, on a small float32 model."""
    small = small_setup(setup)
    generator = BenchGenerator(small)
    if setup.device.type == "cuda":
        generator.warmup([batch])
    tokenizer = TextTokenizer(checkpoint_of(small).tokenizer_path, small.config.text_vocab_size)
    row_TC, mask_TC, _ = build_prompt([], tokenizer.encode(0, TEXT), small.config)
    plain = stepping(small, batch, eager_step, prompt=(row_TC, mask_TC))(CHECKED_FRAMES)
    codes_BTK = [codes_TK.cpu() for codes_TK in generator.generate_codes_batch(requests(batch, CHECKED_FRAMES))]
    for frame, (_, codes_BK) in enumerate(plain):
        if any(
            own.shape[0] <= frame or not torch.equal(own[frame], codes_BK[slot].cpu())
            for slot, own in enumerate(codes_BTK)
        ):
            return frame
    return None


def context(setup: Setup, seed: int) -> list[Segment]:
    """One context turn of CONTEXT_ROWS rows, with random codes."""
    tokenizer = TextTokenizer(checkpoint_of(setup).tokenizer_path, setup.config.text_vocab_size)
    frames = CONTEXT_ROWS - len(tokenizer.encode(0, TEXT)) - 1  # one row ends the audio
    shape = (max(1, frames), setup.config.num_codebooks)
    codes_TK = torch.randint(setup.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))
    return [Segment(0, TEXT, codes=codes_TK)]


def first_audio(setup: Setup) -> dict[str, float]:
    """Milliseconds from a request to its first 80 ms of audio, after CONTEXT_ROWS rows of context: new, and cached."""
    generator = BenchGenerator(setup)
    if setup.device.type == "cuda":
        generator.warmup()
    result = {}
    for name, seed in (("warm", 1), ("cold", 2), ("cached", 2)):
        turns = context(setup, seed)
        synchronize(setup.device)  # a frame of the run before may still be under way
        started = time.perf_counter()
        stream = generator.stream(TEXT, context=turns, max_audio_length_ms=2 * FRAME_MS, seed=1)
        if next(stream, None) is None:
            raise CSMError("the model ended its first frame without audio; its weights do not generate speech")
        result[name] = (time.perf_counter() - started) * 1000
    return {"cold_ms": result["cold"], "cached_ms": result["cached"]}


def sentences(generator: Generator, seconds: float) -> list[dict[str, Any]]:
    """Ten sentences from text to audio, at most ``seconds`` of audio each, and their average."""
    generator.warmup()
    rows: list[dict[str, Any]] = []
    for text in SENTENCES:
        started, first, samples = time.perf_counter(), 0.0, 0
        for chunk in generator.stream(text, 0, max_audio_length_ms=seconds * 1000, seed=0):
            first = first or time.perf_counter() - started
            samples += chunk.shape[0]
        elapsed, audio = time.perf_counter() - started, samples / generator.sample_rate
        row = {
            "rtf": elapsed / audio if audio else None,
            "first_audio_ms": first * 1000 if audio else None,
            "seconds": elapsed,
            "audio_s": audio,
            "frames": round(1000 * audio / FRAME_MS),
        }
        rows.append({"sentence": text, **row})
    return [*rows, {"sentence": "average", **average(rows)}]


def average(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means of the columns, over the rows that have a value."""
    result: dict[str, float | None] = {}
    for name in list(rows[0])[1:]:
        values = [row[name] for row in rows if row[name] is not None]
        result[name] = statistics.fmean(values) if values else None
    return result
