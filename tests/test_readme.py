"""What the README and the examples show runs, with the embedded checkpoint in the place of CSM-1B."""

import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sphn

import csm
import generate
from csm.__main__ import main, parse_arguments
from csm.lora import Lora, LoraConfig, save_adapter
from csm.weights import open_checkpoint
from csm.weights.recipe import recordings
from micro import write_data

ROOT = Path(generate.__file__).parent
DOCS = [path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")]
README = (ROOT / "README.md").read_text()
HUB_NAME = re.compile(r"(sesame|unsloth)/csm-1b")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def short(monkeypatch, tiny):
    """A quarter of a second whatever was asked for, from the embedded checkpoint."""
    whole = csm.Generator._request

    def shortened(self, speech, audio=True):
        return whole(self, replace(speech, max_audio_length_ms=240), audio)

    monkeypatch.setattr(csm.Generator, "_request", shortened)


def test_python(short, tmp_path, monkeypatch):
    """The blocks follow on one another, as a reader takes them."""
    monkeypatch.chdir(tmp_path)
    names = {}
    assert len(blocks("python")) == 2
    for code in blocks("python"):
        exec(HUB_NAME.sub("tiny", code), names)
    assert len(names["answers"]) == 2


def shell_lines():
    for block in blocks("sh"):
        for line in block.splitlines():
            yield line.split("  #")[0].strip()


@pytest.mark.parametrize("line", [line for line in shell_lines() if "generate.py" in line])
def test_generate_lines(line, short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_adapter(Lora(open_checkpoint("tiny").config, LoraConfig()), Path("run/adapter"))
    python, script, *args = shlex.split(HUB_NAME.sub("tiny", line))
    assert (python, script) == (".venv/bin/python", "generate.py")
    assert generate.main(args) == 0
    assert "s of audio" in capsys.readouterr().out


def test_training_and_measuring_lines(short, one_thread, tmp_path, monkeypatch, capsys):
    """In their order, on recordings of noise, for two steps."""
    monkeypatch.chdir(tmp_path)
    write_data(Path("voice"))
    lines = [line for line in shell_lines() if " -m csm " in line]
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


@pytest.mark.parametrize("page", ["README.md", "weights/tiny/README.md", *sorted(p.as_posix() for p in DOCS)])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z]+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_the_first_two_commands():
    assert [line for line in shell_lines() if line][:2] == ["make demo", "make test"]


def test_two_speakers(short, noisy, tmp_path, monkeypatch):
    """Code for the reference implementation, with only its import changed."""
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
    for command in ("finetune", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    monkeypatch.setattr(sys, "argv", ["recordings", "--help"])
    with pytest.raises(SystemExit):
        recordings.main()
    known = run.stdout + capsys.readouterr().out
    for document in (README, (ROOT / "docs" / "finetune.md").read_text()):
        for option in re.findall(r"--[a-z][a-z-]+", document):
            assert option in known or option == "--nproc-per-node", option


def test_the_guide_to_training_shows_options_that_exist():
    """Its commands parse, whatever stands for the data."""
    guide = (ROOT / "docs" / "finetune.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", guide, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if " -m csm " in line]
    assert len(commands) == 9
    for line in commands:
        words = shlex.split(line)
        arguments = [word for word in words[words.index("csm") + 1 :] if word != "..."]
        assert parse_arguments(arguments).run
