"""The docs: examples run, with the embedded checkpoint in place of CSM-1B; commands, links and the glossary hold."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sphn
import torch
from test_book import write_epub
from test_structure import LAYERS

import csm
import generate
from csm.__main__ import main, parse_arguments
from csm.bench.command import main as bench_main
from csm.lora import Lora, LoraConfig, save_adapter
from csm.voices import save_voice, voices_folder
from csm.watermark import Watermark
from csm.weights import open_checkpoint
from csm.weights.recipe import recordings
from micro import write_data

ROOT = Path(generate.__file__).parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/tiny/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
HUB_NAME = re.compile(r"(sesame|unsloth)/csm-1b")
FOREIGN = (
    "hf",
    "pip",
    "curl",
    "docker",
    "echo",
    "install",
    "openssl",
    "serve",
)  # programs of other packages that the docs call


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", TEXT[page], flags=re.DOTALL)


@pytest.fixture
def short(monkeypatch, tiny):
    """Limits every request to a quarter of a second, from the embedded checkpoint."""
    whole = csm.Generator._request

    def shortened(self, speech, audio=True):
        return whole(self, replace(speech, max_audio_length_ms=240), audio)

    monkeypatch.setattr(csm.Generator, "_request", shortened)


@pytest.fixture
def with_anna(tmp_path, monkeypatch):
    """A folder with a voice of random codes, a recording, a book and a dialogue."""
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = open_checkpoint("tiny").config
    codes = torch.randint(config.codebook_size, (5, config.num_codebooks))
    save_voice(csm.Voice("anna", ("Hello.",), (codes,)), voices_folder() / "anna.safetensors")
    sphn.write_wav("anna.wav", np.zeros(24_000, "float32"), 24_000)
    write_epub(Path("book.epub"))
    Path("talk.txt").write_text("[0] Hello.\n[anna] Good morning.")


def test_python(short, with_anna):
    """The blocks run one after another, with the same variables."""
    names = {}
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        exec(HUB_NAME.sub("tiny", code), names)
    assert len(names["answers"]) == 2
    assert [turn.speaker for turn in names["talk"].turns] == [0, 1]


def shell_lines():
    for block in blocks("sh"):
        for line in block.splitlines():
            yield line.split("  #")[0].strip()


@pytest.mark.parametrize("line", [line for line in shell_lines() if "generate.py" in line and "gguf" not in line])
def test_generate_lines(line, short, with_anna, capsys):
    save_adapter(Lora(open_checkpoint("tiny").config, LoraConfig()), Path("run/adapter"))
    python, script, *args = shlex.split(HUB_NAME.sub("tiny", line))
    assert (python, script) == (".venv/bin/python", "generate.py")
    assert generate.main(args) == 0
    assert "s of audio" in capsys.readouterr().out


def test_training_and_measuring_lines(short, one_thread, tmp_path, monkeypatch, capsys):
    """In order, on recordings of noise, for two training steps."""
    monkeypatch.chdir(tmp_path)
    write_data(Path("voice"))
    lines = [line for line in shell_lines() if re.search(r" -m csm (finetune|eval) ", line)]
    assert [shlex.split(line)[3] for line in lines] == ["finetune", "eval"]
    for line in lines:
        python, option, package, command, *args = shlex.split(HUB_NAME.sub("tiny", line))
        assert (python, option, package) == (".venv/bin/python", "-m", "csm")
        if command == "eval" and not all(find_spec(name) for name in ("moonshine_voice", "resemblyzer", "jiwer")):
            pytest.skip("the extra eval is missing")
        more = {"finetune": ["--steps", "2"], "eval": ["--limit", "2"]}[command]
        assert main([command, *args, *more, "--device", "cpu", "--quiet"]) == 0
    assert Path("run/adapter/adapter.safetensors").is_file()
    assert "| recordings | 2 |" in capsys.readouterr().out


def test_gguf_lines(short, tmp_path, monkeypatch, capsys):
    """The file is written, then used."""
    monkeypatch.chdir(tmp_path)
    write, use = [shlex.split(HUB_NAME.sub("tiny", line)) for line in shell_lines() if ".gguf " in f"{line} "]
    assert (write[1:3], use[1]) == (["-m", "csm"], "generate.py")
    assert main(write[3:]) == 0 and generate.main(use[2:]) == 0
    assert "s of audio" in capsys.readouterr().out and Path("gguf.wav").is_file()


class NoMark(Watermark):
    """In place of a package that may be missing: marks nothing, and finds its mark everywhere."""

    def __init__(self, name="perth"):
        super().__init__(name, SimpleNamespace(segment_seconds=0.48))

    def mark_block(self, audio, sample_rate):
        return audio

    def _confidence(self, block):
        return 1.0


def test_batch_and_watermark_lines(short, tmp_path, monkeypatch, capsys):
    """The README's lines, on the lines that docs/batch.md shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("csm.watermark_command.load_watermark", NoMark)
    codes_TK = csm.Generator.from_pretrained("tiny", device="cpu").generate_codes(
        "Hi.", max_audio_length_ms=240, seed=1
    )
    save_voice(csm.Voice("anna", ("Hi.",), (codes_TK,)), voices_folder() / "anna.safetensors")
    Path("lines.jsonl").write_text(blocks("text", "docs/batch.md")[0])
    lines = [shlex.split(HUB_NAME.sub("tiny", line)) for line in shell_lines()]
    lines = [words[3:] for words in lines if words[1:4] in (["-m", "csm", "batch"], ["-m", "csm", "watermark"])]
    assert len(lines) == 2
    for words in lines:
        assert main(words) == 0
    assert {path.name for path in Path("out").iterdir()} == {"greeting.wav", "price.wav", "manifest.jsonl"}
    assert "the watermark perth was found" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["docs/metrics.md", "docs/watermark.md"])
