"""Books: chapters of texts and EPUBs, damaged and hostile files, resuming, files with chapters, subtitles."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_script import some_voice

import csm.__main__
import generate
from csm.audio_file import SUFFIXES, ChapterMark, EncodedWriter, open_writer
from csm.book import BookError, Parts, Section, Settings, Take, parse_text, plan, read_book
from csm.book.recording import Reader
from csm.errors import AudioError
from csm.guards import GuardEvent
from csm.joins import Level, join, loudness
from csm.kernels import native
from csm.metrics import GenerationMetrics
from csm.script import Line, entries, parse_script
from csm.text import Pause, normalize
from csm.voices import save_voice, voices_folder
from csm.weights.recipe.sentences import sentences
from noise import NOISE

ROOT = Path(generate.__file__).parent
RATE = 24_000
SHORT = ["--model", NOISE, "--max-seconds", "0.4", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Voices of the test's own, in an empty folder; the C++ ops are compiled into the user's."""
    native.library()
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def read(*arguments):
    """Run ``csm read`` with the checkpoint of random weights."""
    return csm.__main__.main(["read", *arguments, *SHORT])


def chapters(book):
    return [(chapter.title, " ".join(chapter.text.split())) for chapter in book.chapters]


# Texts


def test_chapters_of_a_plain_text():
    text = "By A. Nonym.\n\nChapter 1\n\nOne.\nChapter 2 is next.\n\nCHAPTER II. The Fox\n\nTwo.\n\nEpilogue\n\nEnd."
    assert chapters(parse_text(text, "story", "story.txt")) == [
        ("story", "By A. Nonym."),
        ("Chapter 1", "Chapter 1 One. Chapter 2 is next."),
        ("CHAPTER II. The Fox", "CHAPTER II. The Fox Two."),
        ("Epilogue", "Epilogue End."),
    ]
    with pytest.raises(BookError, match=r"s: there is no text"):
        parse_text("", "s", "s")
    assert chapters(parse_text("No heading. Part of it.", "s", "s")) == [("s", "No heading. Part of it.")]


def test_chapters_of_markdown():
    text = "# A book\n\n## One\n\nText.\n\n```\n# code\n```\n\n### Not a chapter\n\nMore.\n\n## *Two* ##\n\nEnd."
    book = parse_text(text, "file", "file.md", markdown=True)
    assert (book.title, [chapter.title for chapter in book.chapters]) == ("A book", ["One", "Two"])
    assert book.chapters[0].text.startswith("# A book\n\n## One")
    assert "Not a chapter" in book.chapters[0].text
    book = parse_text("One\n===\n\nText.\n\nTwo\n===\n\nMore.", "file", "file.md", markdown=True)
    assert (book.title, [chapter.title for chapter in book.chapters]) == ("file", ["One", "Two"])


# EPUBs

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
)
PACKAGE = """<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata
 xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A Fox</dc:title><dc:creator>Ann Other</dc:creator></metadata>
<manifest>{items}</manifest><spine>{spine}</spine></package>"""
NAV = """<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><body>
<nav epub:type="toc"><ol>{links}</ol></nav><nav epub:type="landmarks"><ol><li><a href="x.xhtml">x</a></li></ol></nav>
</body></html>"""
NCX = """<?xml version="1.0"?><!DOCTYPE ncx PUBLIC "-//NISO//DTD ncx 2005-1//EN" "ncx.dtd">
<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap><navPoint><navLabel><text>First</text></navLabel>
<content src="text/a%20b.xhtml"/><navPoint><navLabel><text>Inner</text></navLabel><content src="text/a%20b.xhtml#x"/>
</navPoint></navPoint><navPoint><navLabel><text>Second</text></navLabel><content src="c.xhtml#two"/></navPoint>
</navMap></ncx>"""
FIRST = """<?xml version="1.0" encoding="utf-8"?><!DOCTYPE html><html><head><title>no</title><style>p {}</style></head>
<body><section><h1>The  first</h1><p>Caf&eacute; &amp; tea.<sup><a epub:type="noteref" href="#n">1</a></sup></p>
<p>Line<br/>break.</p><script>no()</script><aside epub:type="footnote" id="n"><p>A note.</p></aside>
<p>Unclosed.<table><tr><td>Two</td><td>cells.</td></tr></table><p>Last.</body></html>"""
SECOND = "<html><body><p>Still the first.</p><h2 id='two'>The second</h2><p>End.</p></body></html>"


def write_epub(path, files=None, **changes):
    """An EPUB of two documents; ``changes`` replace parts of it. A value of None leaves a member out."""
    items = '<item id="a" href="text/a%20b.xhtml" media-type="application/xhtml+xml"/>'
    items += '<item id="c" href="c.xhtml" media-type="application/xhtml+xml"/>'
    items += '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
    items += '<item id="p" href="cover.jpg" media-type="image/jpeg"/>' + changes.get("items", "")
    spine = changes.get("spine", '<itemref idref="a"/><itemref idref="c"/><itemref idref="p"/><itemref idref="gone"/>')
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/content.opf": PACKAGE.format(items=items, spine=spine),
        "OEBPS/text/a b.xhtml": FIRST,
        "OEBPS/c.xhtml": SECOND,
        "OEBPS/toc.ncx": NCX,
        **(files or {}),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            if text is not None:
                archive.writestr(name, text)
    return path


