"""Generate speech from text into an audio file, a pipe or a sound device. Every sentence is one utterance."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
    Guards,
    RoomWarning,
    SamplingParams,
    Segment,
    UnavailableError,
    Voice,
    audio_file,
    joins,
    metrics,
    player,
    read_audio,
    script,
    subtitles,
    watermark,
)
from csm.command_line import (
    Parser,
    add_guard_options,
    add_tokenizer_option,
    check_overwrites,
    execute,
    model_inputs,
    suggest_once,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY_NOTE = "the tiny checkpoint is a small demonstration voice for plain English, speakers 0 to 3"
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
    add_voice_options(parser.add_argument_group("voice"))
    sampling = parser.add_argument_group("sampling")
    add_sampling_options(sampling)
    add_guard_options(sampling)
    add_model_options(parser.add_argument_group("model and device"))


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help='what to say; "-" reads standard input; every sentence is one utterance')
    source.add_argument("--file", type=Path, help="a text file")
    source.add_argument("--script", type=Path, help="a dialogue: lines like [0] Hello. or [anna] Hello. or [pause 0.5]")
    group.add_argument(
        "--no-normalize", action="store_true", help="keep numbers, abbreviations and markup as they are written"
    )
    group.add_argument("--no-split", action="store_true", help="every line is one utterance, not every sentence")
    formats = ", ".join(suffix[1:] for suffix in audio_file.SUFFIXES)
    default = "(default: out.wav, unless --stream-to or --play is given)"
    group.add_argument("--out", type=Path, help=f"the file to write, by suffix {formats} {default}")
    group.add_argument(
        "--split",
        nargs="?",
        const="wav",
        choices=[suffix[1:] for suffix in audio_file.SUFFIXES],
        metavar="FORMAT",
        help="with --script: a file for each entry, in the folder --out (default format: wav)",
    )
    group.add_argument("--speed", type=float, default=1.0, help="0.25 to 4; the pitch stays (default: 1)")
    group.add_argument("--stream-to", help='write audio as it is generated to a pipe or file; "-" is standard output')
    group.add_argument("--stream-format", choices=player.FORMATS, default="wav", help="of --stream-to (default: wav)")
    group.add_argument("--play", action="store_true", help="play the audio while it is generated")
    for kind in subtitles.SUBTITLES:
        group.add_argument(f"--{kind}", type=Path, help=f"write the times of all sentences as {kind.upper()}")
    add_watermark_option(group)
    add_report_options(group)


def add_watermark_option(group: argparse._ArgumentGroup) -> None:
    """``--watermark``; ``open_watermark`` reads it."""
    group.add_argument(
        "--watermark", choices=watermark.WATERMARKS, help="mark the audio as generated (docs/watermark.md)"
    )


def add_report_options(group: argparse._ArgumentGroup) -> None:
    """What is printed beside the closing line."""
    group.add_argument("--metrics", action="store_true", help="print RTF, first audio, underruns, retries, memory, ...")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def add_voice_options(group: argparse._ArgumentGroup) -> None:
    """Options of the voice and of what an utterance continues."""
    group.add_argument("--speaker", type=int, help="speaker id (default: the voice's, else 0)")
    group.add_argument("--voice", help="name of a voice (python -m csm voice list)")
    group.add_argument("--ref", type=Path, help="a recording of the voice to continue; needs --ref-text")
    group.add_argument("--ref-text", help="what is said in --ref")
    group.add_argument(
        "--context-turns", type=int, help="utterances that the next one continues (default: 1, with --script 2)"
    )


def add_sampling_options(group: argparse._ArgumentGroup, seed: str = "drawn, and printed") -> None:
    """Options of how codes are drawn; ``seed`` says where the default one comes from."""
    group.add_argument("--seed", type=int, help=f"repeats a run (default: {seed})")
    group.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.9)")
    group.add_argument("--top-k", type=int, help="draw among this many best codes (default: the checkpoint's, else 50)")
    group.add_argument("--max-seconds", type=float, help="most audio an utterance (default: the checkpoint's, else 90)")


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that choose the model and where it runs; ``load`` reads them."""
    group.add_argument(
        "--model",
        help=f"hub name[@revision], folder, GGUF file or tiny (default: {DEFAULT_MODEL} if it can be had, else tiny)",
    )
    group.add_argument("--lora", type=Path, help="folder of an adapter for the model (python -m csm finetune --lora)")
    group.add_argument("--codec", type=Path, help="Mimi weights in Kyutai's layout (default: the checkpoint's own)")
    add_tokenizer_option(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="bfloat16 on a GPU by default")
    group.add_argument("--quantize", help="int8, fp8, int4-depth, int4, or by part: backbone=int4,depth=int8")
    group.add_argument("--threads", type=int, help="on a CPU: compute threads (default: CSM_THREADS, else by model)")


def run(args: argparse.Namespace) -> str:
    """Write the audio; return the closing line. Errors have one line."""
    if args.out is None and args.stream_to is None and not args.play:
        args.out = Path("out" if args.split else "out.wav")
    with warnings.catch_warnings():
        warnings.simplefilter("once", RoomWarning)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            closing = generate(args)
        except (CSMError, OSError) as error:
            raise CSMError(" ".join(str(error).split())) from error
    if args.stream_to != "-":
        return closing
    print(closing, file=sys.stderr)  # standard output is audio
    return ""


