"""Scripts, long texts, subtitles, pipes and playback."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

import csm.__main__
import generate
from csm import PromptError, Voice, VoiceError
from csm.errors import AudioError
from csm.joins import fade
from csm.player import Player, StreamWriter
from csm.script import Line, Narration, parse_script, speaker_ids, text_items
from csm.subtitles import Cue, to_json, to_srt, to_vtt
from csm.text import Pause, normalize
from csm.voices import save_voice, voices_folder
from noise import NOISE

ROOT = Path(generate.__file__).parent
SHORT = ["--model", NOISE, "--max-seconds", "0.4", "--device", "cpu", "--quiet", "--seed", "1"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Voices of the test's own, in an empty folder."""
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def some_voice(name, speaker=0):
    codes = torch.randint(256, (10, 8), generator=torch.Generator().manual_seed(len(name)))
    return Voice(name, (f"I am {name}.",), (codes,), speaker)


def test_lines_and_sentences():
    text = "# Title\n\nI have 3 cats. Dr. Lee has none.\n[pause 1]\nLast line"
    assert text_items(text, 4) == [
        Line(4, "Title.", "Title."),
        Line(4, "I have three cats.", "I have 3 cats."),
        Line(4, "Doctor Lee has none.", "Dr. Lee has none."),
        Pause(1.0),
        Line(4, "Last line", "Last line"),
    ]
    assert [item.text for item in text_items("I have 3. Yes.\n\nTwo", normalized=False)] == ["I have 3.", "Yes.", "Two"]
    assert [item.text for item in text_items("I have 3. Yes.\nTwo", sentences=False)] == ["I have three. Yes.", "Two"]
    assert text_items(" \n *** \n") == []


SCRIPT = """# A dialogue
[anna] Hello there. [pause 0.5] How are you?

[1] Fine.
and you?
[pause 0.25]
[ anna ] Well."""


def test_a_script():
    assert parse_script(SCRIPT) == [
        Line("anna", "Hello there.", "Hello there."),
        Pause(0.5),
        Line("anna", "How are you?", "How are you?"),
        Line(1, "Fine.", "Fine."),
        Line(1, "And you?", "and you?"),
        Pause(0.25),
        Line("anna", "Well.", "Well."),
    ]


BAD_SCRIPTS = {
    "nobody": ("Hello.", PromptError, "line 1: nobody speaks it"),
    "a path": ("[../anna] Hello.", VoiceError, "at most 64 letters"),
    "no name": ("[] Hello.", VoiceError, "at most 64 letters"),
    "a bad pause": ("[0] One.\n[pause x]", PromptError, r"line 2: \[pause x\]"),
    "a pause of an hour": ("[0] One. [pause 3600]", PromptError, "line 1.*at most 60"),
    "no Unicode": ("[0] caf\udce9", PromptError, "line 1.*Unicode"),
}


@pytest.mark.parametrize("case", BAD_SCRIPTS)
def test_bad_scripts(case):
    text, kind, message = BAD_SCRIPTS[case]
    with pytest.raises(kind, match=message):
        parse_script(text)


def test_ids_of_speakers(noisy):
    for name, speaker in (("anna", 0), ("bea", 5), ("carl", 5)):
        save_voice(some_voice(name, speaker), voices_folder() / f"{name}.safetensors")
    items = [Line(name, "Hi.", "Hi.") for name in ("anna", 1, "bea", "carl", "anna")]
    assert speaker_ids(items, noisy, {2: some_voice("x")}) == {1: 1, "anna": 0, "bea": 5, "carl": 3}