def test_an_epub_with_an_ncx(tmp_path):
    book = read_book(write_epub(tmp_path / "fox.epub"))
    assert (book.title, book.author) == ("A Fox", "Ann Other")
    assert chapters(book) == [
        ("First", "The first Café & tea. Line break. Unclosed. Two cells. Last. Still the first."),
        ("Second", "The second End."),
    ]


def test_an_epub_with_navigation(tmp_path):
    """EPUB 3's table of contents comes first; the page that holds it is not read out."""
    nav = NAV.format(links='<li><a href="text/a%20b.xhtml">I</a></li><li><a href="c.xhtml">II</a></li>')
    items = '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    path = write_epub(
        tmp_path / "n.epub",
        {"OEBPS/nav.xhtml": nav, "OEBPS/toc.ncx": None},
        items=items,
        spine='<itemref idref="nav"/><itemref idref="a"/><itemref idref="c"/>',
    )
    assert [title for title, _ in chapters(read_book(path))] == ["I", "II"]


def test_tags_that_an_epub_shows_are_text(tmp_path):
    page = "<p>Write <code>&lt;div&gt;</code> or &lt;b class='x'&gt;, if 2 &lt; 3.</p>"
    (chapter,) = read_book(
        write_epub(tmp_path / "n.epub", {"OEBPS/text/a b.xhtml": page, "OEBPS/c.xhtml": ""})
    ).chapters
    assert normalize(chapter.text) == "Write div or b class 'x', if two is less than three."


def test_an_epub_without_contents(tmp_path):
    """Headings begin chapters; a heading right after another one does not."""
    files = {"OEBPS/toc.ncx": None, "OEBPS/c.xhtml": "<h1>Part</h1><h2>Two</h2><p>End.</p>"}
    assert chapters(read_book(write_epub(tmp_path / "h.epub", files))) == [
        ("The first", "The first Café & tea. Line break. Unclosed. Two cells. Last."),
        ("Part", "Part Two End."),
    ]


ENTITIES = '<!DOCTYPE ncx [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><ncx>&b;</ncx>'
ENCRYPTED = (
    '<encryption xmlns="urn:x"><EncryptedData><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"'
    "/></EncryptedData></encryption>"
)
BAD_EPUBS = {
    "a ZIP bomb": ({"OEBPS/c.xhtml": "0" * 40_000_000}, {}, "is a ZIP bomb"),
    "many large documents": ({"OEBPS/c.xhtml": os.urandom(6000).hex() * 3000}, {}, "bomb|more than"),
    "an entity bomb": ({"OEBPS/toc.ncx": ENTITIES}, {}, "declares the entity 'a'"),
    "an entity bomb in UTF-16": ({"OEBPS/toc.ncx": ENTITIES.encode("utf-16")}, {}, "declares the entity 'a'"),
    "a path out of it": ({"META-INF/container.xml": CONTAINER.replace("OEBPS", "../..")}, {}, "leaves the archive"),
    "an absolute path": ({"META-INF/container.xml": CONTAINER.replace("OEBPS", "/etc")}, {}, "leaves the archive"),
    "a document outside": (
        {},
        {"items": '<item id="z" href="../../../etc/x" media-type="x/html"/>', "spine": '<itemref idref="z"/>'},
        "leaves the archive",
    ),
    "contents outside": (
        {"OEBPS/toc.ncx": None},
        {"items": '<item id="z" href="//h/x" media-type="x" properties="nav"/>'},
        "leaves the archive",
    ),
    "no container": ({"META-INF/container.xml": None}, {}, "'META-INF/container.xml' is not in it"),
    "an empty container": ({"META-INF/container.xml": "<container/>"}, {}, "names no package"),
    "no package": ({"OEBPS/content.opf": None}, {}, "'OEBPS/content.opf' is not in it"),
    "no XML": ({"OEBPS/content.opf": "<package"}, {}, "not well-formed XML"),
    "a missing document": ({"OEBPS/c.xhtml": None}, {}, "'OEBPS/c.xhtml' is not in it"),
    "DRM": ({"META-INF/encryption.xml": ENCRYPTED}, {}, "DRM"),
    "no text": ({}, {"spine": ""}, "no text to speak"),
}


@pytest.mark.parametrize("case", BAD_EPUBS)
def test_bad_epubs(case, tmp_path):
    files, changes, message = BAD_EPUBS[case]
    path = write_epub(tmp_path / "bad.epub", files, **changes)
    with pytest.raises(BookError, match=message) as caught:
        read_book(path)
    assert str(caught.value).startswith(str(path)) or "OEBPS" in str(caught.value)