def read_items(args: argparse.Namespace) -> list[script.Item]:
    """What is said: utterances and pauses."""
    path = args.file or args.script
    try:
        if path is not None:
            text = path.read_text(encoding="utf-8-sig")
        else:
            text = sys.stdin.read() if args.text == "-" else args.text
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{path or 'standard input'}: cannot be read as text: {error}") from error
    options = not args.no_normalize, not args.no_split
    items = script.parse_script(text, *options) if args.script else script.text_items(text, 0, *options)
    if not any(isinstance(item, script.Line) for item in items):
        raise CSMError("there is no text to speak")
    return items


def read_reference(args: argparse.Namespace) -> Segment | None:
    """The recording to continue."""
    if (args.ref is None) != (args.ref_text is None):
        raise CSMError("--ref and --ref-text go together: the recording, and what is said in it")
    if args.ref is None:
        return None
    if args.voice is not None:
        raise CSMError("--voice and --ref exclude each other: each is the voice to continue")
    audio, sample_rate = read_audio(args.ref)
    return Segment(args.speaker or 0, args.ref_text, audio, sample_rate=sample_rate)


def open_watermark(args: argparse.Namespace) -> watermark.Watermark | None:
    """The watermark that was asked for. Raises CSMError where its package is missing."""
    return None if args.watermark is None else watermark.load_watermark(args.watermark)


def load(args: argparse.Namespace, **more: Any) -> Generator:
    """The generator that was asked for, its codec loaded; only where none was named may it fall back to the tiny one.

    ``more`` are arguments of ``Generator.from_pretrained``.
    """
    device = None if args.device == "auto" else args.device

    def from_pretrained(name: str, codec: Path | None = None, lora: Path | None = None) -> Generator:
        dtype = DTYPES.get(args.dtype)
        options: dict[str, Any] = dict(lora=lora, quantize=args.quantize, threads=args.threads)
        options |= dict(tokenizer=args.tokenizer, **more)
        generator = Generator.from_pretrained(name, device, dtype, codec, progress=not args.quiet, **options)
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


def narrate(
    generator: Generator, args: argparse.Namespace, items: list[script.Item], reference: Segment | None
) -> script.Narration:
    """The items, ready to be spoken in the voice that was asked for. Every argument is checked here."""
    voice = None if args.voice is None else generator.voice(args.voice)
    if reference is not None:
        codes = generator.prepare(reference).codes
        assert codes is not None
        voice = Voice("reference", (reference.text,), (codes,), reference.speaker)
    speaker = args.speaker if args.speaker is not None else voice.speaker if voice is not None else 0
    if not args.script:
        items = [replace(item, speaker=speaker) if isinstance(item, script.Line) else item for item in items]
    return script.Narration(
        generator,
        items,
        None if voice is None else {speaker: voice},
        max_turn_ms=None if args.max_seconds is None else args.max_seconds * 1000,
        max_turns=(2 if args.script else 1) if args.context_turns is None else args.context_turns,
        temperature=args.temperature,
        topk=args.top_k,
        seed=args.seed,
        speed=args.speed,
        level=not (args.play or args.stream_to),  # a line's loudness is known at its end: too late for a listener
        words=args.json is not None,
        guards=Guards.without(*args.no_guards),
    )


Sink = audio_file.AtomicWriter | player.StreamWriter | player.Player


def split_files(args: argparse.Namespace, items: list[script.Item]) -> list[Path]:
    """The files of --split: one for each entry of the script, in order."""
    speakers = [
        next(item.speaker for item in group if isinstance(item, script.Line)) for group in script.entries(items)
    ]
    return [args.out / f"{number:04}-{speaker}.{args.split}" for number, speaker in enumerate(speakers, start=1)]


def check_outputs(args: argparse.Namespace, items: list[script.Item]) -> None:
    """Raise CSMError for an output that cannot be, before anything is loaded."""
    joins.check_speed(args.speed)
    if args.split is not None:
        if args.script is None or args.out is None:
            raise CSMError("--split writes a file for each entry of a --script into the folder --out")
        audio_file.check_suffix(Path(f"x.{args.split}"))
        if not args.out.is_dir() and (args.out.exists() or not args.out.parent.is_dir()):
            raise CSMError(f"{args.out}: --split needs a folder here, or a name for a new one")
    read = [("--file", args.file), ("--script", args.script), ("--ref", args.ref), *model_inputs(args)]
    written = [
        *(("--split", file) for file in (split_files(args, items) if args.split else [])),
        ("--out", None if args.split else args.out),
        ("--stream-to", None if args.stream_to == "-" else args.stream_to),
        *((f"--{kind}", getattr(args, kind)) for kind in subtitles.SUBTITLES),
    ]
    check_overwrites(read, written)
    for kind in subtitles.SUBTITLES:
        path = getattr(args, kind)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise CSMError(f"{path}: cannot be written: it is a folder, or is in none")