def test_python_of_pages(page, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(csm, "load_watermark", NoMark)
    (code,) = blocks("python", page)
    exec(HUB_NAME.sub("tiny", code), {})


def test_voice_lines(short, with_anna, capsys):
    (line,) = [line for line in shell_lines() if " -m csm voice " in line]
    words = shlex.split(HUB_NAME.sub("tiny", line))[3:]
    assert main([*words, "--replace", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("anna: 1 clip, 1.04 s, speaker 0, ")


def test_reading_lines(short, with_anna, tmp_path, capsys):
    """A book and a dialogue."""
    lines = [line for line in shell_lines() if " -m csm read " in line]
    assert len(lines) == 2
    for line in lines:
        assert main([*shlex.split(HUB_NAME.sub("tiny", line))[3:], "--device", "cpu", "--quiet"]) == 0
        assert "s of audio" in capsys.readouterr().out
    assert {"book.m4b", "book.srt", "talk.mp3"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", TEXT[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_longer_than_120_columns(page):
    long = [f"{n}: {line}" for n, line in enumerate(TEXT[page].splitlines(), start=1) if len(line) > 120]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", PAGES)
def test_every_named_make_target_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z]+)", TEXT[page], flags=re.MULTILINE)
    assert set(named) <= set(targets)
    assert page != "README.md" or {"demo", "test"} <= set(named)


# Paths that docs name without a link. The log records commands and files of its day.
NAMED = re.compile(r"`((?:csm|kernels|weights|tests|docs)/[a-z0-9_./]*)`")


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])
def test_every_named_file_exists(page):
    for path in NAMED.findall(TEXT[page]):
        assert (ROOT / path).exists(), path


def documented_commands():
    """(page, command) for every line of every sh block, and every command in running text; the log's are history."""
    for page in PAGES:
        lines = "".join(blocks("sh", page)).replace("\\\n", " ").splitlines()
        prose = "" if page == "docs/log.md" else re.sub(r"```.*?```", "", TEXT[page], flags=re.DOTALL)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        commands = [re.split(r"\s+#\s", line)[0].strip() for line in lines]
        commands += [
            code for code in inline if re.match(r"(\.venv/bin/)?python3? |torchrun |generate\.py -|bench\.py -", code)
        ]
        yield from ((page, command) for command in commands if command)


@pytest.fixture(scope="module")
def bench_options():
    run = subprocess.run([sys.executable, ROOT / "bench.py", "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z-]+", run.stdout))