def test_a_header_that_lies_is_found(tmp_path):
    """The sizes in a ZIP's directory are the writer's claim."""
    path = write_epub(tmp_path / "lie.epub", {"OEBPS/c.xhtml": "0" * 40_000_000})
    data = path.read_bytes()
    size = (40_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (1000).to_bytes(4, "little")))
    with pytest.raises(BookError, match="more than|cannot be unpacked"):
        read_book(path)


# Joins


def speech(seconds, scale, seed=0):
    """Noise with the slow envelope of speech."""
    time_N = torch.arange(int(seconds * RATE)) / RATE
    noise_N = torch.randn(time_N.shape, generator=torch.Generator().manual_seed(seed))
    return scale * noise_N * (0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * time_N))


def lufs(audio):
    """Integrated loudness by FFmpeg's filter ebur128."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="flt", layout="mono", time_base=Fraction(1, RATE))
    source.link_to(meter := graph.add("ebur128", "metadata=1"))
    meter.link_to(graph.add("abuffersink"))
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.asarray(audio, "float32")[None], "flt", "mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    graph.push(frame)
    graph.push(None)
    values = []
    with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            values.append(graph.pull().metadata.get("lavfi.r128.I"))
    return float([value for value in values if value is not None][-1])  # the last frame may be without


def test_loudness_is_that_of_ffmpeg():
    tone = torch.sin(2 * torch.pi * 997 * torch.arange(2 * RATE) / RATE)
    pauses = torch.cat((speech(2, 0.05), torch.zeros(2 * RATE), speech(1, 0.1, 1)))
    for audio in (tone, tone / 10, speech(3, 0.05), pauses):
        assert loudness(audio, RATE) == pytest.approx(lufs(audio), abs=0.3)
    assert loudness(tone[:2400], RATE) == pytest.approx(-3.01, abs=0.2)
    assert loudness(torch.zeros(RATE), RATE) is None
    assert loudness(torch.zeros(0), RATE) is None


def test_one_loudness():
    level = Level(RATE)
    turns = [level(speech(1.5, scale, seed)) for seed, scale in enumerate((0.05, 0.02, 0.1, 0.05))]
    assert torch.equal(turns[0], speech(1.5, 0.05))
    levels = [lufs(turn) for turn in turns]
    assert max(levels) - min(levels) < 0.3
    assert torch.equal(level(torch.zeros(RATE)), torch.zeros(RATE))
    spike = torch.cat((speech(1, 0.001), torch.tensor([0.9])))
    assert level(spike).abs().max() <= 0.97 + 1e-6
    assert level(speech(1, 1.0)).abs().max() < speech(1, 1.0).abs().max()


@pytest.mark.parametrize("speed", [1.0, 0.8, 1.7])
@pytest.mark.parametrize("leveled", [False, True])
def test_chunked_equals_whole(speed, leveled):
    """For chunks of 1, 2, 3 and 7 frames, through loudness, speed and fades."""
    audio = speech(40 * 0.08, 0.1)
    outputs = []
    for frames in (40, 1, 2, 3, 7):
        level = Level(RATE, -20) if leveled else None
        outputs.append(torch.cat(list(join(audio.split(frames * 1920), RATE, speed, level))))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert outputs[0].shape[0] == pytest.approx(audio.shape[0] / speed, rel=0.02)


# Files


def decoded(path):
    """(samples, rate) of a file, by FFmpeg."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
        rate, planar = container.streams.audio[0].rate, container.streams.audio[0].format.is_planar
    samples = np.concatenate([part[0] if planar else part.reshape(-1) for part in parts])
    return (samples / 32768 if samples.dtype == np.int16 else samples), rate


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format(suffix, tmp_path):
    """Read back by FFmpeg: the length, the tone, the chapters; and twice the same bytes."""
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(3 * RATE) / RATE)
    marks = [ChapterMark("One", 0, 1.25), ChapterMark("Zwei & drei", 1.25, 3)]
    for name in ("a", "b"):
        with open_writer(tmp_path / f"{name}{suffix}") as writer:
            writer.begin(RATE)
            for chunk in tone.split(1920):
                writer.write(chunk)
            if suffix not in (".wav", ".ogg"):
                writer.describe(marks, {"title": "A fox"})
            elif suffix == ".ogg":
                writer.describe((), {"title": "A fox"})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    samples, rate = decoded(tmp_path / f"a{suffix}")
    assert len(samples) / rate == pytest.approx(3, abs=0.05)
    middle = samples[rate : rate + rate // 2]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == pytest.approx(220, abs=1)
    with av.open(str(tmp_path / f"a{suffix}")) as container:
        found = container.chapters()
    if suffix not in (".wav", ".ogg"):
        times = [float(part[key] * part["time_base"]) for part in found for key in ("start", "end")]
        assert times == pytest.approx([0, 1.25, 1.25, 3], abs=0.01)
        assert [part["metadata"]["title"] for part in found] == ["One", "Zwei & drei"]


def test_a_file_that_fails_leaves_nothing(tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(KeyError), open_writer(tmp_path / f"x{suffix}") as writer:
            writer.begin(RATE)
            writer.write(torch.zeros(1920))
            raise KeyError
    assert not list(tmp_path.iterdir())
    with pytest.raises(AudioError, match="no audio format is called '.txt'"):
        open_writer(tmp_path / "x.txt")


# Plans and guards


def a_plan(texts, settings, model="m"):
    sections = [Section(str(number), tuple(Line(0, text, text) for text in part)) for number, part in enumerate(texts)]
    return plan(sections, {0: 0}, settings, model)


def test_a_change_affects_what_continues_it():
    """Of two chapters, a change in the second sentence of the first one changes that one and the next."""
    texts = [["A.", "B.", "C."], ["D.", "E."]]
    keys = [sentence.key for sentence in a_plan(texts, Settings())]
    changed = [sentence.key for sentence in a_plan([["A.", "X.", "C."], ["D.", "E."]], Settings())]
    assert [one == two for one, two in zip(keys, changed, strict=True)] == [True, False, False, True, True]
    running = Settings(restart=False)
    assert a_plan(texts, running)[3].context == (2,)
    for other in (replace(Settings(), seed=1), replace(Settings(), temperature=0.5), replace(Settings(), topk=9)):
        assert not set(keys) & {sentence.key for sentence in a_plan(texts, other)}
    assert not set(keys) & {sentence.key for sentence in a_plan(texts, Settings(), "another model")}


class Frames(list):
    """In place of a stream: every take needs 2 s, and its first frame half of one."""

    metrics = GenerationMetrics(audio_seconds=99.0, elapsed_seconds=2.0, first_audio_seconds=0.5)


class FailingGenerator:
    """Gives takes in order: each a number of frames, and the guard that ended it."""

    frame_ms = 80.0

    def __init__(self, takes, config):
        self.takes, self.config, self.seeds = iter(takes), config, []

    def room_ms(self, request):
        return 1e6

    def stream_frames(self, request, guards, hold):
        num_frames, guard = next(self.takes)
        self.seeds.append(request.seed)
        assert hold and request.repeatable and guards.retries == 0
        if guard:
            guards.report(GuardEvent(guard, num_frames, request.seed, request.text))
        return Frames([csm.engine.Frame(torch.full((8,), num_frames), None)] * num_frames)


@pytest.mark.parametrize(
    ("takes", "rejections", "kept", "frames"),
    [
        ([(9, None)], (), False, 9),
        ([(0, None), (50, "budget"), (8, None)], ("short", "budget"), False, 8),
        ([(50, "budget"), (40, "repeats"), (30, "silence")], ("budget", "repeats", "silence"), True, 30),
        ([(1, None), (2, None), (0, None)], ("short", "short", "short"), True, 2),
        ([(0, None)] * 3, ("short",) * 3, True, 0),
    ],
)
def test_rejected_sentences_are_spoken_again(noisy, tmp_path, takes, rejections, kept, frames):
    generator = FailingGenerator(takes, noisy.config)
    sentences = a_plan([["A sentence with a good number of letters."]], Settings())
    done = []
    parts = Parts(tmp_path)
    reader = Reader(generator, [], Settings(), parts)
    (metrics,) = reader.generate(sentences, lambda *values: done.append(values))
    assert metrics.audio_seconds == pytest.approx(0.08 * frames)
    assert (metrics.elapsed_seconds, metrics.first_audio_seconds) == (2 * len(takes), 2 * len(takes) - 1.5)
    assert (metrics.retries, metrics.evictions) == (len(takes) - 1, 0)
    assert reader.generate(sentences, lambda *_: None) == []
    (_, take, found), stored = done[0], parts.load(sentences[0].key)
    assert not found
    assert (take.rejections, take.kept, take.codes_TK.shape[0]) == (rejections, kept, frames)
    assert (stored.rejections, stored.kept) == (rejections, kept)
    assert torch.equal(stored.codes_TK, take.codes_TK)
    assert generator.seeds == [sentences[0].seed + attempt for attempt in range(len(takes))]


@pytest.mark.parametrize(
    ("off", "takes", "rejections"),
    [
        ("retry", [(0, None)], ()),
        ("retry", [(50, "budget")], ("budget",)),
        ("all", [(0, None)], ()),
        ("silence", [(0, None), (9, None)], ("short",)),
    ],
)
def test_without_a_guard_a_sentence_is_not_rejected_by_it(noisy, tmp_path, off, takes, rejections):
    settings = Settings(no_guards=(off,))
    generator, parts = FailingGenerator(takes, noisy.config), Parts(tmp_path)
    sentences = a_plan([["A sentence with a good number of letters."]], settings)
    Reader(generator, [], settings, parts).generate(sentences, lambda *_: None)
    assert parts.load(sentences[0].key).rejections == rejections
    assert next(generator.takes, None) is None
    assert sentences[0].key != a_plan([["A sentence with a good number of letters."]], Settings())[0].key


def test_a_damaged_part_is_generated_again(tmp_path):
    parts = Parts(tmp_path)
    parts.save("k", Take(torch.ones(3, 8, dtype=torch.int64)), "text")
    assert parts.load("k").codes_TK.shape == (3, 8)
    (tmp_path / "k.safetensors").write_bytes(b"")
    assert parts.load("k") is None


# The command

BOOK = "# A fox\n\n## One\n\nHello. Yes. [pause 0.5] No.\n\nWell.\n\n## Two\n\nGood. Bye."


def test_a_book_with_chapters_and_subtitles(capsys):
    """Times of sentences and chapters, in every format, as FFmpeg reads them."""
    Path("fox.md").write_text(BOOK)
    assert read("fox.md", "--out", "fox.m4b", "--srt", "--vtt", "--json", "fox.json") == 0
    printed = capsys.readouterr().out
    assert re.match(r"fox\.m4b: 2 chapters, 9 sentences, \d\.\d\d s of audio in .*, seed 0$", printed, re.MULTILINE)
    assert set(os.listdir()) - {"home"} == {"fox.json", "fox.m4b", "fox.md", "fox.srt", "fox.vtt"}
    values = json.loads(Path("fox.json").read_text())
    texts = [sentence["text"] for sentence in values["sentences"]]
    assert texts == ["A fox.", "One.", "Hello.", "Yes.", "No.", "Well.", "Two.", "Good.", "Bye."]
    times = [(sentence["start"], sentence["end"]) for sentence in values["sentences"]]
    assert times[:3] == [(0, 0.4), (pytest.approx(0.8), pytest.approx(1.2)), (pytest.approx(1.6), pytest.approx(2.0))]
    assert times[4][0] - times[3][1] == pytest.approx(0.5)
    assert times[6][0] - times[5][1] == pytest.approx(1.5)  # between chapters
    samples, rate = decoded("fox.m4b")
    assert len(samples) / rate == pytest.approx(times[-1][1], abs=1024 / RATE)
    with av.open("fox.m4b") as container:
        assert container.duration / 1e6 == pytest.approx(times[-1][1], abs=0.002)
        marks = [(part["metadata"]["title"], float(part["end"] * part["time_base"])) for part in container.chapters()]
    assert marks == [("One", pytest.approx(times[6][0])), ("Two", pytest.approx(times[-1][1], abs=0.01))]
    for kind in ("srt", "vtt"):
        assert_subtitles(f"fox.{kind}", texts, times)


def assert_subtitles(path, texts, times):
    """As FFmpeg reads them: the texts, no overlap, the end of the audio."""
    with av.open(path) as container:
        packets = [packet for packet in container.demux() if packet.size]
    found = [(float(p.pts * p.time_base), float((p.pts + p.duration) * p.time_base)) for p in packets]
    assert [bytes(packet).decode() for packet in packets] == texts
    assert np.allclose(found, times, atol=0.001)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(found))


def test_a_folder_of_chapters():
    Path("fox.md").write_text(BOOK)
    assert read("fox.md", "--out", "fox/", "--format", "flac", "--srt") == 0
    assert sorted(os.listdir("fox")) == ["001 One.flac", "001 One.srt", "002 Two.flac", "002 Two.srt"]
    assert read("fox.md", "--out", "fox.flac", "--chapter-pause", "0") == 0
    parts = [decoded(f"fox/{name}")[0] for name in ("001 One.flac", "002 Two.flac")]
    assert np.allclose(np.concatenate(parts), decoded("fox.flac")[0], atol=1e-4)


class Stop(Exception):
    """As a kill would: in the middle of the work."""


def stop(*_):
    raise Stop


@pytest.mark.parametrize("point", ["before the first", "between sentences", "while joining"])
def test_a_stopped_run_resumes_to_the_same_bytes(point, monkeypatch, capsys):
    """Whatever was done, with context across sentences and a voice; the finished sentences are not generated again."""
    save_voice(some_voice("anna", 2), voices_folder() / "anna.safetensors")
    Path("fox.md").write_text(BOOK)
    options = ["--voice", "anna", "--context-turns", "3", "--srt", "--json"]
    assert read("fox.md", "--out", "whole.mp3", *options) == 0
    saved, count = Parts.save, 0

    def save(self, key, take, text):
        nonlocal count
        if count == {"before the first": 0, "between sentences": 5}.get(point):
            raise Stop
        saved(self, key, take, text)
        count += 1

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "save", save)
        if point == "while joining":
            patch.setattr(EncodedWriter, "describe", stop)
        with pytest.raises(Stop):
            read("fox.md", "--out", "again.mp3", *options)
    assert set(os.listdir()) == {"again.mp3.parts", "fox.md", "home", "whole.mp3", "whole.srt", "whole.json"}
    before = count
    capsys.readouterr()
    assert read("fox.md", "--out", "again.mp3", *options) == 0
    there = f"({before} were there already)" if before else "9 sentences, "
    assert there in capsys.readouterr().out
    for suffix in ("mp3", "srt", "json"):
        assert Path(f"again.{suffix}").read_bytes() == Path(f"whole.{suffix}").read_bytes()
    assert not Path("again.mp3.parts").exists()


