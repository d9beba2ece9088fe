"""Faults for ``tests/test_bad_inputs.py``: damaged files of every kind that a command reads, and paths that cannot be.

A fault is made by a function of the path that it is made at.
"""

import json
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_cli import nan_wav, tone, write_wav, zero_rate_wav

from conftest import tensors_of
from csm.voices import FORMAT, Voice, save_voice
from noise import NOISE

WEIGHTS = Path(NOISE) / "model.safetensors"


def text_file(content):
    return lambda path: path.write_text(content, encoding="utf-8")


def bytes_file(content):
    return lambda path: path.write_bytes(content)


def folder(path):
    path.mkdir()


def dangling_link(path):
    path.symlink_to("gone")


def link_to(name):
    return lambda path: path.symlink_to(name)


def zip_file(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


def manifest(*lines):
    return text_file("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


# --- recordings -----------------------------------------------------------------------------------------------------


def recording(seconds=1.0):
    return lambda path: write_wav(path, tone(int(24_000 * seconds)))


def no_samples(path):
    write_wav(path, b"")


# Messages of a recording ref.wav that cannot be read.
AUDIO = [
    ("ref.wav: no such file", {}),
    ("ref.wav: no such file", {"ref.wav": folder}),
    ("ref.wav: no such file", {"ref.wav": dangling_link}),
    ("ref.wav: cannot be decoded", {"ref.wav": bytes_file(b"")}),
    ("ref.wav: cannot be decoded", {"ref.wav": bytes_file(b"RIFFjunk")}),
    ("ref.wav: cannot be decoded", {"ref.wav": zip_file}),
    ("ref.wav: cannot be decoded", {"ref.wav": text_file("La la.")}),
    ("ref.wav: cannot be decoded", {"ref.wav": zero_rate_wav}),
]
SAMPLES = [("not finite", {"ref.wav": nan_wav}), ("empty", {"ref.wav": no_samples})]

# --- voices ---------------------------------------------------------------------------------------------------------

HOME = "home/voices/anna.safetensors"


def voice_file(num_codebooks=8, frames=6, largest=256):
    def make(path):
        codes = torch.randint(largest, (frames, num_codebooks), generator=torch.Generator().manual_seed(0))
        codes[0, 0] = largest - 1
        save_voice(Voice(path.stem, ("Hi.",), (codes,)), path)

    return make


def damaged_voice(tensors=None, **metadata):
    """A voice's file with other tensors, or other metadata; a value of None is left out."""

    def make(path):
        known = {"format": FORMAT, "name": path.stem, "texts": '["Hi."]', "speaker": "0"} | metadata
        known = {key: value for key, value in known.items() if value is not None}
        save_file(tensors or {"codes_0": torch.zeros(3, 8, dtype=torch.int32)}, path, known)

    return make


def codes(*shape, dtype=torch.int32, name="codes_0"):
    return {name: torch.zeros(*shape, dtype=dtype)}


ANNA = {HOME: voice_file()}
# What is said of a voice's file that is damaged.
VOICES = [
    ("cannot be read as a voice: .*header", bytes_file(b"\x08\0\0\0\0\0\0\0{broken}")),
    ("cannot be read as a voice", bytes_file(b"")),
    ("cannot be read as a voice", zip_file),
    ("cannot be read as a voice", bytes_file(b"\xff" * 7 + b"\x7f{}")),  # a header of 2^63 bytes
    ("cannot be read as a voice", lambda path: (voice_file()(path), path.write_bytes(path.read_bytes()[:-9]))),
    ("cannot be read as a voice|no voice is called", folder),
    ("cannot be read as a voice|no voice is called|No such file", dangling_link),
    ("its format is None", lambda path: save_file(codes(3, 8), path)),
    ("its format is 'csm-voice-99'", damaged_voice(format="csm-voice-99")),
    ("not a voice's file: 'texts'", damaged_voice(texts=None)),
    ("not a voice's file: Expecting value", damaged_voice(texts="Hi.")),
    ("texts are not a list of transcripts", damaged_voice(texts="[]")),
    ("texts are not a list of transcripts", damaged_voice(texts='["Hi.", 3]')),
    ("not a voice's file: invalid literal", damaged_voice(speaker="anna")),
    ("its speaker is -1", damaged_voice(speaker="-1")),
    ("it has 2 transcripts, but the tensors codes_0", damaged_voice(texts='["Hi.", "Ho."]')),
    ("it has 1 transcripts, but the tensors codes_1", damaged_voice(codes(3, 8, name="codes_1"))),
    (r"shape \(24,\)", damaged_voice(codes(24))),
    (r"shape \(0, 8\)", damaged_voice(codes(0, 8))),
    ("dtype torch.float32", damaged_voice(codes(3, 8, dtype=torch.float32))),
]
# What is said of a name that cannot be a voice's.
NAMES = [
    "../anna",
    "/etc/passwd",
    "a/b",
    "C:\\anna",
    "7",
    "a b",
    "",
    "x" * 65,
    ".hidden",
    "a\nb",
    "a\x1b[31m",
    "\U0001f600",
]
UNKNOWN = "no voice is called 'nobody'"

# --- checkpoints ----------------------------------------------------------------------------------------------------


def model(**files):
    """A copy of the checkpoint of random weights with other files; a value of None is left out."""

    def make(path):
        path.mkdir()
        makers = {name.replace("_", ".", 1): maker for name, maker in files.items()}
        for original in Path(NOISE).iterdir():
            if original.name not in makers:
                (path / original.name).symlink_to(original)
        for name, maker in makers.items():
            if maker is not None:
                maker(path / name)

    return make


def weights(change):
    def make(path):
        tensors = tensors_of(WEIGHTS)
        change(tensors)
        save_file(tensors, path)

    return model(model_safetensors=make)


def config(**values):
    def make(path):
        path.write_text(json.dumps(json.loads((Path(NOISE) / "config.json").read_text()) | values))

    return model(config_json=make)


def shard_index(*names):
    def make(path):
        path.mkdir()
        shutil.copyfile(Path(NOISE) / "config.json", path / "config.json")
        index = {"weight_map": dict(enumerate(names))}
        (path / "transformers.safetensors.index.json").write_text(json.dumps(index))

    return make


def header(length):
    return bytes_file(length.to_bytes(8, "little") + b"{}")


LM_HEAD = "lm_head.weight"
# The value of --model, what is said of it, and what is made.
CHECKPOINTS = [
    ("nowhere", "no folder 'nowhere'", {}),
    ("../nowhere", "no folder '../nowhere'", {}),
    ("a/b@main", "a/b: the checkpoint is not in the cache", {}),
    ("m", "m: no weights", {"m": folder}),
    ("m", "m is a file; pass the folder", {"m": text_file("")}),
    ("m", "m: no weights", {"m": model(model_safetensors=folder)}),
    ("m", "model.safetensors: truncated", {"m": model(model_safetensors=bytes_file(b""))}),
    ("m", "model.safetensors: truncated", {"m": model(model_safetensors=bytes_file(WEIGHTS.read_bytes()[:-9]))}),
    ("m", "model.safetensors: .*corrupt", {"m": model(model_safetensors=zip_file)}),
    ("m", "model.safetensors: .*corrupt", {"m": model(model_safetensors=header(2**62))}),
    ("m", "missing tensor lm_head", {"m": weights(lambda tensors: tensors.pop(LM_HEAD))}),
    ("m", r"lm_head.weight: expected shape", {"m": weights(lambda t: t.update({LM_HEAD: torch.zeros(1, 2)}))}),
    ("m", "unexpected tensor nose", {"m": weights(lambda tensors: tensors.update(nose=torch.zeros(2)))}),
    ("m", "missing tensor text_embeddings", {"m": model(model_safetensors=lambda path: save_file(codes(2), path))}),
    ("m", "config.json: ", {"m": model(config_json=None)}),
    ("m", "config.json: ", {"m": model(config_json=bytes_file(b"{\xff\xfe"))}),
    ("m", "config.json: .*object", {"m": model(config_json=text_file("[]"))}),
    ("m", "config.json: ", {"m": model(config_json=folder)}),
    ("m", "unknown key 'colour'", {"m": config(colour=["red"])}),
    ("m", "hidden_size: expected an integer, got nan", {"m": config(hidden_size=float("nan"))}),
    ("m", "expected shape|hidden_size|dim", {"m": config(hidden_size=10**30)}),
    ("m", "num_hidden_layers|num_layers", {"m": config(num_hidden_layers=-1)}),
    ("m", "shard names must be plain", {"m": shard_index("../a.safetensors")}),
    ("m", "a.safetensors: ", {"m": shard_index("a.safetensors")}),
    ("m.gguf", "m.gguf: no such file", {}),
    ("m.gguf", "m.gguf: .*GGUF|m.gguf: .*magic", {"m.gguf": text_file("not one")}),
    ("m.gguf", "m.gguf: .*truncated|m.gguf: .*ends", {"m.gguf": bytes_file(b"GGUF\3\0\0\0")}),
]
TOKENIZERS = [
    ("tokenizer.json: no such file", model(tokenizer_json=None)),
    ("tokenizer.json: ", model(tokenizer_json=bytes_file(b"\0\0\0"))),
    ("tokenizer.json: ", model(tokenizer_json=text_file("{}"))),
]
LOADED = [*CHECKPOINTS, *(("m", message, {"m": make}) for message, make in TOKENIZERS)]

# --- outputs --------------------------------------------------------------------------------------------------------

# The value of --out for an audio file, what is said of it, and what is made.
OUTPUTS = [
    ("no/such/a.wav", "a.wav: cannot be written: No such file", {}),
    ("file/a.wav", "a.wav: cannot be written: Not a directory", {"file": text_file("")}),
    ("here.wav", "is a folder", {"here.wav": folder}),
    ("/dev/full", "device or a pipe", {}),
    ("/proc/a.wav", "/proc/a.wav: cannot be written", {}),
    ("a.avi", "no audio format is called '.avi'", {}),
    ("x" * 300 + ".wav", "File name too long", {}),
]
