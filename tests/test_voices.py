"""Voices: files, names, the command, and that a loaded voice needs neither the codec nor, again, its prompt."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from safetensors.torch import save_file

from csm import Generator, Segment, SpeechRequest, Voice, VoiceError, VoiceFileError
from csm.__main__ import main
from csm.voices import SESAME_PROMPTS, data_folder, find_voice, load_voice, save_voice, voice_files, voices_folder
from noise import NOISE

RNG = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test sees or changes the voices of whoever runs it."""
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def some_voice(name="anna", frames=(9, 12), num_codebooks=8):
    codes = tuple(torch.randint(256, (count, num_codebooks), generator=RNG) for count in frames)
    return Voice(name, tuple(f"Clip {index}." for index in range(len(frames))), codes, 2, "Anna agreed, in writing.")


def write_recording(path, seconds=1.0, rate=24_000):
    sphn.write_wav(str(path), (np.sin(np.arange(int(seconds * rate)) / 20) / 4).astype("float32"), rate)
    return path


def test_a_file_keeps_everything(home):
    voice = some_voice()
    save_voice(voice, voices_folder() / "anna.safetensors")
    loaded = load_voice(find_voice("anna"))
    assert (loaded.name, loaded.texts, loaded.speaker, loaded.consent) == (
        *("anna", voice.texts, 2, "Anna agreed, in writing."),
    )
    assert all(torch.equal(one, two) for one, two in zip(voice.codes, loaded.codes, strict=True))
    assert [path.name for path in voices_folder().iterdir()] == ["anna.safetensors"]
    assert voices_folder() == home / "voices"


def test_a_renamed_file_is_another_voice():
    save_voice(some_voice("anna"), voices_folder() / "bea.safetensors")
    assert load_voice(find_voice("bea")).name == "bea"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        "a\0b",
        "x" * 65,
        ".hidden",
        "-x",
        "a b",
        "7",
        "a\n",
        None,
        "\N{GOTHIC LETTER AHSA}" * 51,
    ],
)
def test_bad_names(name):
    with pytest.raises(VoiceError, match="at most 64 letters"):
        find_voice(name)


