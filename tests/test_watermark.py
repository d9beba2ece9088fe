"""Watermarks: found where they were put, also after MP3 and resampling; not found elsewhere; nothing else changes.

Tests with the real package are skipped where resemble-perth is missing: pip install -e ".[watermark]" has it.
"""

import contextlib
import io
import itertools
import json
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional
from test_batch import audio_of
from test_cli import read_wav, write_wav

import generate
from csm import CSMError, UnavailableError, Voice, load_watermark
from csm.__main__ import main
from csm.evaluate.words import normalise
from csm.voices import save_voice, voices_folder
from csm.watermark import CSM_1B_KEY, StreamMarker, Watermark
from csm.weights import recipe
from noise import NOISE

RATE = 24_000
perth_only = pytest.mark.skipif(
    not find_spec("perth"), reason='the package resemble-perth is missing: pip install -e ".[watermark]"'
)
SENTENCES = (
    "Good morning, how are you today?",
    "The weather was warm in the morning.",
    "She opened the window and looked at the garden.",
    "We will meet again at the station in an hour.",
    "He asked for a cup of coffee and a piece of bread.",
    "Please close the window before you leave.",
)


class Tone:
    """A method for tests: the mark is a constant, so that it can be computed by hand. Detects it by the mean."""

    segment_seconds = 0.48

    def __init__(self):
        self.lengths = []

    def mark(self, audio_N, sample_rate):
        self.lengths.append(audio_N.shape[0])
        return audio_N + 0.25

    def confidence(self, audio_N, sample_rate):
        return float(audio_N.mean() > 0.2)


@pytest.fixture
def tone_mark():
    return Watermark("tone", Tone())


def some_audio(seconds, seed=0):
    return torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed)) / 10


def test_a_stream_does_not_depend_on_its_chunks(tone_mark):
    audio = some_audio(2.3)
    for size in (1, 2, 3, 7):
        parts = list(tone_mark.stream(audio.split(1920 * size), RATE))
        assert torch.allclose(torch.cat(parts), audio + 0.25)
    odd = torch.cat(list(tone_mark.stream(audio.split(777), RATE)))
    assert torch.equal(odd, torch.cat(list(tone_mark.stream(audio.split(1920), RATE))))
    assert max(tone_mark._method.lengths) <= round((0.32 + 0.48 + 0.02 + 0.08) * RATE)  # segments alone, not the whole


def test_segments_fade_into_each_other():
    """A mark whose sign changes with every segment: the step between two segments is spread over the overlap."""

    class Alternating(Tone):
        def mark(self, audio_N, sample_rate):
            self.lengths.append(audio_N.shape[0])
            return audio_N + (0.25 if len(self.lengths) % 2 else -0.25)

    audio = torch.full((RATE * 2,), 0.1)
    marked = torch.cat(list(Watermark("alternating", Alternating()).stream(audio.split(1920), RATE)))
    assert (marked[1:] - marked[:-1]).abs().max() < 0.5 / 400
    assert marked.shape == audio.shape and marked.max() > 0.34 and marked.min() < -0.14


def test_whole_files_are_marked_whole_and_long_ones_in_blocks(tone_mark):
    audio = some_audio(30)
    assert torch.allclose(tone_mark.apply(audio, RATE), audio + 0.25)
    assert len(tone_mark._method.lengths) == 1
    long = some_audio(130)
    assert torch.allclose(tone_mark.apply(long, RATE), long + 0.25)
    assert len(tone_mark._method.lengths) == 1 + 3
    half = torch.cat((tone_mark.apply(long, RATE)[: 65 * RATE], long[65 * RATE :]))
    assert tone_mark.detect(half, RATE)[2:] == (1, 3)
    assert tone_mark.apply(torch.zeros(999), RATE).equal(torch.zeros(999))  # silence stays silent
    assert tone_mark.detect(torch.zeros(RATE), RATE) == (False, 0.0, 0, 0)


def test_a_live_stream_hands_out_what_is_complete(tone_mark):
    marker = StreamMarker(tone_mark, RATE, 0.48)
    lengths = [marker.write(torch.ones(1920)).shape[0] for _ in range(14)]
    assert lengths == [0] * 6 + [6 * 1920] + [0] * 5 + [6 * 1920] + [0]
    assert marker.close().shape[0] == 2 * 1920