@pytest.mark.parametrize(("page", "command"), sorted(set(documented_commands())))
def test_documented_commands_parse(page, command, bench_options):
    """No command is run: its program exists and takes the options shown."""
    program, rest = split_command(command)
    if program == "make":
        assert rest
    elif program.startswith("csm."):
        assert find_spec(program), program
    elif program == "bench.py":
        assert {word for word in rest if word.startswith("--")} <= bench_options
    elif program in ("generate.py", "csm"):
        if rest and "--help" not in rest:
            parse = generate.parse_arguments if program == "generate.py" else parse_arguments
            assert parse(rest + missing_arguments(program, rest))
    else:
        assert program in (*FOREIGN, "pytest", "venv", "docs/examples/two_speakers.py"), program


def split_command(command):
    """The program or module of a command line, and its arguments."""
    words = [word for word in shlex.split(command) if word not in ("...", "COMMAND", "EXPRESSION")]
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if "-m" in rest and program in ("python", "python3", "torchrun"):
        at = rest.index("-m")
        return rest[at + 1], rest[at + 2 :]
    if program in ("python", "python3"):
        return rest[0], rest[1:]
    return program, rest


def missing_arguments(program, words):
    """Required arguments of a command that is shown for one option only."""
    needed = {
        "generate.py": [["--text", "--file", "--script"]],
        "finetune": [["--data"], ["--out"]],
        "eval": [["--data", "--sentences"]],
        "read": [["--out"]],
        "quantize": [["--scheme"], ["--out"]],
    }
    command = program if program == "generate.py" else words[0]
    missing = [word for options in needed.get(command, []) if not {*options} & {*words} for word in (options[0], "x")]
    positional = {"quantize": ["tiny"], "batch": ["lines.jsonl", "out"], "watermark": ["a.wav"]}
    return [*(positional.get(words[0], []) if len(words) == 1 else []), *missing] if words else missing


def test_every_expression_selects_gpu_tests():
    """The table of what one GPU has confirmed selects tests by name."""
    page = TEXT["docs/unconfirmed.md"]
    expressions = re.findall(r"\| `([a-z_ ]+)` \|$", page[: page.index("## Speed")], flags=re.MULTILINE)
    code = "".join((ROOT / "tests" / name).read_text() for name in ("test_cuda.py", "test_recipe.py"))
    names = re.findall(r"^def (test_\w+)", code, flags=re.MULTILINE)
    assert len(expressions) >= 1
    for expression in expressions:
        assert any(word in name for word in expression.split(" or ") for name in names), expression


ENTRY = re.compile(r"^- \*\*(.+?)\*\*:(.+)\(`([^`]+)` in `([^`]+)`\)$")


def glossary():
    section = TEXT["docs/design.md"].split("## Glossary")[1].split("\n## ")[0]
    return re.split(r"\n(?=- )", section.strip())


