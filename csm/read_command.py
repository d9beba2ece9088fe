"""Read a book (.txt, .md, .epub) or a dialogue into one audio file with chapters, or into a folder of files.

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from csm import CSMError, GenerationMetrics, Generator, Guards, SamplingParams, Segment, Voice, Watermark
from csm.audio_file import SUFFIXES, check_suffix, write_text
from csm.book import (
    Binder,
    Book,
    Parts,
    Reader,
    Recording,
    Section,
    Sentence,
    Settings,
    Sound,
    Take,
    parse_text,
    plan,
    read_book,
)
from csm.command_line import add_guard_options, check_overwrites, model_inputs
from csm.fingerprint import fingerprint
from csm.formats import import_av
from csm.generate_command import (
    add_model_options,
    add_report_options,
    add_sampling_options,
    add_voice_options,
    add_watermark_option,
    load,
    open_watermark,
    read_reference,
)
from csm.joins import check_speed
from csm.metrics import combined
from csm.script import Item, Line, entries, parse_script, speaker_ids, text_items
from csm.subtitles import SUBTITLES, cue_values
from csm.text import Pause

FORMATS = [suffix[1:] for suffix in SUFFIXES]
BESIDE = Path("*")  # of --srt and others without a value: beside the audio
DEFAULT_SEED = 0  # a drawn one would not be that of the run that is resumed
MIN_LOUDNESS, MAX_LOUDNESS = -40.0, -10.0
MAX_PAUSE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    _add_book_options(parser.add_argument_group("book and output"))
    add_voice_options(parser.add_argument_group("voice"))
    sampling = parser.add_argument_group("sampling")
    add_sampling_options(sampling, seed=str(DEFAULT_SEED))
    add_guard_options(sampling)
    add_model_options(parser.add_argument_group("model and device"))


def _add_book_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("book", nargs="?", help='a file: .txt, .md or .epub; "-" reads plain text from standard input')
    group.add_argument("--script", type=Path, help="a dialogue instead: lines like [0] Hello. or [anna] Hello.")
    group.add_argument("--out", required=True, help=f"a file ({', '.join(FORMATS)}), or a folder/: one file a chapter")
    group.add_argument("--split", action="store_true", help="--out is a folder; with --script one file for each entry")
    group.add_argument("--format", choices=FORMATS, default="mp3", help="of the files in a folder (default: mp3)")
    for kind in SUBTITLES:
        text = f"write the times of all sentences as {kind.upper()} (default place: beside the audio)"
        group.add_argument(f"--{kind}", type=Path, nargs="?", const=BESIDE, help=text)
    group.add_argument("--speed", type=float, default=1.0, help="0.25 to 4; the pitch stays (default: 1)")
    group.add_argument("--loudness", type=float, default=-20.0, help="of every sentence, in LUFS (default: -20)")
    group.add_argument("--paragraph-pause", type=float, default=0.4, help="seconds between paragraphs (default: 0.4)")
    group.add_argument("--chapter-pause", type=float, default=1.5, help="seconds between chapters (default: 1.5)")
    group.add_argument("--no-normalize", action="store_true", help="keep numbers and abbreviations as written")
    group.add_argument("--retries", type=int, default=2, help="for a sentence that a guard rejects (default: 2)")
    group.add_argument("--keep-parts", action="store_true", help="keep the folder OUT.parts, to change the book later")
    add_watermark_option(group)
    add_report_options(group)


def run(args: argparse.Namespace) -> str:
    """Write the audio; return the closing lines."""
    book, items, ids_from = read_source(args)
    target = check_options(args, book)
    reference = read_reference(args)
    watermark = open_watermark(args)
    generator = load(args)
    voices = chosen_voices(generator, args, reference)
    if not ids_from:
        speaker = next(iter(voices), args.speaker or 0)
        items = [spoken_by(part, speaker) for part in items]
    sections = [Section(chapter.title, tuple(part)) for chapter, part in zip(book.chapters, items, strict=True)]
    job = Job(args, generator, book, sections, voices, target, watermark)
    try:
        return job.run()
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on: finished sentences are in {target.parts}", file=sys.stderr)
        raise


def spoken_by(items: list[Item], speaker: int) -> list[Item]:
    """The same items in the voice of one speaker."""
    return [replace(item, speaker=speaker) if isinstance(item, Line) else item for item in items]


def read_source(args: argparse.Namespace) -> tuple[Book, list[list[Item]], bool]:
    """The book, the items of each chapter, and whether they name their speakers. Raises CSMError."""
    if (args.book is None) == (args.script is None):
        raise CSMError("give a book, or a dialogue with --script")
    if args.script is not None:
        return read_script(args)
    book = read_stdin() if args.book == "-" else read_book(Path(args.book))
    items: list[list[Item]] = []
    for chapter in book.chapters:
        try:
            items.append(chapter_items(chapter.text, not args.no_normalize, args.paragraph_pause))
        except CSMError as error:
            raise CSMError(f"{args.book}: {chapter.title[:60]!r}: {error}") from error
    spoken = [any(isinstance(item, Line) for item in part) for part in items]
    if not any(spoken):
        raise CSMError(f"{args.book}: there is no text to speak")
    chapters = tuple(itertools.compress(book.chapters, spoken))
    return replace(book, chapters=chapters), list(itertools.compress(items, spoken)), False


def read_stdin() -> Book:
    """Standard input as a plain text."""
    try:
        return parse_text(sys.stdin.read(), "Text", "standard input")
    except UnicodeDecodeError as error:
        raise CSMError(f"standard input: cannot be read as text: {error}") from error


def read_script(args: argparse.Namespace) -> tuple[Book, list[list[Item]], bool]:
    """A dialogue as a book of one chapter, or with --split of one for each entry."""
    try:
        text = args.script.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CSMError(f"{args.script}: cannot be read as text: {error}") from error
    items = parse_script(text, not args.no_normalize)
    groups = entries(items)
    if not groups:
        raise CSMError(f"{args.script}: there is no text to speak")
    if not args.split:
        groups = [items]
    names = [str(next(item.speaker for item in group if isinstance(item, Line))) for group in groups]
    book = parse_text(text, args.script.stem, str(args.script))
    titles = names if args.split else [args.script.stem]
    chapters = tuple(replace(book.chapters[0], title=title, text="") for title in titles)
    return Book(args.script.stem, "", chapters), groups, True


def chapter_items(text: str, normalized: bool, pause: float) -> list[Item]:
    """The sentences of a chapter, with a pause between paragraphs."""
    items: list[Item] = []
    for paragraph in re.split(r"\n\s*\n", text):
        found = text_items(paragraph, 0, normalized, wrapped=True)
        if items and found and pause and not isinstance(found[0], Pause) and not isinstance(items[-1], Pause):
            items.append(Pause(pause))
        items += found
    return items


@dataclass(frozen=True)
class Target:
    """Where the audio goes: one file, or files of a folder; and the folder of finished sentences."""

    files: tuple[Path, ...]
    folder: Path | None
    parts: Path

    def subtitles(self, asked: Path, file: Path, kind: str) -> Path:
        """The file for the subtitles of an audio file."""
        return file.with_suffix(f".{kind}") if asked == BESIDE else asked


def check_options(args: argparse.Namespace, book: Book) -> Target:
    """The output. Raises CSMError for everything that can be known before a model is loaded."""
    given = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    SamplingParams(**{name: value for name, value in given.items() if value is not None})
    check_speed(args.speed)
    Guards.without(*args.no_guards)
    for name, low, high in (
        ("loudness", MIN_LOUDNESS, MAX_LOUDNESS),
        ("paragraph_pause", 0.0, MAX_PAUSE),
        ("chapter_pause", 0.0, MAX_PAUSE),
        ("retries", 0, 20),
        ("context_turns", 0, 1000),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise CSMError(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, not {value:g}")
    if args.max_seconds is not None and not 0.08 <= args.max_seconds <= 600:
        raise CSMError(f"--max-seconds must be from 0.08 to 600, not {args.max_seconds:g}")
    target = find_target(args, book)
    for kind in SUBTITLES:
        asked = getattr(args, kind)
        if asked not in (None, BESIDE):
            if target.folder is not None:
                raise CSMError(f"--{kind} takes no file where --out is a folder: the times are beside each file")
            if asked.is_dir() or not asked.parent.is_dir():
                raise CSMError(f"{asked}: cannot be written: it is a folder, or is in none")
    written = [("--out", file) for file in target.files] + [
        (f"--{kind}", target.subtitles(getattr(args, kind), file, kind))
        for kind in SUBTITLES
        for file in target.files
        if getattr(args, kind) is not None
    ]
    book_file = None if args.book == "-" else args.book
    read = [("the book", book_file), ("--script", args.script), ("--ref", args.ref), *model_inputs(args)]
    check_overwrites(read, written)
    return target


def find_target(args: argparse.Namespace, book: Book) -> Target:
    """The files to write. Raises CSMError for a suffix or a folder that cannot be."""
    out = Path(args.out)
    if not out.name:
        raise CSMError(f"{args.out}: has no name; give a file, or a folder by its name")
    if args.split or args.out.endswith(("/", "\\")) or out.is_dir():
        check_suffix(Path(f"x.{args.format}"))
        if out.exists() and not out.is_dir():
            raise CSMError(f"{out}: is a file; a folder is needed here")
        files = [out / file_name(number, chapter.title, args.format) for number, chapter in enumerate(book.chapters, 1)]
        target = Target(tuple(files), out, out.with_name(f"{out.name}.parts"))
    else:
        check_suffix(out)
        target = Target((out,), None, out.with_name(f"{out.name}.parts"))
    if not out.absolute().parent.is_dir():
        raise CSMError(f"{out}: cannot be written: there is no folder {out.absolute().parent}")
    if (target.parts.exists() and not target.parts.is_dir()) or Parts(target.parts).is_foreign():
        raise CSMError(f"{target.parts}: is in the way: finished sentences are kept in a folder of this name")
    if target.files[0].suffix.lower() not in ("", ".wav"):
        import_av("a file with a title and chapters")  # now, not when everything is generated
    return target


def file_name(number: int, title: str, suffix: str) -> str:
    """A chapter's file: its number, and what of its title any file system takes."""
    plain = re.sub(r"[^\w ,'()-]+", " ", title)
    return f"{number:03} {' '.join(plain.split())[:60].strip()}".strip() + f".{suffix}"