@pytest.fixture
def stub(monkeypatch, tone_mark):
    """``load_watermark`` returns the test's mark, wherever it is called."""
    for module in ("csm.watermark", "csm.watermark_command", "csm.serve.command", "csm.voice_command"):
        monkeypatch.setattr(f"{module}.load_watermark", lambda name: tone_mark)
    return tone_mark


SHORT = [
    "--model",
    NOISE,
    "--max-seconds",
    "0.8",
    "--device",
    "cpu",
    "--quiet",
    "--seed",
    "1",
    "--text",
    "Hello. There.",
]


def test_voice_say_marks_its_file(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    codes = torch.randint(256, (6, 8), generator=torch.Generator().manual_seed(0))
    save_voice(Voice("anna", ("Hi.",), (codes,)), voices_folder() / "anna.safetensors")
    say = [
        "voice",
        "say",
        "anna",
        "--text",
        "Hi.",
        "--model",
        NOISE,
        "--device",
        "cpu",
        "--max-seconds",
        "0.4",
        "--out",
    ]
    plain, marked = tmp_path / "plain.wav", tmp_path / "marked.wav"
    assert main([*say, str(plain)]) == 0
    assert main([*say, str(marked), "--watermark", "perth"]) == 0
    expected = np.clip(read_wav(plain) / 32767 + 0.25, -1, 1) * 32767
    assert np.abs(read_wav(marked) - expected).max() <= 1


def test_generate_marks_files_and_streams(stub, tmp_path, capsys):
    plain, marked, piped = (tmp_path / name for name in ("plain.wav", "marked.wav", "piped.wav"))
    assert generate.main([*SHORT, "--out", str(plain)]) == 0
    assert generate.main([*SHORT, "--out", str(marked), "--watermark", "perth", "--metrics"]) == 0
    assert len(stub._method.lengths) == 1  # the file is marked whole
    assert generate.main([*SHORT, "--stream-to", str(piped), "--watermark", "perth"]) == 0
    assert len(stub._method.lengths) == 1 + 4  # 1.6 s in segments of 0.48 s
    expected = np.clip(read_wav(plain) / 32767 + 0.25, -1, 1) * 32767
    assert np.abs(read_wav(marked) - expected).max() <= 1
    unmarked = tmp_path / "unmarked.wav"  # sentences of a stream are not brought to one loudness
    assert generate.main([*SHORT, "--stream-to", str(unmarked)]) == 0
    samples = [np.frombuffer(path.read_bytes()[44:], "<i2") for path in (piped, unmarked)]
    assert np.abs(samples[0] - np.clip(samples[1] / 32767 + 0.25, -1, 1) * 32767).max() <= 1
    assert re.search(r"metrics: RTF \d+\.\d\d, first audio \d+ ms, \d+ underruns?, ", capsys.readouterr().out)


def test_a_failed_run_leaves_no_marked_file(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(Tone, "mark", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate.main([*SHORT, "--out", str(tmp_path / "out.wav"), "--watermark", "perth"])
    assert list(tmp_path.iterdir()) == []


def test_batch_marks_each_line(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "Hello."}\n')
    options = ["--model", NOISE, "--device", "cpu", "--quiet", "--max-seconds", "0.4"]
    assert main(["batch", "in.jsonl", "plain", *options]) == 0
    assert main(["batch", "in.jsonl", "out", *options, "--watermark", "perth"]) == 0
    plain, marked = (np.frombuffer(audio_of(tmp_path / out)["a.wav"][44:], "<i2") for out in ("plain", "out"))
    assert np.abs(marked - np.clip(plain / 32767 + 0.25, -1, 1) * 32767).max() <= 1
    assert main(["batch", "in.jsonl", "plain", *options, "--watermark", "perth"]) == 0  # generated again
    assert audio_of(tmp_path / "plain") == audio_of(tmp_path / "out")


def test_a_book_is_marked_whole(stub, tmp_path, monkeypatch, capsys):
    """Each file whole, after speed and loudness; the mark changes no codes, so nothing is generated again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.md").write_text("# A\n\nHello. Bye.\n\n# B\n\nMore.\n")
    read = ["read", "b.md", "--model", NOISE, "--device", "cpu", "--quiet", "--max-seconds", "0.4", "--srt"]
    assert main([*read, "--out", "b.wav", "--keep-parts"]) == 0
    plain, times = read_wav(tmp_path / "b.wav"), (tmp_path / "b.srt").read_bytes()
    assert main([*read, "--out", "b.wav", "--keep-parts", "--watermark", "perth"]) == 0
    assert "(5 were there already)" in capsys.readouterr().out
    assert len(stub._method.lengths) == 1
    expected = np.clip(plain / 32767 + 0.25, -1, 1) * 32767
    assert np.abs(read_wav(tmp_path / "b.wav") - expected).max() <= 1
    assert (tmp_path / "b.srt").read_bytes() == times
    assert main([*read, "--out", "b/", "--watermark", "perth"]) == 0
    assert len(stub._method.lengths) == 1 + 2
    monkeypatch.setattr(Tone, "mark", lambda *_: 1 / 0)
    before = (tmp_path / "b.wav").read_bytes()
    with pytest.raises(ZeroDivisionError):
        main([*read, "--out", "b.wav", "--watermark", "perth"])
    assert (tmp_path / "b.wav").read_bytes() == before


def test_the_command_finds_it(stub, tmp_path, capsys):
    marked, plain = tmp_path / "marked.wav", tmp_path / "plain.wav"
    soundfile.write(marked, (some_audio(1) + 0.25).numpy(), 44_100)
    soundfile.write(plain, some_audio(61).numpy(), RATE)
    assert main(["watermark", str(marked)]) == 0
    assert capsys.readouterr().out == f"{marked}: the watermark perth was found (confidence 1.00)\n"
    assert main(["watermark", str(marked), str(plain)]) == 1
    assert "not found in 0 of 2 blocks (confidence 0.00)" in capsys.readouterr().out


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "perth", None)
    monkeypatch.setitem(sys.modules, "silentcipher", None)
    with pytest.raises(CSMError, match=r"resemble-perth: pip install 'csm\[watermark\]'"):
        load_watermark("perth")
    with pytest.raises(CSMError, match="SesameAILabs/silentcipher"):
        load_watermark("silentcipher")
    with pytest.raises(CSMError, match="no watermark is called 'sonic'; there are perth, silentcipher"):
        load_watermark("sonic")
    monkeypatch.setitem(sys.modules, "perth", types.SimpleNamespace(PerthImplicitWatermarker=None))
    with pytest.raises(CSMError, match="setuptools < 81"):
        load_watermark("perth")
    out = tmp_path / "out.wav"
    assert generate.main([*SHORT, "--out", str(out), "--watermark", "silentcipher"]) == 2
    assert capsys.readouterr().err.startswith("generate.py: error: the watermark silentcipher needs")
    assert list(tmp_path.iterdir()) == []


class SilentCipherModel:
    """The interface of silentcipher's model (server.py of its version 1.0.5). The message is in the sum of samples."""

    def encode_wav(self, wav, rate, message, message_sdr=None, calc_sdr=True):
        assert message == [212, 211, 146, 56, 201] and wav.ndim == 1 and wav.dtype == np.float32
        print("it prints")
        return wav + 0.25, 0

    def decode_wav(self, wav, rate, phase_shift_decoding):
        if wav.mean() < 0.2:
            return {"error": "Could not find", "status": False}
        return {"messages": [CSM_1B_KEY], "confidences": [0.9], "status": True}


def test_silentcipher_with_a_replaced_package(monkeypatch, capsys):
    package = types.SimpleNamespace(get_model=lambda model_type, device: SilentCipherModel())
    monkeypatch.setitem(sys.modules, "silentcipher", package)
    mark = load_watermark("silentcipher")
    audio = some_audio(1)
    assert torch.allclose(mark.apply(audio, RATE), audio + 0.25)
    assert mark.detect(mark.apply(audio, RATE), RATE).found and not mark.detect(audio, RATE).found
    assert capsys.readouterr().out == ""  # standard output may be audio

    def unreachable(model_type, device):
        raise ConnectionError("no network")

    package.get_model = unreachable
    with pytest.raises(UnavailableError, match=r"sony/silentcipher.*no network"):
        load_watermark("silentcipher")


# The server


@pytest.mark.parametrize(
    ("policy", "fields", "expected"),
    [
        ("all", {}, True),
        ("added-voices", {}, False),
        ("added-voices", {"voice": "anna"}, True),
        ("added-voices", {"context": [{"text": "Hi.", "codes": [[1] * 8] * 3}]}, True),
        ("added-voices", {"watermark": True}, True),
        ("requests", {"voice": "anna"}, False),
        ("requests", {"watermark": True}, True),
    ],
)
def test_the_server_marks_what_it_must(policy, fields, expected, noisy, tone_mark, tmp_path):
    from test_serve import Running

    from csm.serve.settings import Settings
    from csm.voices import Voice, save_voice

    save_voice(Voice("anna", ("Hi.",), (torch.ones(4, 8, dtype=torch.int64),)), tmp_path / "anna.safetensors")
    options = dict(voices=tmp_path, max_seconds=1.2)
    fields = {"voice": "speaker_0", **fields}
    with Running(noisy, **options) as running:
        plain = running.speak(**{name: value for name, value in fields.items() if name != "watermark"})
        refused = running.speak(watermark=True)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "watermark"
        service = running.service
        service.settings = Settings(port=1, watermark="perth", watermark_for=policy, **options)
        service.watermark = tone_mark
        response = running.speak(**fields)
    assert response.status_code == 200
    assert response.headers.get("x-csm-watermark") == ("tone" if expected else None)
    before, after = (np.frombuffer(one.content, "<i2") for one in (plain, response))
    offset = 0.25 if expected else 0.0
    assert np.abs(after - np.clip(before / 32767 + offset, -1, 1) * 32767).max() <= 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"context": [{"text": "Hi.", "codes": [[1] * 8] * 3}]}, True),
        ({"watermark": True}, True),
    ],
)
def test_the_websocket_marks_what_it_must(fields, expected, noisy, tone_mark):
    """A voice that comes as context counts as added."""
    from test_serve import Running
    from test_socket import Client, address, connect

    from csm.serve.settings import Settings

    options = dict(max_seconds=0.8, watermark="perth", watermark_for="added-voices")
    with Running(noisy, max_seconds=0.8) as running:
        plain_fields = {name: value for name, value in fields.items() if name != "watermark"}
        with connect(address(running)) as connection:
            _, plain = Client(connection).turn("Hi.", voice="speaker_0", **plain_fields)
        running.service.settings, running.service.watermark = Settings(port=1, **options), tone_mark
        with connect(address(running)) as connection:
            event, marked = Client(connection).turn("Hi.", voice="speaker_0", **fields)
    assert event["type"] == "done"
    before, after = (np.frombuffer(audio, "<i2") for audio in (plain, marked))
    offset = 0.25 if expected else 0.0
    assert np.abs(after - np.clip(before / 32767 + offset, -1, 1) * 32767).max() <= 1


