"""Text to a WAV file: ``python generate.py --text "Hello."``. ``--help`` lists the options."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor
from tqdm import tqdm

from csm import (
    DEFAULT_MODEL,
    CSMError,
    Generator,
    RoomWarning,
    SamplingParams,
    Segment,
    UnavailableError,
    Voice,
    WavWriter,
    player,
    read_audio,
    script,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUBTITLES = {"srt": script.to_srt, "vtt": script.to_vtt, "json": script.to_json}
TINY_NOTE = "the tiny checkpoint is a small demonstration voice: some 900 words of English, speakers 0 to 3"


class Parser(argparse.ArgumentParser):
    """Reports a bad option as everything else is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise CSMError(message)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description="Speak text with CSM-1B into a WAV file, a pipe or a sound device.")
    add_text_options(parser)
    parser.add_argument(
        "--model",
        help=f"hub name[@revision], folder, or tiny (default: {DEFAULT_MODEL} where it can be had, else tiny)",
    )
    parser.add_argument("--lora", type=Path, help="folder of an adapter for the model (python -m csm finetune --lora)")
    parser.add_argument("--codec", type=Path, help="Mimi weights in Kyutai's layout (default: the checkpoint's own)")
    parser.add_argument("--speaker", type=int, help="speaker id (default: the voice's, else 0)")
    parser.add_argument("--voice", help="name of a voice (python -m csm voice list)")
    parser.add_argument("--ref", type=Path, help="a recording of the voice to continue; needs --ref-text")
    parser.add_argument("--ref-text", help="what is said in --ref")
    parser.add_argument("--seed", type=int, help="repeats a run (default: drawn, and printed)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.9)")
    parser.add_argument(
        "--top-k", type=int, help="draw among this many best codes (default: the checkpoint's, else 50)"
    )
    parser.add_argument(
        "--max-seconds", type=float, help="most audio an utterance (default: the checkpoint's, else 90)"
    )
    parser.add_argument(
        "--context-turns", type=int, help="utterances that the next one continues (default: 1, with --script 2)"
    )
    add_output_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="bfloat16 on a GPU by default")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.out is None and args.stream_to is None and not args.play:
        args.out = Path("out.wav")
    return args


def add_text_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help='what to say; "-" reads standard input; every sentence is one utterance')
    source.add_argument("--file", type=Path, help="a text file")
    source.add_argument("--script", type=Path, help="a dialogue: lines like [0] Hello. or [anna] Hello. or [pause 0.5]")
    parser.add_argument(
        "--no-normalize", action="store_true", help="keep numbers, abbreviations and markup as they are written"
    )
    parser.add_argument("--no-split", action="store_true", help="every line is one utterance, not every sentence")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="the WAV file to write (default: out.wav, unless --stream-to or --play is given)"
    )
    parser.add_argument("--stream-to", help='write audio as it is generated to a pipe or file; "-" is standard output')
    parser.add_argument("--stream-format", choices=player.FORMATS, default="wav", help="of --stream-to (default: wav)")
    parser.add_argument("--play", action="store_true", help="play the audio while it is generated")
    for kind in SUBTITLES:
        parser.add_argument(f"--{kind}", type=Path, help=f"write the times of all sentences as {kind.upper()}")


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


def load(args: argparse.Namespace) -> Generator:
    """The generator that was asked for, its codec loaded; only where none was named may the tiny one stand in."""
    device = None if args.device == "auto" else args.device

    def from_pretrained(name: str, codec: Path | None = None, lora: Path | None = None) -> Generator:
        dtype = DTYPES.get(args.dtype)
        generator = Generator.from_pretrained(name, device, dtype, codec, progress=not args.quiet, lora=lora)
        _ = generator.codec  # now, not in the first utterance's time
        return generator

    if args.quiet:
        disable_progress_bars()
    try:
        generator = from_pretrained(args.model or DEFAULT_MODEL, args.codec, args.lora)
    except UnavailableError as error:
        if args.model is not None or args.lora is not None:
            raise
        print(f"WARNING: no CSM-1B: {error}", file=sys.stderr)
        print(f"WARNING: falling back to the embedded checkpoint; {TINY_NOTE}", file=sys.stderr)
        generator = from_pretrained("tiny")
    return generator


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
    )


def open_outputs(args: argparse.Namespace, stack: ExitStack) -> list[WavWriter | player.StreamWriter | player.Player]:
    """Everything that audio is written to. Raises before anything is loaded if one cannot be."""
    for kind in SUBTITLES:
        path = getattr(args, kind)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise CSMError(f"{path}: cannot be written: it is a folder, or is in none")
    outputs: list[WavWriter | player.StreamWriter | player.Player] = []
    if args.play:
        outputs.append(stack.enter_context(player.Player()))
    if args.out is not None:
        outputs.append(stack.enter_context(WavWriter(args.out)))
    if args.stream_to is not None:
        outputs.append(stack.enter_context(player.StreamWriter(args.stream_to, args.stream_format)))
    return outputs


def progress(args: argparse.Namespace) -> Callable[[script.Line, Iterator[Tensor]], Iterator[Tensor]]:
    """A bar for each utterance. One step is one frame of 80 ms, so its rate is in times real time."""

    def watch(line: script.Line, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        return iter(tqdm(chunks, desc=line.text[:40], unit="s", unit_scale=0.08, disable=args.quiet, leave=False))

    return watch


def run(args: argparse.Namespace) -> str:
    """Write the audio; return the closing line."""
    items, reference = read_items(args), read_reference(args)
    args.seed = secrets.randbits(32) if args.seed is None else args.seed
    given = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    SamplingParams(**{name: value for name, value in given.items() if value is not None})  # checked before loading
    with ExitStack() as stack:
        outputs = open_outputs(args, stack)
        generator = load(args)
        started, first_audio, num_samples = time.perf_counter(), None, 0
        narration = narrate(generator, args, items, reference)
        for output in outputs:
            output.begin(generator.sample_rate)
        for chunk in narration.stream(progress(args)):
            first_audio = first_audio or time.perf_counter() - started
            for output in outputs:
                output.write(chunk)
            num_samples += chunk.shape[0]
        for kind, convert in SUBTITLES.items():
            if getattr(args, kind) is not None:
                getattr(args, kind).write_text(convert(narration.cues), encoding="utf-8")
    if args.model == "tiny":
        print(f"note: {TINY_NOTE}", file=sys.stderr)
    return summary(args, generator, num_samples, first_audio, time.perf_counter() - started)


def summary(
    args: argparse.Namespace, generator: Generator, num_samples: int, first_audio: float | None, elapsed: float
) -> str:
    seconds, target = num_samples / generator.sample_rate, args.out or args.stream_to or "played"
    if not first_audio:
        return f"{target}: the speech ended before its first frame; seed {args.seed}, on {generator.device}"
    return (
        f"{target}: {seconds:.2f} s of audio in {elapsed:.2f} s (RTF {elapsed / seconds:.2f}), "
        f"first audio after {first_audio * 1000:.0f} ms, on {generator.device}, seed {args.seed}"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on stderr for what the user can mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", RoomWarning)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            args = parse_arguments(argv)
            print(run(args), file=sys.stderr if args.stream_to == "-" else sys.stdout)
        except (CSMError, OSError) as error:
            print(f"generate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: what is half written goes
    sys.exit(main())