def test_kept_parts_after_a_change(capsys):
    """A changed sentence, and those that continue it in its chapter, are generated again; nothing else is."""
    Path("fox.md").write_text(BOOK)
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    options = ["--voice", "anna", "--out", "fox.wav", "--keep-parts"]
    assert read("fox.md", *options) == 0
    Path("fox.md").write_text(BOOK.replace("No.", "Never."))
    capsys.readouterr()
    assert read("fox.md", *options, "--speed", "1.1", "--loudness", "-23") == 0
    assert "(7 were there already)" in capsys.readouterr().out
    manifest = json.loads(Path("fox.wav.parts/manifest.json").read_text())
    assert (manifest["format"], manifest["settings"]["seed"]) == ("csm-book-1", 0)


def test_rejected_sentences_are_listed(capsys):
    """0.4 s is too short for so many letters."""
    Path("fox.txt").write_text("Short. This is a sentence of quite a number of letters, too many for so short a time.")
    assert read("fox.txt", "--out", "fox.wav") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("rejected (short, short, short; the best take was kept): fox: 'This is")


def test_two_runs_exclude_each_other(capsys):
    Path("fox.txt").write_text("Hello.")
    with Parts(Path("fox.wav.parts")).locked():
        assert read("fox.txt", "--out", "fox.wav") == 2
    assert "another run is writing" in capsys.readouterr().err
    assert not Path("fox.wav").exists()