def test_an_unknown_policy_is_refused():
    from csm.serve.settings import Settings

    with pytest.raises(CSMError, match="watermark_for must be one of all, added-voices, requests"):
        Settings(watermark="perth", watermark_for="nobody")
    with pytest.raises(CSMError, match="no watermark is called"):
        Settings(watermark="sonic")


# The real package


@pytest.fixture(scope="module")
def perth():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        mark = load_watermark("perth")
    assert printed.getvalue() == ""
    return mark


def as_mp3(audio, path, bits=128_000):
    """(samples,) through an MP3 file: what a decoder returns."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=RATE)
        stream.bit_rate, stream.layout, stream.format = bits, "mono", "fltp"
        frame = av.AudioFrame.from_ndarray(audio.numpy()[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert abs(path.stat().st_size * 8 / (audio.shape[0] / RATE) / bits - 1) < 0.2
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    return torch.from_numpy(samples)


@perth_only
def test_perth_survives_mp3_and_resampling(perth, tiny, one_thread, tmp_path):
    audio = tiny.generate(SENTENCES[0], seed=0, max_audio_length_ms=4000)
    whole = perth.apply(audio, RATE)
    stream = torch.cat(list(perth.stream(audio.split(1920), RATE)))
    assert whole.shape == stream.shape == audio.shape
    for marked in (whole, stream):
        assert perth.detect(marked, RATE).found
        assert perth.detect(as_mp3(marked, tmp_path / "a.mp3"), RATE).found
        assert perth.detect(torchaudio.functional.resample(marked, RATE, 16_000), 16_000).found
    assert not perth.detect(audio, RATE).found
    assert not perth.detect(as_mp3(audio, tmp_path / "a.mp3"), RATE).found
    joins = torch.arange(round(0.48 * RATE), audio.shape[0] - 1, round(0.48 * RATE))
    step = (stream - audio).diff().abs()
    assert step[joins - 1].max() <= step.max() and step[joins].max() < step.quantile(0.999)


@perth_only
@pytest.mark.slow
def test_perth_is_found_in_every_file(perth, tiny, one_thread, tmp_path):
    """36 utterances, plain and marked, also through MP3 and at 16 kHz; prints docs/watermark.md's figures."""
    found, num_files = {"plain": 0, "marked": 0, "MP3": 0, "16 kHz": 0}, 0
    for seed, (number, text) in itertools.product(range(6), enumerate(SENTENCES)):
        audio = tiny.generate(text, speaker=number % 4, seed=seed, max_audio_length_ms=8000)
        marked = perth.apply(audio, RATE)
        versions = {
            "plain": (audio, RATE),
            "marked": (marked, RATE),
            "MP3": (as_mp3(marked, tmp_path / "a.mp3"), RATE),
            "16 kHz": (torchaudio.functional.resample(marked, RATE, 16_000), 16_000),
        }
        for name, (version, rate) in versions.items():
            found[name] += perth.detect(version, rate).found
        num_files += 1
        print(json.dumps({"files": num_files, "found": found}), flush=True)
    assert found == {"plain": 0, "marked": num_files, "MP3": num_files, "16 kHz": num_files}