def defined_names(path):
    """Names of functions, classes, variables and attributes (as ``self.x``) that a Python file defines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield ast.unparse(node)


@pytest.mark.parametrize("entry", glossary())
def test_every_term_of_the_glossary_is_defined_where_it_points(entry):
    term, meaning, name, path = ENTRY.match(" ".join(entry.split())).groups()
    assert len(meaning.split()) >= 5, term
    name = re.sub(r"^(class|def) ", "", name)
    assert name in set(defined_names(ROOT / path)), f"{term}: {path} does not define {name}"


def test_the_glossary_is_complete():
    terms = [ENTRY.match(" ".join(entry.split()))[1] for entry in glossary()]
    assert len(terms) == len(set(terms)) >= 20


# "section 7", with the title or the name that is said to be there: section 7, "Two requests at once".
SECTION = re.compile(r"\bsection (\d+)(?:, (?:\"([^\"]+)\"|`([^`]+)`))?")


def design_sections():
    """Number -> text of the numbered sections of the design page."""
    parts = re.split(r"^## (?:(\d+)\. )?", TEXT["docs/design.md"], flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True) if number}


def section_references():
    for page in PAGES:
        prose = " ".join(TEXT[page].split())
        yield from ((page, *match.groups()) for match in SECTION.finditer(prose) if page != "docs/log.md")


def holds(text, title, name):
    """Whether a section has a paragraph that begins with the bold title, and mentions the name."""
    has_title = title is None or re.search(rf"^\*\*{re.escape(title)}\.\*\*", text, flags=re.MULTILINE)
    return bool(has_title) and (name is None or f"`{name}`" in text)


@pytest.mark.parametrize(("page", "number", "title", "name"), sorted(set(section_references()), key=str))
def test_section_references_are_right(page, number, title, name):
    sections = design_sections()
    assert int(number) in sections, f"{page}: section {number}"
    assert holds(sections[int(number)], title, name), f"{page}: section {number} is not about {title or name}"


def test_questions_name_the_section_that_answers_them():
    references = [reference for reference in section_references() if reference[0] == "docs/design.md"]
    assert sum(title is not None or name is not None for _, _, title, name in references) >= 5
    sections = design_sections()
    assert holds(sections[8], "What is captured", None) and not holds(sections[7], "What is captured", None)


def test_import_chain_is_the_enforced_one():
    section = TEXT["docs/design.md"].split("## Imports run one way")[1]
    lines = re.search(r"```text\n(.*?)```", section, flags=re.DOTALL)[1].splitlines()
    chain = [{name if name == "csm" else f"csm.{name}" for name in line.split(", ")} for line in lines]
    assert chain == LAYERS


VARIABLE = re.compile(r"environ(?:\.get\(|\[)\"(CSM_\w+)\"|VARIABLE = \"(CSM_\w+)\"")


def test_every_environment_variable_is_in_the_table():
    files = [path for folder in ("csm", "kernels", "weights") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in files for match in VARIABLE.findall(path.read_text()) for name in match if name}
    assert {"CSM_SELFCHECK", "CSM_THREADS", "CSM_HOME"} <= read
    table = README.split("### Environment variables")[1].split("\n#")[0]
    assert read <= set(re.findall(r"`([A-Z_]+)`", table))


def test_every_page_is_linked_from_another():
    links = {
        (ROOT / page).parent.joinpath(link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", TEXT[page])
    }
    assert {(ROOT / page).resolve() for page in PAGES if page.startswith("docs/")} <= links


def test_every_test_file_holds_a_claim():
    """CONTRIBUTING.md maps claims to tests: every test file has a line, and every test that is named exists."""
    page = TEXT["CONTRIBUTING.md"].split("## Which test holds which claim")[1].split("\n## ")[0]
    files = {path.name: path for path in (ROOT / "tests").glob("test_*.py")}
    assert set(files) <= set(re.findall(r"`tests/(test_\w+\.py)`", page))
    for test, file in re.findall(r"`(test_\w+)` \| `tests/(test_\w+\.py)`", page):
        assert f"def {test}(" in files[file].read_text(), test


def test_the_first_two_commands():
    assert [line for line in shell_lines() if line][:2] == ["make demo", "make test"]


def test_two_speakers(short, noisy, tmp_path, monkeypatch):
    """Code for the reference implementation runs with only its import changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(csm, "load_csm_1b", lambda device: noisy)
    for name in ("a.wav", "b.wav"):
        sphn.write_wav(name, np.random.default_rng(0).normal(size=44_100).astype("float32") / 9, 44_100)
    monkeypatch.setattr(sys, "argv", ["two_speakers.py", "a.wav", "One.", "b.wav", "Two."])
    runpy.run_path(str(ROOT / "docs" / "examples" / "two_speakers.py"), run_name="__main__")
    samples, rate = sphn.read("conversation.wav")
    assert (samples.shape, rate) == ((1, 3 * 3 * 1920), 24_000)


def test_help_names_every_option(capsys, monkeypatch):
    run = subprocess.run([sys.executable, ROOT / "generate.py", "--help"], capture_output=True, text=True, check=True)
    for command in ("finetune", "eval", "batch", "quantize"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    monkeypatch.setattr(sys, "argv", ["recordings", "--help"])
    for main_of in (recordings.main, lambda: bench_main(["--help"])):
        with pytest.raises(SystemExit):
            main_of()
    known = run.stdout + capsys.readouterr().out
    for document in (README, TEXT["docs/finetune.md"]):
        for option in re.findall(r"--[a-z][a-z-]+", document):
            assert option in known or option == "--nproc-per-node", option