def test_a_narration(noisy):
    """Turns of one conversation, each with the voices before it; cues and pauses where they are heard."""
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    narration = Narration(noisy, parse_script(SCRIPT), max_turn_ms=400, max_turns=2, seed=3)
    audio = torch.cat(list(narration.stream()))
    assert audio.shape == (5 * 9600 + 18_000,)
    assert [(round(cue.start, 3), round(cue.end, 3), cue.speaker) for cue in narration.cues] == [
        *((0.0, 0.4, "anna"), (0.9, 1.3, "anna"), (1.3, 1.7, 1), (1.7, 2.1, 1), (2.35, 2.75, "anna")),
    ]
    assert not audio[9600 : 9600 + 12_000].any()
    talk = narration.conversation
    assert [segment.text for segment in talk.context] == ["I am anna.", "Fine.", "And you?", "Well."]
    codes = noisy.generate_codes("Hello there.", 0, max_audio_length_ms=400, seed=3, voice="anna")
    assert (noisy.decode(codes)[500:9000] - audio[500:9000]).abs().max() < 1e-4


def test_no_join_has_a_step(noisy):
    narration = Narration(noisy, text_items("One. Two. Three. Four."), max_turn_ms=240, seed=1)
    audio = torch.cat(list(narration.stream()))
    steps = audio.diff().abs()
    joins = torch.tensor([5760, 11_520, 17_280])
    assert steps[joins - 1].max() < 0.02 * audio.abs().max()
    assert steps[joins - 1].max() < steps.max()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 300])
def test_a_fade_in_chunks_is_the_fade_of_the_whole(size):
    audio = torch.randn(203, generator=torch.Generator().manual_seed(0))
    expected = audio.clone()
    expected[:20] *= torch.arange(1, 21) / 21
    expected[-20:] *= torch.arange(20, 0, -1) / 21
    assert torch.allclose(torch.cat(list(fade(audio.split(size), 20))), expected)
    short = torch.cat(list(fade(audio[:7].split(size), 20)))
    assert short.shape == (7,)
    assert list(fade([], 20)) == []


CUES = [Cue(0.0, 1.2345, 0, "One & <two>."), Cue(3599.9996, 3661.5, "anna", "A\nline.")]


def test_subtitles():
    assert to_srt(CUES) == (
        "1\n00:00:00,000 --> 00:00:01,234\nOne & <two>.\n\n2\n01:00:00,000 --> 01:01:01,500\nA line.\n\n"
    )
    assert to_vtt(CUES) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\nOne &amp; &lt;two&gt;.\n\n01:00:00.000 --> 01:01:01.500\nA line.\n\n"
    )
    assert json.loads(to_json(CUES))[1] == {"start": 3599.9996, "end": 3661.5, "speaker": "anna", "text": "A\nline."}


# The command line


def samples_of(path):
    samples, rate = sphn.read(str(path))
    assert rate == 24_000
    return samples[0]


def test_a_dialogue_with_subtitles(capsys):
    save_voice(some_voice("anna"), voices_folder() / "anna.safetensors")
    Path("talk.txt").write_text(SCRIPT)
    files = [word for kind in ("srt", "vtt", "json") for word in (f"--{kind}", f"talk.{kind}")]
    assert generate.main(["--script", "talk.txt", *SHORT, "--out", "talk.wav", *files]) == 0
    assert samples_of("talk.wav").shape == (5 * 9600 + 18_000,)
    cues = json.loads(Path("talk.json").read_text())
    assert [cue["text"] for cue in cues] == ["Hello there.", "How are you?", "Fine.", "and you?", "Well."]
    assert all(one["end"] <= two["start"] for one, two in itertools.pairwise(cues))
    assert cues[-1]["end"] == pytest.approx(2.75)
    assert len(re.findall(r" --> ", Path("talk.srt").read_text())) == 5
    assert Path("talk.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.400\nHello there.\n")


def test_subtitles_end_where_the_audio_ends():
    """Also where a pause ends it. Words keep their times."""
    files = [word for kind in ("srt", "vtt", "json") for word in (f"--{kind}", f"t.{kind}")]
    for command in (["generate"], ["read", "--out", "out.wav"]):
        text = ["--script", "talk.txt"]
        Path("talk.txt").write_text("[0] One.\n[pause 0.5]\n[0] Two.\n[pause 1.5]\n")
        assert csm.__main__.main([*command, *text, *SHORT, *files]) == 0
        seconds = samples_of("out.wav").shape[0] / 24_000
        assert seconds == pytest.approx(2.8)
        cues = json.loads(Path("t.json").read_text())
        cues = cues["sentences"] if isinstance(cues, dict) else cues
        assert [(cue["start"], cue["end"]) for cue in cues] == [(0, 0.4), (0.9, pytest.approx(seconds))]
        assert "00:00:00,900 --> 00:00:02,800\n" in Path("t.srt").read_text()
        assert "00:00:00.900 --> 00:00:02.800\n" in Path("t.vtt").read_text()


