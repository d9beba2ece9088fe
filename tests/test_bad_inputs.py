"""Every command on bad inputs: exit code 2, one line on stderr that names the fault, and nothing changed on disk.

Each command and each action of ``csm voice`` has at least 25, which differ in what is said of them. ``tests/faults.py``
makes the damaged files. ``tests/test_cli.py`` has more for generate.py alone, ``tests/test_batch.py`` those of lines.
"""

import argparse
import hashlib
import os
import re
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
from faults import (
    ANNA,
    AUDIO,
    CHECKPOINTS,
    HOME,
    LOADED,
    NAMES,
    OUTPUTS,
    SAMPLES,
    UNKNOWN,
    VOICES,
    bytes_file,
    dangling_link,
    folder,
    link_to,
    manifest,
    model,
    no_samples,
    recording,
    text_file,
    voice_file,
    zip_file,
)

import generate
from csm.__main__ import COMMANDS, main
from csm.bench import command as bench
from csm.kernels import native
from micro import write_config
from noise import NOISE

LEAST = 25  # bad inputs of a command
NAMED = "at most 64 letters"


def options(base, rows):
    """Rows that add arguments to a command line that is right."""
    return [([*base, *args], message, made) for args, message, made in rows]


def models(base, made, checkpoints=LOADED):
    """A command with each model that cannot be loaded. What ``made`` has is made too."""
    return [([*base, "--model", name], message, made | more) for name, message, more in checkpoints]


def outputs(base, made):
    """A command that writes a file of audio, with each name that cannot be one."""
    return [([*base, "--out", name], message, made | more) for name, message, more in OUTPUTS]


def recordings(base, made=None):
    """A command that reads ref.wav, with each file that is no recording."""
    return [(base, message, (made or {}) | more) for message, more in AUDIO + SAMPLES]


WAV = {"ref.wav": recording()}
REF = ["--ref", "ref.wav", "--ref-text", "La la."]
ON_CPU = ["--model", NOISE, "--device", "cpu"]
QUICK = [*ON_CPU, "--quiet", "--max-seconds", "0.4"]
DEVICES = [
    (["--device", "abacus"], "no device is called 'abacus'", {}),
    (["--device", "cuda:77"], "cuda:77", {}),
    (["--device", "meta"], "of a kind that is not supported", {}),
]

SAMPLING = [
    (["--seed", "-1"], "seed", {}),
    (["--seed", "x"], "--seed: invalid int", {}),
    (["--seed", str(2**64)], "seed must be .*18446744073709551616|seed.*18446744073709551616", {}),
    (["--temperature", "nan"], "temperature .* not nan|temperature.*nan", {}),
    (["--temperature", "-1"], "temperature.*-1", {}),
    (["--top-k", "0"], "top-k must be a whole number of at least 1", {}),
    (["--top-k", "10000"], "top-k must be at most", {}),
    (["--max-seconds", "0"], "0.08|at least one frame", {}),
    (["--max-seconds", "nan"], "max.*nan|limit.*nan", {}),
]
# Of a model that is asked for in a way that cannot be.
LOADING = [
    *DEVICES,
    (["--dtype", "int3"], "--dtype: invalid choice", {}),
    (["--quantize", "int3"], "quantisation 'int3'", {}),
    (["--quantize", "nose=int4"], "nose", {}),
    (["--lora", "adapter"], "adapter_config.json: cannot read", {}),
    (["--lora", "adapter", "--quantize", "int8"], "either lora or quantize", {"adapter": folder}),
    (["--codec", "ref.wav"], "ref.wav: .*truncated|ref.wav: .*corrupt", WAV),
    (["--codec", "gone"], "gone: no such file|gone", {}),
    (["--tokenizer", "tokenizer.json"], "a tokenizer is given for a GGUF file only", {}),
    (["--threads", "0"], "threads must be", {}),
    (["--threads", "many"], "--threads: invalid int", {}),
]
VOICED = [
    (["--voice", "nobody"], UNKNOWN, {}),
    (["--voice", "../anna"], NAMED, ANNA),
    (["--voice", "anna"], "made for another model: .*4", {HOME: voice_file(num_codebooks=4)}),
    (
        ["--voice", "anna"],
        "made for another model: .*255",
        {HOME: voice_file(largest=2048)},
    ),
    (["--voice", "anna"], "positions", {HOME: voice_file(frames=2100)}),
    (["--voice", "anna", *REF], "exclude each other", ANNA | WAV),
    *((["--voice", "anna"], message, {HOME: make}) for message, make in VOICES[:4]),
    (["--ref", "ref.wav"], "--ref and --ref-text go together", WAV),
    (["--ref-text", "La."], "--ref and --ref-text go together", {}),
    (["--speaker", "-1", *REF], "speaker", WAV),
    (["--speaker", "x"], "--speaker: invalid int", {}),
    (["--context-turns", "-1"], "context-turns|max_turns", {}),
]
GENERATE = ["generate", *QUICK, "--text", "Hi."]
SCRIPT = ["generate", *QUICK, "--script", "talk.txt"]
TALK = {"talk.txt": text_file("[0] Hello.")}
GENERATE_ROWS = [
    *options(GENERATE, SAMPLING + LOADING + VOICED),
    *recordings([*GENERATE, *REF]),
    *models(GENERATE, {}),
    *outputs(GENERATE, {}),
    *options(
        GENERATE,
        [
            (["--srt", "no/such/a.srt"], "a.srt: cannot be written", {}),
            (["--vtt", "here"], "here: cannot be written", {"here": folder}),
            (["--srt", "a.txt", "--vtt", "a.txt"], "--vtt a.txt: would overwrite a file that is written", {}),
            ([*REF, "--out", "ref.wav"], r"--out ref.wav: would overwrite a file that is read \(--ref\)", WAV),
            ([*REF, "--json", "link"], r"--json link: would overwrite .*\(--ref\)", WAV | {"link": link_to("ref.wav")}),
            (
                ["--tokenizer", "t.json", "--json", "t.json"],
                r"--json t.json: would overwrite .*\(--tokenizer\)",
                {"t.json": text_file("{}")},
            ),
            (
                ["--tokenizer", "t", "--json", "t/tokenizer.json"],
                r"would overwrite .*\(--tokenizer\)",
                {"t/tokenizer.json": text_file("{}")},
            ),
            (["--model", "m", "--json", "m/config.json"], r"would overwrite .*\(--model\)", {"m": model()}),
            (
                ["--model", "m", "--stream-to", "m/model.safetensors"],
                r"--stream-to m/model.safetensors: would overwrite .*\(--model\)",
                {"m": model()},
            ),
            (
                ["--codec", "c.bin", "--srt", "c.bin"],
                r"--srt c.bin: would overwrite .*\(--codec\)",
                {"c.bin": text_file("")},
            ),
            (["--stream-to", "no/such/pipe"], "no/such/pipe: cannot be written", {}),
            (["--stream-format", "mp4"], "--stream-format: invalid choice", {}),
            (["--watermark", "sonic"], "--watermark: invalid choice", {}),
            (["--speed", "0"], "the speed must be", {}),
            (["--speed", "nan"], "the speed must be .* nan", {}),
            (["--split"], "--split writes a file for each entry", {}),
            (["--split", "avi"], "--split: invalid choice", {}),
            (["--text", ""], "there is no text to speak", {}),
            (["--text", "\U0001f600"], "there is no text to speak", {}),
            (["--text", "caf\udce9"], "Unicode", {}),
            (["--text", "word " * 600, "--no-split"], "positions", {}),
            (["--text", "Wait. [pause 0.x] Now."], r"\[pause 0.x\]: write a pause as", {}),
            (["--text", "Wait. [pause 1e9] Now."], r"\[pause 1e9\]: write a pause as", {}),
            (["--text", "Wait. [pause -1] Now."], r"\[pause -1\]: write a pause as", {}),
            (["--text", "Wait. [pause 61] Now."], r"at most 60", {}),
            (["--file", "text.txt"], "not allowed with", {"text.txt": text_file("Hi.")}),
            (["a", "b\nc"], "unrecognized arguments: a b c", {}),
            (["--colour", "\x1b[31mred"], r"unrecognized arguments: --colour \\x1b\[31mred", {}),
        ],
    ),
    *options(
        SCRIPT,
        [
            (
                ["--split", "--out", "talk", "--ref", "talk/0001-0.wav", "--ref-text", "La la."],
                r"--split talk/0001-0.wav: would overwrite a file that is read \(--ref\)",
                TALK | {"talk/0001-0.wav": recording()},
            ),
            (["--srt", "talk.txt"], r"--srt talk.txt: would overwrite a file that is read \(--script\)", TALK),
            ([], "talk.txt: cannot be read as text: .*No such file", {}),
            ([], "talk.txt: cannot be read as text: .*Is a directory", {"talk.txt": folder}),
            ([], "talk.txt: cannot be read as text: .*decode", {"talk.txt": bytes_file(b"\xff\xfe\xfa")}),
            ([], "nobody speaks it", {"talk.txt": text_file("Hello.")}),
            ([], UNKNOWN, {"talk.txt": text_file("[nobody] Hello.")}),
            ([], NAMED, {"talk.txt": text_file("[../x] Hello.")}),
            ([], NAMED, {"talk.txt": text_file("[an\0na] Hello.")}),
            ([], "line 2", {"talk.txt": text_file("[0] Hello.\n[pause 1 x]")}),
            ([], "no text", {"talk.txt": text_file("# a comment\n[0]")}),
            (
                ["--split", "wav", "--out", "here"],
                "here: --split needs a folder",
                {"talk.txt": text_file("[0] Hello."), "here": text_file("")},
            ),
        ],
    ),
]


