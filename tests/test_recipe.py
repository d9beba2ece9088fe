"""How the embedded voice is made: its sentences, recordings and codec, at a size that trains in seconds."""

import importlib
import itertools
import json
import math
import random
import shlex
import shutil
import string
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from conftest import tensors_of
from csm import Generator
from csm.__main__ import parse_arguments
from csm.codec import Codec
from csm.finetune.batches import Example, Turn, collate
from csm.finetune.loss import Trainee
from csm.model import CSM
from csm.pronounce import PRONUNCIATION_FILE, Pronouncer
from csm.weights import open_checkpoint, read_model
from csm.weights.layouts import mimi_table
from csm.weights.recipe import open_text, picture, shape
from csm.weights.recipe.codec import (
    LABEL_SAMPLES,
    PHONES,
    UNKNOWN,
    Clips,
    CodedClips,
    MelLoss,
    Trainer,
    Training,
    read_phones,
    work,
)
from csm.weights.recipe.conversations import OPEN_IDS, TURNS, conversations
from csm.weights.recipe.drawn import draw, draw_codes
from csm.weights.recipe.drawn import main as write_drawn
from csm.weights.recipe.everyday import everyday_sentences
from csm.weights.recipe.export import export_codec, export_model, export_start, phone_embedding
from csm.weights.recipe.open_text import as_sentence, evaluation_sentences, open_sentences, plain_words, wordnet_texts
from csm.weights.recipe.recordings import VOICES, Utterance, plan, read_manifest, record_all
from csm.weights.recipe.sentences import number_in_words, plural, sentences, split_of, year_in_words
from noise import CODEC, CONFIG, NOISE, random_state

FRAME = 1920


def test_sentences_are_the_same_every_time_and_never_twice():
    first = sentences("train", 500)
    assert first == sentences("train", 500) == sentences("train", 600)[:500]
    assert len(set(first)) == 500
    assert sentences("train", 50, seed=1) != first[:50]


def test_held_out_sentences_are_in_no_other_split():
    held_out, train = set(sentences("test", 150)), set(sentences("train", 5000))
    assert len(held_out) == 150
    assert not held_out & train
    assert split_of("The red door.") == split_of("the red door!")  # punctuation does not carry a sentence over


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'tset'"):
        sentences("tset", 1)


def test_sentences_are_short_and_plain():
    for sentence in sentences("train", 3000):
        assert 1 <= len(sentence.split()) <= 18
        assert not set("{}_0123456789|") & set(sentence), sentence
        assert sentence[0].isupper() or sentence[0] == '"'
        assert sentence[-1] in ".?!"


@pytest.fixture
def wordnet(tmp_path):
    """WordNet's files with a few lines of their form (wndb(5WN))."""
    lines = ["  1 This is the licence.  "]
    for number in range(400):
        gloss = f'a thing that is {number_in_words(number)} old; "he saw thing {number_in_words(number)}"; "X 7"'
        lines.append(f"{number:08d} 03 n 01 thing 0 000 | {gloss}  ")
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_wordnet_s_texts_become_sentences(wordnet):
    examples, definitions = wordnet_texts(wordnet)
    assert len(examples) == len(definitions) == 400
    assert (examples[3], definitions[3]) == ("He saw thing three.", "A thing that is three old.")
    assert as_sentence("a dog , and a cat--no") == "A dog, and a cat, no."
    assert (
        as_sentence("it was built in 1984")
        is as_sentence(" ".join(["no"] * 21))
        is as_sentence("the U.S. army")
        is None
    )


def test_open_text_is_the_same_every_time_and_holds_out_the_evaluation_list(wordnet, monkeypatch):
    first = open_sentences("train", 600, wordnet=wordnet)
    assert first == open_sentences("train", 700, wordnet=wordnet)[:600]
    assert len({plain_words(text) for text in first}) == 600
    assert all(split_of(text) == "train" and 1 <= len(text.split()) <= 22 for text in first)
    monkeypatch.setattr(open_text, "evaluation_sentences", lambda: [first[10].upper()])
    assert first[10] not in open_sentences("train", 600, wordnet=wordnet)
    with pytest.raises(ValueError, match="'tset'"):
        open_sentences("tset", 1, wordnet=wordnet)


