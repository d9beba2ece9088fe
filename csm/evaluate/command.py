"""``python -m csm eval``: word error rate, voice similarity and duration of recordings and generated speech."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from csm.audio import read_audio
from csm.command_line import add_tokenizer_option
from csm.errors import CSMError
from csm.evaluate import report
from csm.evaluate.measure import (
    Evaluator,
    GenerationSettings,
    Sentence,
    Utterance,
    evaluate_codec,
    evaluate_recordings,
    evaluate_speech,
)
from csm.evaluate.words import normalise
from csm.finetune.manifest import check_clips, check_recording, read_manifest
from csm.generator import Generator
from csm.guards import GuardEvent
from csm.prompt import Segment
from csm.sampling import SamplingParams
from csm.voices import check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sentences", type=Path, help="a text file with one sentence per line")
    source.add_argument("--data", type=Path, help="manifest.jsonl, its folder, or an LJSpeech folder")
    parser.add_argument(
        "--model", help="hub name, folder, GGUF file, or tiny: generate the sentences and evaluate them"
    )
    parser.add_argument("--lora", type=Path, help="folder of an adapter for the model")
    add_tokenizer_option(parser)
    parser.add_argument("--recordings", action="store_true", help="evaluate the recordings of --data")
    parser.add_argument("--codec", action="store_true", help="evaluate the recordings through the codec of --model")
    parser.add_argument("--no-speech", action="store_true", help="do not generate speech (with --codec)")
    parser.add_argument("--codec-weights", type=Path, help="Mimi weights in Kyutai's layout (default: the model's own)")
    parser.add_argument("--ref", type=Path, help="a recording of the voice to compare with")
    parser.add_argument("--ref-text", help="transcript of --ref, which is then used as context")
    parser.add_argument("--voice", help="name of a voice, whose clips are then used as context")
    parser.add_argument("--speaker", type=int, default=0, help="speaker of --sentences (default: 0)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="generations per sentence, with seeds 0, 1, ... (default: 1)"
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's, else 0.9)")
    parser.add_argument(
        "--top-k", type=int, help="sample among the k most likely codes (default: the checkpoint's, else 50)"
    )
    parser.add_argument("--max-seconds", type=float, default=20.0, help="maximum audio per sentence (default: 20)")
    parser.add_argument("--batch", type=int, default=4, help="sentences generated at once (default: 4)")
    parser.add_argument(
        "--guards", action="store_true", help="generate with the guards on, and count what they did (default: off)"
    )
    parser.add_argument("--quantize", help="quantise while loading: int8, fp8, int4-depth, int4, or by part")
    parser.add_argument("--limit", type=int, help="use only the first sentences, up to this number")
    parser.add_argument("--out", type=Path, default=Path("eval"), help="folder for the report (default: eval)")
    parser.add_argument("--keep-audio", action="store_true", help="write the generated audio to --out/speech")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> str:
    """Evaluate the requested sources; return the report's table."""
    _check(args)
    sentences = read_sentences(args)
    generator = None if args.model is None else _load(args)
    guard_events: list[GuardEvent] | None = [] if args.guards else None
    settings = None if generator is None else replace(_generation_settings(args, generator), guard_events=guard_events)
    evaluator = Evaluator(args.ref, sentences)  # slow to load: last
    progress = not args.quiet
    sources: dict[str, list[Utterance]] = {}
    if args.recordings:
        sources["recordings"] = evaluate_recordings(evaluator, sentences, progress)
    if generator is not None and args.codec:
        sources["codec"] = evaluate_codec(evaluator, generator, sentences, progress)
    if generator is not None and settings is not None and not args.no_speech:
        keep = args.out / "speech" if args.keep_audio else None
        sources["speech"] = evaluate_speech(evaluator, generator, sentences, settings, keep, progress)
    options = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, type(None)))}
    options |= {name: str(value) for name, value in vars(args).items() if isinstance(value, Path)}
    return report.write(args.out, options, sources, guard_events)


def _load(args: argparse.Namespace) -> Generator:
    """The generator with its codec, so that a bad file is an error before the recogniser is loaded."""
    generator = Generator.from_pretrained(
        args.model,
        None if args.device == "auto" else args.device,
        codec=args.codec_weights,
        progress=not args.quiet,
        lora=args.lora,
        quantize=args.quantize,
        tokenizer=args.tokenizer,
    )
    _ = generator.codec
    return generator


def _check(args: argparse.Namespace) -> None:
    if (args.recordings or args.codec) and args.data is None:
        raise CSMError("--recordings and --codec need recordings: give a manifest with --data")
    if args.codec and args.model is None:
        raise CSMError("--codec needs a model's codec: give the model with --model")
    if args.model is None and not args.recordings:
        raise CSMError("nothing to evaluate: give --model, or --data with --recordings")
    if args.ref_text is not None and args.ref is None:
        raise CSMError("--ref-text is the transcript of --ref: give --ref too")
    for name in ("seeds", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CSMError(f"--{name} must be at least 1, not {value}")
    given = {"temperature": args.temperature, "top_k": args.top_k}
    SamplingParams(**{name: value for name, value in given.items() if value is not None})
    if not 0.08 <= args.max_seconds < math.inf:
        raise CSMError(f"--max-seconds must be at least 0.08, not {args.max_seconds:g}")
    if args.out.exists() and not args.out.is_dir():
        raise CSMError(f"{args.out} is not a folder: give the name of one")
    if args.ref is not None:
        read_audio(args.ref)  # a bad file is an error before anything is loaded
    _check_voice(args)


def _check_voice(args: argparse.Namespace) -> None:
    if args.voice is None:
        return
    if args.ref_text is not None:
        raise CSMError("--voice and --ref-text exclude each other: each is what the speech continues")
    if args.model is None:
        raise CSMError("--voice is for the speech of a model: give --model too")
    check_name(args.voice)


def read_sentences(args: argparse.Namespace) -> list[Sentence]:
    """The sentences of the text file or the manifest. Raises CSMError for a sentence without words."""
    if args.data is not None:
        manifest = read_manifest(args.data)
        check_clips(manifest, lambda clip: _check_clip(clip.audio, clip.text), not args.quiet)
        return [Sentence(clip.text, clip.speaker, clip.audio) for clip in manifest.clips][: args.limit]
    return read_lines(args.sentences, args.speaker)[: args.limit]


def read_lines(path: Path, speaker: int = 0) -> list[Sentence]:
    """The sentences of a text file, one a line. Raises CSMError for a sentence without words."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{path}: cannot be read as UTF-8 text ({error}); check the path and the encoding") from error
    sentences = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _check_words(line.strip(), f"{path}:{number}: ")
            sentences.append(Sentence(line.strip(), speaker))
    if not sentences:
        raise CSMError(f"{path}: the file has no sentences; give one per line")
    return sentences


def _check_clip(audio: Path, text: str) -> None:
    check_recording(audio)
    _check_words(text)


def _check_words(text: str, where: str = "") -> None:
    if not normalise(text):
        raise CSMError(f"{where}no word to recognise in {text!r}; remove this text")


def _generation_settings(args: argparse.Namespace, generator: Generator) -> GenerationSettings:
    context: tuple[Segment, ...] = ()
    if args.voice is not None:
        context = tuple(generator.voice(args.voice).segments(args.speaker))
    if args.ref_text is not None:
        audio, rate = read_audio(args.ref)
        context = (generator.prepare(Segment(args.speaker, args.ref_text, audio, sample_rate=rate)),)
    return GenerationSettings(args.seeds, args.temperature, args.top_k, args.max_seconds, args.batch, context)