def test_subtitles_into_devices():
    devices = ["--srt", "/dev/null", "--vtt", "/dev/null", "--json", "/dev/null"]
    assert generate.main(["--text", "One.", *SHORT, *devices]) == 0


@pytest.mark.parametrize("command", [["generate", "--out", "o.wav"], ["read", "--out", "o.wav"]])
def test_subtitles_appear_as_a_whole(command, monkeypatch):
    """A disk that is full leaves the file that was there, and nothing beside it."""

    def full(writer, data):
        writer._file.write(data[:5])
        raise AudioError("no space left")

    Path("talk.txt").write_text("[0] One.\n")
    Path("t.srt").write_text("yesterday's")
    monkeypatch.setattr("csm.audio.AtomicWriter.write_bytes", full)
    assert csm.__main__.main([*command, "--script", "talk.txt", *SHORT, "--srt", "t.srt"]) == 2
    assert Path("t.srt").read_text() == "yesterday's"
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".csm-")]


def test_a_long_text_is_one_file():
    """No sentence is too long, and positions never run out."""
    text = "This sentence is said again and again. " * 30 + "word " * 600
    arguments = ["--text", text, "--model", NOISE, "--max-seconds", "0.08", "--device", "cpu", "--quiet"]
    assert generate.main([*arguments, "--context-turns", "40", "--json", "long.json"]) == 0
    cues = json.loads(Path("long.json").read_text())
    assert len(cues) == 30 + 10
    assert samples_of("out.wav").shape == (40 * 1920,)


def test_options_of_the_text():
    for options, texts in {
        (): ["I am 3.", "Yes."],
        ("--no-normalize",): ["I am 3.", "Yes."],
        ("--no-split",): ["I am 3. Yes."],
    }.items():
        assert generate.main(["--text", "I am 3. Yes.", *SHORT, *options, "--json", "t.json"]) == 0
        assert [cue["text"] for cue in json.loads(Path("t.json").read_text())] == texts


def test_a_voice_by_name(noisy):
    save_voice(some_voice("anna", 3), voices_folder() / "anna.safetensors")
    assert generate.main(["--text", "Hello.", *SHORT, "--voice", "anna"]) == 0
    expected = noisy.generate("Hello.", 3, voice="anna", max_audio_length_ms=400, seed=1).numpy()
    assert np.abs(samples_of("out.wav")[500:9000] - expected[500:9000].clip(-1, 1)).max() < 1e-3


def test_standard_output():
    """Audio alone on standard output, the same as in the file; the summary on stderr."""
    arguments = ["--text", "Hello.", *SHORT, "--stream-to", "-", "--stream-format", "pcm", "--out", "o.wav"]
    run = subprocess.run([sys.executable, ROOT / "generate.py", *arguments], capture_output=True, check=True)
    assert run.stdout == Path("o.wav").read_bytes()[44:]
    assert len(run.stdout) == 2 * 9600
    assert b"s of audio" in run.stderr