def test_a_dialogue_and_its_entries(capsys):
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    Path("talk.txt").write_text("[anna] Hello. [pause 0.25]\nAgain.\n[1] Fine.\n[1] And you?\n")
    assert read("--script", "talk.txt", "--out", "talk.flac") == 0
    assert read("--script", "talk.txt", "--out", "talk/", "--split", "--format", "wav") == 0
    assert sorted(os.listdir("talk")) == ["001 anna.wav", "002 1.wav", "003 1.wav"]
    assert decoded("talk/001 anna.wav")[0].shape == (2 * 9600 + 6000,)
    arguments = ["--script", "talk.txt", *SHORT, "--seed", "1"]
    assert generate.main([*arguments, "--out", "one.wav"]) == 0
    assert generate.main([*arguments, "--split", "flac", "--out", "each"]) == 0
    assert sorted(os.listdir("each")) == ["0001-anna.flac", "0002-1.flac", "0003-1.flac"]
    parts = [decoded(f"each/{name}")[0] for name in sorted(os.listdir("each"))]
    assert np.abs(np.concatenate(parts) - decoded("one.wav")[0]).max() < 1e-4


def test_entries_of_a_script():
    items = parse_script("[pause 1]\n[0] A. [pause 2] B.\nC.\n[0] D.\n[pause 3]")
    groups = [[getattr(item, "text", item) for item in group] for group in entries(items)]
    assert groups == [[Pause(1), "A.", Pause(2), "B.", "C."], ["D.", Pause(3)]]