EVERYDAY = Path(recipe.__file__).with_name("everyday.txt")
NUM_SEEDS, NUM_RESAMPLINGS = 2, 2000


def resampled(audio):
    """Through 23.9 kHz: nobody hears it, but the recogniser gets other samples."""
    lower = torchaudio.functional.resample(audio, RATE, 23_900)
    return torchaudio.functional.resample(lower, 23_900, RATE)[: audio.shape[0]]


def lost(counts, name):
    """(word errors more than in the plain audio, its standard error), in % of words. Utterances are drawn anew."""
    words = np.array([one["words"] for one in counts])
    more = np.array([one[name] - one["plain"] for one in counts])
    drawn = np.random.default_rng(0).integers(len(counts), size=(NUM_RESAMPLINGS, len(counts)))
    return 100 * more.sum() / words.sum(), 100 * (more[drawn].sum(1) / words[drawn].sum(1)).std()


def test_words_lost_worked_out_by_hand():
    """One utterance of four words in two gains an error: 12.5 %, 0, 12.5 or 25 % when two are drawn."""
    counts = [{"words": 4, "plain": 1, "marked": 2}, {"words": 4, "plain": 1, "marked": 1}]
    more, error = lost(counts, "marked")
    assert more == pytest.approx(12.5)
    assert error == pytest.approx(np.std([0, 12.5, 12.5, 25]), rel=0.05)