def test_the_data_folder_of_each_platform(monkeypatch):
    monkeypatch.delenv("CSM_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    folders = {"linux": ".local/share/csm", "darwin": "Library/Application Support/csm", "win32": "AppData/Local/csm"}
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for platform, folder in folders.items():
        monkeypatch.setattr("sys.platform", platform)
        assert data_folder() == Path.home() / folder


def test_a_voice_is_its_clips_as_context(noisy):
    voice = some_voice()
    save_voice(voice, voices_folder() / "anna.safetensors")
    options = dict(max_audio_length_ms=400, temperature=0.0)
    expected = noisy.generate_codes("Hello.", 3, voice.segments(3), **options)
    assert [segment.speaker for segment in voice.segments()] == [2, 2]
    for named in ("anna", voice):
        assert torch.equal(noisy.generate_codes("Hello.", 3, voice=named, **options), expected)
        request = SpeechRequest("Hello.", 3, voice=named, **options)
        assert torch.equal(noisy.generate_codes_batch([request, dict(text="Hi.", **options)])[0], expected)
    context = [Segment(1, "Before.", codes=torch.zeros(3, 8, dtype=torch.int64))]
    continued = noisy.generate_codes("Hello.", 3, context, voice="anna", **options)
    assert torch.equal(continued, noisy.generate_codes("Hello.", 3, [*voice.segments(3), *context], **options))
    audio = noisy.generate("Hello.", 3, voice="anna", **options)
    assert torch.equal(audio, torch.cat(list(noisy.stream("Hello.", 3, voice="anna", **options))))
    assert audio.shape == (5 * 1920,)


def test_neither_the_codec_nor_the_prompt_runs_again(monkeypatch):
    generator = Generator.from_pretrained(NOISE, device="cpu")
    save_voice(some_voice(frames=(300, 100)), voices_folder() / "anna.safetensors")
    monkeypatch.setattr("csm.codec.Codec.encode", lambda *_: pytest.fail("the codec encoded"))
    found = []
    load = generator._prefix_cache.load
    monkeypatch.setattr(generator._prefix_cache, "load", lambda *args: found.append(load(*args)) or found[-1])
    for text in ("One.", "Another."):
        generator.generate("Hello." + text, 0, voice="anna", max_audio_length_ms=80)
    clips = sum(generator.num_positions(segment) for segment in load_voice(find_voice("anna")).segments(0))
    assert found == [0, clips]


def test_a_changed_file_is_read_again(noisy):
    path = voices_folder() / "anna.safetensors"
    save_voice(some_voice(), path)
    first = noisy.voice("anna")
    assert noisy.voice("anna") is first
    save_voice(some_voice(frames=(4,)), path)
    assert noisy.voice("anna").num_frames == 4


def test_voices_beside_the_checkpoint(tmp_path):
    folder = tmp_path / "model"
    save_voice(some_voice("bea"), folder / "voices" / "bea.safetensors")
    save_voice(some_voice("anna"), folder / "voices" / "anna.safetensors")
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    (folder / "prompts").mkdir()
    write_recording(folder / "prompts" / "read_speech_c.wav")
    files = voice_files(folder)
    assert list(files) == ["anna", "bea", "read_speech_c"]
    assert files["anna"].parent == voices_folder()  # one's own comes first


def test_say_does_not_overwrite_the_prompt_that_it_speaks_in(tmp_path, capsys):
    folder = shutil.copytree(NOISE, tmp_path / "model")
    prompt = folder / "prompts" / "read_speech_c.wav"
    prompt.parent.mkdir()
    write_recording(prompt)
    before = prompt.read_bytes()
    say = ["voice", "say", "read_speech_c", "--text", "Hi.", "--model", str(folder), "--device", "cpu"]
    assert main([*say, "--out", str(prompt)]) == 2
    assert "would overwrite a file that is read (the voice)" in capsys.readouterr().err
    assert prompt.read_bytes() == before


def test_sesames_prompts(noisy, tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    write_recording(tmp_path / "prompts" / "conversational_b.wav", rate=44_100)
    monkeypatch.setattr(
        noisy, "_checkpoint", noisy._checkpoint.__class__(**vars(noisy._checkpoint) | {"folder": tmp_path})
    )
    voice = noisy.voice("conversational_b")
    assert (voice.speaker, voice.codes[0].shape) == (1, (13, 8))
    assert noisy.voice("conversational_b") is voice


def test_the_transcript_of_prompt_a_has_the_published_number_of_tokens(llama_tokenizer):
    """111 text rows for conversational_a: measured with Sesame's reference implementation."""
    assert len(llama_tokenizer(f"[0]{SESAME_PROMPTS['conversational_a']}")) + 2 == 111


@pytest.fixture
def llama_tokenizer():
    tokenizer = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance()
    return lambda text: tokenizer.encode(text, bos=False, eos=False)


# The command


def test_the_life_of_a_voice(capsys, tmp_path):
    one, two = write_recording(tmp_path / "one.wav"), write_recording(tmp_path / "two.wav", 0.5, 44_100)
    add = ["voice", "add", "anna", "--model", NOISE, "--device", "cpu", "--consent", "It is a tone."]
    assert main([*add, "--ref", str(one), "--ref-text", "La.", "--ref", str(two), "--ref-text", "Lo."]) == 0
    line = f"anna: 2 clips, 1.60 s, speaker 0, {voices_folder() / 'anna.safetensors'}\n"
    assert capsys.readouterr().out == line
    assert main(["voice", "list"]) == 0
    assert capsys.readouterr().out == line
    assert main(["voice", "show", "anna"]) == 0
    assert capsys.readouterr().out == f"{line}consent: It is a tone.\n  La.\n  Lo.\n"
    say = ["voice", "say", "anna", "--text", "I am 3.", "--model", NOISE, "--device", "cpu", "--max-seconds", "0.4"]
    assert main(say) == 0
    assert capsys.readouterr().out == "out.wav: 0.40 s of audio in the voice anna\n"
    samples, _ = sphn.read("out.wav")
    generator = Generator.from_pretrained(NOISE, device="cpu")
    spoken = generator.generate("I am three.", voice="anna", max_audio_length_ms=400, seed=0)
    assert np.abs(samples[0] - spoken.numpy().clip(-1, 1)).max() < 1e-3
    export = ["voice", "export", "anna", "--out", "copy.safetensors"]
    assert main(export) == 0
    Path("copy.safetensors").write_text("something else")
    assert main(export) == 2
    assert Path("copy.safetensors").read_text() == "something else"
    assert main([*export, "--replace"]) == 0
    assert main(["voice", "remove", "anna", "--model", "nobody/no-model"]) == 0  # no checkpoint is opened
    assert voice_files() == {}
    assert main(["voice", "add", "bea", "--file", "copy.safetensors"]) == 0
    assert load_voice(find_voice("bea")).consent == "It is a tone."
    capsys.readouterr()
    assert main(["voice", "remove", "bea"]) == 0
    assert main(["voice", "list"]) == 0
    assert "no voices in" in capsys.readouterr().out


def test_a_file_that_is_no_voice_does_not_end_the_list(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own
    for name in ("anna", "zoe"):
        save_voice(some_voice(), voices_folder() / f"{name}.safetensors")
    (voices_folder() / "bad.safetensors").write_bytes(b"not a voice")
    assert main(["voice", "list"]) == 0
    listed = capsys.readouterr()
    assert [line.split(":")[0] for line in listed.out.splitlines()] == ["anna", "zoe"]
    (line,) = listed.err.splitlines()
    assert f"skipped: {voices_folder() / 'bad.safetensors'}: cannot be read as a voice" in line
    assert main(["voice", "show", "bad"]) == 2
    assert "bad.safetensors: cannot be read as a voice" in capsys.readouterr().err


def test_a_list_of_files_that_are_no_voices_is_an_error(capsys):
    voices_folder().mkdir(parents=True)
    for name in ("bad", "worse"):
        (voices_folder() / f"{name}.safetensors").write_bytes(b"not a voice")
    assert main(["voice", "list"]) == 2
    listed = capsys.readouterr()
    assert listed.out == "" and len(listed.err.splitlines()) == 1
    for name in ("bad", "worse"):
        assert f"{name}.safetensors: cannot be read as a voice" in listed.err


@pytest.mark.parametrize("texts", ["not JSON", "[" * 100_000, "[]"])
def test_a_file_with_other_contents_is_named(texts):
    metadata = {"format": "csm-voice-1", "texts": texts, "speaker": "0"}
    path = voices_folder() / "bad.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"codes_0": torch.ones(3, 8, dtype=torch.int32)}, path, metadata)
    with pytest.raises(VoiceFileError, match="bad.safetensors: not a voice's file"):
        load_voice(path)


def test_a_voice_is_said_into_a_file_of_any_format():
    save_voice(some_voice(), voices_folder() / "anna.safetensors")
    say = ["voice", "say", "anna", "--text", "Hi.", "--model", NOISE, "--device", "cpu", "--max-seconds", "0.4"]
    assert main([*say, "--out", "hi.flac"]) == 0
    assert Path("hi.flac").read_bytes()[:4] == b"fLaC"


class Hears:
    """A recogniser that hears the same in every recording."""

    def __init__(self, text):
        self._text = text

    def __call__(self):
        return self

    def transcribe(self, audio, sample_rate):
        return self._text


ADD_ONE = ["voice", "add", "anna", "--ref", "one.wav", "--model", NOISE, "--device", "cpu"]


def test_a_transcript_is_guessed_and_said_to_be(monkeypatch, capsys, tmp_path):
    write_recording(tmp_path / "one.wav")
    monkeypatch.setattr("csm.voice_command.Recogniser", Hears("La la."))
    assert main([*ADD_ONE, "--ref", "one.wav"]) == 0
    guess = "transcript guessed by a speech recogniser:\n  La la.\n  La la.\n"
    assert capsys.readouterr().out.endswith(f"{guess}if it is wrong: --replace, with --ref-text\n")
    assert main(["voice", "show", "anna"]) == 0
    assert guess in capsys.readouterr().out
    assert main(["voice", "export", "anna", "--out", "copy.safetensors"]) == 0
    assert load_voice(Path("copy.safetensors")).guessed
    assert main([*ADD_ONE, "--replace", "--ref-text", "La la la."]) == 0
    assert main(["voice", "show", "anna"]) == 0
    assert "guessed" not in capsys.readouterr().out.split("consent")[-1]


def test_a_transcript_that_cannot_be_guessed(monkeypatch, capsys, tmp_path):
    write_recording(tmp_path / "one.wav")
    monkeypatch.setattr("csm.voice_command.Recogniser", Hears(" "))
    assert main(ADD_ONE) == 2
    assert "one.wav: no speech was recognised in it; give what is said in it with --ref-text" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "moonshine_voice", None)
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    assert main([*ADD_ONE[:3], "--ref", str(tmp_path / "one.wav"), *ADD_ONE[5:]]) == 2
    printed = capsys.readouterr().err
    assert "--ref-text is missing, and cannot be guessed" in printed and "pip install 'csm[eval]'" in printed
    assert not (tmp_path / "home").exists()


def voice_file(name, change=lambda tensors, metadata: None):
    """Writes a voice's file with something wrong in it."""

    def write():
        metadata = {"format": "csm-voice-1", "name": name, "texts": json.dumps(["La."]), "speaker": "0", "consent": ""}
        tensors = {"codes_0": torch.zeros(4, 8, dtype=torch.int32)}
        change(tensors, metadata)
        voices_folder().mkdir(parents=True, exist_ok=True)
        save_file(tensors, voices_folder() / f"{name}.safetensors", metadata)

    return write


def raw(path, content):
    def write():
        target = voices_folder() / path if path.endswith(".safetensors") else Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    return write


REF = ["--ref", "a.wav", "--ref-text", "La."]
TONE = lambda seconds=1.0: lambda: write_recording(Path("a.wav"), seconds)  # noqa: E731
ADD = ["add", "anna", *REF, "--model", NOISE]
SAY = ["say", "anna", "--text", "Hi.", "--model", NOISE]
BAD = {
    "no action": ([], "required", None),
    "an unknown action": (["sing"], "invalid choice", None),
    "a name with ../": (["add", "../anna", *REF], "at most 64 letters", TONE()),
    "a name with NUL": (["show", "a\0b"], "at most 64 letters", None),
    "a long name": (["remove", "x" * 65], "at most 64 letters", None),
    "a name that is a number": (["add", "7", *REF], "at most 64 letters", TONE()),
    "an absolute path": (["export", "/etc/passwd", "--out", "x.safetensors"], "at most 64 letters", None),
    "no recording": (["add", "anna", "--model", NOISE], "0 --ref and 0 --ref-text", None),
    "a missing transcript": ([*ADD, "--ref", "a.wav"], "2 --ref and 1 --ref-text", TONE()),
    "no model": (["add", "anna", *REF], "--model is missing", TONE()),
    "no such recording": (ADD, "a.wav: no such file", None),
    "a recording of 0 bytes": (ADD, "a.wav: cannot be decoded", raw("a.wav", b"")),
    "a recording that is text": (ADD, "a.wav: cannot be decoded", raw("a.wav", b"La la la")),
    "a recording of 200 s": (ADD, "takes 2500 positions", TONE(200.0)),
    "recordings that leave no room": (ADD, "leave room for .* s of speech", TONE(150.0)),
    "an empty transcript": (["add", "anna", "--ref", "a.wav", "--ref-text", " ", "--model", NOISE], "empty", TONE()),
    "speaker -1": ([*ADD, "--speaker", "-1"], "speaker must be", TONE()),
    "a voice that exists": (ADD, "--replace replaces it", voice_file("anna")),
    "no such model": (["add", "anna", *REF, "--model", "nowhere"], "no folder 'nowhere'", TONE()),
    "file and recording": (["add", "anna", *REF, "--file", "x.safetensors"], "--file goes without", TONE()),
    "no such file": (["add", "anna", "--file", "x.safetensors"], "x.safetensors: cannot be read", None),
    "no such voice": (["show", "anna"], "no voice is called 'anna'; there is none yet", None),
    "one's own only": (["remove", "anna"], "no such voice of yours", None),
    "a damaged file": (["show", "anna"], "anna.safetensors: cannot be read", raw("anna.safetensors", b"junk")),
    "another format": (["show", "anna"], "its format is '2'", voice_file("anna", lambda t, m: m.update(format="2"))),
    "no texts": (["show", "anna"], "not a list of transcripts", voice_file("anna", lambda t, m: m.update(texts="[]"))),
    "texts that are no JSON": (["list"], "not a voice's file", voice_file("anna", lambda t, m: m.update(texts="[la"))),
    "a missing tensor": (
        ["show", "anna"],
        "2 transcripts, but the tensors codes_0",
        voice_file("anna", lambda t, m: m.update(texts='["a", "b"]')),
    ),
    "codes of floats": (
        ["show", "anna"],
        "not \\(T, K\\)",
        voice_file("anna", lambda t, m: t.update(codes_0=torch.ones(4, 8))),
    ),
    "codes of another codec": (
        SAY,
        "'anna' was made for another model",
        voice_file("anna", lambda t, m: t.update(codes_0=torch.zeros(4, 32, dtype=torch.int32))),
    ),
    "codes out of range": (
        SAY,
        "must be from 0 to 255",
        voice_file("anna", lambda t, m: t.update(codes_0=torch.full((4, 8), 256, dtype=torch.int32))),
    ),
    "no text": (["say", "anna", "--text", " ", "--model", NOISE], "text is empty", voice_file("anna")),
    "say without a model": (["say", "anna", "--text", "Hi."], "--model is missing", voice_file("anna")),
    "out in no folder": ([*SAY, "--out", "no/out.wav"], "cannot be written", voice_file("anna")),
    "export to another format": (["export", "anna", "--out", "anna.wav"], "ends in .safetensors", voice_file("anna")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case, tmp_path, capsys):
    """A named error, exit code 2, and nothing changed."""
    args, message, make = BAD[case]
    if make is not None:
        make()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["voice", *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err)
    assert "Traceback" not in printed.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