def test_everyday_sentences_are_plain():
    texts = list(itertools.islice(everyday_sentences(random.Random(0)), 3000))
    for text in texts:
        assert 1 <= len(text.split()) <= 22, text
        assert as_sentence(text) in (text, None), text
        assert not set("{}_0123456789|") & set(text), text
        assert text[0].isupper()
        assert text[-1] in ".?!"


def test_the_evaluation_list_is_150_sentences_in_no_template():
    texts = evaluation_sentences()
    assert len({plain_words(text) for text in texts}) == len(texts) == 150
    templates = {plain_words(text) for text in itertools.islice(everyday_sentences(random.Random(1)), 20_000)}
    templates |= {plain_words(text) for text in sentences("train", 2000)}
    assert not templates & {plain_words(text) for text in texts}


def test_a_phone_begins_with_the_embedding_of_the_bytes_that_spell_it():
    before, after = shape.byte_tokenizer(), shape.phone_tokenizer()
    embedding = torch.randn(258, 4, generator=torch.Generator().manual_seed(0))
    phones = phone_embedding(embedding)
    assert phones.shape == (after.get_vocab_size(), 4)
    by_token = {after.id_to_token(index): row for index, row in enumerate(phones)}
    assert torch.equal(by_token["m"], embedding[before.token_to_id("m")])
    assert torch.equal(by_token["<|end_of_text|>"], embedding[before.token_to_id("<|end_of_text|>")])
    spelt = embedding[[before.token_to_id("s"), before.token_to_id("h")]].mean(dim=0)
    assert torch.equal(by_token["ʃ"], spelt)


def test_numbers_and_plurals_are_said_in_full():
    said = {7: "seven", 40: "forty", 85: "eighty five", 300: "three hundred", 341: "three hundred forty one"}
    assert {number: number_in_words(number) for number in said} == said
    assert number_in_words(12_005) == "twelve thousand five"
    years = {1984: "nineteen eighty four", 1905: "nineteen oh five", 2000: "two thousand", 2009: "two thousand nine"}
    years |= {1800: "eighteen hundred", 2024: "twenty twenty four"}
    assert {year: year_in_words(year) for year in years} == years
    assert [plural(noun) for noun in ("box", "lady", "boy", "mouse")] == ["boxes", "ladies", "boys", "mice"]


def test_training_sentences_take_turns_and_held_out_ones_have_every_voice():
    assert [speaker for _, _, speaker in plan("train", 8)] == [0, 1, 2, 3] * 2
    assert [speaker for _, _, speaker in plan("test", 2)] == [0, 1, 2, 3] * 2
    assert len({text for _, text, _ in plan("test", 2)}) == 2