@perth_only
@pytest.mark.slow
@pytest.mark.skipif(not find_spec("moonshine_voice"), reason='moonshine_voice is missing: pip install -e ".[eval]"')
def test_perth_costs_no_word(perth, tiny, one_thread):
    """The same 300 utterances plain, marked and changed inaudibly; prints docs/watermark.md's figures."""
    from csm.evaluate.listen import Recogniser
    from csm.evaluate.words import word_errors

    recogniser, counts = Recogniser(), []
    texts = EVERYDAY.read_text().splitlines()
    for seed, (number, text) in itertools.product(range(NUM_SEEDS), enumerate(texts)):
        audio = tiny.generate(text, speaker=(number + seed) % 4, seed=seed, max_audio_length_ms=15_000)
        versions = {"plain": audio, "marked": perth.apply(audio, RATE), "resampled": resampled(audio)}
        errors = {
            name: word_errors(text, recogniser.transcribe(version, RATE))[0] for name, version in versions.items()
        }
        counts.append({"words": len(normalise(text).split()), **errors})
        figures = {name: sum(one[name] for one in counts) for name in counts[0]}
        print(json.dumps({"utterances": len(counts), **figures}), flush=True)
    for name in ("marked", "resampled"):
        more, error = lost(counts, name)
        print(f"{name}: {more:+.2f} % of words, standard error {error:.2f} %")
    more, error = lost(counts, "marked")
    assert more <= 2 * error


def test_a_wav_of_the_command_line_is_read(tmp_path):
    """The helper that other tests use writes what soundfile reads."""
    samples, rate = soundfile.read(write_wav(tmp_path / "a.wav", np.ones(10, "<i2").tobytes()))
    assert rate == RATE and samples.shape == (10,)
