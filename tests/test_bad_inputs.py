"""Every command on bad inputs: exit code 2, one line on stderr that names the fault, and nothing changed on disk.

``tests/test_cli.py`` has more for generate.py alone, ``tests/test_batch.py`` those of single lines.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import nan_wav, tone, truncated, unknown_key, write_wav, zero_rate_wav

from csm.__main__ import COMMANDS, main
from csm.voices import Voice, save_voice
from micro import write_config
from noise import NOISE


def text_file(content):
    return lambda path: path.write_text(content, encoding="utf-8")


def bytes_file(content):
    return lambda path: path.write_bytes(content)


def folder(path):
    path.mkdir()


def recording(seconds=1.0):
    return lambda path: write_wav(path, tone(int(24_000 * seconds)))


def voice_file(num_codebooks=8, frames=6):
    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        codes = torch.randint(256, (frames, num_codebooks), generator=torch.Generator().manual_seed(0))
        save_voice(Voice(path.stem, ("Hi.",), (codes,)), path)

    return make


def broken_voice(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")


def tensors_without_metadata(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"codes_0": torch.zeros(3, 8, dtype=torch.int32)}, path)


def noise(path):
    shutil.copytree(NOISE, path)


def manifest(*lines):
    return text_file("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


WAV, ZERO = {"ref.wav": recording()}, {"ref.wav": bytes_file(b"")}
ANNA, HOME = {"home/voices/anna.safetensors": voice_file()}, "home/voices/anna.safetensors"
GENERATE = ["generate", "--model", NOISE, "--device", "cpu", "--quiet", "--max-seconds", "0.4", "--text", "Hi."]
SCRIPT = [*GENERATE[:-2], "--script", "talk.txt"]
ADD = ["voice", "add", "anna", "--model", NOISE, "--device", "cpu"]
REF = ["--ref", "ref.wav", "--ref-text", "La la."]
SAY = ["voice", "say", "anna", "--model", NOISE, "--device", "cpu", "--text", "Hi."]
BATCH = ["batch", "in.jsonl", "out", "--model", NOISE, "--device", "cpu", "--quiet"]
LINE = {"in.jsonl": manifest({"id": "a", "text": "Hi."})}
SERVE = ["serve", "--model", NOISE, "--device", "cpu", "--port", "0"]
QUANTIZE = ["quantize", NOISE, "--quiet", "--out", "out", "--scheme"]
COMPARE = ["compare", "--quiet", NOISE]
EVAL = ["eval", "--model", NOISE, "--device", "cpu", "--quiet"]
SENTENCES = {"s.txt": text_file("Good morning.\n")}
FINETUNE = ["finetune", "--model", NOISE, "--device", "cpu", "--quiet", "--data", "data.jsonl", "--out", "run"]
DATA = {"data.jsonl": manifest({"audio": "ref.wav", "text": "La la.", "speaker": 0}), **WAV}
NO_MODEL = ["--model", "nowhere"]

# Command line, what the one line on stderr says, and what is made in the folder beforehand.
GENERATE_ROWS = [
    (["--voice", "nobody"], "no voice is called 'nobody'", {}),
    (["--voice", "../anna"], "at most 64 letters", ANNA),
    (["--voice", "anna"], "cannot be read as a voice", {HOME: broken_voice}),
    (["--voice", "anna"], "not a voice's file", {HOME: tensors_without_metadata}),
    (["--voice", "anna"], "made for another model", {HOME: voice_file(num_codebooks=4)}),
    (["--voice", "anna"], "positions", {HOME: voice_file(frames=2100)}),
    (["--voice", "anna", *REF], "exclude each other", ANNA | WAV),
    (REF, "cannot be decoded", ZERO),
    ([*REF, "--speaker", "-1"], "speaker", WAV),
    (["--srt", "no/such/a.srt"], "cannot be written", {}),
    (["--vtt", "here"], "cannot be written", {"here": folder}),
    (["--stream-to", "no/such/pipe"], "cannot be written", {}),
    (["--stream-format", "mp4"], "--stream-format", {}),
    (["--lora", "adapter"], "adapter", {}),
    (["--lora", "adapter", "--quantize", "int8"], "adapter", {"adapter": folder}),
    (["--quantize", "int3"], "int3", {}),
    (["--quantize", "nose=int4"], "nose", {}),
    (["--threads", "0"], "threads", {}),
    (["--threads", "many"], "--threads", {}),
    (["--context-turns", "-1"], "max_turns", {}),
    (["--watermark", "sonic"], "--watermark", {}),
    (["--text", "Wait. [pause soon] Now."], "pause", {}),
    (["--text", "Wait. [pause 1e9] Now."], "pause", {}),
    (["--text", "Wait. [pause -1] Now."], "pause", {}),
    (["--model", "m"], "truncated", {"m": truncated}),
    (["--model", "m"], "no weights", {"m": folder}),
    (["--model", "m"], "unknown key", {"m": unknown_key}),
    (["--codec", "ref.wav"], "ref.wav", WAV),
]
SCRIPT_ROWS = [
    (["--script", "nowhere.txt"], "nowhere.txt", {}),
    ([], "nobody speaks it", {"talk.txt": text_file("Hello.")}),
    ([], "no voice is called 'nobody'", {"talk.txt": text_file("[nobody] Hello.")}),
    ([], "at most 64 letters", {"talk.txt": text_file("[../x] Hello.")}),
    ([], "line 2", {"talk.txt": text_file("[0] Hello.\n[pause x]")}),
    ([], "no text", {"talk.txt": text_file("# a comment\n[0]")}),
    ([], "cannot be read as text", {"talk.txt": bytes_file(b"\xff\xfe\xfa")}),
]
ADD_ROWS = [
    *(
        (["voice", "add", name, *ADD[3:], *REF], "at most 64 letters", WAV)
        for name in ("../x", "a/b", "7", "a b", "", "x" * 65, ".hidden")
    ),
    (ADD, "0 --ref and 0 --ref-text", {}),
    ([*ADD, *REF, "--ref", "ref.wav"], "2 --ref and 1 --ref-text", WAV),
    ([*ADD, *REF, "--ref-text", "More."], "1 --ref and 2 --ref-text", WAV),
    (["voice", "add", "anna", *REF], "--model is missing", WAV),
    ([*ADD, *REF], "ref.wav: no such file", {}),
    ([*ADD, *REF], "cannot be decoded", ZERO),
    ([*ADD, *REF], "cannot be decoded", {"ref.wav": bytes_file(b"RIFFjunk")}),
    ([*ADD, *REF], "cannot be decoded", {"ref.wav": zero_rate_wav}),
    ([*ADD, *REF], "no such file", {"ref.wav": folder}),
    ([*ADD, *REF], "not finite", {"ref.wav": nan_wav}),
    ([*ADD, *REF], "empty", {"ref.wav": lambda path: write_wav(path, b"")}),
    ([*ADD, *REF], "2048", {"ref.wav": recording(200)}),
    ([*ADD, *REF], "leave room for", {"ref.wav": recording(150)}),
    ([*ADD, "--ref", "ref.wav", "--ref-text", " "], "text is empty", WAV),
    ([*ADD, *REF, "--speaker", "-1"], "speaker", WAV),
    ([*ADD, *REF, "--speaker", "x"], "--speaker", WAV),
    ([*ADD, *REF], "there is a voice of this name", ANNA | WAV),
    ([*ADD, *REF, *NO_MODEL], "nowhere", WAV),
    ([*ADD, *REF, "--device", "abacus"], "abacus", WAV),
    ([*ADD, "--file", "gone.safetensors"], "gone.safetensors", {}),
    ([*ADD, "--file", "a.safetensors"], "cannot be read as a voice", {"a.safetensors": broken_voice}),
    ([*ADD, "--file", "a.safetensors"], "not a voice's file", {"a.safetensors": tensors_without_metadata}),
    ([*ADD, "--file", "a.safetensors", *REF], "goes without", {"a.safetensors": voice_file(), **WAV}),
]
VOICE_ROWS = [
    (["voice"], "required", {}),
    (["voice", "sing"], "sing", {}),
    (["voice", "list", *NO_MODEL], "nowhere", {}),
    (["voice", "list"], "cannot be read as a voice", {HOME: broken_voice}),
    (["voice", "list", "--colour"], "--colour", {}),
    (["voice", "show"], "required", {}),
    (["voice", "show", "nobody"], "no voice is called", ANNA),
    (["voice", "show", "../anna"], "at most 64 letters", ANNA),
    (["voice", "show", "anna"], "cannot be read as a voice", {HOME: broken_voice}),
    (["voice", "remove", "nobody"], "no such voice", ANNA),
    (["voice", "remove", "../voices/anna"], "at most 64 letters", ANNA),
    (["voice", "export", "anna"], "--out", ANNA),
    (["voice", "export", "nobody", "--out", "x.safetensors"], "no voice is called", ANNA),
    (["voice", "export", "anna", "--out", "x.wav"], "ends in .safetensors", ANNA),
    (["voice", "export", "anna", "--out", "7.safetensors"], "at most 64 letters", ANNA),
    (["voice", "export", "anna", "--out", "file/x.safetensors"], "cannot be written", ANNA | {"file": text_file("")}),
    (["voice", "say", "anna"], "--text", ANNA),
    (["voice", "say", "anna", "--text", "Hi."], "--model is missing", ANNA),
    (SAY, "no voice is called", {}),
    ([*SAY, "--text", " "], "empty", ANNA),
    ([*SAY, "--seed", "-1"], "seed", ANNA),
    ([*SAY, "--seed", "x"], "--seed", ANNA),
    ([*SAY, "--max-seconds", "0"], "limit must be at least", ANNA),
    ([*SAY, "--max-seconds", "nan"], "limit must be at least", ANNA),
    ([*SAY, "--out", "no/such.wav"], "cannot be written", ANNA),
    ([*SAY, "--out", "hi.avi"], "no audio format is called '.avi'", ANNA),
    ([*SAY, "--out", "home"], "is a folder", ANNA),
    ([*SAY, "--device", "abacus"], "abacus", ANNA),
    ([*SAY, *NO_MODEL], "nowhere", ANNA),
]
BATCH_ROWS = [
    (["batch"], "required", {}),
    (["batch", "in.jsonl"], "required", LINE),
    ([*BATCH, "--colour"], "--colour", LINE),
    (BATCH, "in.jsonl: cannot be read", {}),
    (BATCH, "in.jsonl: cannot be read", {"in.jsonl": folder}),
    (BATCH, "cannot be read as text", {"in.jsonl": bytes_file(b"\xff\xfe\xfa")}),
    (BATCH, "the file is empty", {"in.jsonl": text_file("\n\n")}),
    (BATCH, "line 1: not JSON", {"in.jsonl": text_file("Hello.\n")}),
    (BATCH, "line 1: not an object", {"in.jsonl": manifest([])}),
    (BATCH, "without a path", {"in.jsonl": manifest({"id": "../a", "text": "Hi."})}),
    (BATCH, "text is missing", {"in.jsonl": manifest({"id": "a"})}),
    (BATCH, "unknown field 'txt'", {"in.jsonl": manifest({"id": "a", "txt": "Hi."})}),
    (BATCH, "no voice is called", {"in.jsonl": manifest({"id": "a", "text": "Hi.", "voice": "nobody"})}),
    (BATCH, "at most 64 letters", {"in.jsonl": manifest({"id": "a", "text": "Hi.", "voice": "../anna"})}),
    (BATCH, "is no entry of a batch", {**LINE, "out/manifest.jsonl": manifest("nonsense")}),
    (BATCH, "is no entry of a batch", {**LINE, "out/manifest.jsonl": manifest({"id": "a", "text": "Theirs."})}),
    (BATCH, "is no manifest of a batch", {**LINE, "out/manifest.jsonl": text_file('["theirs, without an end"]')}),
    (["batch", "out/manifest.jsonl", "out"], "would be overwritten", {"out/manifest.jsonl": manifest({"id": "a"})}),
    (BATCH, "is not a folder", {**LINE, "out": text_file("")}),
    ([*BATCH, "--slots", "0"], "--slots must be", LINE),
    ([*BATCH, "--slots", "9999"], "--slots must be", LINE),
    ([*BATCH, "--slots", "x"], "--slots", LINE),
    ([*BATCH, "--seed", "-1"], "seed", LINE),
    ([*BATCH, "--max-seconds", "0"], "max_seconds", LINE),
    ([*BATCH, "--max-seconds", "nan"], "max_seconds", LINE),
    ([*BATCH, "--watermark", "sonic"], "--watermark", LINE),
    ([*BATCH, *NO_MODEL], "nowhere", LINE),
    ([*BATCH, "--device", "abacus"], "abacus", LINE),
    ([*BATCH, "--dtype", "int3"], "--dtype", LINE),
    ([*BATCH, "--quantize", "int3"], "int3", LINE),
    ([*BATCH, "--lora", "adapter"], "adapter", LINE),
    ([*BATCH, "--codec", "gone"], "gone", LINE),
    ([*BATCH, "--threads", "0"], "threads", LINE),
]
WATERMARK_ROWS = [
    (["watermark"], "required", {}),
    (["watermark", "ref.wav"], "ref.wav: no such file", {}),
    (["watermark", "here"], "no such file", {"here": folder}),
    (["watermark", "ref.wav"], "cannot be decoded", ZERO),
    (["watermark", "ref.wav"], "cannot be decoded", {"ref.wav": bytes_file(b"RIFFjunk")}),
    (["watermark", "ref.wav"], "cannot be decoded", {"ref.wav": zero_rate_wav}),
    (["watermark", "a.m4a"], "a.m4a: cannot be decoded", {"a.m4a": bytes_file(b"")}),
    (["watermark", "a.opus"], "a.opus: cannot be decoded", {"a.opus": text_file("junk")}),
    (["watermark", "ref.wav", "gone.wav"], "gone.wav: no such file", WAV),
    (["watermark", "ref.wav", "--watermark", "sonic"], "--watermark", WAV),
    (["watermark", "ref.wav", "--colour"], "--colour", WAV),
]
SERVE_ROWS = [
    ([*SERVE, "--port", "-1"], "port", {}),
    ([*SERVE, "--port", "70000"], "port", {}),
    ([*SERVE, "--port", "x"], "--port", {}),
    ([*SERVE, "--max-streams", "0"], "max_streams", {}),
    ([*SERVE, "--max-streams", "x"], "--max-streams", {}),
    ([*SERVE, "--max-queue", "-1"], "max_queue", {}),
    ([*SERVE, "--max-seconds", "0"], "max_seconds", {}),
    ([*SERVE, "--max-seconds", "nan"], "max_seconds", {}),
    ([*SERVE, "--request-timeout", "0"], "request_timeout", {}),
    ([*SERVE, "--request-timeout", "nan"], "request_timeout", {}),
    ([*SERVE, "--request-timeout", "inf"], "request_timeout", {}),
    ([*SERVE, "--unload-after", "-1"], "unload_after", {}),
    ([*SERVE, "--unload-after", "nan"], "unload_after", {}),
    ([*SERVE, "--api-key", " key"], "API key", {}),
    ([*SERVE, "--api-key", "schlüssel"], "API key", {}),
    ([*SERVE, "--api-key-file", "gone"], "API keys cannot be read", {}),
    ([*SERVE, "--api-key-file", "keys"], "no API key", {"keys": text_file("# none\n")}),
    ([*SERVE, "--api-key-file", "keys"], "API keys cannot be read", {"keys": bytes_file(b"\xff\xfa")}),
    ([*SERVE, "--voices", "file"], "cannot be made", {"file": text_file("")}),
    ([*SERVE, "--voices", "file/voices"], "cannot be made", {"file": text_file("")}),
    ([*SERVE, "--watermark", "sonic"], "--watermark", {}),
    ([*SERVE, "--watermark-for", "nobody"], "--watermark-for", {}),
    ([*SERVE, *NO_MODEL], "nowhere", {}),
    ([*SERVE, "--lora", "adapter"], "adapter", {}),
    ([*SERVE, "--device", "abacus"], "abacus", {}),
    ([*SERVE, "--colour"], "--colour", {}),
]
MODEL_ROWS = [
    ([], "required", {}),
    (["sing"], "sing", {}),
    (["quantize"], "required", {}),
    (["quantize", NOISE, "--out", "out"], "--scheme", {}),
    (["quantize", NOISE, "--scheme", "int8"], "--out", {}),
    ([*QUANTIZE, "int3"], "int3", {}),
    ([*QUANTIZE, ""], "quantisation", {}),
    ([*QUANTIZE, "backbone=int9"], "int9", {}),
    ([*QUANTIZE, "nose=int4"], "nose", {}),
    ([*QUANTIZE, "depth=int4,depth=int8"], "depth", {}),
    ([*QUANTIZE, "int8", "--dtype", "int3"], "--dtype", {}),
    ([*QUANTIZE, "int8", "--colour"], "--colour", {}),
    ([*QUANTIZE, "int8"], "out", {"out": text_file("")}),
    (["quantize", "m", "--scheme", "int8", "--out", "./m"], "is the folder of the model that is read", {"m": noise}),
    (["quantize", "nowhere", *QUANTIZE[2:], "int8"], "nowhere", {}),
    (["quantize", "m", *QUANTIZE[2:], "int8"], "truncated", {"m": truncated}),
    (["quantize", "m", *QUANTIZE[2:], "int8"], "unknown key", {"m": unknown_key}),
    (["quantize", "m", *QUANTIZE[2:], "int8"], "no weights", {"m": folder}),
    (["compare"], "required", {}),
    (["compare", "nowhere"], "nowhere", {}),
    ([*COMPARE, "nowhere"], "nowhere", {}),
    ([*COMPARE, "tiny"], "different shapes", {}),
    ([*COMPARE, "--scheme", "int3"], "int3", {}),
    ([*COMPARE, "--dtype", "int3"], "--dtype", {}),
    ([*COMPARE, "--colour"], "--colour", {}),
    ([*COMPARE, "m"], "truncated", {"m": truncated}),
    ([*COMPARE, "m"], "no weights", {"m": folder}),
    (["doctor", "--colour"], "--colour", {}),
    (["doctor", "me"], "me", {}),
]
EVAL_ROWS = [
    (["eval"], "required", {}),
    (["eval", "--sentences", "s.txt"], "nothing to evaluate", SENTENCES),
    (["eval", "--sentences", "s.txt", "--data", "d"], "not allowed", SENTENCES),
    ([*EVAL, "--sentences", "gone.txt"], "gone.txt", {}),
    ([*EVAL, "--sentences", "s.txt"], "cannot be read", {"s.txt": bytes_file(b"\xff\xfa")}),
    ([*EVAL, "--sentences", "s.txt"], "no sentences", {"s.txt": text_file("\n\n")}),
    ([*EVAL, "--sentences", "s.txt"], "no word to recognise", {"s.txt": text_file("Good.\n?!\n")}),
    ([*EVAL, "--sentences", "s.txt", "--recordings"], "need recordings", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--codec"], "need recordings", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--ref-text", "La."], "--ref-text", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--seeds", "0"], "--seeds must be", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--batch", "0"], "--batch must be", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--limit", "-1"], "--limit must be", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--limit", "x"], "--limit", SENTENCES),
    ([*EVAL, "--sentences", "s.txt", "--colour"], "--colour", SENTENCES),
    (["eval", "--data", "data.jsonl", "--codec", "--quiet"], "codec", DATA),
    (["eval", "--data", "gone", "--recordings", "--quiet"], "gone", {}),
    (["eval", "--data", "data.jsonl", "--recordings", "--quiet"], "data.jsonl", {"data.jsonl": text_file("")}),
    (["eval", "--data", "data.jsonl", "--recordings", "--quiet"], "data.jsonl:1: ", {"data.jsonl": text_file("x\n")}),
    (["eval", "--data", "data.jsonl", "--recordings", "--quiet"], "ref.wav", DATA | ZERO),
]
FINETUNE_ROWS = [
    (["finetune"], "--data", {}),
    ([*FINETUNE], "data.jsonl", {}),
    ([*FINETUNE], "data.jsonl", {"data.jsonl": text_file("")}),
    ([*FINETUNE], "data.jsonl", {"data.jsonl": text_file("nonsense\n")}),
    ([*FINETUNE], "ref.wav", {"data.jsonl": DATA["data.jsonl"]}),
    ([*FINETUNE], "ref.wav", DATA | ZERO),
    ([*FINETUNE, *NO_MODEL], "nowhere", DATA),
    *(
        ([*FINETUNE, option, value], option, DATA)
        for option, value in (
            *(("--steps", "0"), ("--steps", "x"), ("--batch-size", "0"), ("--batch-rows", "0")),
            *(("--grad-accum-steps", "0"), ("--learning-rate", "nan"), ("--learning-rate", "-1"), ("--warmup", "-1")),
            *(("--schedule", "zigzag"), ("--min-lr-ratio", "-1"), ("--beta1", "1"), ("--beta2", "-1")),
            *(("--weight-decay", "inf"), ("--depth-share", "0"), ("--depth-share", "2"), ("--code-noise", "1")),
            *(("--precision", "int3"), ("--ema", "1"), ("--keep", "0"), ("--eval-every", "-1"), ("--colour", "red")),
        )
    ),
    ([*FINETUNE, "--lora", "--rank", "0"], "rank", DATA),
    ([*FINETUNE, "--lora", "--targets", "nose"], "--targets", DATA),
    ([*FINETUNE, "--lora", "--config", "c.json"], "give only one", DATA | {"c.json": write_config}),
    ([*FINETUNE, "--config", "gone.json"], "gone.json", DATA),
    ([*FINETUNE, "--device", "abacus"], "abacus", DATA),
]
ROWS = [
    *(([*GENERATE, *args], message, made) for args, message, made in GENERATE_ROWS),
    *(([*SCRIPT, *args], message, made) for args, message, made in SCRIPT_ROWS),
    *(([name, "--no-such-option"], "--no-such-option|required", {}) for name, _, _ in COMMANDS),
    *(ADD_ROWS + VOICE_ROWS + BATCH_ROWS + WATERMARK_ROWS + SERVE_ROWS + MODEL_ROWS + EVAL_ROWS + FINETUNE_ROWS),
]


def snapshot(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def show(row):
    words = [word.replace(str(Path(NOISE)), "NOISE")[:20] for word in row[0]]
    return re.sub(r"[^\w.-]+", " ", " ".join(words))


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
    code = main(args)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    if "correct or remove these lines:" not in printed.err:  # of a manifest, every bad line is listed
        assert len(printed.err.splitlines()) == 1, printed.err
    assert "error: " in printed.err and "Traceback" not in printed.err
    assert re.search(message, printed.err), printed.err
    assert snapshot(tmp_path) == before


def test_every_command_has_rows():
    rows = {name: sum(args[:1] == [name] for args, _, _ in ROWS) for name, _, _ in COMMANDS}
    assert all(rows.values()), rows
    assert len(ROWS) >= 200


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