def test_a_pipe():
    os.mkfifo("pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()), daemon=True)
    reader.start()
    arguments = ["--text", "Hello. Goodbye.", *SHORT, "--stream-to", "pipe", "--out", "o.wav"]
    assert generate.main(arguments) == 0
    reader.join(60)
    assert received[0][:4] == b"RIFF"
    assert received[0][44:] == Path("o.wav").read_bytes()[44:]
    assert len(received[0]) == 44 + 4 * 9600


def test_a_reader_that_leaves_is_an_error(capsys):
    """As of `generate.py | head`."""
    os.mkfifo("pipe")

    def read_a_little():
        with open("pipe", "rb") as pipe:
            pipe.read(100)

    reader = threading.Thread(target=read_a_little, daemon=True)
    reader.start()
    assert generate.main(["--text", "Hello. " * 9, *SHORT, "--stream-to", "pipe", "--out", "o.wav"]) == 2
    reader.join(60)
    assert "the stream cannot be written: Broken pipe" in capsys.readouterr().err
    assert not Path("o.wav").exists()


def test_a_stream_of_wav_can_be_read_back():
    with StreamWriter("s.wav") as stream:
        stream.begin(24_000)
        for part in torch.linspace(-1, 1, 100).split(7):
            stream.write(part)
    data = Path("s.wav").read_bytes()
    assert data[:4] == b"RIFF"
    assert len(data) == 44 + 200
    assert int.from_bytes(data[24:28], "little") == 24_000


class FakeDevice(types.ModuleType):
    """sounddevice with a device that keeps what it plays."""

    class PortAudioError(Exception):
        pass

    def __init__(self, device=True):
        super().__init__("sounddevice")
        self.device, self.played, self.calls = device, b"", []

    def query_devices(self, kind):
        if not self.device:
            raise self.PortAudioError("Error querying device -1")

    def RawOutputStream(self, samplerate, channels, dtype):  # noqa: N802
        assert (samplerate, channels, dtype) == (24_000, 1, "int16")
        return self

    def start(self):
        self.calls.append("start")

    def write(self, data):
        self.played += data
        return False

    def stop(self):
        self.calls.append("stop")

    def close(self):
        self.calls.append("close")


def test_playing(monkeypatch, capsys):
    device = FakeDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    assert generate.main(["--text", "Hello.", *SHORT, "--play"]) == 0
    assert len(device.played) == 2 * 9600
    assert device.calls == ["start", "stop", "close"]
    assert capsys.readouterr().out.startswith("played: 0.40 s")
    assert not Path("out.wav").exists()


def test_playing_without_a_device(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevice(device=False))
    assert generate.main(["--text", "Hello.", *SHORT, "--play"]) == 2
    assert "--play needs a sound device, and there is none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert generate.main(["--text", "Hello.", *SHORT, "--play"]) == 2
    assert 'pip install "csm[play]"' in capsys.readouterr().err
    with pytest.raises(Exception, match="sounddevice"):
        Player()


def write_script(text):
    return lambda: Path("s.txt").write_bytes(text)


BAD = {
    "no such script": (["--script", "no.txt"], "no.txt: cannot be read", None),
    "a script that is a folder": (["--script", "home"], "home: cannot be read", lambda: Path("home").mkdir()),
    "a script that is not text": (["--script", "s.txt"], "s.txt: cannot be read", write_script(b"\xff\xfe\xff")),
    "an empty script": (["--script", "s.txt"], "no text to speak", write_script(b"")),
    "a script of pauses": (["--script", "s.txt"], "no text to speak", write_script(b"[pause 1]\n[0]\n# no")),
    "a line of nobody": (["--script", "s.txt"], "line 2: nobody", write_script(b"\nHello.\n")),
    "an unknown voice": (["--script", "s.txt"], "no voice is called 'zoe'", write_script(b"[0] Hi.\n[zoe] Hi.")),
    "a voice that is a path": (["--script", "s.txt"], "at most 64 letters", write_script(b"[../zoe] Hi.")),
    "a bad pause": (["--script", "s.txt"], "line 1.*pause 0.5", write_script(b"[0] Hi. [pause two]")),
    "a bad pause in a text": (["--text", "Hi. [pause 99]"], "pause 0.5", None),
    "script and text": (["--script", "s.txt", "--text", "Hi."], "not allowed", None),
    "no such voice": (["--text", "Hi.", "--voice", "zoe"], "no voice is called 'zoe'", None),
    "a voice with ../": (["--text", "Hi.", "--voice", "../zoe"], "at most 64 letters", None),
    "a voice with NUL": (["--text", "Hi.", "--voice", "z\0e"], "at most 64 letters", None),
    "voice and ref": (
        ["--text", "Hi.", "--voice", "zoe", "--ref", "a.wav", "--ref-text", "La."],
        "exclude each other",
        None,
    ),
    "a damaged voice": (
        ["--text", "Hi.", "--voice", "zoe"],
        "zoe.safetensors: cannot be read",
        lambda: (voices_folder().mkdir(parents=True), (voices_folder() / "zoe.safetensors").write_bytes(b"")),
    ),
    "subtitles in no folder": (["--text", "Hi.", "--srt", "no/a.srt"], "a.srt: cannot be written", None),
    "subtitles that are a folder": (["--text", "Hi.", "--vtt", "."], "cannot be written", None),
    "json in no folder": (["--text", "Hi.", "--json", "no/a.json"], "a.json: cannot be written", None),
    "a stream in no folder": (["--text", "Hi.", "--stream-to", "no/a.wav"], "a.wav: cannot be written", None),
    "a stream that is a folder": (["--text", "Hi.", "--stream-to", "."], "cannot be written", None),
    "an unknown stream format": (["--text", "Hi.", "--stream-format", "mp3"], "invalid choice", None),
    "context turns -1": (["--text", "Hi.", "--context-turns", "-1"], "max_turns must be at least 0", None),
    "context turns x": (["--text", "Hi.", "--context-turns", "x"], "--context-turns", None),
    "only markup": (["--text", "***\n---\n"], "no text to speak", None),
    "only emoji": (["--text", "🎉"], "no text to speak", None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case, tmp_path, capsys):
    args, message, make = BAD[case]
    if make is not None:
        make()
    before = sorted(tmp_path.rglob("*"))
    assert generate.main([*SHORT, *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err)
    assert len(printed.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def guide(language):
    text = (ROOT / "docs" / "voices.md").read_text().replace("\\\n", " ").replace("sesame/csm-1b", NOISE)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def test_the_guide(monkeypatch):
    """Every example of docs/voices.md, in order of the languages: the commands, then Python."""
    whole = csm.Generator._request
    short = lambda self, speech, audio=True: whole(self, replace(speech, max_audio_length_ms=160), audio)  # noqa: E731
    monkeypatch.setattr(csm.Generator, "_request", short)
    for name in ("anna.wav", "question.wav"):
        sphn.write_wav(name, np.sin(np.arange(24_000) / 20).astype("float32") / 4, 24_000)
    Path("story.txt").write_text("Once there was a fox. It was red.")
    Path("talk.txt").write_text(guide("text")[0])
    commands = [shlex.split(line) for block in guide("sh") for line in block.splitlines()]
    assert len(commands) == 13
    for _, program, *arguments in commands:
        code = generate.main(arguments) if program == "generate.py" else csm.__main__.main(arguments[1:])
        assert code == 0, arguments
    assert {"hello.wav", "story.srt", "a.vtt", "a.json", "talk.srt", "audio.pcm"} <= set(os.listdir())
    names = {}
    for block in guide("python"):
        exec(block, names)
    assert names["talk"].stats.num_turns == 4


def test_the_guides_table_of_spoken_text():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", (ROOT / "docs" / "voices.md").read_text(), flags=re.MULTILINE)
    rows = rows[[row[0] for row in rows].index("Written") + 1 :]
    assert len(rows) == 3
    for written, spoken in rows:
        assert normalize(written) == spoken


def test_the_lines_of_wrapped_text_are_joined():
    text = "The train to the coast\nleaves at nine. It is\nnever late."
    wrapped = [item.text for item in text_items(text, wrapped=True)]
    assert wrapped == ["The train to the coast leaves at nine.", "It is never late."]
    assert len(text_items(text)) == 4


def test_a_number_sign_that_is_spoken_is_no_comment():
    items = parse_script("# nobody hears this\n[anna] #1 is tea.\n# nor this")
    assert [item.written for item in items] == ["#1 is tea."]