@pytest.mark.parametrize("suffix", ["mp3", "opus", "m4a"])
def test_generate_by_suffix_and_speed(suffix):
    arguments = ["--text", "Hello. Bye.", *SHORT, "--seed", "1", "--speed", "1.25", "--json", "t.json"]
    assert generate.main([*arguments, "--out", f"out.{suffix}"]) == 0
    samples, rate = decoded(f"out.{suffix}")
    cues = json.loads(Path("t.json").read_text())
    assert cues[-1]["end"] == pytest.approx(0.8 / 1.25, abs=0.05)  # the filter ends a little late, for each sentence
    assert len(samples) / rate == pytest.approx(cues[-1]["end"], abs=0.06)
    words = [word for cue in cues for word in cue["words"]]
    assert [word["text"] for word in words] == ["Hello.", "Bye."]
    assert all(cue["start"] <= cue["words"][0]["start"] <= cue["words"][-1]["end"] <= cue["end"] for cue in cues)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read_back(suffix):
    """A tone of 440 Hz, a second long: 440 cycles. Encoders may add silence."""
    path = Path(f"tone{suffix}")
    with open_writer(path) as writer:
        writer.begin(RATE)
        writer.write(torch.sin(torch.arange(RATE) * 2 * np.pi * 440 / RATE) / 2)
    audio_CN, rate = csm.read_audio(path)
    assert audio_CN.shape[0] == 1 and 1 <= audio_CN.shape[1] / rate < 1.1
    middle = audio_CN[0, round(0.2 * rate) : round(0.8 * rate)]
    rises = ((middle[:-1] < 0) & (middle[1:] >= 0)).sum()
    assert abs(int(rises) - 0.6 * 440) <= 1 and 0.4 < middle.max() < 0.6


# Bad inputs


def write(name, data):
    return lambda: Path(name).write_bytes(data)