def chosen_voices(generator: Generator, args: argparse.Namespace, reference: Segment | None) -> dict[int, Voice]:
    """The voice of --voice or --ref, by the id of its speaker."""
    voice = None if args.voice is None else generator.voice(args.voice)
    if reference is not None:
        codes = generator.prepare(reference).codes
        assert codes is not None
        voice = Voice("reference", (reference.text,), (codes,), reference.speaker)
    return {} if voice is None else {voice.speaker if args.speaker is None else args.speaker: voice}


class Job:
    """One run: what is read, how, and where to. Construct it to check every text."""

    def __init__(
        self,
        args: argparse.Namespace,
        generator: Generator,
        book: Book,
        sections: list[Section],
        voices: dict[int, Voice],
        target: Target,
        watermark: Watermark | None = None,
    ):
        self.args, self.generator, self.book, self.sections, self.target = args, generator, book, sections, target
        self.watermark = watermark
        items = [item for section in sections for item in section.items]
        ids = speaker_ids(items, generator, voices)
        named = {number: generator.voice(name) for name, number in ids.items() if isinstance(name, str)}
        voices = {**voices, **named}
        self.references = [part for number, voice in sorted(voices.items()) for part in voice.segments(number)]
        turns, defaults = args.context_turns, generator.defaults
        self.settings = Settings(
            defaults.temperature if args.temperature is None else args.temperature,
            defaults.top_k if args.top_k is None else args.top_k,
            defaults.max_audio_length_ms if args.max_seconds is None else args.max_seconds * 1000,
            DEFAULT_SEED if args.seed is None else args.seed,
            (2 if args.script else 1) if turns is None else turns,
            bool(voices) and args.script is None,  # without a voice, earlier sentences are all that keeps it
            args.retries,
            tuple(sorted(set(args.no_guards))),
        )
        self.model = fingerprint(generator, self.references)
        self.sentences = plan(sections, ids, self.settings, self.model)
        self.parts = Parts(target.parts)
        self.reader = Reader(generator, self.references, self.settings, self.parts)
        for sentence in self.sentences:
            self.reader.check(sentence)

    def run(self) -> str:
        """Generate what is missing, write the files, and remove the work folder."""
        started, args = time.perf_counter(), self.args
        with self.parts.locked():
            settings = {"settings": asdict(self.settings), "model": self.model}
            self.parts.describe({"title": self.book.title, "out": str(args.out), **settings})
            listing, num_found, metrics = self.generate()
            recordings = self.write()
        if not args.keep_parts:
            self.parts.remove()
        seconds, elapsed = sum(recording.seconds for recording in recordings), time.perf_counter() - started
        there = f" ({num_found} were there already)" if num_found else ""
        closing = (
            f"{args.out}: {_count(len(self.sections), 'chapter')}, {_count(len(self.sentences), 'sentence')}{there}, "
            f"{seconds:.2f} s of audio in {elapsed:.2f} s, on {self.generator.device}, seed {self.settings.seed}"
        )
        return "\n".join([closing, *([f"metrics: {metrics}"] if args.metrics else []), *listing])

    def generate(self) -> tuple[list[str], int, GenerationMetrics]:
        """Generate the sentences that are missing.

        Returns a line for each rejected one, how many were there, and the metrics of the others.
        """
        lengths = {sentence.key: len(sentence.line.text) for sentence in self.sentences}
        there = {key for key in lengths if key in self.parts}
        bar = tqdm(
            total=sum(lengths.values()),
            initial=sum(lengths[key] for key in there),
            desc=self.book.title[:30],
            disable=True if self.args.quiet else None,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
        )
        listing = []

        def done(sentence: Sentence, take: Take, found: bool) -> None:
            if take.rejections:
                listing.append(rejection_line(self.sections, sentence, take))
            if not found:
                bar.update(len(sentence.line.text))

        started = time.perf_counter()
        with bar:
            parts = self.reader.generate(self.sentences, done)
        metrics = combined(parts, time.perf_counter() - started)
        return listing, sum(sentence.key in there for sentence in self.sentences), metrics

    def write(self) -> list[Recording]:
        """The audio files and the subtitles."""
        sound = Sound(self.args.speed, self.args.loudness, self.args.chapter_pause, words=self.args.json is not None)
        binder = Binder(self.generator, self.sections, self.sentences, sound, self.watermark)
        tags = {"title": self.book.title, "album": self.book.title}
        if self.book.author:
            tags["artist"] = self.book.author
        everything: Sequence[Sequence[int]] = [range(len(self.sections))]
        if self.target.folder is not None:
            self.target.folder.mkdir(exist_ok=True)
            everything = [[number] for number in range(len(self.sections))]
        recordings = []
        for file, numbers in zip(self.target.files, everything, strict=True):
            names = {"title": self.sections[numbers[0]].title} if self.target.folder is not None else {}
            recording = binder.write(file, numbers, self.parts, {**tags, **names})
            self.write_subtitles(recording)
            recordings.append(recording)
        return recordings

    def write_subtitles(self, recording: Recording) -> None:
        """The files of --srt, --vtt and --json for one audio file."""
        for kind, convert in SUBTITLES.items():
            asked = getattr(self.args, kind)
            if asked is None:
                continue
            text = convert(recording.cues)
            if kind == "json":
                values = {
                    "title": self.book.title,
                    "author": self.book.author,
                    "chapters": [asdict(mark) for mark in recording.marks],
                    "sentences": [cue_values(cue) for cue in recording.cues],
                }
                text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            write_text(self.target.subtitles(asked, recording.path, kind), text)


def rejection_line(sections: Sequence[Section], sentence: Sentence, take: Take) -> str:
    """What the guards did to a sentence."""
    guards = ", ".join(take.rejections)
    outcome = "the best take was kept" if take.kept else "the next take is good"
    return f"rejected ({guards}; {outcome}): {sections[sentence.section].title[:30]}: {sentence.line.written[:60]!r}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
