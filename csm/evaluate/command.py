"""``python -m csm eval``: sentences to speech, speech to words and voices, and how far off these are."""

from __future__ import annotations

import argparse
from pathlib import Path

from csm.audio import read_audio
from csm.errors import CSMError
from csm.evaluate import report
from csm.evaluate.measure import Ears, Heard, Sentence, Speaking, recordings, speech, through_codec
from csm.evaluate.words import normalise
from csm.finetune.manifest import check_clips, check_recording, read_manifest
from csm.generator import Generator
from csm.prompt import Segment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--sentences", type=Path, help="a text file, one sentence a line")
    source.add_argument("--data", type=Path, help="manifest.jsonl, its folder, or an LJSpeech folder")
    parser.add_argument("--model", help="hub name, folder, or tiny: have it say the sentences")
    parser.add_argument("--lora", type=Path, help="folder of an adapter for the model")
    parser.add_argument("--recordings", action="store_true", help="measure the recordings of --data: the floor")
    parser.add_argument("--codec", action="store_true", help="measure the recordings through the codec of --model")
    parser.add_argument("--no-speech", action="store_true", help="with --codec: the model need not speak")
    parser.add_argument("--codec-weights", type=Path, help="Mimi weights in Kyutai's layout (default: the model's own)")
    parser.add_argument("--ref", type=Path, help="a recording of the voice that it should be")
    parser.add_argument("--ref-text", help="what is said in --ref, which then is continued")
    parser.add_argument("--speaker", type=int, default=0, help="who says --sentences (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="times each sentence is said (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.9, help="0 is greedy (default: 0.9)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among this many best codes (default: 50)")
    parser.add_argument("--max-seconds", type=float, default=20.0, help="most audio a sentence (default: 20)")
    parser.add_argument("--batch", type=int, default=4, help="sentences at once (default: 4)")
    parser.add_argument("--limit", type=int, help="only the first so many sentences")
    parser.add_argument("--out", type=Path, default=Path("eval"), help="folder for the report (default: eval)")
    parser.add_argument("--keep-audio", action="store_true", help="keep the speech in --out too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> str:
    """Measure what was asked for; return the table."""
    _check(args)
    sentences = read_sentences(args)
    ears = Ears(args.ref, sentences)
    kinds: dict[str, list[Heard]] = {}
    if args.recordings:
        kinds["recordings"] = recordings(ears, sentences, not args.quiet)
    if args.model is not None:
        device = None if args.device == "auto" else args.device
        generator = Generator.from_pretrained(
            args.model, device, codec=args.codec_weights, progress=not args.quiet, lora=args.lora
        )
        if args.codec:
            kinds["codec"] = through_codec(ears, generator, sentences, not args.quiet)
        if not args.no_speech:
            keep = args.out / "speech" if args.keep_audio else None
            kinds["speech"] = speech(ears, generator, sentences, _speaking(args, generator), keep, not args.quiet)
    told = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, type(None)))}
    told |= {name: str(value) for name, value in vars(args).items() if isinstance(value, Path)}
    return report.write(args.out, told, kinds)


def _check(args: argparse.Namespace) -> None:
    if (args.recordings or args.codec) and args.data is None:
        raise CSMError("--recordings and --codec measure a manifest's own audio: give it as --data")
    if args.codec and args.model is None:
        raise CSMError("--codec measures the codec of a model: give it as --model")
    if args.model is None and not args.recordings:
        raise CSMError("there is nothing to measure: give --model, or --data and --recordings")
    if args.ref_text is not None and args.ref is None:
        raise CSMError("--ref-text says what is said in --ref: give both")
    for name in ("seeds", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CSMError(f"--{name} must be at least 1, not {value}")


def read_sentences(args: argparse.Namespace) -> list[Sentence]:
    """The sentences of the file or of the manifest; those without a word in them are an error that names the line."""
    if args.data is not None:
        manifest = read_manifest(args.data)
        check_clips(manifest, lambda clip: _check_clip(clip.audio, clip.text), not args.quiet)
        return [Sentence(clip.text, clip.speaker, clip.audio) for clip in manifest.clips][: args.limit]
    try:
        lines = args.sentences.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{args.sentences}: cannot be read as text: {error}") from error
    sentences = [Sentence(line.strip(), args.speaker) for line in lines if line.strip()]
    for sentence in sentences:
        _check_words(sentence.text)
    if not sentences:
        raise CSMError(f"{args.sentences}: there is no sentence in it")
    return sentences[: args.limit]


def _check_clip(audio: Path, text: str) -> None:
    check_recording(audio)
    _check_words(text)


def _check_words(text: str) -> None:
    if not normalise(text):
        raise CSMError(f"no word to recognise in {text!r}")


def _speaking(args: argparse.Namespace, generator: Generator) -> Speaking:
    context: tuple[Segment, ...] = ()
    if args.ref_text is not None:
        audio, rate = read_audio(args.ref)
        context = (generator.prepare(Segment(args.speaker, args.ref_text, audio, sample_rate=rate)),)
    return Speaking(args.seeds, args.temperature, args.top_k, args.max_seconds, args.batch, context)