def test_conversations_use_every_recording_once_and_open_ids_for_one_voice_each():
    lines = [Utterance(f"{n}.wav", f"Line {n}.", n % 4, f"train-{n // 8}", n % 8) for n in range(400)]
    talks = list(conversations(lines))
    assert talks == list(conversations(lines)) != list(conversations(lines, seed=1))
    assert sorted(line.audio for line in talks) == sorted(line.audio for line in lines)
    voice_of = {line.audio: line.speaker for line in lines}
    text_of = {line.audio: line.text for line in lines}
    assert all(line.text == text_of[line.audio] for line in talks)
    by_talk: dict[str, list[Utterance]] = {}
    for line in talks:
        by_talk.setdefault(line.conversation, []).append(line)
    open_talks, meanings = 0, set()
    for talk in by_talk.values():
        assert len(talk) <= max(TURNS) and len({line.order for line in talk}) == len(talk)
        voices = {(line.speaker, voice_of[line.audio]) for line in talk}
        assert len({speaker for speaker, _ in voices}) == len({voice for _, voice in voices}) == len(voices) <= 2
        if talk[0].speaker in OPEN_IDS:
            open_talks, meanings = open_talks + 1, meanings | voices
        else:
            assert all(speaker == voice for speaker, voice in voices)
    assert 0.2 < open_talks / len(by_talk) < 0.55  # half of those with several turns
    assert len(meanings) == len(OPEN_IDS) * len(VOICES)  # every open id has been every voice


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_recordings_and_their_manifest(tmp_path):
    manifest = record_all(tmp_path, "test", 1, workers=2)
    lines = read_manifest(manifest)
    assert [line.speaker for line in lines] == list(range(len(VOICES)))
    for line in lines:
        audio, rate = sphn.read(line.audio)
        assert (audio.shape[0], rate) == (1, 24_000)
        assert 0.5 < audio.shape[1] / rate < 12 and abs(audio).max() > 0.05
        phones = read_phones(Path(line.audio), audio.shape[1] // 240, 240)
        said = [PHONES[phone] for phone in phones]
        assert said[0] == said[-1] == "pau" and len(set(said)) > 5
        quiet, loud = (audio[0, : phones.size * 240].reshape(-1, 240)[mask].std() for mask in (phones == 0, phones > 0))
        assert quiet < 0.3 * loud  # they are where the sound is
    times = [Path(line.audio).stat().st_mtime_ns for line in lines]
    before = manifest.read_text()
    record_all(tmp_path, "test", 1, workers=2)  # nothing is read again
    assert times == [Path(line.audio).stat().st_mtime_ns for line in lines]
    assert manifest.read_text() == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Four recordings that no synthesiser is needed for: gliding tones, each said to be a pause and a phone."""
    folder = tmp_path_factory.mktemp("tones")
    time = np.arange(2 * 24_000, dtype=np.float32) / 24_000
    lines = []
    for number in range(4):
        sphn.write_wav(
            str(folder / f"{number}.wav"), 0.3 * np.sin(2 * np.pi * (200 + 150 * number * time) * time), 24_000
        )
        (folder / f"{number}.phones").write_text(f"pau:0.25 {PHONES[number + 1]}:2.0\n")
        lines.append({"audio": f"{number}.wav", "text": "-", "speaker": 0, "conversation": str(number), "order": 0})
    path = folder / "tones.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


SMALL = replace(CODEC, num_filters=4, codebook_size=32, num_codebooks=4)
TRAINING = Training(
    steps=24,
    warm_steps=4,
    clips=2,
    clip_frames=4,
    warmup=1,
    learning_rate=3e-3,
    codebook_clips=32,
    workers=1,
    save_every=6,
    compiled=False,
)


def trainer(manifest, folder):
    folder.mkdir(exist_ok=True)
    return Trainer(SMALL, TRAINING, Clips(manifest, TRAINING.clip_frames * FRAME), folder)


def test_manifest_paths_are_relative_to_it(manifest):
    first = read_manifest(manifest)[0]
    assert first == Utterance(str(manifest.parent / "0.wav"), "-", 0, "0", 0)


def test_clips_come_from_one_recording_each(tmp_path):
    lines = [Utterance(f"{level}.wav", "-", 0, "0", level) for level in range(1, 6)]
    for line in lines:
        sphn.write_wav(str(tmp_path / line.audio), np.full(5000 * line.order, line.order / 10, np.float32), 24_000)
    path = tmp_path / "levels.jsonl"
    path.write_text("\n".join(json.dumps(asdict(line)) for line in lines))
    for clip in Clips(path, 8000).draw(100, np.random.default_rng(0))[0][:, 0]:
        levels = {round(float(value), 2) for value in clip.unique()}
        assert len(levels - {0.0}) == 1, levels
    path.write_text("\n".join(json.dumps(asdict(line)) for line in lines[:2]))
    assert list(Clips(path, 8000).ends) == [5000, 15_000]  # not what was gathered of the longer manifest


def test_clips_are_drawn_from_a_seed(manifest):
    clips = Clips(manifest, FRAME)
    assert list(clips.ends) == [48_000, 96_000, 144_000, 192_000]
    (drawn, labels), (again, labels_again) = (clips.draw(50, np.random.default_rng(0)) for _ in range(2))
    assert drawn.shape == (50, 1, FRAME) and labels.shape == (50, FRAME // LABEL_SAMPLES)
    assert torch.equal(drawn, again) and torch.equal(labels, labels_again)
    assert 0.2 < drawn.abs().max() <= 0.31


def test_labels_are_of_the_samples_beside_them(tmp_path):
    """Two recordings whose samples say which phone they are."""
    lines = [Utterance(f"{number}.wav", "-", 0, "0", number) for number in range(2)]
    for line, length in zip(lines, (9000, 20_001), strict=True):
        phone_N = np.full(length, 0.5, np.float32)
        phone_N[:2400] = 0.0
        phone_N[6000:] = 0.25
        sphn.write_wav(str(tmp_path / line.audio), phone_N, 24_000)
        (tmp_path / line.audio).with_suffix(".phones").write_text(f"pau:0.1 b:0.25 zh:{length / 24_000:.3f}\n")
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(json.dumps(asdict(line)) for line in lines))
    audio, labels = Clips(path, 6 * FRAME).draw(200, np.random.default_rng(0))
    middles = audio[:, 0, LABEL_SAMPLES // 2 :: LABEL_SAMPLES]
    # A label is of the 10 ms that its sample is in: at a border it may be the neighbour's.
    expected = torch.zeros_like(labels)
    expected[middles > 0.2] = PHONES.index("zh")
    expected[middles > 0.4] = PHONES.index("b")
    assert (labels == expected).float().mean() > 0.97
    assert {*labels.unique().tolist()} == {0, PHONES.index("b"), PHONES.index("zh")}


def test_phones_that_nobody_wrote_down_are_unknown(tmp_path):
    assert (read_phones(tmp_path / "none.wav", 7, 240) == UNKNOWN).all()
    (tmp_path / "one.phones").write_text("pau:0.015 ae:0.030\n")
    assert read_phones(tmp_path / "one.wav", 5, 240).tolist() == [0, 0, 2, 0, 0]  # at 0, 10, ..., 40 ms


def test_mel_loss_is_zero_for_the_same_and_grows_with_the_distance():
    loss = MelLoss(24_000)
    audio = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    assert loss(audio, audio) == 0
    assert 0 < loss(audio, 0.9 * audio) < loss(audio, 0.5 * audio) < loss(audio, torch.zeros_like(audio))


def test_training_goes_on_as_if_it_had_not_stopped_and_the_loss_falls(manifest, tmp_path):
    whole, part = trainer(manifest, tmp_path / "whole"), trainer(manifest, tmp_path / "part")
    whole.run()
    part.run(until=12)
    resumed = trainer(manifest, tmp_path / "part")
    assert (resumed.step, resumed.has_codebooks) == (12, True)
    resumed.run()
    for name, tensor in whole.mimi.state_dict().items():
        assert torch.equal(tensor, resumed.mimi.state_dict()[name]), name
    rows = (tmp_path / "whole" / "losses.csv").read_text().splitlines()
    mel = [float(row.split(",")[3]) for row in rows[1:]]
    assert len(mel) == 24
    assert sum(mel[-4:]) < 0.9 * sum(mel[:4])
    for name, tensor in whole.phone_head.state_dict().items():
        assert torch.equal(tensor, resumed.phone_head.state_dict()[name]), name


def test_codebook_0_is_taught_the_phones_and_nothing_else(manifest, tmp_path):
    run = trainer(manifest, tmp_path / "run")
    run.run(until=8)
    rng = np.random.default_rng(0)
    losses = run._losses(4, rng)
    projection = run.mimi.quantizer.rvq_first.input_proj.weight
    for name, taught in (("mel", False), ("likeness", False), ("phones", True)):
        (gradient,) = torch.autograd.grad(losses[name], projection, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == taught, name
    run.training = replace(TRAINING, steps=200)
    phones = [run.take_step()["phones"] for _ in range(60)]
    assert sum(phones[-5:]) < 0.6 * sum(phones[:5])


def test_two_readings_differ_by_what_they_are_off(manifest, tmp_path):
    losses = {}
    for jitter in (0.0, 5.0):
        run = trainer(manifest, tmp_path / str(jitter))
        run.training = replace(TRAINING, jitter=jitter)
        rng = np.random.default_rng(0)
        losses[jitter] = run._losses(0, rng)["likeness"]
    assert losses[0.0] == 0 < losses[5.0]
    audio_11N = torch.arange(1.0, 2001.0).view(1, 1, -1)
    for _ in range(20):
        off = run._off(audio_11N, rng)[0, 0]
        shift = int(off[1000] - audio_11N[0, 0, 1000])
        assert abs(shift) <= 120 and torch.equal(off[200:-200], audio_11N[0, 0, 200 + shift : 1800 + shift])


@pytest.fixture
def small(monkeypatch):
    model = replace(CONFIG, num_codebooks=4, codebook_size=32, audio_vocab_size=35)
    model = replace(model, depth_decoder=replace(model.depth_decoder, max_positions=4))
    monkeypatch.setattr("csm.weights.recipe.export.CODEC", SMALL)
    monkeypatch.setattr("csm.weights.recipe.export.MODEL", model)
    return model


def test_what_is_exported_decodes_as_what_was_trained(manifest, tmp_path, small):
    run = trainer(manifest, tmp_path / "run")
    run.run(until=10)
    assert (tmp_path / "run" / "losses.csv").read_text().count("\n") == 11
    audio = Clips(manifest, 10 * FRAME).draw(1, np.random.default_rng(0))[0][0, 0]
    export_codec(tmp_path / "run" / "checkpoint.pt", tmp_path / "codec.safetensors")
    pronouncer = Pronouncer({"hi": "hI"}, dict.fromkeys(string.ascii_lowercase, "t"))
    pronouncer.write(tmp_path / "words.json.gz")
    export_start(tmp_path / "codec.safetensors", tmp_path / "start", tmp_path / "words.json.gz")
    run.mimi.eval()
    with torch.no_grad():
        codes_1KT = run.mimi.encode(audio.view(1, 1, -1))
        expected = run.mimi.decode(codes_1KT)[0, 0]
    export_model(tmp_path / "start", tmp_path / "shipped")
    for folder in ("start", "shipped"):
        generator = Generator.from_pretrained(tmp_path / folder, device="cpu")
        assert generator.config == small
        assert (generator.encode(audio) == codes_1KT[0].T).float().mean() > 0.9  # float16 may move a few
        assert (generator.decode(codes_1KT[0].T) - expected).norm() < 0.02 * expected.norm()
        assert len(generator.generate_codes("Hi.", max_audio_length_ms=160, topk=30, seed=0)) == 2
        assert generator.defaults.temperature == 0.4
        assert (tmp_path / folder / PRONUNCIATION_FILE).read_bytes() == (tmp_path / "words.json.gz").read_bytes()
    start, shipped = (tensors_of(tmp_path / folder / "model.safetensors") for folder in ("start", "shipped"))
    assert start.keys() == shipped.keys()
    for name, tensor in shipped.items():
        assert tensor.dtype == (torch.float16 if name.startswith("codec_model.") else torch.bfloat16)
        assert torch.equal(tensor, start[name].to(tensor.dtype))
    later = {name: tensor * 2 for name, tensor in load_file(tmp_path / "codec.safetensors").items()}
    save_file(later, tmp_path / "later.safetensors")
    export_model(tmp_path / "start", tmp_path / "again", tmp_path / "later.safetensors")
    again = tensors_of(tmp_path / "again" / "model.safetensors")
    for name, tensor in again.items():
        assert torch.equal(tensor, shipped[name] * (2 if name.startswith("codec_model.") else 1)), name


def test_a_run_can_begin_with_a_trained_codec(manifest, tmp_path):
    first = trainer(manifest, tmp_path / "first")
    first.run(until=6)
    export_codec(tmp_path / "first" / "checkpoint.pt", tmp_path / "codec.safetensors")
    second = trainer(manifest, tmp_path / "second")
    second.start_from(load_file(tmp_path / "codec.safetensors"))
    begun = second.take_step()
    assert begun["codebooks"] > 0
    assert begun["mel"] < 0.95 * trainer(manifest, tmp_path / "third").take_step()["mel"]


@pytest.mark.slow
def test_workers_learn_as_one_and_go_on_as_if_they_had_not_stopped(manifest, tmp_path):
    """Two processes, stopped before the codebooks are made and after, against two that are not."""
    training = replace(TRAINING, workers=2, steps=12, save_every=100)
    Clips(manifest, 1)  # gathered once
    for name, stops in (("whole", [12]), ("part", [2, 7, 12])):
        (tmp_path / name).mkdir()
        for until in stops:
            (tmp_path / name / "workers").unlink(missing_ok=True)
            arguments = (SMALL, training, manifest, tmp_path / name, None, None, until)
            multiprocessing.spawn(work, arguments, nprocs=2)
    whole, part = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "part"))
    assert whole["step"] == part["step"] == 12
    for name, tensor in whole["mimi"].items():
        assert torch.equal(tensor, part["mimi"][name]), name
    rows = (tmp_path / "part" / "losses.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(1, 13))


@pytest.mark.slow
def test_workers_end_with_who_began_them(manifest, tmp_path):
    """A killed parent, which cannot tell them: the log of the steps grows no more."""
    program = f"""
from pathlib import Path
from test_recipe import SMALL, TRAINING, multiprocessing, replace, work
training = replace(TRAINING, workers=2, steps=5000, warm_steps=5000, save_every=5000)
multiprocessing.spawn(work, (SMALL, training, Path({str(manifest)!r}), Path({str(tmp_path)!r}), None), nprocs=2)
"""
    Clips(manifest, 1)  # gathered once
    log = tmp_path / "losses.csv"
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not log.exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        run.kill()
    deadline = time.monotonic() + 30
    size = -1
    while log.stat().st_size != size:
        assert time.monotonic() < deadline
        size = log.stat().st_size
        time.sleep(3)


def test_the_decoder_alone_learns_and_the_codes_stay(manifest, tmp_path):
    first = trainer(manifest, tmp_path / "first")
    first.run(until=8)
    export_codec(tmp_path / "first" / "checkpoint.pt", tmp_path / "codec.safetensors")
    (tmp_path / "second").mkdir()
    clips = Clips(manifest, 4 * FRAME)
    sounds = torch.from_numpy(np.array(clips.array).reshape(4, 1, -1)).float() / 32768
    with torch.no_grad():
        codes_FK = first.mimi.eval().encode(sounds).transpose(1, 2).flatten(0, 1).numpy()
    np.savez(tmp_path / "codes.npz", codes=np.stack([codes_FK, codes_FK[::-1]]), ends=np.arange(1, 5) * 25)
    coded = CodedClips(clips, tmp_path / "codes.npz")
    second = Trainer(SMALL, replace(TRAINING, drawn_share=0.1), clips, tmp_path / "second", coded=coded)
    before = load_file(tmp_path / "codec.safetensors")
    second.start_from(before)
    losses = [second.take_step()["mel"] for _ in range(12)]
    assert sum(losses[-4:]) < sum(losses[:4])
    second.save()
    export_codec(tmp_path / "second" / "checkpoint.pt", tmp_path / "again.safetensors")
    for name, tensor in load_file(tmp_path / "again.safetensors").items():
        learns = name.startswith(("decoder.", "decoder_transformer.", "upsample.")) and "layer_scale" not in name
        assert torch.equal(tensor, before[name]) != learns, name
    with pytest.raises(ValueError, match="trains other parts"):
        trainer(manifest, tmp_path / "second")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_trains_the_codec_and_a_cpu_goes_on(manifest, tmp_path):
    (tmp_path / "gpu").mkdir()
    clips = Clips(manifest, TRAINING.clip_frames * FRAME)
    gpu = Trainer(SMALL, replace(TRAINING, device="cuda"), clips, tmp_path / "gpu")
    assert gpu.take_step()["mel"] == pytest.approx(trainer(manifest, tmp_path / "cpu").take_step()["mel"], rel=0.01)
    gpu.run(until=6)
    later = trainer(manifest, tmp_path / "gpu")
    assert later.step == 6 and later.has_codebooks
    assert later.take_step()["mel"] == pytest.approx(gpu.take_step()["mel"], rel=0.02)


def test_coded_clips_begin_with_their_frames(tmp_path):
    """Recordings that end within a frame; codes say (recording, frame), or with 100 more that they are drawn."""
    rng = np.random.default_rng(0)
    sounds = [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in (47_000, 50_001, 3 * FRAME, 4 * FRAME)]
    for number, sound in enumerate(sounds):
        sphn.write_wav(str(tmp_path / f"{number}.wav"), sound, 24_000)
    lines = [Utterance(f"{number}.wav", "-", 0, str(number), 0) for number in range(4)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines))
    lengths = [25, 27, 3, 4]
    frames = np.array([(which, frame) for which in range(4) for frame in range(lengths[which])], np.int16)
    np.savez(tmp_path / "codes.npz", codes=np.stack([frames, frames + 100]), ends=np.cumsum(lengths))
    clips = Clips(tmp_path / "all.jsonl", 4 * FRAME)
    audio, codes, begins = CodedClips(clips, tmp_path / "codes.npz").draw(600, 0.5, rng)
    drawn = (codes >= 100).flatten(1)
    assert 240 < drawn.all(dim=1).sum() < 360
    assert torch.equal(drawn.all(dim=1), drawn.any(dim=1))
    which, frame = (codes % 100).unbind(1)
    assert torch.equal(frame, frame[:, :1] + torch.arange(4))
    assert torch.equal(begins, frame[:, 0] == 0)
    for piece, place, first in zip(audio[:, 0].numpy(), which[:, 0].tolist(), frame[:, 0].tolist(), strict=True):
        expected = np.pad(sounds[place], (0, FRAME))[first * FRAME :][: 4 * FRAME]
        assert np.abs(piece - expected).max() < 1e-4
    seen = set(zip(which[:, 0].tolist(), frame[:, 0].tolist(), strict=True))
    assert seen == {(0, first) for first in range(22)} | {(1, first) for first in range(24)} | {(3, 0)}
    np.savez(tmp_path / "codes.npz", codes=np.stack([frames, frames]), ends=np.arange(1, 4) * 25)
    with pytest.raises(ValueError, match="of 3 recordings, the manifest 4"):
        CodedClips(clips, tmp_path / "codes.npz")


def test_drawn_codes_are_likely_and_of_the_best():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    drawn = draw(logits.repeat(20_000, 1), 0.8, 3, torch.Generator().manual_seed(0)).bincount(minlength=5) / 20_000
    expected = torch.tensor([0.0, *(math.exp(x / 0.8) for x in (1, 2, 3)), 0.0])
    assert (drawn - expected / expected.sum()).abs().max() < 0.02


def test_codes_are_drawn_given_those_before_in_the_frame():
    """The best ones, so that nothing is random: in one pass over what was drawn, each is the best again."""
    checkpoint = open_checkpoint(NOISE)
    state = read_model(checkpoint, torch.device("cpu"), torch.float32)
    trainee = Trainee(CSM.from_state_dict(checkpoint.config, state, torch.device("cpu"))).eval()
    generator = torch.Generator().manual_seed(0)
    turns = [
        Turn([256, *range(65, 70 + length), 257], torch.randint(256, (length, 8), generator=generator))
        for length in (5, 9, 2)
    ]
    drawn = draw_codes(trainee, turns, 1.0, 1, generator)
    for turn, codes_TK in zip(turns, drawn, strict=True):
        assert codes_TK.shape == turn.codes_TK.shape
        assert torch.equal(codes_TK[:, 0], turn.codes_TK[:, 0])
        assert not torch.equal(codes_TK, turn.codes_TK)
        (alone,) = draw_codes(trainee, [turn], 1.0, 1, generator)
        assert torch.equal(alone, codes_TK)  # what others are beside it changes nothing
        with torch.no_grad():
            h_ND = trainee.predicting_states(collate([Example((turn,))], [""], 1.0))[:-1]
            best = trainee.depth_logits(h_ND, codes_TK)[:, :, :256].argmax(-1)
        assert torch.equal(best.T, codes_TK[:, 1:])


def test_recordings_and_a_model_to_drawn_codes(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["drawn", str(manifest), NOISE, str(tmp_path / "codes.npz"), "--codes", str(tmp_path / "codes")]
    )
    write_drawn()
    with np.load(tmp_path / "codes.npz") as file:
        codes, ends = file["codes"], file["ends"]
    assert list(ends) == [25, 50, 75, 100]
    assert codes.shape == (2, 100, 8)
    generator = Generator.from_pretrained(NOISE, device="cpu")
    tone = torch.from_numpy(sphn.read(str(manifest.parent / "2.wav"))[0][0])
    assert torch.equal(torch.from_numpy(codes[0, 50:75]).long(), generator.encode(tone))
    assert (codes[1] != codes[0]).mean(axis=0)[1:].min() > 0.9
    assert (codes[1] == codes[0])[:, 0].all()
    written = (tmp_path / "codes.npz").stat().st_mtime_ns
    write_drawn()
    assert (tmp_path / "codes.npz").stat().st_mtime_ns == written  # drawn already
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    write_drawn()
    with np.load(tmp_path / "codes.npz") as file:
        assert (file["codes"][1] != codes[1]).any()


def test_folded_scales_and_added_layers_change_nothing(manifest, tmp_path):
    """A codec of two layers whose scales are moshi's, gone on with as one of three without them."""
    state = random_state(mimi_table(SMALL), seed=1)
    audio, _ = Clips(manifest, 6 * FRAME).draw(1, np.random.default_rng(0))
    deeper = replace(SMALL, num_layers=3)
    run = Trainer(deeper, TRAINING, Clips(manifest, FRAME), tmp_path)
    run.start_from(state)
    found = run.mimi.state_dict()
    assert all((tensor == 1).all() for name, tensor in found.items() if ".layer_scale" in name)
    codec, expected = (
        Codec(config, 4, weights, torch.device("cpu")) for config, weights in ((deeper, found), (SMALL, state))
    )
    codes_TK = expected.encode(audio[0, 0])
    assert torch.equal(codec.encode(audio[0, 0]), codes_TK)
    assert (codec.decode(codes_TK) - expected.decode(codes_TK)).abs().max() < 1e-5
    assert expected.decode(codes_TK).std() > 1e-3


def test_a_picture_of_what_is_said(manifest, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="only the train extra brings it")
    line = asdict(read_manifest(manifest)[0]) | {"text": "Hello."}
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr("sys.argv", ["picture", str(tmp_path / "one.jsonl"), NOISE, str(tmp_path / "out.png")])
    monkeypatch.setattr(Generator, "generate", lambda *_, **__: torch.rand(9600) - 0.5)
    picture.main()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sphn.read(str(tmp_path / "out.wav"))[0].shape == (1, 9600)
    assert "Hello." in capsys.readouterr().out


def test_codebooks_keep_no_graph(manifest, tmp_path):
    """moshi replaces unused codes by latents: with their graph, every step's memory would stay."""
    run = trainer(manifest, tmp_path / "run")
    run.run(until=20)
    assert all(not buffer.requires_grad for buffer in run.mimi.buffers())


@pytest.mark.parametrize("field", ["steps", "clips", "workers"])
def test_a_training_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
        replace(TRAINING, **{field: 0})


def test_workers_are_for_a_cpu():
    with pytest.raises(ValueError, match="2 workers need the device cpu; cuda takes one worker"):
        replace(TRAINING, workers=2, device="cuda")


def test_a_codec_of_too_few_codebooks_is_refused(manifest, tmp_path):
    run = trainer(manifest, tmp_path / "run")
    state = {name: value for name, value in run.mimi.state_dict().items() if "rvq_rest.vq.layers.2" not in name}
    with pytest.raises(ValueError, match="has 3 codebooks, not 4"):
        run.start_from(state)


def test_the_commands_of_make_tiny_are_as_the_programs_take_them(monkeypatch, capsys):
    root = Path(__file__).parents[1]
    made = subprocess.run(["make", "-n", "tiny"], cwd=root, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line) for line in made.replace("\\\n", " ").splitlines() if " -m csm" in line]
    called = []
    for words in commands:
        place = words.index("-m") + 1
        package, arguments = words[place], words[place + 1 :]
        called.append(package.split(".")[-1] if package != "csm" else arguments[0])
        if package == "csm":
            assert parse_arguments(arguments).run
            continue
        monkeypatch.setattr(sys, "argv", [package, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(package).main()
        known = capsys.readouterr().out
        assert all(word in known for word in arguments if word.startswith("--")), words
    order = ["recordings", "pronunciation", "conversations", "codec", "export", "finetune", "drawn", "codec", "export"]
    order += ["eval"]
    assert [name for name, _ in itertools.groupby(called)] == order


def test_the_codec_is_mimi_s_shape():
    assert shape.CODEC.frame_size == FRAME
    assert shape.CODEC.sample_rate == 24_000