def open_outputs(args: argparse.Namespace, items: list[script.Item], stack: ExitStack) -> list[Sink]:
    """Everything that audio is written to, but the files of --split. Raises before anything is loaded."""
    check_outputs(args, items)
    outputs: list[Sink] = []
    if args.play:
        outputs.append(stack.enter_context(player.Player()))
    if args.out is not None and args.split is None:
        outputs.append(stack.enter_context(audio_file.open_writer(args.out)))
    if args.stream_to is not None:
        outputs.append(stack.enter_context(player.StreamWriter(args.stream_to, args.stream_format)))
    return outputs


class Progress:
    """Shows a bar for every line, and notes when the first audio of all was generated."""

    def __init__(self, sample_rate: int, quiet: bool):
        self.started = time.perf_counter()
        self.first_audio: float | None = None
        self._sample_rate, self._quiet = sample_rate, quiet

    def watch(self, line: script.Line, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same chunks."""
        for chunk in with_progress(chunks, line.text, self._sample_rate, self._quiet):
            self.first_audio = self.first_audio or time.perf_counter() - self.started
            yield chunk


def write_audio(
    narration: script.Narration,
    outputs: Sequence[watermark.AudioOutput],
    args: argparse.Namespace,
    progress: Progress,
    mark: watermark.Watermark | None,
) -> int:
    """Write the whole narration to the outputs, and with --split each entry to a file. Returns the samples."""
    num_samples = 0
    groups = script.entries(narration.items) if args.split else [list(narration.items)]
    files = split_files(args, list(narration.items)) if args.split else [None]
    if args.split:
        args.out.mkdir(exist_ok=True)
    for path, items in zip(files, groups, strict=True):
        with ExitStack() as stack:
            sinks = list(outputs)
            if path is not None:
                file = stack.enter_context(audio_file.open_writer(path))
                for sink in (own := watermark.marked(stack, [file], mark)):
                    sink.begin(narration.sample_rate)
                sinks += own
            for chunk in narration.speak(items, progress.watch):
                for sink in sinks:
                    sink.write(chunk)
                num_samples += chunk.shape[0]
    return num_samples


def generate(args: argparse.Namespace) -> str:
    """Write the audio; return the closing line."""
    items, reference = read_items(args), read_reference(args)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    given = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    SamplingParams(**{name: value for name, value in given.items() if value is not None})  # checked before loading
    Guards.without(*args.no_guards)
    with ExitStack() as stack:
        outputs = open_outputs(args, items, stack)
        mark = open_watermark(args)
        generator = load(args)
        progress, meter = Progress(generator.sample_rate, args.quiet), metrics.Meter()
        sinks = watermark.marked(stack, [meter, *outputs], mark, live=args.play or args.stream_to is not None)
        narration = narrate(generator, args, items, reference)
        for output in sinks:
            output.begin(generator.sample_rate)
        num_samples = write_audio(narration, sinks, args, progress, mark)
        seconds = num_samples / generator.sample_rate
        for kind, convert in subtitles.SUBTITLES.items():
            if getattr(args, kind) is not None:
                audio_file.write_text(getattr(args, kind), convert(subtitles.until(narration.cues, seconds)))
    if args.model == "tiny":
        print(f"note: {TINY_NOTE}", file=sys.stderr)
    closing = summary(args, generator, num_samples, progress.first_audio, time.perf_counter() - progress.started)
    if args.metrics:
        meter.retries = narration.conversation.stats.num_retries
        closing += f"\nmetrics: {meter.metrics(evictions=narration.conversation.stats.num_evicted)}"
    texts = [item.text for item in items if isinstance(item, script.Line)]
    wanted = args.out is not None and args.split is None
    next_step = suggest_once("generate", suggestion(args, texts)) if wanted else ""
    return f"{closing}\n{next_step}" if next_step else closing


def summary(
    args: argparse.Namespace, generator: Generator, num_samples: int, first_audio: float | None, elapsed: float
) -> str:
    """The closing line: length, speed, first audio, and the seed that repeats the run."""
    seconds = num_samples / generator.sample_rate
    target = args.out or player.name_of(args.stream_to) or "played"
    if not first_audio:
        return f"{target}: the speech ended before its first frame; seed {args.seed}, on {generator.device}"
    return (
        f"{target}: {seconds:.2f} s of audio in {elapsed:.2f} s (RTF {elapsed / seconds:.2f}), "
        f"first audio after {first_audio * 1000:.0f} ms, on {generator.device}, seed {args.seed}"
    )


def suggestion(args: argparse.Namespace, lines: list[str]) -> str:
    """What to try after the first run: CSM-1B after the tiny checkpoint, else a second text in the same voice."""
    program = getattr(args, "program", "python generate.py")  # "csm generate" or "python -m csm generate"
    if args.model == "tiny":
        csm = "python -m csm" if program.endswith(".py") else program.removesuffix(" generate")
        return f"next: `{csm} doctor` shows what CSM-1B needs on this machine; then leave out --model for its voice"
    voice = shlex.join(["--ref", str(args.out), "--ref-text", " ".join(lines)])
    return f'next: the same voice again: {program} {voice} --text "Something else." --out next.wav'