BAD = {
    "no book": (["--out", "x.wav"], "give a book", None),
    "book and script": (["b.txt", "--script", "s.txt", "--out", "x.wav"], "give a book", None),
    "no output": (["b.txt"], "--out", write("b.txt", b"Hi.")),
    "no such file": (["b.txt", "--out", "x.wav"], "b.txt: no such file", None),
    "a folder": (["home.txt", "--out", "x.wav"], "no such file", lambda: Path("home.txt").mkdir()),
    "an unknown kind": (["b.pdf", "--out", "x.wav"], "must end in .txt, .md", write("b.pdf", b"%PDF")),
    "0 bytes": (["b.txt", "--out", "x.wav"], "no text to speak", write("b.txt", b"")),
    "0 bytes of Markdown": (["b.md", "--out", "x.wav"], "no text to speak", write("b.md", b"")),
    "a 0-byte EPUB": (["b.epub", "--out", "x.wav"], "not an EPUB", write("b.epub", b"")),
    "a ZIP bomb": (
        ["b.epub", "--out", "x.wav"],
        "ZIP bomb",
        lambda: write_epub(Path("b.epub"), {"OEBPS/c.xhtml": "0" * 40_000_000}),
    ),
    "an entity bomb": (
        ["b.epub", "--out", "x.wav"],
        "declares the entity",
        lambda: write_epub(Path("b.epub"), {"OEBPS/toc.ncx": ENTITIES}),
    ),
    "no text": (["b.txt", "--out", "x.wav"], "no text", write("b.txt", b"\n***\n")),
    "another encoding": (["b.txt", "--out", "x.wav"], "cannot be read as UTF-8", write("b.txt", b"caf\xe9")),
    "a bad pause": (["b.txt", "--out", "x.wav"], "b.txt: 'b': .pause 99", write("b.txt", b"Hi. [pause 99]")),
    "a wrong suffix": (["b.txt", "--out", "x.avi"], "no audio format is called '.avi'", write("b.txt", b"Hi.")),
    "no such folder": (["b.txt", "--out", "no/x.wav"], "there is no folder", write("b.txt", b"Hi.")),
    "a file for a folder": (["b.txt", "--out", "b.txt", "--split"], "is a file", write("b.txt", b"Hi.")),
    "an unknown voice": (["b.txt", "--voice", "zoe", "--out", "x.wav"], "no voice is called", write("b.txt", b"Hi.")),
    "a voice with ../": (["b.txt", "--voice", "../z", "--out", "x.wav"], "at most 64", write("b.txt", b"Hi.")),
    "an unknown voice in a script": (
        ["--script", "s.txt", "--out", "x.wav"],
        "no voice is called 'zoe'",
        write("s.txt", b"[0] Hi.\n[zoe] Hi."),
    ),
    "a script of nobody": (["--script", "s.txt", "--out", "x.wav"], "line 1: nobody", write("s.txt", b"Hi.")),
    "an empty script": (["--script", "s.txt", "--out", "x.wav"], "no text to speak", write("s.txt", b"")),
    "a speed of 0": (["b.txt", "--speed", "0", "--out", "x.wav"], "speed must be from 0.25", write("b.txt", b"Hi.")),
    "a loudness of 3": (["b.txt", "--loudness", "3", "--out", "x.wav"], "must be from -40", write("b.txt", b"Hi.")),
    "a pause of -1": (["b.txt", "--chapter-pause", "-1", "--out", "x.wav"], "from 0 to 60", write("b.txt", b"Hi.")),
    "a temperature of -1": (["b.txt", "--temperature", "-1", "--out", "x.wav"], "temperature", write("b.txt", b"Hi.")),
    "subtitles of a folder": (["b.txt", "--srt", "x.srt", "--out", "x/"], "takes no file", write("b.txt", b"Hi.")),
    "subtitles in no folder": (["b.txt", "--vtt", "n/x", "--out", "x.wav"], "cannot be written", write("b.txt", b"H.")),
    "something in the way": (
        ["b.txt", "--out", "x.wav"],
        "is in the way",
        lambda: (write("b.txt", b"Hi.")(), write("x.wav.parts", b"")()),
    ),
    "a folder in the way": (
        ["b.txt", "--out", "x.wav"],
        "is in the way",
        lambda: (write("b.txt", b"Hi.")(), Path("x.wav.parts").mkdir(), write("x.wav.parts/mine.txt", b"Hi.")()),
    ),
    "retries 99": (["b.txt", "--out", "x.wav", "--retries", "99"], "from 0 to 20", write("b.txt", b"Hi.")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case, tmp_path, capsys):
    arguments, message, make = BAD[case]
    if make is not None:
        make()
    before = sorted(tmp_path.rglob("*"))
    assert read(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err)
    assert len(printed.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "Hi.", "--out", "x.avi"], "no audio format is called"),
        (["--text", "Hi.", "--speed", "9"], "speed must be from"),
        (["--text", "Hi.", "--split"], "--split writes a file for each entry"),
        (["--script", "s.txt", "--split", "--out", "s.txt"], "--split needs a folder"),
        (["--script", "s.txt", "--split", "xyz"], "invalid choice"),
    ],
)
def test_bad_inputs_of_generate(arguments, message, tmp_path, capsys):
    Path("s.txt").write_text("[0] Hi.")
    before = sorted(tmp_path.rglob("*"))
    assert generate.main([*SHORT, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["av", "soundfile"])
def test_without_the_packages(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    Path("b.txt").write_text("Hi.")
    assert read("b.txt", "--out", {"av": "b.m4b", "soundfile": "b.mp3"}[package]) == 2
    name = {"av": "PyAV: pip install av", "soundfile": "soundfile: pip install soundfile"}[package]
    assert name in capsys.readouterr().err


def guide(language):
    text = (ROOT / "docs" / "books.md").read_text().replace("\\\n", " ").replace("sesame/csm-1b", NOISE)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def test_the_guide(monkeypatch):
    """Every command of docs/books.md."""
    whole = csm.Generator._request
    short = lambda self, speech, audio=True: whole(self, replace(speech, max_audio_length_ms=160), audio)  # noqa: E731
    monkeypatch.setattr(csm.Generator, "_request", short)
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    write_epub(Path("fox.epub"))
    Path("talk.txt").write_text(guide("text")[0])
    Path("notes.md").write_text(BOOK)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello. Bye."))
    commands = [shlex.split(line) for block in guide("sh") for line in block.splitlines()]
    assert len(commands) >= 4
    for _, program, *arguments in commands:
        code = generate.main(arguments) if program == "generate.py" else csm.__main__.main(arguments[1:])
        assert code == 0, arguments
    assert {"fox.m4b", "fox.srt", "notes", "talk"} <= set(os.listdir())


# With the embedded voice, and a process that is killed

TINY = [sys.executable, "-m", "csm", "read", "-", "--model", "tiny", "--speaker", "1", "--device", "cpu", "--quiet"]


def words(count):
    """Sentences that the embedded voice knows, with at least so many words, in paragraphs."""
    chosen, total = [], 0
    for sentence in sentences("valid", count):
        chosen.append(sentence)
        total += len(sentence.split())
        if total >= count:
            break
    return "\n\n".join(" ".join(chosen[start : start + 8]) for start in range(0, len(chosen), 8))


def read_aloud(text, out, kill_after=None):
    """Run ``csm read -`` in a process, killed after so many sentences. Returns its memory in MiB, each half second."""
    Path("text.txt").write_text(text)
    memory, folder = [], Path(f"{out}.parts")
    with open("text.txt") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        del environment["CSM_HOME"]  # the compiled ops are in the user's folder
        process = subprocess.Popen([*TINY, "--json", "--srt", "--out", out], stdin=file, env=environment)
    while process.poll() is None:
        time.sleep(0.5)
        num_done = len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0
        if kill_after is not None and num_done >= kill_after:
            process.send_signal(signal.SIGKILL)
            kill_after = None
        with contextlib.suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            memory += [pages * os.sysconf("SC_PAGE_SIZE") / 2**20] if num_done > 8 else []
    return process.returncode, memory


def assert_one_piece(out):
    """No step at a join is larger than the signal's own, and every sentence has the loudness of the first."""
    samples = decoded(out)[0]
    cues = json.loads(Path(out).with_suffix(".json").read_text())["sentences"]
    assert cues[-1]["end"] == pytest.approx(len(samples) / RATE, abs=1e-4)
    assert all(one["end"] <= two["start"] for one, two in itertools.pairwise(cues))
    steps = np.abs(np.diff(samples))
    joins = [round(cue[key] * RATE) for cue in cues for key in ("start", "end")]
    at_joins = [steps[max(0, join - 2) : join + 2].max() for join in joins if join < len(samples)]
    assert max(at_joins) < 0.1 * steps.max()
    bounds = [(round(cue["start"] * RATE), round(cue["end"] * RATE)) for cue in cues if cue["end"] - cue["start"] > 1]
    levels = [lufs(samples[start:end]) for start, end in bounds]
    assert max(levels) - min(levels) < 1
    assert abs(levels[0] - levels[-1]) < 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, 3000])
def test_a_killed_process_resumes_to_the_same_bytes(count):
    """SIGKILL half-way: nothing under the final name; the second run ends with the bytes of an unbroken one."""
    text = words(count)
    code, _ = read_aloud(text, "killed.flac", kill_after=count // 14)
    assert code == -signal.SIGKILL
    assert not Path("killed.flac").exists()
    assert read_aloud(text, "killed.flac")[0] == 0
    code, memory = read_aloud(text, "whole.flac")
    assert code == 0
    assert Path("killed.flac").read_bytes() == Path("whole.flac").read_bytes()
    assert Path("killed.srt").read_bytes() == Path("whole.srt").read_bytes()
    assert_one_piece("whole.flac")
    assert count < 1000 or max(memory) - memory[len(memory) // 4] < 64, memory[:: len(memory) // 20]
