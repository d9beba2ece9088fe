"""``python -m csm eval``: word errors counted by hand, recordings made with flite, and error messages."""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from csm import CSMError, Voice, read_audio
from csm.__main__ import main
from csm.evaluate.measure import Utterance
from csm.evaluate.report import summary, table
from csm.evaluate.words import normalise, word_errors
from csm.voices import save_voice, voices_folder
from noise import NOISE

pytestmark = pytest.mark.usefixtures("one_thread")
needs_words = pytest.mark.skipif(
    not all(find_spec(name) for name in ("jiwer", "num2words")), reason="the extra eval is missing"
)
needs_models = pytest.mark.skipif(
    not all(find_spec(name) for name in ("moonshine_voice", "resemblyzer", "jiwer", "num2words")),
    reason="the extra eval is missing",
)
SENTENCES = (
    "He wrote a letter to his friend.",
    "There is nothing new under the sun.",
    "The train leaves at half past 7.",
    "Good morning to all of you.",
)


@needs_words
@pytest.mark.parametrize(
    ("written", "normalised"),
    [
        ("The Cat's whiskers -- 3 of them!", "the cats whiskers three of them"),
        ("Dr. Smith paid $5, i.e. 20% more…", "doctor smith paid five dollars i e twenty percent more"),
        ("On the 21st, 1,204 naïve cafés", "on the twenty first one thousand two hundred four naive cafes"),
        ("To day no body saw a grey theatre", "today nobody saw a gray theater"),
        ("Every day, to one man; no, where?", "every day to one man no where"),
        ("One hundred and five, everyday", "one hundred five every day"),
        ("well-known; “quoted” don’t", "well known quoted dont"),
        ("3.5 & 7", "three point five and seven"),
        ("?!", ""),
    ],
)
def test_normalised_words(written, normalised):
    assert normalise(written) == normalised


@needs_words
@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors", "words"),
    [
        ("The cat sat on the mat.", "the cat sat on the mat", 0, 6),
        ("The cat sat on the mat.", "The bat sat on the mat", 1, 6),
        ("The cat sat on the mat.", "cat sat on the mat you", 2, 6),
        ("The cat sat on the mat.", "", 6, 6),
        ("One.", "and 1 or two", 3, 1),
        ("At half past seven", "at half past 7.", 0, 4),
        ("at seven forty five", "at 7:45", 0, 4),
        ("at seven forty five", "at 745.", 0, 4),
        ("at seven forty five", "at 7.45", 0, 4),
        ("In nineteen oh five", "in 1905,", 0, 4),
        ("In nineteen eighty four", "In 1984", 0, 4),
        ("in two thousand nine", "in 2009", 0, 4),
        ("It has 1,500 doors", "it has fifteen hundred doors", 0, 5),
        ("It has 1500 doors", "it has fifteen hundred doors", 0, 5),
        ("twelve thousand five", "12005", 0, 3),
        ("eight four two seven one", "84271", 0, 5),
        ("seven hundred forty five", "745", 0, 4),
        ("The year 1984", "the year 1985", 1, 8),
        ("I gave it to one man", "I gave it two one man", 1, 6),
        ("every day", "every they", 1, 2),
    ],
)
def test_word_errors_counted_by_hand(reference, hypothesis, errors, words):
    assert word_errors(reference, hypothesis) == (errors, words)


@needs_words
def test_a_sentence_without_words_is_refused():
    with pytest.raises(CSMError, match="no word to recognise"):
        word_errors("...", "hello")


