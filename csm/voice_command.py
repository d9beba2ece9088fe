"""``python -m csm voice``: add, list, show, say, remove and export voices."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from csm.audio import read_audio
from csm.audio_file import open_writer
from csm.command_line import add_guard_options, add_tokenizer_option, check_overwrites
from csm.errors import CSMError, VoiceError
from csm.evaluate.listen import Recogniser
from csm.generator import Generator
from csm.guards import Guards
from csm.prompt import Segment
from csm.request import SpeechRequest
from csm.text import normalize
from csm.voices import (
    SUFFIX,
    Voice,
    check_name,
    describe,
    find_voice,
    load_voice,
    remove_voice,
    save_voice,
    voice_files,
    voices_folder,
)
from csm.watermark import WATERMARKS, load_watermark
from csm.weights import open_checkpoint

MIN_ROOM_MS = 20_000  # audio that a new voice must leave room for
GUESSED = "transcript guessed by a speech recogniser:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    add = actions.add_parser("add", help="make a voice of recordings and what is said in them")
    add.add_argument("name", help="letters, digits, '_', '-' and '.'")
    add.add_argument("--ref", type=Path, action="append", default=[], help="a recording; may be repeated")
    add.add_argument(
        "--ref-text",
        action="append",
        default=[],
        help="what is said in it; once for each --ref. Without any, a recogniser guesses (pip install 'csm[eval]')",
    )
    add.add_argument("--file", type=Path, help="take over an exported voice, in place of recordings")
    add.add_argument("--speaker", type=int, default=0, help="speaker id of the recordings (default: 0)")
    add.add_argument("--consent", default="", help="who allowed this use of the voice, and how; kept with the voice")
    add.add_argument("--replace", action="store_true", help="replace a voice of the same name")
    actions.add_parser("list", help="list all voices")
    show = actions.add_parser("show", help="show a voice's transcripts, length, consent and file")
    show.add_argument("name")
    say = actions.add_parser("say", help="generate a sentence in a voice")
    say.add_argument("name")
    say.add_argument("--text", required=True)
    say.add_argument("--out", type=Path, default=Path("out.wav"), help="the audio file to write (default: out.wav)")
    say.add_argument("--seed", type=int, default=0, help="(default: 0)")
    say.add_argument("--max-seconds", type=float, default=20.0, help="maximum length of the audio (default: 20)")
    say.add_argument("--watermark", choices=WATERMARKS, help="mark the audio as generated (docs/watermark.md)")
    add_guard_options(say)
    remove = actions.add_parser("remove", help="delete one of your voices")
    remove.add_argument("name")
    export = actions.add_parser("export", help="write a voice to a file for another machine")
    export.add_argument("name")
    export.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    export.add_argument("--replace", action="store_true", help="replace a file of this name")
    for action in (add, say, export):
        action.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    remove.add_argument("--model", help="not used: voices beside a checkpoint are not removed")
    for action in (add, actions.choices["list"], show, say, export):
        action.add_argument(
            "--model", help="hub name, folder, GGUF file, or tiny: also finds the voices beside this checkpoint"
        )
        add_tokenizer_option(action)


def run(args: argparse.Namespace) -> str:
    """Run one action; return what it prints."""
    action = {"add": _add, "list": _list, "show": _show, "say": _say, "remove": _remove, "export": _export}
    return action[args.action](args)


def _add(args: argparse.Namespace) -> str:
    path = voices_folder() / f"{check_name(args.name)}{SUFFIX}"
    if path.exists() and not args.replace:
        raise VoiceError(f"{path}: there is a voice of this name; --replace replaces it")
    if args.file is not None:
        if args.ref or args.ref_text:
            raise VoiceError("--file goes without --ref and --ref-text: it holds a whole voice")
        voice = dataclasses.replace(load_voice(args.file), name=args.name)
    else:
        voice = _record(args)
    save_voice(voice, path)
    lines = [next(describe({args.name: path}))]
    if voice.guessed:
        lines += [GUESSED, *(f"  {text}" for text in voice.texts), "if it is wrong: --replace, with --ref-text"]
    return "\n".join(lines)


def _record(args: argparse.Namespace) -> Voice:
    """A voice of recordings. Raises if they leave no room to speak."""
    if not args.ref or len(args.ref_text) not in (0, len(args.ref)):
        raise VoiceError(
            f"a voice takes recordings and their transcripts: {len(args.ref)} --ref and {len(args.ref_text)} --ref-text"
        )
    if args.model is None:
        raise VoiceError("--model is missing: the checkpoint whose codec encodes the recordings")
    clips = [read_audio(path) for path in args.ref]
    texts = args.ref_text or _guess(args.ref, clips)
    generator = _load(args)
    positions = round(sum(audio.shape[-1] / rate for audio, rate in clips) * 1000 / generator.frame_ms)
    limit = generator.config.backbone.max_positions
    if positions >= limit:  # known before the codec has encoded them
        raise VoiceError(f"the voice takes {positions} positions, but the model has {limit}: use shorter recordings")
    turns = [
        generator.prepare(Segment(args.speaker, text, audio, sample_rate=rate))
        for text, (audio, rate) in zip(texts, clips, strict=True)
    ]
    voice = Voice(
        args.name,
        tuple(texts),
        tuple(turn.codes for turn in turns if turn.codes is not None),
        args.speaker,
        args.consent,
        guessed=not args.ref_text,
    )
    room_ms = generator.room_ms(SpeechRequest("Hello there.", args.speaker, voice=voice))
    if room_ms < MIN_ROOM_MS:
        raise VoiceError(
            f"the recordings leave room for {room_ms / 1000:.2f} s of speech, less than {MIN_ROOM_MS / 1000:g} s: use "
            f"shorter ones"
        )
    return voice


def _guess(paths: Sequence[Path], clips: Sequence[tuple[Tensor, int]]) -> list[str]:
    """What a recogniser hears in the recordings. Raises VoiceError where there is none, and where it hears nothing."""
    try:
        recogniser = Recogniser()
    except CSMError as error:
        raise VoiceError(f"--ref-text is missing, and cannot be guessed without a recogniser: {error}") from error
    texts = [recogniser.transcribe(audio, rate) for audio, rate in clips]
    for path, text in zip(paths, texts, strict=True):
        if not text.strip():
            raise VoiceError(f"{path}: no speech was recognised in it; give what is said in it with --ref-text")
    return texts


def _load(args: argparse.Namespace) -> Generator:
    if args.model is None:
        raise VoiceError("--model is missing: a hub name, a folder, or tiny")
    device = None if args.device == "auto" else args.device
    return Generator.from_pretrained(args.model, device, tokenizer=args.tokenizer)


def _folder(args: argparse.Namespace) -> Path | None:
    return None if args.model is None else open_checkpoint(args.model, tokenizer=args.tokenizer).folder


def _list(args: argparse.Namespace) -> str:
    lines = list(describe(voice_files(_folder(args))))
    return "\n".join(lines) or f"no voices in {voices_folder()}; python -m csm voice add makes one"


def _show(args: argparse.Namespace) -> str:
    path = find_voice(args.name, _folder(args))
    lines = list(describe({args.name: path}))
    if path.suffix == SUFFIX:
        voice = load_voice(path)
        lines += [f"consent: {voice.consent or 'none stated'}", *([GUESSED] if voice.guessed else [])]
        lines += [f"  {text}" for text in voice.texts]
    return "\n".join(lines)


def _say(args: argparse.Namespace) -> str:
    guards = Guards.without(*args.no_guards)
    check_overwrites([("the voice", find_voice(args.name, _folder(args)))], [("--out", args.out)])
    mark = None if args.watermark is None else load_watermark(args.watermark)
    with open_writer(args.out) as writer:
        generator = _load(args)
        voice = generator.voice(args.name)
        limit_ms = args.max_seconds * 1000
        text = normalize(args.text)
        audio = generator.generate(
            text, voice.speaker, max_audio_length_ms=limit_ms, seed=args.seed, voice=voice, guards=guards
        )
        writer.begin(generator.sample_rate)
        writer.write(audio if mark is None else mark.apply(audio, generator.sample_rate))
    return f"{args.out}: {audio.shape[0] / generator.sample_rate:.2f} s of audio in the voice {args.name}"


def _remove(args: argparse.Namespace) -> str:
    return f"{remove_voice(args.name)}: removed"


def _export(args: argparse.Namespace) -> str:
    if args.out.suffix != SUFFIX:
        raise VoiceError(f"{args.out}: a voice's file ends in {SUFFIX}")
    check_name(args.out.stem)
    if args.out.exists() and (args.out.is_dir() or not args.replace):
        raise VoiceError(f"{args.out}: exists; give another name, or --replace to replace a file")
    path = find_voice(args.name, _folder(args))
    voice = load_voice(path) if path.suffix == SUFFIX else _load(args).voice(args.name)
    save_voice(dataclasses.replace(voice, name=args.out.stem), args.out)
    return next(describe({args.name: args.out}))
