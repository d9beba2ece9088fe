"""csm batch: every line once, with the bytes it has alone, however the run was stopped; bad lines are listed."""

import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import tensors_of
from csm import SpeechRequest
from csm.__main__ import main
from csm.batch import (
    BatchLine,
    BatchOptions,
    LineError,
    Output,
    check_id,
    identified,
    make_job,
    read_lines,
    seed_of,
)
from csm.errors import CSMError
from csm.kernels.native import cache_folder
from csm.prompt import TextTokenizer
from csm.pronounce import Pronouncer
from csm.voices import Voice, save_voice, voices_folder
from noise import NOISE

MODEL = ["--model", NOISE, "--device", "cpu", "--quiet"]
LINES = [
    {"id": "one", "text": "Hello there."},
    {"id": "two", "text": "Good morning, everybody.", "seed": 7, "speaker": 1},
    {"id": "three.b", "text": "On 3/5/24 it cost $5.", "temperature": 0, "max_seconds": 0.8},
    {"id": "größe", "text": "The fourth.", "top_k": 5, "voice": "anna"},
    {"id": "5", "text": "The fifth line.", "max_seconds": 0.24},
    {"id": "six", "text": "The sixth, and the last."},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own, with the voice anna."""
    compiled = list(cache_folder().glob("native-*"))
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for path in compiled:  # C++ ops, which take a minute to compile
        (tmp_path / "home" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    codes = torch.randint(256, (6, 8), generator=torch.Generator().manual_seed(0))
    save_voice(Voice("anna", ("Hi.",), (codes,), 2), voices_folder() / "anna.safetensors")
    return tmp_path


def write(lines, path="in.jsonl"):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


def batch(out, *more):
    return main(["batch", "in.jsonl", str(out), *MODEL, "--max-seconds", "0.4", *more])


def audio_of(out):
    return {path.name: path.read_bytes() for path in out.glob("*.wav")}


def entries_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def key_of(generator, **values):
    """Of a line, in a run without options."""
    return make_job(generator, 1, BatchLine("a", "Hi.", **values), identified(BatchOptions(), generator)).key


def test_a_key_has_the_checkpoints_defaults_and_its_tokenizer(noisy, monkeypatch, tmp_path):
    defaults, keys = noisy.defaults, [key_of(noisy)]
    assert keys[0] == key_of(noisy, temperature=defaults.temperature, top_k=defaults.top_k)
    for change in ({"temperature": 0.5}, {"top_k": 9}, {"max_audio_length_ms": 240}):
        with monkeypatch.context() as patch:
            patch.setattr(noisy, "defaults", replace(defaults, **change))
            keys.append(key_of(noisy))
    path = tmp_path / "tokenizer.json"
    path.write_text((Path(NOISE) / "tokenizer.json").read_text() + "\n")
    for has_stage in (False, True):
        if has_stage:
            Pronouncer({}, dict.fromkeys(string.ascii_lowercase, "ə")).write(tmp_path / "pronunciation.json.gz")
        with monkeypatch.context() as patch:
            patch.setattr(noisy, "_tokenizer", TextTokenizer(path, noisy.config.text_vocab_size))
            keys.append(key_of(noisy))
    assert len(set(keys)) == 6


@pytest.fixture
def unbroken(folder):
    """The audio of a run that nothing interrupted."""
    write(LINES)
    assert batch(folder / "unbroken", "--slots", "3") == 0
    return audio_of(folder / "unbroken")


def test_each_line_has_the_samples_that_it_has_alone(folder, unbroken, noisy, capsys):
    """Compared with ``generate``, one request at a time."""
    assert sorted(unbroken) == sorted(f"{line['id']}.wav" for line in LINES)
    alone = {
        "one": SpeechRequest("Hello there.", 0, max_audio_length_ms=400, seed=seed_of(0, "one")),
        "two": SpeechRequest("Good morning, everybody.", 1, max_audio_length_ms=400, seed=7),
        "three.b": SpeechRequest(
            "On March fifth, twenty twenty-four it cost five dollars.", max_audio_length_ms=800, temperature=0
        ),
        "größe": SpeechRequest(
            "The fourth.", 2, max_audio_length_ms=400, topk=5, voice="anna", seed=seed_of(0, "größe")
        ),
    }
    for name, request in alone.items():
        (audio,) = noisy.generate_batch([request])
        expected = (audio.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()
        assert unbroken[f"{name}.wav"][44:] == expected, name
    entries = entries_of(folder / "unbroken" / "manifest.jsonl")
    assert [entry["id"] for entry in entries] == [line["id"] for line in LINES]
    assert [round(entry["seconds"], 2) for entry in entries] == [0.4, 0.4, 0.8, 0.4, 0.24, 0.4]
    for entry in entries:
        assert entry["finish"] == "length" and entry["retries"] == 0
        assert entry["elapsed_seconds"] >= entry["first_audio_seconds"] > 0
        assert entry["rtf"] == pytest.approx(entry["elapsed_seconds"] / entry["seconds"], rel=0.01)
        assert entry["bytes"] == 44 + 2 * round(entry["seconds"] * 24_000)
    assert not (folder / "unbroken" / "errors.jsonl").exists()
    assert batch(folder / "unbroken") == 0
    assert capsys.readouterr().out == f"{folder / 'unbroken'}: 0 lines generated, 6 were there\n"
    assert audio_of(folder / "unbroken") == unbroken


def test_the_number_of_slots_and_the_other_lines_change_nothing(folder, unbroken):
    write([*LINES[::-1], {"id": "seven", "text": "One more."}])
    assert batch(folder / "out", "--slots", "1") == 0
    assert {name: data for name, data in audio_of(folder / "out").items() if name != "seven.wav"} == unbroken


def test_a_model_is_known_by_its_weights(folder, capsys):
    """Not by its name: moved, nothing is generated again; after training, or with another codec, everything is."""
    write(LINES[:2])
    tensors = tensors_of(Path(NOISE) / "model.safetensors")

    def copied(name, change=None):
        shutil.copytree(NOISE, name)
        if change is not None:
            changed = tensors | {change: tensors[change] + 1e-3}
            save_file(changed, folder / name / "model.safetensors", {"format": "pt"})
        return ["--model", name]

    codec = next(name for name in tensors if name.startswith("codec_model.decoder."))
    for model, generated in (
        ([], 2),
        (copied("moved"), 0),
        (copied("trained", "lm_head.weight"), 2),
        (copied("another_codec", codec), 2),
        (["--model", "another_codec"], 0),
    ):
        capsys.readouterr()
        assert batch(folder / "out", *model) == 0
        assert f"{generated} lines generated, {2 - generated} were there" in capsys.readouterr().out, model


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_before_the_file(output, job, speech, rate):
    raise Killed


def killed_between_file_and_manifest(output, job, speech, rate):
    output._file.close()  # the next write to the manifest fails
    try:
        Output.whole_write(output, job, speech, rate)
    except ValueError:
        raise Killed from None


def killed_within_the_manifest(output, job, speech, rate):
    Output.whole_write(output, job, speech, rate)
    output._file.truncate(output._file.seek(0, os.SEEK_END) - 9)
    raise Killed


@pytest.mark.parametrize("kill", [killed_before_the_file, killed_between_file_and_manifest, killed_within_the_manifest])
@pytest.mark.parametrize("number", [0, 2, 5])
def test_killed_and_resumed(folder, unbroken, monkeypatch, kill, number):
    """At each stage of writing a line, of the first, the third or the last one."""
    out, count = folder / "out", iter(range(9))

    def write_or_die(output, *arguments):
        (kill if next(count) == number else Output.whole_write)(output, *arguments)

    monkeypatch.setattr(Output, "whole_write", Output.write, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", write_or_die)
        with pytest.raises(Killed):
            batch(out, "--slots", "2")
    assert len(entries_whole(out)) == number
    assert batch(out, "--slots", "3") == 0
    assert audio_of(out) == unbroken
    assert [entry["id"] for entry in entries_of(out / "manifest.jsonl")] == [line["id"] for line in LINES]
    assert sorted(path.name for path in out.iterdir()) == sorted([*unbroken, "manifest.jsonl"])


def entries_whole(out):
    return [line for line in (out / "manifest.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_a_process_that_is_killed(folder, unbroken):
    """SIGKILL, as soon as two lines are there."""
    out = folder / "out"
    args = ["batch", "in.jsonl", str(out), *MODEL, "--max-seconds", "0.4", "--slots", "1"]
    run = subprocess.Popen([sys.executable, "-m", "csm", *args], stdout=subprocess.DEVNULL)
    while not (out / "manifest.jsonl").exists() or len(entries_whole(out)) < 2:
        assert run.poll() is None
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=60)
    (out / ".csm-left.part").touch()  # what a kill within a WAV file leaves
    assert batch(out) == 0
    assert not list(out.glob(".*"))
    assert audio_of(out) == unbroken
    assert [entry["id"] for entry in entries_of(out / "manifest.jsonl")] == [line["id"] for line in LINES]


def test_a_changed_line_option_or_file_is_generated_again(folder, unbroken, capsys):
    out = folder / "unbroken"
    capsys.readouterr()
    write([{**LINES[0], "text": "Something else."}, *LINES[1:]])
    assert batch(out) == 0
    assert "1 lines generated, 5 were there" in capsys.readouterr().out
    (out / "two.wav").write_bytes(b"cut off")
    assert batch(out) == 0
    assert "1 lines generated, 5 were there" in capsys.readouterr().out
    assert audio_of(out)["two.wav"] == unbroken["two.wav"]
    assert batch(out, "--seed", "1") == 0  # for the lines without a seed of their own
    assert "5 lines generated, 1 were there" in capsys.readouterr().out
    codes = torch.randint(256, (6, 8), generator=torch.Generator().manual_seed(1))
    save_voice(Voice("anna", ("Hi.",), (codes,), 2), voices_folder() / "anna.safetensors")
    assert batch(out, "--seed", "1") == 0
    assert "1 lines generated, 5 were there" in capsys.readouterr().out


BAD_LINES = {
    "nonsense": "not JSON",
    "[1]": "not an object",
    '{"id": "x"}': "text is missing",
    '{"id": "x", "text": "  "}': "text is missing",
    '{"id": "x", "text": 5}': "text is missing",
    '{"text": "Hi."}': "id must be a file name",
    '{"id": 5, "text": "Hi."}': "id must be a file name",
    '{"id": "../x", "text": "Hi."}': "id must be a file name",
    '{"id": "x", "text": "Hi.", "colour": "red"}': "unknown field 'colour'",
    '{"id": "x", "text": "Hi.", "voice": "../anna"}': "at most 64 letters",
    '{"id": "x", "text": "Hi.", "voice": "nobody"}': "no voice is called 'nobody'",
    '{"id": "x", "text": "Hi.", "speaker": -1}': "speaker must be",
    '{"id": "x", "text": "Hi.", "speaker": true}': "speaker must be",
    '{"id": "x", "text": "Hi.", "seed": -1}': "seed must be",
    '{"id": "x", "text": "Hi.", "seed": 1.5}': "seed must be",
    '{"id": "x", "text": "Hi.", "temperature": "hot"}': "temperature must be",
    '{"id": "x", "text": "Hi.", "temperature": NaN}': "temperature must be",
    '{"id": "x", "text": "Hi.", "top_k": 0}': "top-k must be",
    '{"id": "x", "text": "Hi.", "top_k": 99999}': "top-k must be at most",
    '{"id": "x", "text": "Hi.", "max_seconds": 0}': "max_seconds must be",
    '{"id": "x", "text": "Hi.", "max_seconds": Infinity}': "max_seconds must be",
    '{"id": "x", "text": "Wait. [pause 0.5] Now."}': "is one utterance",
    '{"id": "x", "text": "caf\\ud800"}': "Unicode",
    '{"id": "ONE", "text": "Hi."}': "names the same file as that of line 1",
    json.dumps({"id": "x", "text": "word " * 3000}): "positions",
    "[" * 100_000: "not JSON",
}


def test_bad_lines_are_listed_and_the_rest_is_generated(folder, capsys):
    write([LINES[0], *(line.replace('"x"', f'"x{number}"') for number, line in enumerate(BAD_LINES)), LINES[5]])
    assert batch(folder / "out") == 1
    errors = entries_of(folder / "out" / "errors.jsonl")
    assert [error["line"] for error in errors] == list(range(2, 2 + len(BAD_LINES)))
    for error, expected in zip(errors, BAD_LINES.values(), strict=True):
        assert expected in error["error"]
    assert [entry["id"] for entry in entries_of(folder / "out" / "manifest.jsonl")] == ["one", "six"]
    printed = capsys.readouterr()
    assert f"2 lines generated, 0 were there, {len(BAD_LINES)} left out" in printed.out
    assert "line 2: not JSON" in printed.err and f"... and {len(BAD_LINES) - 10} more" in printed.err
    write([LINES[0], LINES[5]])  # mended
    assert batch(folder / "out") == 0
    assert not (folder / "out" / "errors.jsonl").exists()


@pytest.mark.parametrize("name", ["a", "7", "a.b-c_d", "größe", "x" * 100, "com10", "_"])
def test_good_ids(name):
    assert check_id(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "/etc/passwd",
            ".hidden",
            "-x",
            "a.",
            "a b",
            "a\n",
            "a:b",
            "a\0b",
            "nul",
            "COM1.x",
        ),
        *("x" * 101, "漢" * 90, None),
    ],
)
def test_bad_ids(name):
    with pytest.raises(LineError, match="id must be a file name without a path"):
        check_id(name)


def test_two_runs_do_not_share_a_folder(folder, capsys):
    write(LINES[:1])
    with Output(folder / "out"):
        assert batch(folder / "out") == 2
    assert "another batch is writing to it" in capsys.readouterr().err


def test_a_failed_request_is_listed(folder, monkeypatch, noisy):
    """An exception in a prefill ends that line alone."""
    write(LINES[:3])
    begin = type(noisy._worker_for(1).engine._prefill).begin

    def fail_once(prefill, state, slot, row_TC, mask_TC, params, ends):
        if params.seed == 7:
            raise RuntimeError("out of memory")
        return begin(prefill, state, slot, row_TC, mask_TC, params, ends)

    monkeypatch.setattr("csm.prefill.Prefill.begin", fail_once)
    assert batch(folder / "out") == 1
    assert entries_of(folder / "out" / "errors.jsonl") == [{"line": 2, "id": "two", "error": "out of memory"}]
    assert len(entries_of(folder / "out" / "manifest.jsonl")) == 2


def test_a_file_without_a_usable_line_changes_nothing(folder, capsys):
    for lines in ([], ["nonsense"], [{"id": "x", "text": "Hi.", "voice": "nobody"}]):
        write(lines)
        assert batch(folder / "out") == 2
        assert "no line can be spoken" in capsys.readouterr().err
        assert not (folder / "out").exists()
    with pytest.raises(CSMError, match=r"in\.jsonl"):
        read_lines(folder / "nowhere" / "in.jsonl")


def test_the_embedded_voice_in_a_batch(folder, tiny, capsys):
    """Its samples are those of a request alone."""
    write(
        [{"id": "a", "text": "Good morning, how are you?"}, {"id": "b", "text": "The weather was warm.", "speaker": 1}]
    )
    options = ["--model", "tiny", "--device", "cpu", "--quiet", "--metrics"]
    assert main(["batch", "in.jsonl", "out", *options, "--max-seconds", "1.2"]) == 0
    (alone,) = tiny.generate_batch(
        [SpeechRequest("The weather was warm.", 1, max_audio_length_ms=1200, seed=seed_of(0, "b"))]
    )
    expected = (alone.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()
    assert audio_of(folder / "out")["b.wav"][44:] == expected
    assert "metrics: RTF " in capsys.readouterr().out
