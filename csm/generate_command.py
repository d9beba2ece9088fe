"""Generate speech from text and write it to a WAV file. Every line of the text is one utterance."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor
from tqdm import tqdm

from csm import (
    DEFAULT_MODEL,
    CSMError,
    Generator,
    PromptTooLongError,
    RoomWarning,
    SamplingParams,
    Segment,
    UnavailableError,
    WavWriter,
    read_audio,
)
from csm.command_line import Parser, execute, suggest_once

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY_NOTE = "the tiny checkpoint is a small demonstration voice: some 900 words of English, speakers 0 to 3"
EXAMPLES = """examples:
  {program} --model tiny --text "Hello there."
  {program} --text "In the same voice." --ref voice.wav --ref-text "What voice.wav says." --out reply.wav"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of ``generate.py``."""
    parser = Parser(prog="generate.py", description=__doc__)
    add_arguments(parser)
    parser.set_defaults(run=run)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """``generate.py``. Exit code: 0, or 2 with one line on stderr for what the user can fix."""
    return execute("generate.py", lambda: parse_arguments(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    program = f"python {parser.prog}" if parser.prog.endswith(".py") else parser.prog
    parser.epilog = EXAMPLES.format(program=program)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_text_options(parser.add_argument_group("text and output"))
    _add_voice_options(parser.add_argument_group("voice"))
    _add_sampling_options(parser.add_argument_group("sampling"))
    _add_model_options(parser.add_argument_group("model and device"))


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help='what to say; "-" reads standard input; every line is one utterance')
    source.add_argument("--file", type=Path, help="a text file; every line is one utterance")
    group.add_argument("--out", type=Path, default=Path("out.wav"), help="the WAV file to write (default: out.wav)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_voice_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--speaker", type=int, default=0, help="speaker id (default: 0)")
    group.add_argument("--ref", type=Path, help="a recording of the voice to continue; needs --ref-text")
    group.add_argument("--ref-text", help="what is said in --ref")


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=int, help="repeats a run (default: drawn, and printed)")
    group.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.9)")
    group.add_argument("--top-k", type=int, help="draw among this many best codes (default: the checkpoint's, else 50)")
    group.add_argument("--max-seconds", type=float, help="most audio an utterance (default: the checkpoint's, else 90)")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        help=f"hub name[@revision], folder, or tiny (default: {DEFAULT_MODEL} where it can be had, else tiny)",
    )
    group.add_argument("--lora", type=Path, help="folder of an adapter for the model (python -m csm finetune --lora)")
    group.add_argument("--codec", type=Path, help="Mimi weights in Kyutai's layout (default: the checkpoint's own)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="bfloat16 on a GPU by default")


def run(args: argparse.Namespace) -> str:
    """Write the WAV file; return the closing line. Errors have one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", RoomWarning)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            return generate(args)
        except (CSMError, OSError) as error:
            raise CSMError(" ".join(str(error).split())) from error


def read_lines(args: argparse.Namespace) -> list[str]:
    """The utterances: every line that is not blank."""
    try:
        if args.file is not None:
            text = args.file.read_text(encoding="utf-8-sig")
        else:
            text = sys.stdin.read() if args.text == "-" else args.text
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{args.file or 'standard input'}: cannot be read as text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise CSMError("there is no text to speak")
    return lines


def read_reference(args: argparse.Namespace) -> Segment | None:
    """The recording to continue."""
    if (args.ref is None) != (args.ref_text is None):
        raise CSMError("--ref and --ref-text go together: the recording, and what is said in it")
    if args.ref is None:
        return None
    audio, sample_rate = read_audio(args.ref)
    return Segment(args.speaker, args.ref_text, audio, sample_rate=sample_rate)


def load(args: argparse.Namespace) -> Generator:
    """The generator that was asked for, its codec loaded; only where none was named may the tiny one stand in."""
    device = None if args.device == "auto" else args.device

    def from_pretrained(name: str, codec: Path | None = None, lora: Path | None = None) -> Generator:
        dtype = DTYPES.get(args.dtype)
        generator = Generator.from_pretrained(name, device, dtype, codec, progress=not args.quiet, lora=lora)
        _ = generator.codec  # now, not in the first utterance's time
        return generator

    if args.quiet or not sys.stderr.isatty():
        disable_progress_bars()  # of huggingface_hub's downloads
    try:
        generator = from_pretrained(args.model or DEFAULT_MODEL, args.codec, args.lora)
    except UnavailableError as error:
        if args.model is not None or args.lora is not None:
            raise
        print(f"WARNING: no CSM-1B: {error}", file=sys.stderr)
        print(f"WARNING: falling back to the embedded checkpoint; {TINY_NOTE}", file=sys.stderr)
        generator = from_pretrained("tiny")
    return generator


class AudioBar(tqdm):
    """A progress bar in seconds of audio. The rate is the audio's length over the elapsed time: "4.1x real time"."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's values, and those that only this bar shows."""
        values = super().format_dict
        return {**values, "speed": values["n"] / values["elapsed"] if values["elapsed"] else 0.0}


def with_progress(chunks: Iterator[Tensor], text: str, sample_rate: int, quiet: bool) -> Iterator[Tensor]:
    """The same chunks, (samples,) each, with a bar on stderr if that is a terminal and ``quiet`` is false."""
    shown = "{desc}: {n:.1f} s of audio, {speed:.1f}x real time"
    with AudioBar(desc=text[:40], bar_format=shown, disable=True if quiet else None, leave=False) as bar:
        for chunk in chunks:
            bar.update(chunk.shape[0] / sample_rate)
            yield chunk


class LineSpeaker:
    """Speaks the lines one after the other, each continuing the voice of the one before where there is room."""

    def __init__(self, generator: Generator, args: argparse.Namespace, reference: Segment | None):
        self.generator = generator
        self.args = args
        self.reference = [] if reference is None else [generator.prepare(reference)]

    def stream(self, index: int, line: str, before: list[Segment]) -> Iterator[Tensor]:
        """One line; arguments are checked here, the speech comes as it is read."""
        return self.generator.stream(
            line,
            self.args.speaker,
            [*self.reference, *before],
            max_audio_length_ms=None if self.args.max_seconds is None else self.args.max_seconds * 1000,
            temperature=self.args.temperature,
            topk=self.args.top_k,
            seed=self.args.seed + index,
        )

    def speak(self, lines: list[str]) -> Iterator[Tensor]:
        """Chunks of all lines, a progress bar in seconds of audio under way."""
        before: list[Segment] = []
        for index, line in enumerate(lines):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RoomWarning)
                    stream = self.stream(index, line, before)
            except (PromptTooLongError, RoomWarning):
                stream = self.stream(index, line, [])
            chunks = []
            for chunk in with_progress(stream, line, self.generator.sample_rate, self.args.quiet):
                chunks.append(chunk)
                yield chunk
            before = [Segment(self.args.speaker, line, torch.cat(chunks))] if chunks else []


def generate(args: argparse.Namespace) -> str:
    """Write the WAV file; return the closing line."""
    lines, reference = read_lines(args), read_reference(args)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    given = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    SamplingParams(**{name: value for name, value in given.items() if value is not None})  # checked before loading
    with WavWriter(args.out) as wav:
        generator = load(args)
        wav.begin(generator.sample_rate)
        started, first_audio, num_samples = time.perf_counter(), None, 0
        speaker = LineSpeaker(generator, args, reference)
        for index, line in enumerate(lines):
            speaker.stream(index, line, [])  # not read: a bad last line fails before the first is spoken
        for chunk in speaker.speak(lines):
            first_audio = first_audio or time.perf_counter() - started
            wav.write(chunk)
            num_samples += chunk.shape[0]
    elapsed, seconds = time.perf_counter() - started, num_samples / generator.sample_rate
    next_step = suggest_once("generate", suggestion(args, lines))
    if args.model == "tiny":
        print(f"note: {TINY_NOTE}", file=sys.stderr)
    if not first_audio:
        return f"{args.out}: the speech ended before its first frame; seed {args.seed}, on {generator.device}"
    closing = (
        f"{args.out}: {seconds:.2f} s of audio in {elapsed:.2f} s (RTF {elapsed / seconds:.2f}), "
        f"first audio after {first_audio * 1000:.0f} ms, on {generator.device}, seed {args.seed}"
    )
    return f"{closing}\n{next_step}" if next_step else closing


def suggestion(args: argparse.Namespace, lines: list[str]) -> str:
    """What to try after the first run: CSM-1B after the tiny checkpoint, else a second text in the same voice."""
    if args.model == "tiny":
        return "next: `csm doctor` shows what CSM-1B needs on this machine; then leave out --model for its voice"
    voice = shlex.join(["--ref", str(args.out), "--ref-text", " ".join(lines)])
    return f'next: the same voice again: csm generate {voice} --text "Something else." --out next.wav'