def bomb(path):
    """An EPUB whose package unpacks to 64 MB."""
    container = "<container><rootfiles><rootfile full-path='a.opf'/></rootfiles></container>"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("a.opf", bytes(64 << 20))


def epub(container="<c><rootfile full-path='a.opf'/></c>", **members):
    """An EPUB with this container.xml and other members."""

    def make(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("META-INF/container.xml", container)
            for name, text in members.items():
                archive.writestr(name.replace("_", "."), text)

    return make


BOOK = {"book.txt": text_file("Hello there.\n")}
READ = ["read", *QUICK, "--out", "a.wav", "book.txt"]
EPUB = ["read", *QUICK, "--out", "a.wav", "book.epub"]
READ_ROWS = [
    (["read"], "--out", {}),
    (["read", "--out", "a.wav"], "give a book, or a dialogue", {}),
    ([*READ, "--script", "talk.txt"], "give a book, or a dialogue", BOOK),
    (["read", "book.pdf", "--out", "a.wav"], "a book must end in", {"book.pdf": bytes_file(b"%PDF-1.7")}),
    (READ, "book.txt: no such file", {}),
    (READ, "book.txt: no such file", {"book.txt": folder}),
    (READ, "book.txt: cannot be read as UTF-8 text", {"book.txt": bytes_file(b"\xff\xfe\xfa")}),
    (READ, "book.txt: there is no text to speak", {"book.txt": bytes_file(b"")}),
    (READ, "book.txt: there is no text to speak", {"book.txt": text_file("\U0001f600 ...\n")}),
    (READ, r"'book': \[pause 99\]: write a pause as", {"book.txt": text_file("Wait. [pause 99] Now.")}),
    (["read", "book.md", "--out", "a.wav"], "book.md: no such file", {"book.md": dangling_link}),
    (EPUB, "book.epub: not an EPUB", {"book.epub": bytes_file(b"")}),
    (EPUB, "book.epub: not an EPUB", {"book.epub": text_file("Hello.")}),
    (EPUB, "'META-INF/container.xml' is not in it", {"book.epub": zip_file}),
    (EPUB, "a.opf is a ZIP bomb", {"book.epub": bomb}),
    (EPUB, "not well-formed XML", {"book.epub": epub("<c>")}),
    (EPUB, "names no package", {"book.epub": epub("<c/>")}),
    (EPUB, "leaves the archive", {"book.epub": epub("<c><rootfile full-path='../../a.opf'/></c>")}),
    (
        EPUB,
        "declares the entity",
        {"book.epub": epub("<!DOCTYPE c [<!ENTITY a 'b'>]><c>&a;</c>")},
    ),
    (EPUB, "'a.opf' is not in it", {"book.epub": epub()}),
    (EPUB, "there is no text to speak", {"book.epub": epub(a_opf="<package/>")}),
    *options(READ, [(args, message, BOOK | made) for args, message, made in SAMPLING + LOADING + VOICED]),
    *recordings([*READ, *REF], BOOK),
    *models(READ, BOOK, LOADED[::3]),
    ([*READ, "--out", "no/such/a.wav"], "a.wav: cannot be written: there is no folder", BOOK),
    ([*READ, "--out", "/proc/a.wav"], "/proc/a.wav.*: cannot be written", BOOK),
    ([*READ, "--out", "a.avi"], "no audio format is called '.avi'", BOOK),
    ([*READ, "--out", "x" * 300 + ".wav"], "File name too long", BOOK),
    *options(
        READ,
        [
            (["--vtt", "book.txt"], r"--vtt book.txt: would overwrite a file that is read \(the book\)", BOOK),
            ([*REF, "--out", "ref.wav"], r"--out ref.wav: would overwrite .*\(--ref\)", BOOK | WAV),
            (["--srt", "a.txt", "--json", "./a.txt"], "--json a.txt: would overwrite a file that is written", BOOK),
            (["--loudness", "0"], "--loudness must be", BOOK),
            (["--loudness", "nan"], "--loudness must be .* nan", BOOK),
            (["--paragraph-pause", "-1"], "--paragraph-pause must be", BOOK),
            (["--chapter-pause", "1e9"], "--chapter-pause must be", BOOK),
            (["--retries", "99"], "--retries must be", BOOK),
            (["--speed", "9"], "the speed must be", BOOK),
            (["--srt", "no/such/a.srt"], "a.srt: cannot be written", BOOK),
            (["--json", "here"], "here: cannot be written", BOOK | {"here": folder}),
            (["--out", "folder/", "--srt", "a.srt"], "--srt takes no file", BOOK),
            (["--out", "folder/"], "folder: is a file", BOOK | {"folder": text_file("")}),
            (["--out", ""], "has no name", BOOK),
            ([], "a.wav.parts: is in the way", BOOK | {"a.wav.parts": text_file("")}),
            ([], "a.wav.parts: is in the way", BOOK | {"a.wav.parts/theirs.txt": text_file("")}),
            (["--format", "avi"], "--format: invalid choice", BOOK),
            (["--watermark", "sonic"], "--watermark: invalid choice", BOOK),
            (["--colour"], "unrecognized arguments: --colour", BOOK),
        ],
    ),
]
SCRIPTED = ["read", *QUICK, "--out", "a.wav", "--script", "talk.txt"]
READ_ROWS += [
    (SCRIPTED, "talk.txt: cannot be read as text", {}),
    (
        ["read", *QUICK, "--out", "talk.wav", "--script", "talk.json", "--json"],
        "--json talk.json: would overwrite a file that is read",
        {"talk.json": text_file("[0] Hello.")},
    ),
    (SCRIPTED, UNKNOWN, {"talk.txt": text_file("[nobody] Hello.")}),
    (SCRIPTED, "line 1: nobody speaks it", {"talk.txt": text_file("Hello.")}),
    (SCRIPTED, "talk.txt: there is no text to speak", {"talk.txt": text_file("[0]\n")}),
]

ADD = ["voice", "add", "anna", *ON_CPU]
FILE = [*ADD, "--file", "new.safetensors"]
ADD_ROWS = [
    *((["voice", "add", name, *ON_CPU, *REF], NAMED, WAV) for name in NAMES),
    (["voice", "add"], "required: name", {}),
    (ADD, "0 --ref and 0 --ref-text", {}),
    ([*ADD, *REF, "--ref", "ref.wav"], "2 --ref and 1 --ref-text", WAV),
    ([*ADD, *REF, "--ref-text", "More."], "1 --ref and 2 --ref-text", WAV),
    (["voice", "add", "anna", *REF], "--model is missing", WAV),
    *recordings([*ADD, *REF]),
    ([*ADD, *REF], "2048", {"ref.wav": recording(200)}),
    ([*ADD, "--ref", "ref.wav", "--ref-text", " "], "text is empty", WAV),
    ([*ADD, *REF, "--speaker", "-1"], "speaker", WAV),
    ([*ADD, *REF, "--speaker", "x"], "--speaker: invalid int", WAV),
    ([*ADD, *REF], "there is a voice of this name", ANNA | WAV),
    *options([*ADD, *REF], [(args, message, WAV) for args, message, _ in DEVICES]),
    *models(["voice", "add", "anna", "--device", "cpu", *REF], WAV, LOADED[1::3]),
    (FILE, "new.safetensors: cannot be read as a voice", {}),
    *((FILE, message.split("|")[0], {"new.safetensors": make}) for message, make in VOICES),
    ([*FILE, *REF], "goes without", {"new.safetensors": voice_file(), **WAV}),
    (FILE, "cannot be written", {"new.safetensors": voice_file(), "home": text_file("")}),
    ([*ADD, *REF, "--colour"], "unrecognized arguments: --colour", WAV),
]
LIST_ROWS = [
    *models(["voice", "list"], ANNA, CHECKPOINTS),
    (["voice", "list", "--colour"], "unrecognized arguments: --colour", ANNA),
    (["voice", "list", "anna"], "unrecognized arguments: anna", ANNA),
    (["voice", "list", "--model"], "--model: expected one argument", ANNA),
    (["voice", "list", "--tokenizer", "t.json", "--model", NOISE], "a tokenizer is given for a GGUF file only", ANNA),
]
SHOW_ROWS = [
    *((["voice", "show", name], NAMED, ANNA) for name in NAMES),
    *((["voice", "show", "anna"], message, {HOME: make}) for message, make in VOICES),
    *models(["voice", "show", "anna"], ANNA, CHECKPOINTS[::4]),
    (["voice", "show"], "required: name", ANNA),
    (["voice", "show", "nobody"], UNKNOWN, ANNA),
    (["voice", "show", "anna", "bea"], "unrecognized arguments: bea", ANNA),
]
REMOVE = ["voice", "remove"]
NOT_YOURS = "safetensors: no such voice of yours"
REMOVE_ROWS = [
    *(([*REMOVE, name], re.escape(f"not {name!r}"), ANNA) for name in [*NAMES, "\U00020000" * 64, "caf\udce9", "a\0b"]),
    ([*REMOVE, "--", "-anna"], "not '-anna'", ANNA),
    (REMOVE, "required: name", ANNA),
    ([*REMOVE, "nobody"], f"nobody.{NOT_YOURS}", ANNA),
    ([*REMOVE, "ANNA"], f"ANNA.{NOT_YOURS}", ANNA),
    ([*REMOVE, "anna.safetensors"], f"anna.safetensors.{NOT_YOURS}", ANNA),
    ([*REMOVE, "anna"], "anna.safetensors: is a folder", {HOME: folder}),
    ([*REMOVE, "anna"], f"home/voices/anna.{NOT_YOURS}", {"home": text_file("")}),
    ([*REMOVE, "bea", "--model", "m"], f"bea.{NOT_YOURS}", {"m/voices/bea.safetensors": voice_file()}),
    (
        [*REMOVE, "conversational_a", "--model", "m"],
        f"conversational_a.{NOT_YOURS}",
        {"m/prompts/conversational_a.wav": recording()},
    ),
    ([*REMOVE, "anna", "bea"], "unrecognized arguments: bea", ANNA),
    ([*REMOVE, "anna", "--model"], "--model: expected one argument", ANNA),
    ([*REMOVE, "anna", "--device", "cpu"], "unrecognized arguments: --device cpu", ANNA),
    ([*REMOVE, "anna", "--tokenizer", "t.json"], "unrecognized arguments: --tokenizer t.json", ANNA),
    ([*REMOVE, "anna", "--colour"], "unrecognized arguments: --colour", ANNA),
]
EXPORT = ["voice", "export", "anna", "--out", "x.safetensors"]
EXPORT_ROWS = [
    *((["voice", "export", name, *EXPORT[3:]], NAMED, ANNA) for name in NAMES),
    *((EXPORT, message, {HOME: make}) for message, make in VOICES),
    *models(EXPORT, ANNA, CHECKPOINTS[1::4]),
    (["voice", "export", "anna"], "required: --out", ANNA),
    (["voice", "export", "nobody", *EXPORT[3:]], UNKNOWN, ANNA),
    ([*EXPORT[:3], "--out", "x.wav"], "ends in .safetensors", ANNA),
    ([*EXPORT[:3], "--out", "7.safetensors"], NAMED, ANNA),
    ([*EXPORT[:3], "--out", "file/x.safetensors"], "x.safetensors: cannot be written", ANNA | {"file": text_file("")}),
    ([*EXPORT[:3], "--out", "/proc/x.safetensors"], "/proc/x.safetensors: cannot be written", ANNA),
    (EXPORT, "x.safetensors: exists", ANNA | {"x.safetensors": text_file("theirs")}),
    (EXPORT, "x.safetensors: exists", ANNA | {"x.safetensors": folder}),
]
SAY = ["voice", "say", "anna", *ON_CPU, "--text", "Hi."]
SAY_ROWS = [
    *((["voice", "say", name, *SAY[3:]], NAMED, ANNA) for name in NAMES[:3]),
    *((SAY, message, {HOME: make}) for message, make in VOICES[:8]),
    (["voice", "say", "anna"], "required: --text", ANNA),
    (["voice", "say", "anna", "--text", "Hi."], "--model is missing", ANNA),
    (SAY, "no voice is called 'anna'", {}),
    (SAY, "made for another model", {HOME: voice_file(num_codebooks=4)}),
    (SAY, "positions", {HOME: voice_file(frames=2100)}),
    ([*SAY, "--text", " "], "empty", ANNA),
    ([*SAY, "--text", "word " * 600], "positions", ANNA),
    *options(SAY, [(args, message, ANNA) for args, message, _ in SAMPLING if "--t" not in args[0]]),
    *outputs(SAY, ANNA),
    *options(SAY, [(args, message, ANNA) for args, message, _ in DEVICES]),
    *models(SAY, ANNA, LOADED[2::4]),
    ([*SAY, "--watermark", "sonic"], "--watermark: invalid choice", ANNA),
]
VOICE_ROWS = [
    (["voice"], "required: ACTION", {}),
    (["voice", "sing"], "invalid choice: 'sing'", {}),
    *(ADD_ROWS + LIST_ROWS + SHOW_ROWS + SAY_ROWS + REMOVE_ROWS + EXPORT_ROWS),
]

BATCH = ["batch", "in.jsonl", "out", *ON_CPU, "--quiet"]
LINE = {"in.jsonl": manifest({"id": "a", "text": "Hi."})}


def line(**values):
    return {"in.jsonl": manifest({"id": "a", "text": "Hi.", **values})}


BATCH_ROWS = [
    (["batch"], "required: FILE, out", {}),
    (["batch", "in.jsonl"], "required: out", LINE),
    ([*BATCH, "--colour"], "unrecognized arguments: --colour", LINE),
    (BATCH, "in.jsonl: cannot be read as text: .*No such file", {}),
    (BATCH, "in.jsonl: cannot be read as text: .*Is a directory", {"in.jsonl": folder}),
    (BATCH, "in.jsonl: cannot be read as text: .*decode", {"in.jsonl": bytes_file(b"\xff\xfe\xfa")}),
    (BATCH, "the file is empty", {"in.jsonl": text_file("\n\n")}),
    (BATCH, "line 1: not JSON", {"in.jsonl": text_file("Hello.\n")}),
    (BATCH, "line 1: not JSON", {"in.jsonl": text_file("[" * 100_000)}),
    (BATCH, "line 1: not an object", {"in.jsonl": manifest([])}),
    (BATCH, "without a path.*'../a'", line(id="../a")),
    (BATCH, "without a path.*7", line(id=7)),
    (BATCH, "no name of a device; not 'con'", line(id="con")),
    (BATCH, r"without a path.*x00", line(id="a\0b")),
    (BATCH, "text is missing", line(text=None)),
    (BATCH, "nothing to speak", line(text="...")),
    (BATCH, r"\[pause\] is for", line(text="Wait. [pause 1] Now.")),
    (BATCH, "unknown field 'txt'", line(txt="Hi.")),
    (BATCH, "speaker must be", line(speaker=-1)),
    (BATCH, "temperature", line(temperature=float("nan"))),
    (BATCH, "positions", line(text="word " * 600)),
    (BATCH, "top-k must be at most 256", line(top_k=10**9)),
    (BATCH, "seed", line(seed=2**80)),
    (BATCH, "max_seconds must be a number", line(max_seconds="1")),
    (BATCH, UNKNOWN, line(voice="nobody")),
    (BATCH, NAMED, line(voice="../anna")),
    (BATCH, "is no entry of a batch", {**LINE, "out/manifest.jsonl": manifest("nonsense")}),
    (BATCH, "is no entry of a batch: 'key'", {**LINE, "out/manifest.jsonl": manifest({"id": "a", "text": "Theirs."})}),
    (BATCH, "is no manifest of a batch", {**LINE, "out/manifest.jsonl": text_file('["theirs, without an end"]')}),
    (BATCH, "out: cannot be written", {**LINE, "out/manifest.jsonl": folder}),
    (["batch", "out/manifest.jsonl", "out"], "would be overwritten", {"out/manifest.jsonl": manifest({"id": "a"})}),
    (BATCH, "out is not a folder", {**LINE, "out": text_file("")}),
    *options(
        BATCH,
        [
            (["--slots", "0"], "--slots must be .* 0", LINE),
            (["--slots", "9999"], "--slots must be .* 9999", LINE),
            (["--slots", "x"], "--slots: invalid int", LINE),
            (["--ray-workers", "0"], "--ray-workers must be", LINE),
            (["--watermark", "sonic"], "--watermark: invalid choice", LINE),
            *((args, message, LINE) for args, message, _ in SAMPLING if "--t" not in args[0]),
            *((args, message, LINE | made) for args, message, made in LOADING),
        ],
    ),
    *models(BATCH, LINE, LOADED[::4]),
]
WATERMARK = ["watermark", "ref.wav"]
WATERMARK_ROWS = [
    (["watermark"], "required: FILE", {}),
    *recordings(WATERMARK),
    (["watermark", "a.m4a"], "a.m4a: cannot be decoded", {"a.m4a": bytes_file(b"")}),
    (["watermark", "a.m4b"], "a.m4b: cannot be decoded", {"a.m4b": zip_file}),
    (["watermark", "a.aac"], "a.aac: cannot be decoded", {"a.aac": bytes_file(bytes(1000))}),
    (["watermark", "a.opus"], "a.opus: cannot be decoded", {"a.opus": text_file("junk")}),
    (["watermark", "a.webm"], "a.webm: cannot be decoded", {"a.webm": bytes_file(b"\x1a\x45\xdf\xa3")}),
    (["watermark", "a.mp4"], "a.mp4: no such file", {"a.mp4": folder}),
    (["watermark", "a.flac"], "a.flac: cannot be decoded", {"a.flac": bytes_file(b"fLaC")}),
    (["watermark", "a.mp3"], "a.mp3: cannot be decoded", {"a.mp3": bytes_file(b"ID3\3\0\0\0\0\0\0")}),
    (["watermark", "a.ogg"], "a.ogg: cannot be decoded", {"a.ogg": bytes_file(b"OggS")}),
    (["watermark", "no/such.wav"], "no/such.wav: no such file", {}),
    (["watermark", "/dev/null"], "/dev/null: no such file", {}),
    (["watermark", ""], "no such file", {}),
    (["watermark", "pipe.wav"], "pipe.wav: no such file", {"pipe.wav": os.mkfifo}),
    (["watermark", "ref.wav", "--watermark", ""], "--watermark: invalid choice: ''", WAV),
    (["watermark", "ref.wav", "--", "--watermark"], "--watermark: no such file", WAV),
    (["watermark", "x" * 300], "File name too long", {}),
    (["watermark", "a\nb.wav"], "a b.wav: no such file", {}),
    (["watermark", "ref.wav", "gone.wav"], "gone.wav: no such file", WAV),
    (["watermark", "ref.wav", "--watermark", "sonic"], "--watermark: invalid choice", WAV),
    (["watermark", "ref.wav", "--watermark"], "--watermark: expected one argument", WAV),
    (["watermark", "ref.wav", "--colour"], "unrecognized arguments: --colour", WAV),
    (["watermark", "ref.wav", "--device", "cuda"], "unrecognized arguments: --device", WAV),
]
SERVE = ["serve", *ON_CPU, "--port", "0"]
SERVE_ROWS = [
    *options(
        SERVE,
        [
            (["--port", "-1"], "port must be at least 0", {}),
            (["--port", "70000"], "port must be at most", {}),
            (["--port", "x"], "--port: invalid int", {}),
            (["--max-streams", "0"], "max_streams must be", {}),
            (["--max-streams", "x"], "--max-streams: invalid int", {}),
            (["--max-queue", "-1"], "max_queue must be", {}),
            (["--max-seconds", "0"], "max_seconds must be", {}),
            (["--max-seconds", "nan"], "max_seconds must be .* nan", {}),
            (["--request-timeout", "0"], "request_timeout must be", {}),
            (["--request-timeout", "inf"], "request_timeout must be .* inf", {}),
            (["--unload-after", "-1"], "unload_after must be .* -1", {}),
            (["--unload-after", "nan"], "unload_after must be .* nan", {}),
            (["--api-key", " key"], "API key", {}),
            (["--api-key", "schlüssel"], "API key must be printable ASCII", {}),
            (["--api-key-file", "gone"], "gone: API keys cannot be read: .*No such file", {}),
            (["--api-key-file", "keys"], "keys: API keys cannot be read: .*Is a directory", {"keys": folder}),
            (["--api-key-file", "keys"], "keys has no API key", {"keys": text_file("# none\n")}),
            (["--api-key-file", "keys"], "keys: API keys cannot be read: .*decode", {"keys": bytes_file(b"\xff\xfa")}),
            (["--voices", "file"], "file.*cannot be made", {"file": text_file("")}),
            (["--voices", "file/voices"], "file/voices.*cannot be made", {"file": text_file("")}),
            (["--watermark", "sonic"], "--watermark: invalid choice", {}),
            (["--watermark-for", "nobody"], "--watermark-for: invalid choice", {}),
            (["--lora", "adapter"], "adapter", {}),
            (["--tokenizer", "t.json"], "a tokenizer is given for a GGUF file only", {}),
            (["--colour"], "unrecognized arguments: --colour", {}),
            *DEVICES,
        ],
    ),
    *models(SERVE, {}, LOADED[1::4]),
]
QUANTIZE = ["quantize", NOISE, "--quiet", "--out", "out", "--scheme"]
QUANTIZED = {"m": model()}


def first(base, checkpoints=LOADED):
    """A command whose first argument after ``base[0]`` is a model that cannot be loaded."""
    return [([base[0], name, *base[2:]], message, made) for name, message, made in checkpoints]


QUANTIZE_ROWS = [
    (["quantize"], "required: model, --scheme, --out", {}),
    (["quantize", NOISE, "--out", "out"], "required: --scheme", {}),
    (["quantize", NOISE, "--scheme", "int8"], "required: --out", {}),
    ([*QUANTIZE, "int3"], "quantisation 'int3'", {}),
    ([*QUANTIZE, ""], "quantisation ''", {}),
    ([*QUANTIZE, "backbone=int9"], "int9", {}),
    ([*QUANTIZE, "nose=int4"], "nose", {}),
    ([*QUANTIZE, "depth=int4,depth=int8"], "depth", {}),
    ([*QUANTIZE, "int8", "--dtype", "int3"], "--dtype: invalid choice", {}),
    ([*QUANTIZE, "int8", "--colour"], "unrecognized arguments: --colour", {}),
    ([*QUANTIZE, "int8", "--tokenizer", "t.json"], "a tokenizer is given for a GGUF file only", {}),
    ([*QUANTIZE, "int8"], "out: a file of this name exists", {"out": text_file("")}),
    ([*QUANTIZE[:-2], "file/out", "--scheme", "int8"], "file/out", {"file": text_file("")}),
    ([*QUANTIZE[:-2], "/proc/out", "--scheme", "int8"], "/proc/out", {}),
    ([*QUANTIZE[:-2], "a.gguf", "--scheme", "int8"], "a GGUF file can have", {}),
    ([*QUANTIZE, "q8_0"], "is for a GGUF file", {}),
    ([*QUANTIZE[:-2], "file/a.gguf", "--scheme", "q8_0"], "file", {"file": text_file("")}),
    ([*QUANTIZE[:-2], "a.gguf", "--scheme", "q8_0"], "a.gguf", {"a.gguf": folder}),
    (["quantize", "m", "--scheme", "int8", "--out", "./m"], "is the folder of the model that is read", QUANTIZED),
    *first([*QUANTIZE, "int8"], LOADED[::2]),
]
COMPARE = ["compare", "--quiet", NOISE]
COMPARE_ROWS = [
    (["compare"], "required: a", {}),
    ([*COMPARE, "tiny"], "different shapes", {}),
    ([*COMPARE, "--scheme", "int3"], "quantisation 'int3'", {}),
    ([*COMPARE, "--scheme", "nose=int4"], "nose", {}),
    ([*COMPARE, "--scheme", ""], "quantisation ''", {}),
    ([*COMPARE, "--dtype", "int3"], "--dtype: invalid choice", {}),
    ([*COMPARE, "--colour"], "unrecognized arguments: --colour", {}),
    ([*COMPARE, "tiny", "another"], "unrecognized arguments: another", {}),
    ([*COMPARE, "--tokenizer", "t.json"], "--tokenizer is that of a GGUF file", {}),
    *first(["compare", NOISE, "--quiet"]),
    *(([*COMPARE, name], message, made) for name, message, made in LOADED[::9]),
]
DOCTOR_ROWS = [
    (["doctor", *args], f"unrecognized arguments: ?{message}", made)
    for args, message, made in (
        (["--colour"], "--colour", {}),
        (["me"], "me", {}),
        (["--json", "yes"], "yes", {}),
        (["--model", "tiny"], "--model tiny", {}),
        (["--model", "m"], "--model m", {"m": folder}),
        (["--device", "cuda:77"], "--device cuda:77", {}),
        (["--out", "report.json"], "--out report.json", {}),
        (["--threads", "-4"], "--threads -4", {}),
        (["--quiet"], "--quiet", {}),
        ([""], r"\s*$", {}),
        (["../../etc"], "../../etc", {}),
        (["here"], "here", {"here": folder}),
        (["ref.wav"], "ref.wav", WAV),
        (["@args.txt"], "@args.txt", {"args.txt": text_file("--json")}),
        (["x" * 70_000], "xxx", {}),
        (["caf\udce9"], r"caf\\udce9", {}),
        (["a\nb"], "a b$", {}),
        (["a\0b"], r"a\\x00b", {}),
        (["\x1b[31mred"], r"\\x1b\[31mred", {}),
        (["-1"], "-1", {}),
        (["nan"], "nan", {}),
        (["1e999"], "1e999", {}),
        (["-j"], "-j", {}),
        (["--jsonl"], "--jsonl", {}),
        (["https://example.com"], "https://example.com", {}),
        (["generate"], "generate", {}),
        (["%s %d"], "%s %d", {}),
        (["\U0001f600"], "\U0001f600", {}),
        (["--json", "--", "--json"], "-- --json", {}),
    )
]
DOCTOR_ROWS += [(["doctor", "--json=yes"], "--json: ignored explicit argument 'yes'", {})]
EVAL = ["eval", *ON_CPU, "--quiet"]
SENTENCES = {"s.txt": text_file("Good morning.\n")}
OF_DATA = ["eval", "--data", "data.jsonl", "--recordings", "--quiet"]
DATA = {"data.jsonl": manifest({"audio": "ref.wav", "text": "La la.", "speaker": 0}), **WAV}


def clip(**values):
    return {"data.jsonl": manifest({"audio": "ref.wav", "text": "La la.", "speaker": 0, **values}), **WAV}


# What is said of data that cannot be used.
CLIPS = [
    ("data.jsonl", {}),
    ("data.jsonl: the manifest is empty", {"data.jsonl": text_file("")}),
    ("data.jsonl: ", {"data.jsonl": bytes_file(b"\xff\xfe\xfa")}),
    ("data.jsonl:1: .*JSON", {"data.jsonl": text_file("nonsense\n")}),
    ("data.jsonl:1: .*object", {"data.jsonl": manifest([])}),
    ("data.jsonl:1: .*text", clip(text=" ")),
    ("data.jsonl:1: .*speaker", clip(speaker=-1)),
    ("data.jsonl:1: .*speaker", clip(speaker="anna")),
    ("data.jsonl:1: .*colour", clip(colour="red")),
    ("data.jsonl:1: .*order", clip(order=1)),
    ("data.jsonl:1: .*gone.wav", clip(audio="gone.wav")),
    ("data.jsonl:1: .*audio", clip(audio=7)),
    ("data.jsonl:1: .*ref.wav", DATA | {"ref.wav": bytes_file(b"")}),
    ("data.jsonl:1: .*ref.wav", DATA | {"ref.wav": folder}),
    ("ref.wav: is 0.01 s long", DATA | {"ref.wav": recording(0.01)}),
    ("ref.wav: is 0.00 s long", DATA | {"ref.wav": no_samples}),
]
EVAL_ROWS = [
    (["eval"], "required", {}),
    (["eval", "--sentences", "s.txt"], "nothing to evaluate", SENTENCES),
    (["eval", "--sentences", "s.txt", "--data", "d"], "not allowed with", SENTENCES),
    *options(
        [*EVAL, "--sentences"],
        [
            (["gone.txt"], "gone.txt: cannot be read as UTF-8 text .*No such file", {}),
            (["s.txt"], "s.txt: cannot be read as UTF-8 text .*Is a directory", {"s.txt": folder}),
            (["s.txt"], "s.txt: cannot be read as UTF-8 text .*decode", {"s.txt": bytes_file(b"\xff\xfa")}),
            (["s.txt"], "no sentences", {"s.txt": text_file("\n\n")}),
            (["s.txt"], "no word to recognise", {"s.txt": text_file("Good.\n?!\n")}),
        ],
    ),
    *options(
        [*EVAL, "--sentences", "s.txt"],
        [
            (["--recordings"], "need recordings", SENTENCES),
            (["--ref-text", "La."], "give --ref too", SENTENCES),
            (["--seeds", "0"], "--seeds must be", SENTENCES),
            (["--batch", "0"], "--batch must be", SENTENCES),
            (["--limit", "-1"], "--limit must be", SENTENCES),
            (["--limit", "x"], "--limit: invalid int", SENTENCES),
            (["--temperature", "nan"], "temperature", SENTENCES),
            (["--top-k", "0"], "top-k", SENTENCES),
            (["--max-seconds", "nan"], "--max-seconds must be .* nan", SENTENCES),
            (["--out", "file"], "file is not a folder", SENTENCES | {"file": text_file("")}),
            (["--voice", "anna", *REF], "exclude each other", SENTENCES | ANNA | WAV),
            (["--voice", "nobody"], UNKNOWN, SENTENCES),
            (["--voice", "../anna"], NAMED, SENTENCES),
            (["--ref", "ref.wav"], "ref.wav: cannot be decoded", SENTENCES | {"ref.wav": bytes_file(b"")}),
            (["--ref", "ref.wav"], "ref.wav: no such file", SENTENCES),
            (["--quantize", "int3"], "quantisation 'int3'", SENTENCES),
            (["--lora", "adapter"], "adapter", SENTENCES),
            (["--codec-weights", "gone"], "gone", SENTENCES),
            (["--tokenizer", "t.json"], "a tokenizer is given for a GGUF file only", SENTENCES),
            (["--colour"], "unrecognized arguments: --colour", SENTENCES),
            *((args, message, SENTENCES) for args, message, _ in DEVICES),
        ],
    ),
    *models([*EVAL, "--sentences", "s.txt"], SENTENCES, LOADED[::5]),
    (["eval", "--data", "data.jsonl", "--codec", "--quiet"], "--codec needs a model's codec", DATA),
    *((OF_DATA, message, made) for message, made in CLIPS),
]
FINETUNE = ["finetune", *ON_CPU, "--quiet", "--data", "data.jsonl", "--out", "run"]
FINETUNE_ROWS = [
    (["finetune"], "required: --data", {}),
    *((FINETUNE, message, made) for message, made in CLIPS),
    *models(FINETUNE, DATA, LOADED[1::4]),
    *(
        ([*FINETUNE, option, value], f"{option} must be|{option}: invalid|unrecognized arguments: {option}", DATA)
        for option, value in (
            *(("--steps", "0"), ("--batch-size", "x"), ("--batch-rows", "0"), ("--grad-accum-steps", "0")),
            *(("--learning-rate", "nan"), ("--warmup", "-1"), ("--schedule", "zigzag"), ("--min-lr-ratio", "-1")),
            *(("--beta1", "1"), ("--beta2", "-1"), ("--weight-decay", "inf"), ("--depth-share", "2")),
            *(("--code-noise", "1"), ("--precision", "int3"), ("--ema", "1"), ("--keep", "0"), ("--eval-every", "-1")),
            ("--colour", "red"),
        )
    ),
    ([*FINETUNE, "--lora", "--rank", "0"], "rank", DATA),
    ([*FINETUNE, "--lora", "--targets", "nose"], "--targets: invalid choice", DATA),
    ([*FINETUNE, "--lora", "--config", "c.json"], "give only one", DATA | {"c.json": write_config}),
    ([*FINETUNE, "--config", "gone.json"], "gone.json", DATA),
    *options(FINETUNE, [(args, message, DATA) for args, message, _ in DEVICES]),
]
BENCH = ["bench.py", "--quiet"]
TINY_BENCH = [*BENCH, "--model", NOISE, "--device", "cpu"]
BENCH_ROWS = [
    *options(
        BENCH,
        [
            (["--frames", "0"], "--frames must be", {}),
            (["--frames", "1000000000"], "--frames must be within", {}),
            (["--frames", "x"], "--frames: invalid int", {}),
            (["--batch", "0"], "--batch at least 1", {}),
            (["--batch", "x"], "--batch: invalid int", {}),
            (["--batch"], "--batch: expected at least one", {}),
            (["--dtype", "int3"], "--dtype: invalid choice", {}),
            (["--rows", "magic"], "there is no row 'magic'", {}),
            (["--cpu", "--rows", "magic"], "there is no row 'magic'; choose from: transformers", {}),
            (["--predict", "Voodoo 2"], "--predict: invalid choice", {}),
            (["--predict", "h100", "--quantize", "int3"], "int3", {}),
            (["--quantize", "int8"], "--quantize goes with --kernels", {}),
            (["--threads", "2"], "--threads and --busy go with --cpu", {}),
            (["--cpu", "--threads", "0"], "threads are at least 1", {}),
            (["--cpu", "--busy", "-1"], "busy loops at least 0", {}),
            (["--max-seconds", "nan"], "--max-seconds must be .* nan", {}),
            (["--max-seconds", "0"], "--max-seconds must be .* 0", {}),
            (["--seconds", "5"], "--seconds goes with", {}),
            (["--serve", "http://localhost:1", "--clients", "0"], "clients", {}),
            (["--serve", "http://localhost:1", "--seconds", "nan"], "--seconds must be positive, not nan", {}),
            (["--serve", "localhost:8000"], "not 'localhost:8000'", {}),
            (["--serve", "http://[::1"], "http://\\[::1", {}),
            (["--api-key", "x"], "--api-key goes with --serve", {}),
            (["--out", "file", "--count"], "file: --out is a folder", {"file": text_file("")}),
            (["--out", "file/out", "--count"], "file/out: --out is a folder", {"file": text_file("")}),
            (["--count", "--tune"], "--tune is not allowed with --count", {}),
            (["--colour"], "unrecognized arguments: --colour", {}),
            (["here"], "unrecognized arguments: here", {"here": folder}),
            (["--tokenizer", "t.json", "--model", NOISE], "a tokenizer is given for a GGUF file only", {}),
            *DEVICES,
        ],
    ),
    *models([*BENCH, "--device", "cpu"], {}, CHECKPOINTS[2::4]),
]
ROWS = [
    (["--no-such-option"], "required: COMMAND|unrecognized", {}),
    ([], "required: COMMAND", {}),
    (["sing"], "invalid choice: 'sing'", {}),
    *(GENERATE_ROWS + READ_ROWS + VOICE_ROWS + BATCH_ROWS + WATERMARK_ROWS + SERVE_ROWS + QUANTIZE_ROWS),
    *(COMPARE_ROWS + DOCTOR_ROWS + EVAL_ROWS + FINETUNE_ROWS + BENCH_ROWS),
    *((["generate.py", *args[1:]], message, made) for args, message, made in GENERATE_ROWS[::2]),
]
PROGRAMS = {"generate.py": generate.main, "bench.py": bench.main}


def snapshot(root):
    """Every path below, links and times of folders included, with a digest of the files' contents."""
    found = {}
    for path in root.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        contents = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
        found[path.relative_to(root).as_posix()] = os.lstat(path).st_mtime_ns, contents
    return found


def show(row):
    words = [word.replace(str(Path(NOISE)), "NOISE")[:20] for word in row[0]]
    return re.sub(r"[^\w.-]+", " ", " ".join(words))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The C++ ops, compiled into the user's own folder: a test's is empty."""
    native.library()


@pytest.mark.parametrize("row", ROWS, ids=show)
def test_a_bad_input_is_named_and_changes_nothing(row, tmp_path, monkeypatch, capsys):
    args, message, made = row
    if args[:1] == ["serve"]:
        pytest.importorskip("uvicorn", reason="needs the extra serve")
        monkeypatch.setattr("csm.serve.server.Server.run", lambda server: pytest.fail("the server was started"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    for name, make in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make(tmp_path / name)
    before = snapshot(tmp_path)
    program = PROGRAMS.get(args[0] if args else "")
    code = program(args[1:]) if program else main(args)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    if "correct or remove these lines:" not in printed.err:  # of a manifest, every bad line is listed
        assert len(printed.err.splitlines()) == 1, printed.err
    assert "error: " in printed.err and "Traceback" not in printed.err
    assert re.search(message, printed.err), printed.err
    assert snapshot(tmp_path) == before


def commands():
    """Every command as its first words: ``("read",)``, ``("voice", "add")``, ..., ``("bench.py",)``."""
    for name, _, module in COMMANDS:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        yield from ((name, choice) for choice in actions[0].choices) if actions else [(name,)]
    yield from ((program,) for program in PROGRAMS)


def test_every_command_has_25_bad_inputs():
    """Counted are rows that differ in what is said. Another spelling of the same fault does not count."""
    faults = defaultdict(set)
    for args, message, _ in ROWS:
        faults[tuple(args[:2]) if args[:1] == ["voice"] else tuple(args[:1])].add(message)
    numbers = {command: len(faults[command]) for command in commands()}
    assert not {command: number for command, number in numbers.items() if number < LEAST}


def test_numbers_and_choices_are_checked_by_every_parser(monkeypatch, capsys):
    """Whatever option is added: a word in place of a number or of a choice is an error that names the option."""
    for name, _, module in COMMANDS:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = (
            {(name,): parser}
            if not subparsers
            else {(name, action): sub for action, sub in subparsers[0].choices.items()}
        )
        for words, sub in parsers.items():
            for action in sub._actions:
                if action.option_strings and (action.type in (int, float) or action.choices):
                    option = action.option_strings[0]
                    assert main([*words, option, "purple"]) == 2
                    assert option in capsys.readouterr().err
