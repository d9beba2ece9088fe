"""generate.py: what it writes, what it prints, and how it fails."""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import shlex
import stat
import struct
import subprocess
import sys
import termios
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import generate
from conftest import tensors_of
from csm import RoomWarning, generate_command
from csm.__main__ import main as csm_main
from csm.weights.checkpoint import TINY
from noise import NOISE

ROOT = Path(generate.__file__).parent
SHORT = ["--model", NOISE, "--max-seconds", "0.4", "--device", "cpu", "--quiet"]


def read_wav(path):
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def write_wav(path, samples, rate=24_000, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples)
    return path


def tone(samples, dtype="<i2", scale=8000.0, offset=0.0):
    return (offset + scale * np.sin(np.arange(samples) / 20)).astype(dtype).tobytes()


def test_a_sentence(tmp_path, capsys):
    out = tmp_path / "out.wav"
    args = ["--text", "Hello, George. Good morning.", "--model", "tiny", "--device", "cpu", "--quiet"]
    assert generate.main([*args, "--max-seconds", "10", "--seed", "3", "--out", str(out)]) == 0
    audio = read_wav(out)
    seconds = len(audio) / 24_000
    assert 0.5 < seconds < 10
    assert len(audio) % 1920 == 0
    assert audio.std() > 100
    printed = capsys.readouterr()
    assert re.fullmatch(
        rf"\S+out\.wav: {seconds:.2f} s of audio in \d+\.\d\d s \(RTF \d+\.\d\d\), "
        r"first audio after \d+ ms, on cpu, seed 3\n",
        printed.out,
    )
    assert "demonstration voice" in printed.err
    assert list(tmp_path.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~umask


def test_a_printed_seed_repeats_the_run(tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("a.wav", "b.wav", "c.wav"))
    generate.main(["--text", "Hello.", *SHORT, "--out", str(first)])
    seed = capsys.readouterr().out.split()[-1]
    generate.main(["--text", "Hello.", *SHORT, "--out", str(second), "--seed", seed])
    generate.main(["--text", "Hello.", *SHORT, "--out", str(third)])
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != third.read_bytes()


def test_several_lines_from_everywhere(tmp_path, capsys, monkeypatch):
    text = "One.\n\n  Two, the second.  \nThree.\n"
    file = tmp_path / "text.txt"
    file.write_text(text)
    monkeypatch.setattr("sys.stdin", open(file))  # noqa: SIM115
    sources = {"arg": ["--text", text], "stdin": ["--text", "-"], "file": ["--file", str(file)]}
    for name, source in sources.items():
        out = tmp_path / f"{name}.wav"
        assert generate.main([*source, *SHORT, "--seed", "1", "--out", str(out)]) == 0
        assert read_wav(out).shape == (3 * 5 * 1920,)
    contents = {(tmp_path / f"{name}.wav").read_bytes() for name in sources}
    assert len(contents) == 1


REFERENCES = {
    "16-bit mono": dict(samples=tone(48_000)),
    "stereo": dict(samples=tone(48_000), channels=2),
    "8-bit": dict(samples=tone(24_000, "u1", 60, 128), width=1),
    "96 kHz": dict(samples=tone(96_000), rate=96_000),
    "24-bit": dict(samples=bytes(3 * 24_000), width=3),
    "one sample": dict(samples=tone(1)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_of_every_kind(tmp_path, name):
    ref = write_wav(tmp_path / "ref.wav", **REFERENCES[name])
    out = tmp_path / "out.wav"
    args = ["--text", "Hello.", *SHORT, "--ref", str(ref), "--ref-text", "La la.", "--seed", "1", "--out", str(out)]
    assert generate.main(args) == 0
    assert read_wav(out).shape == (5 * 1920,)


def test_without_a_model_the_fallback_is_loud(tmp_path, capsys):
    """No hub here: the embedded checkpoint stands in, and says so."""
    out = tmp_path / "out.wav"
    assert generate.main(["--text", "Hello.", *SHORT[2:], "--out", str(out)]) == 0
    errors = capsys.readouterr().err
    assert "WARNING: no CSM-1B" in errors
    assert "demonstration voice" in errors


def test_a_model_that_was_asked_for_never_falls_back(tmp_path, capsys):
    out = tmp_path / "out.wav"
    assert generate.main(["--text", "Hi.", *SHORT[2:], "--model", "sesame/csm-1b", "--out", str(out)]) == 2
    assert "WARNING" not in capsys.readouterr().err
    assert not out.exists()


PROGRAM = [sys.executable, ROOT / "generate.py"]


def test_as_a_program_from_another_folder(tmp_path):
    args = ["--text", "Hello.", *SHORT[:4], "--device", "cpu", "--seed", "0"]
    run = subprocess.run([*PROGRAM, *args], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert read_wav(tmp_path / "out.wav").shape == (5 * 1920,)
    assert run.stdout.startswith("out.wav: 0.40 s")
    assert "s of audio," not in run.stderr  # no progress bar, since stderr is not a terminal


def open_terminal():
    """Our end of a terminal of 24 rows and 80 columns, and the program's."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return ours, terminal


def on_a_terminal(args, folder):
    """Run generate.py in a folder with a terminal as its output; the exit code, and what the terminal shows."""
    ours, terminal = open_terminal()
    environment = {**os.environ, "CSM_HOME": str(folder / "home")}
    run = subprocess.Popen([*PROGRAM, *args], cwd=folder, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the program has closed its end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return run.wait(timeout=60), shown.decode()


def test_the_bar_and_the_suggestion_on_a_terminal(tmp_path):
    """The bar shows seconds of audio and times real time; the first run, and only the first, suggests the next step."""
    args = ["--text", "It's short.", *SHORT[:2], "--device", "cpu", "--max-seconds", "2"]
    code, shown = on_a_terminal(args, tmp_path)
    assert code == 0
    assert re.search(r"\rIt's short\.: \d\.\d s of audio, \d+\.\dx real time", shown)
    assert "it/s" not in shown and "s/s" not in shown
    example = re.search(r"next: .*: python generate\.py (.*)", shown).group(1)
    parsed = generate.parse_arguments(shlex.split(example))
    assert (parsed.ref, parsed.ref_text) == (Path("out.wav"), "It's short.")
    code, shown = on_a_terminal([*args, "--quiet"], tmp_path)
    assert code == 0
    assert len(shown.splitlines()) == 1


def test_the_rate_of_the_bar(monkeypatch):
    """Audio over time, computed from the clock that tqdm reads."""
    bar = generate_command.AudioBar(disable=True)
    monkeypatch.setattr("tqdm.std.tqdm.format_dict", property(lambda self: {"n": 3.0, "elapsed": 0.75}))
    assert bar.format_dict["speed"] == 4.0


def test_help_has_groups_and_two_examples(capsys):
    for main, program in ((generate.main, "python generate.py"), (csm_main, "python -m csm generate")):
        with pytest.raises(SystemExit) as stop:
            main(["--help"] if main is generate.main else ["generate", "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert re.findall(r"^(\S.*):$", shown, flags=re.MULTILINE) == [
            *("options", "text and output", "voice", "sampling", "model and device", "examples")
        ]
        examples = [line.strip() for line in shown.split("examples:")[1].splitlines() if line.strip()]
        assert len(examples) == 2
        for example in examples:
            assert example.startswith(f"{program} --")
            assert generate.parse_arguments(shlex.split(example.removeprefix(program)))


# Options that scripts of others rely on. A new one is added here; none is ever removed.
OPTIONS = """
--codec --context-turns --device --dtype --file --help --json --lora --max-seconds --metrics --model --no-guard
--no-guards --no-normalize --no-split --out --play --quantize --quiet --ref --ref-text --script --seed --speaker
--speed --split --srt --stream-format --stream-to --temperature --text --threads --tokenizer --top-k --voice --vtt
--watermark
"""


def test_generate_keeps_every_option():
    parser = argparse.ArgumentParser(prog="generate.py")
    generate_command.add_arguments(parser)
    found = {option for action in parser._actions for option in action.option_strings}
    assert set(OPTIONS.split()) <= found, "options were removed"


def test_csm_generate_is_generate(tmp_path, capsys):
    outs = tmp_path / "a.wav", tmp_path / "b.wav"
    for main, command, out in ((generate.main, [], outs[0]), (csm_main, ["generate"], outs[1])):
        assert main([*command, "--text", "Hello.", *SHORT, "--seed", "1", "--out", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    capsys.readouterr()
    for bad in (["--top-k", "0"], ["--speaker", "x"]):
        assert csm_main(["generate", "--text", "Hi", *SHORT, *bad]) == 2
        assert capsys.readouterr().err.startswith("python -m csm generate: error: ")


def nan_wav(path):
    """A WAV file of floats, one of them not a number."""
    samples = np.zeros(4800, dtype="<f4")
    samples[7] = np.nan
    data = samples.tobytes()
    header = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    for value, size in ((3, 2), (1, 2), (24_000, 4), (96_000, 4), (4, 2), (32, 2)):
        header += value.to_bytes(size, "little")
    path.write_bytes(header + b"data" + len(data).to_bytes(4, "little") + data)


def zero_rate_wav(path):
    write_wav(path, tone(4800))
    data = bytearray(path.read_bytes())
    data[24:28] = bytes(4)
    path.write_bytes(data)


def damaged(change):
    """A copy of the embedded checkpoint with something wrong in its weights."""

    def make(folder):
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_bytes((TINY / name).read_bytes())
        tensors = tensors_of(TINY / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return make


def truncated(folder):
    damaged(lambda tensors: None)(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unknown_key(folder):
    damaged(lambda tensors: None)(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"colour": ["red"],', 1))


REF = ["--ref", "ref.wav", "--ref-text", "La."]
LM_HEAD = "lm_head.weight"

# Arguments, what the one line on stderr says, and what is made in the folder beforehand.
BAD = {
    "no text": (["--text", ""], "no text", {}),
    "blank text": (["--text", " \n\t "], "no text", {}),
    "text of 2,400 tokens": (["--text", "word " * 600, "--no-split"], "takes 2404 positions.*has 2048", {}),
    "no text and no file": ([], "required", {}),
    "text and file": (["--text", "Hi", "--file", "text.txt"], "not allowed", {}),
    "missing file": (["--file", "nowhere.txt"], "nowhere.txt", {}),
    "a file that is not text": (["--file", "x.bin"], "x.bin", {"x.bin": lambda p: p.write_bytes(b"\xff\xfe\xff")}),
    "speaker -1": (["--text", "Hi", "--speaker", "-1"], "speaker", {}),
    "speaker x": (["--text", "Hi", "--speaker", "x"], "--speaker", {}),
    "ref without its text": (["--text", "Hi", "--ref", "ref.wav"], "--ref-text go together", {}),
    "text without its ref": (["--text", "Hi", "--ref-text", "La."], "--ref-text go together", {}),
    "missing ref": (["--text", "Hi", *REF], "ref.wav: no such file", {}),
    "corrupt ref": (
        ["--text", "Hi", *REF],
        "ref.wav: cannot be decoded as audio",
        {"ref.wav": lambda p: p.write_bytes(b"RIFFjunk")},
    ),
    "empty ref": (
        ["--text", "Hi", *REF],
        "ref.wav: cannot be decoded as audio",
        {"ref.wav": lambda p: p.write_bytes(b"")},
    ),
    "ref is a folder": (["--text", "Hi", *REF], "ref.wav: no such file", {"ref.wav": lambda p: p.mkdir()}),
    "ref without samples": (["--text", "Hi", *REF], "empty", {"ref.wav": lambda p: write_wav(p, b"")}),
    "ref with NaN": (["--text", "Hi", *REF], "not finite", {"ref.wav": nan_wav}),
    "ref of 200 seconds": (
        ["--text", "Hi", *REF],
        "takes 2500 positions.*has 2048",
        {"ref.wav": lambda p: write_wav(p, bytes(2 * 2500 * 1920))},
    ),
    "empty ref text": (
        ["--text", "Hi", "--ref", "ref.wav", "--ref-text", " "],
        "text is empty",
        {"ref.wav": lambda p: write_wav(p, tone(4800))},
    ),
    "ref at 0 Hz": (["--text", "Hi", *REF], "ref.wav: cannot be decoded as audio", {"ref.wav": zero_rate_wav}),
    "a bad last line": (["--text", "Hi\n" + "word " * 600, "--no-split"], "takes 2404 positions", {}),
    "text that is no Unicode": (["--text", "caf\udce9"], "Unicode", {}),
    "temperature 1e39": (["--text", "Hi", "--temperature", "1e39"], "temperature", {}),
    "out is a pipe": (["--text", "Hi", "--out", "pipe"], "device or a pipe", {"pipe": os.mkfifo}),
    "an unknown option": (["--text", "Hi", "--colour", "red"], "--colour", {}),
    "out in no folder": (["--text", "Hi", "--out", "no/such/out.wav"], "cannot be written", {}),
    "out is a folder": (["--text", "Hi", "--out", "here"], "is a folder", {"here": lambda p: p.mkdir()}),
    "top-k 0": (["--text", "Hi", "--top-k", "0"], "top-k must be a whole number of at least 1", {}),
    "top-k 10,000": (["--text", "Hi", "--top-k", "10000"], "top-k must be at most 1024", {}),
    "temperature -1": (["--text", "Hi", "--temperature", "-1"], "temperature", {}),
    "temperature nan": (["--text", "Hi", "--temperature", "nan"], "temperature", {}),
    "max-seconds 0": (["--text", "Hi", "--max-seconds", "0"], "limit must be at least", {}),
    "max-seconds nan": (["--text", "Hi", "--max-seconds", "nan"], "limit must be at least", {}),
    "seed -1": (["--text", "Hi", "--seed", "-1"], "seed", {}),
    "seed too large": (["--text", "Hi", "--seed", str(2**63)], "seed", {}),
    "no such device": (["--text", "Hi", "--device", "abacus"], "abacus", {}),
    "no such GPU": (["--text", "Hi", "--device", "cuda:77"], "cuda:77", {}),
    "no such dtype": (["--text", "Hi", "--dtype", "int3"], "--dtype", {}),
    "no such model": (["--text", "Hi", "--model", "nowhere"], "no folder 'nowhere'", {}),
    "a model that the hub cannot give": (["--text", "Hi", "--model", "a/b"], "is not in the cache", {}),
    "no such codec": (["--text", "Hi", "--codec", "no.safetensors"], "no.safetensors: no such file", {}),
    "truncated weights": (["--text", "Hi", "--model", "m"], "model.safetensors: truncated", {"m": truncated}),
    "weights of a wrong shape": (
        ["--text", "Hi", "--model", "m"],
        r"lm_head\.weight: expected shape .*, got \(1, 2\)",
        {"m": damaged(lambda tensors: tensors.update({LM_HEAD: torch.zeros(1, 2)}))},
    ),
    "weights of a wrong dtype": (
        ["--text", "Hi", "--model", "m"],
        r"lm_head\.weight: expected a floating-point dtype, got torch\.int16",
        {"m": damaged(lambda tensors: tensors.update({LM_HEAD: tensors[LM_HEAD].to(torch.int16)}))},
    ),
    "a missing tensor": (
        ["--text", "Hi", "--model", "m"],
        r"missing tensor lm_head\.weight",
        {"m": damaged(lambda tensors: tensors.pop(LM_HEAD))},
    ),
    "an unknown config key": (["--text", "Hi", "--model", "m"], "unknown key 'colour'", {"m": unknown_key}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name, tmp_path, monkeypatch, capsys):
    """Exit code 2, a message that names the fault, nothing on stdout, no traceback, and no file left behind."""
    args, message, made = BAD[name]
    monkeypatch.chdir(tmp_path)
    for path, make in made.items():
        make(tmp_path / path)
    before = sorted(tmp_path.rglob("*"))
    defaults = ["--model", "tiny", "--device", "cpu", "--max-seconds", "0.4", "--quiet"]  # what comes later counts
    code = generate.main([*defaults, *args])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("generate.py: error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unwritable_folder(tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert generate.main(["--text", "Hi", *SHORT, "--out", str(folder / "out.wav")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_existing_file_survives_a_failure(tmp_path):
    out = tmp_path / "out.wav"
    out.write_bytes(b"precious")
    assert generate.main(["--text", "Hi", *SHORT, "--temperature", "-1", "--out", str(out)]) == 2
    assert out.read_bytes() == b"precious"


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target.wav", tmp_path / "link.wav"
    link.symlink_to(target)
    assert generate.main(["--text", "Hi", *SHORT, "--out", str(link)]) == 0
    assert link.is_symlink()
    assert read_wav(target).shape == (5 * 1920,)


def test_a_long_reference_leaves_little_room_and_says_so(tmp_path, capsys):
    ref = write_wav(tmp_path / "ref.wav", bytes(2 * 2000 * 1920))
    args = ["--text", "Hi", *SHORT, "--max-seconds", "9", "--ref", str(ref), "--ref-text", "La."]
    with pytest.warns(RoomWarning, match=r"room for 2\.\d+ s of audio, of the 9 s"):
        assert generate.main([*args, "--out", str(tmp_path / "out.wav")]) == 0


def test_a_terminated_run_leaves_nothing(tmp_path):
    args = ["--text", "Hello.", "--model", NOISE, "--max-seconds", "90", "--out", str(tmp_path / "out.wav")]
    ours, terminal = open_terminal()
    run = subprocess.Popen([*PROGRAM, *args], stderr=terminal)
    os.close(terminal)
    printed = b""
    while b"s of audio" not in printed:
        assert run.poll() is None
        printed += os.read(ours, 4096)  # fails once the program has ended
    run.terminate()
    run.wait(timeout=60)
    os.close(ours)
    assert run.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("csm.runner.decode_frame", interrupt)
    assert generate.main(["--text", "Hi", *SHORT, "--out", str(tmp_path / "out.wav")]) == 130
    assert list(tmp_path.iterdir()) == []