def test_the_error_rate_is_over_words_not_sentences():
    utterances = [
        Utterance("a", "a", errors=0, words=9, seconds=2.0, seed=0, ended=True, length_ratio=1.0, similar=0.5),
        Utterance("b", "c", errors=1, words=1, seconds=1.0, seed=0, ended=False, length_ratio=3.0, similar=None),
        Utterance("a", "a", errors=0, words=9, seconds=2.0, seed=1, ended=True, length_ratio=1.3, similar=0.7),
        Utterance("b", "b", errors=0, words=1, seconds=1.0, seed=1, ended=True, length_ratio=None, similar=None),
    ]
    values = summary(utterances)
    assert values["wer"] == pytest.approx(1 / 20)
    assert values["wer_spread"] == pytest.approx(np.std([0.1, 0.0], ddof=1))
    assert (values["ended"], values["length_ratio"], values["seconds"]) == (0.75, 1.3, 6.0)
    assert values["similar"] == pytest.approx(0.6)
    text = table({"speech": values, "recordings": summary([Utterance("a", "a", 0, 9, 2.0)])}).splitlines()
    columns = "utterances | word error rate | std. dev. over seeds | length ratio | length within 0.8 to 1.25"
    columns += " | ended before the limit | voice similarity | seconds"
    assert text[0] == f"| | {columns} |"
    assert text[2] == "| speech | 4 | 5.0% | 7.1% | 1.30 | 33.3% | 75.0% | 0.60 | 6.0 |"
    assert text[3] == "| recordings | 1 | 0.0% |  |  |  |  |  | 2.0 |"


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory):
    """A manifest of speech synthesized by flite."""
    flite = shutil.which("flite")
    if flite is None:
        pytest.skip("flite is not installed")
    folder = tmp_path_factory.mktemp("synthesized")
    lines = []
    for index, text in enumerate(SENTENCES):
        subprocess.run([flite, "-voice", "slt", "-t", text, "-o", folder / f"{index}.wav"], check=True)
        lines.append(json.dumps({"audio": f"{index}.wav", "text": text}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def evaluate(*arguments):
    return main(["eval", *map(str, arguments), "--device", "cpu", "--quiet"])


@needs_models
def test_recordings_codec_and_speech_in_one_table(synthesized, tmp_path, capsys):
    """The recogniser transcribes recordings nearly without errors, and fails on the audio of random weights."""
    options = ["--recordings", "--codec", "--model", NOISE, "--seeds", 2, "--limit", 3, "--max-seconds", 1]
    options.append("--keep-audio")
    assert evaluate("--data", synthesized, "--out", tmp_path / "eval", *options) == 0
    text = capsys.readouterr().out
    print("\n" + text)
    values = json.loads((tmp_path / "eval" / "eval.json").read_text())
    found = values["summary"]
    assert list(found) == ["recordings", "codec", "speech"]
    assert [found[kind]["utterances"] for kind in found] == [3, 3, 6]
    assert found["recordings"]["wer"] < 0.15 < 0.7 < found["codec"]["wer"]
    assert found["speech"]["wer"] > 0.7
    assert found["codec"]["length_ratio"] == pytest.approx(1, abs=0.06)  # the codec pads to whole frames
    assert 0 <= found["speech"]["ended"] <= 1
    assert all(one["heard"] for one in values["utterances"]["recordings"])
    wavs = sorted((tmp_path / "eval" / "speech").iterdir())
    assert [wav.name for wav in wavs] == [f"{n:04d}-seed{n // 3}.wav" for n in range(6)]
    for one, wav in zip(values["utterances"]["speech"], wavs, strict=True):
        assert one["seconds"] == pytest.approx(read_audio(wav)[0].shape[-1] / 24_000)
    assert (tmp_path / "eval" / "eval.md").read_text().strip() == text.strip()


@needs_models
def test_guards_are_counted(tmp_path, capsys):
    """Random weights never end by themselves: the budget of a 2-letter text, 10.6 s, ends before the limit."""
    (tmp_path / "s.txt").write_text("Hi\n")
    options = ["--model", NOISE, "--max-seconds", 12, "--out", tmp_path]
    assert evaluate("--sentences", tmp_path / "s.txt", *options, "--guards") == 0
    assert "\n\nGuards: retry 0, budget 1, silence 0, repeats 0" in capsys.readouterr().out
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["guards"]["budget"] == 1
    assert values["utterances"]["speech"][0]["seconds"] == pytest.approx(10.6, abs=0.4)
    assert evaluate("--sentences", tmp_path / "s.txt", *options) == 0
    assert "Guards" not in capsys.readouterr().out
    assert json.loads((tmp_path / "eval.json").read_text())["utterances"]["speech"][0]["seconds"] == pytest.approx(12)


@needs_models
def test_a_transcript_does_not_depend_on_earlier_recordings(synthesized, monkeypatch):
    """Nor on when the recogniser was renewed."""
    from csm.evaluate.listen import Recogniser

    monkeypatch.setattr("csm.evaluate.listen.RENEW_AFTER", 2)
    recogniser = Recogniser()
    clips = [read_audio(synthesized / f"{index}.wav") for index in range(3)]
    first = [recogniser.transcribe(*clip) for clip in clips]
    assert [recogniser.transcribe(*clip) for clip in reversed(clips)] == first[::-1]
    assert recogniser.transcribe(torch.zeros(0), 24_000) == ""


@needs_models
def test_voice_similarity(synthesized, tmp_path):
    """One voice is more similar to itself than to another; audio without samples has no voice."""
    from csm.evaluate.listen import SpeakerEncoder, similarity

    subprocess.run(["flite", "-voice", "rms", "-t", SENTENCES[0], "-o", tmp_path / "rms.wav"], check=True)
    encoder = SpeakerEncoder()
    one, same, other = (
        encoder.embed(*read_audio(path))
        for path in (synthesized / "0.wav", synthesized / "1.wav", tmp_path / "rms.wav")
    )
    print(f"\nthe same voice {similarity(one, same):.2f}, another voice {similarity(one, other):.2f}")
    assert similarity(one, same) > similarity(one, other) + 0.1
    assert similarity(one, one) == pytest.approx(1, abs=1e-5)
    assert encoder.embed(torch.zeros(0), 24_000) is None
    assert similarity(one, None) is None


@needs_models
def test_speakers_are_evaluated_and_recognised(tmp_path, capsys):
    """Recordings of two voices match their own speaker ids, and not each other's."""
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    lines = []
    for index, text in enumerate(SENTENCES):
        for speaker, voice in enumerate(("slt", "rms")):
            name = f"{voice}{index}.wav"
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", tmp_path / name], check=True)
            lines.append({"audio": name, "text": text, "speaker": speaker})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    assert evaluate("--data", manifest, "--recordings", "--out", tmp_path / "eval") == 0
    text = capsys.readouterr().out
    print("\n" + text)
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())["summary"]
    assert list(found) == ["recordings", "recordings, speaker 0", "recordings, speaker 1"]
    assert [values["utterances"] for values in found.values()] == [8, 4, 4]
    assert [values["right_voice"] for values in found.values()] == [1, 1, 1]
    assert "correct speaker" in text

    from csm.evaluate.measure import Evaluator, Sentence

    evaluator = Evaluator(None, [Sentence(line["text"], line["speaker"], tmp_path / line["audio"]) for line in lines])
    other = read_audio(tmp_path / "rms0.wav")
    assert evaluator.evaluate(Sentence(SENTENCES[0], speaker=0), *other).right_voice is False
    assert evaluator.evaluate(Sentence(SENTENCES[0], speaker=7), *other).right_voice is None
    assert (
        Evaluator(None, [Sentence("a", 0, tmp_path / "rms0.wav")]).evaluate(Sentence("a"), *other).right_voice is None
    )


@needs_models
def test_sentences_from_a_file_with_a_reference(synthesized, tmp_path, capsys):
    (tmp_path / "sentences.txt").write_text("One for all.\n\nAll for one.\n")
    reference = ["--ref", synthesized / "0.wav", "--ref-text", SENTENCES[0]]
    out = tmp_path / "eval"
    options = ["--model", "tiny", "--max-seconds", 0.8, "--out", out]
    assert evaluate("--sentences", tmp_path / "sentences.txt", *reference, *options) == 0
    values = json.loads((out / "eval.json").read_text())
    assert [one["text"] for one in values["utterances"]["speech"]] == ["One for all.", "All for one."]
    assert values["summary"]["speech"]["length_ratio"] is None
    assert all(one["similar"] is not None for one in values["utterances"]["speech"])


@needs_words
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d"], "nothing to evaluate: give --model"),
        (["--sentences", "s.txt", "--recordings"], "--recordings and --codec need recordings"),
        (["--data", "d", "--codec"], "--codec needs a model's codec"),
        (
            ["--sentences", "s.txt", "--model", "tiny", "--ref-text", "x"],
            "--ref-text is the transcript of --ref: give --ref too",
        ),
        (["--sentences", "s.txt", "--model", "tiny", "--seeds", 0], "--seeds must be at least 1"),
        (["--sentences", "none.txt", "--model", "tiny"], "none.txt: cannot be read"),
        (["--sentences", "s.txt", "--model", "tiny"], "s.txt:2: no word to recognise in '...'"),
        (["--data", "d", "--recordings"], "manifest.jsonl:1: no word to recognise in '?'"),
        (["--model", "tiny"], "one of the arguments --sentences --data is required"),
    ],
)
def test_error_messages(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("s.txt").write_text("Fine.\n...\n")
    Path("d").mkdir()
    sphn.write_wav("d/0.wav", np.random.default_rng(0).normal(size=24_000).astype("float32") / 9, 24_000)
    Path("d/manifest.jsonl").write_text('{"audio": "0.wav", "text": "?"}\n')
    assert evaluate(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("eval").exists()


@needs_words
def test_a_voice_is_the_context(tmp_path, monkeypatch):
    """Speech continues the clips of --voice, as it does a --ref with its text."""
    seen = []

    def evaluate(evaluator, generator, sentences, settings, keep, progress):
        seen.append(settings.context)
        return [Utterance("Good morning.", "good morning", 0, 2, 1.0, 0, True)]

    monkeypatch.setattr("csm.evaluate.command.Evaluator", lambda *_: None)
    monkeypatch.setattr("csm.evaluate.command.evaluate_speech", evaluate)
    monkeypatch.setenv("CSM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    voice = Voice("anna", ("One.", "Two."), (torch.zeros(4, 8, dtype=torch.int64), torch.ones(5, 8, dtype=torch.int64)))
    save_voice(voice, voices_folder() / "anna.safetensors")
    Path("s.txt").write_text("Good morning.\n")
    options = ["--model", NOISE, "--device", "cpu", "--quiet", "--voice", "anna", "--speaker", "3"]
    assert main(["eval", "--sentences", "s.txt", *options]) == 0
    assert [(turn.speaker, turn.text) for turn in seen[0]] == [(3, "One."), (3, "Two.")]
    assert all(torch.equal(turn.codes, codes) for turn, codes in zip(seen[0], voice.codes, strict=True))
