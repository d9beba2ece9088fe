"""Data: the report of bad lines, manifest formats, stored codes, and the contents of examples and batches."""

import json
import shutil
import wave

import numpy as np
import pytest
import sphn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm import Generator, read_audio
from csm.__main__ import main
from csm.finetune.batches import Turn, collate, conversation_examples, plan_epoch
from csm.finetune.codes import CodecSource, CodeStore, encode_missing
from csm.finetune.data import DataOptions, conversations, hold_out, load_corpus
from csm.finetune.manifest import read_manifest
from csm.prompt import TextTokenizer
from csm.weights import open_checkpoint
from micro import random_examples, write_config, write_data
from noise import CONFIG, NOISE

pytestmark = pytest.mark.usefixtures("one_thread")


def write_noise(path, seconds=0.5, rate=24_000, scale=0.2):
    path.parent.mkdir(parents=True, exist_ok=True)
    sphn.write_wav(str(path), scale * np.random.default_rng(1).normal(size=int(seconds * rate)).astype("float32"), rate)


def write_float_wav(path, samples, rate=24_000):
    """32-bit float samples: the WAV format that can hold NaN."""
    data = np.asarray(samples, dtype="<f4").tobytes()
    head = b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    head += (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
    head += (4 * rate).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    path.write_bytes(head + b"data" + len(data).to_bytes(4, "little") + data)


def write_bad_recordings(folder):
    for name in ("good", "other", "third", "turn"):
        write_noise(folder / f"{name}.wav")
    (folder / "empty.wav").touch()
    (folder / "broken.wav").write_bytes(b"RIFF" + bytes(300))
    (folder / "folder.wav").mkdir()
    write_float_wav(folder / "nan.wav", [0.1, float("nan")] * 12_000)
    write_float_wav(folder / "loud.wav", [1000.0, -900.0] * 12_000)
    write_noise(folder / "long.wav", seconds=600, rate=16_000)
    write_noise(folder / "short.wav", seconds=0.02)
    write_noise(folder / "telephone.wav", rate=8000)
    write_noise(folder / "silent.wav", scale=0)
    with wave.open(str(folder / "nothing.wav"), "wb") as file:
        file.setparams((1, 2, 24_000, 0, "NONE", ""))


# The line, and what the report says about it.
BAD_LINES = [
    (b'{"audio": "good.wav", "text": "No end', "not JSON"),
    (b'["good.wav", "A list."]', "must be a JSON object, not list"),
    (b'{"audio": "good.wav", "text": "\xff"}', "not UTF-8"),
    (b'{"text": "No recording."}', "audio is missing"),
    (b'{"audio": "good.wav"}', "text is missing"),
    (b'{"audio": "good.wav", "text": "  "}', "text is empty"),
    (b'{"audio": "", "text": "No name."}', "audio is empty"),
    (b'{"audio": "good.wav", "text": 7}', "text must be a string, not 7"),
    (
        b'{"audio": "good.wav", "text": "Who?", "speaker": -1}',
        "speaker must be an integer of at least 0 and below 2**31, not -1",
    ),
    (
        b'{"audio": "good.wav", "text": "Who?", "speaker": "me"}',
        "speaker must be an integer of at least 0 and below 2**31, not 'me'",
    ),
    (b'{"audio": "good.wav", "text": "What?", "emotion": 1}', "unknown key 'emotion'"),
    (b'{"audio": "good.wav", "text": "When?", "conversation": "a"}', "conversation and order must be given together"),
    (b'{"audio": "other.wav", "text": "Fine."}', "duplicate: same recording and text as line 2"),
    (
        b'{"audio": "turn.wav", "text": "b", "conversation": 1, "order": 1}',
        "duplicate: same conversation and order (1) as line 3",
    ),
    (b'{"audio": "good.wav", "text": "a\\u0000b"}', "text contains a NUL character"),
]
BAD_RECORDINGS = [
    ("missing.wav", "no such file"),
    ("empty.wav", "the file is empty (0 bytes)"),
    ("broken.wav", "cannot be decoded as audio"),
    ("folder.wav", "is a folder"),
    ("nan.wav", "not finite (NaN or infinite)"),
    ("loud.wav", "samples of magnitude 1e+03; full scale is 1"),
    ("long.wav", "is 600.00 s long; it must be 0.1 to 120 s"),
    ("short.wav", "is 0.02 s long"),
    ("telephone.wav", "sample rate is 8000 Hz; it must be 16000"),
    ("silent.wav", "is silent (all samples below 0.0001)"),
    ("nothing.wav", ""),
]
GOOD = [
    b'{"audio": "good.wav", "text": "Fine."}',
    b'{"audio": "other.wav", "text": "Fine."}',
    b'{"audio": "third.wav", "text": "a", "conversation": 1, "order": 1}',
]


def refused(folder, tmp_path, capsys):
    """The error message for this data; nothing is written to the run's folder."""
    arguments = [
        "finetune",
        "--data",
        folder,
        "--model",
        NOISE,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--quiet",
    ]
    assert main([*map(str, arguments)]) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_every_bad_line_is_named_in_one_report(tmp_path, capsys):
    write_bad_recordings(tmp_path)
    bad = [
        *BAD_LINES,
        (json.dumps({"audio": "turn.wav", "text": "word " * 500}).encode(), "text and audio take 2512"),
    ]
    bad += [(json.dumps({"audio": name, "text": "Fine."}).encode(), what) for name, what in BAD_RECORDINGS]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join([*GOOD, *(line for line, _ in bad)]) + b"\n")
    message = refused(tmp_path, tmp_path, capsys)
    print("\n" + message)
    assert f"{len(bad)} problems; correct or remove these lines" in message
    reported = message.splitlines()[1:]
    assert len(reported) == len(bad) == 27
    for number, ((_, what), line) in enumerate(zip(bad, reported, strict=True), start=len(GOOD) + 1):
        assert line.startswith(f"manifest.jsonl:{number}: ") and what in line
    for (name, _), line in zip(BAD_RECORDINGS, reported[-len(BAD_RECORDINGS) :], strict=True):
        assert name in line
    assert not list(tmp_path.rglob("codes-*"))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_manifest_is_refused(tmp_path, capsys, content):
    (tmp_path / "manifest.jsonl").write_bytes(content)
    assert "the manifest is empty" in refused(tmp_path, tmp_path, capsys)


def test_a_folder_without_a_manifest_is_refused(tmp_path, capsys):
    assert "neither manifest.jsonl nor metadata.csv" in refused(tmp_path, tmp_path, capsys)
    assert "no such file or folder" in refused(tmp_path / "nowhere", tmp_path, capsys)


def test_ljspeech(tmp_path, capsys):
    for name in ("LJ001-0001", "LJ001-0002"):
        write_noise(tmp_path / "wavs" / f"{name}.wav", rate=22_050)
    lines = "LJ001-0001|Printing, in 1455|Printing, in fourteen fifty-five\nLJ001-0002|in being modern.\n"
    (tmp_path / "metadata.csv").write_text(lines)
    manifest = read_manifest(tmp_path)
    assert manifest.problems == []
    assert [clip.text for clip in manifest.clips] == ["Printing, in fourteen fifty-five", "in being modern."]
    assert [clip.audio.is_file() for clip in manifest.clips] == [True, True]
    (tmp_path / "metadata.csv").write_text(lines + "LJ001-0003|No such recording.\nonly an id\nLJ001-0001||\n")
    message = refused(tmp_path, tmp_path, capsys)
    assert "3 problems" in message
    assert "metadata.csv:3: " in message and "LJ001-0003.wav: no such file" in message
    assert "metadata.csv:4: 1 fields" in message and "metadata.csv:5: text is empty" in message


@pytest.fixture(scope="module")
def source():
    return CodecSource(open_checkpoint(NOISE), None, 8)


def test_stored_codes_equal_the_codecs_and_are_reused(noisy, source, tmp_path, monkeypatch):
    clips = read_manifest(write_data(tmp_path / "data")).clips
    store = CodeStore(tmp_path / "codes", source)
    monkeypatch.setattr("csm.finetune.codes.SHARD_CLIPS", 3)
    encode_missing(store, clips, jobs=1, progress=False)
    codes = store.read(clips)
    for clip, codes_TK in zip(clips, codes, strict=True):
        assert torch.equal(codes_TK.long(), noisy.encode(*read_audio(clip.audio)))
        assert store.num_frames(clip) == codes_TK.shape[0]

    # After a shard is lost, a later run encodes only its recordings.
    shards = sorted(store.folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[0].unlink()
    again = CodeStore(tmp_path / "codes", source)
    lost = again.missing(clips)
    assert 0 < len(lost) < len(clips)
    encoded = []
    encode = type(source.load()).encode
    monkeypatch.setattr("csm.codec.Codec.encode", lambda *args: encoded.append(1) or encode(*args))
    encode_missing(again, clips, jobs=1, progress=False)
    assert len(encoded) == len(lost)
    assert all(torch.equal(mine, before) for mine, before in zip(again.read(clips), codes, strict=True))

    # A changed recording has no codes; the others keep theirs.
    write_noise(clips[3].audio, seconds=0.7)
    assert again.missing(clips) == [clips[3]]


def test_parallel_encoding_gives_the_same_codes(source, tmp_path):
    clips = read_manifest(write_data(tmp_path / "data")).clips
    stores = [CodeStore(tmp_path / name, source) for name in ("one", "two")]
    for store, jobs in zip(stores, (1, 2), strict=True):
        encode_missing(store, clips, jobs, progress=False)
    for one, two in zip(stores[0].read(clips), stores[1].read(clips), strict=True):
        assert torch.equal(one, two)


def test_codecs_do_not_share_stored_codes(source, tmp_path):
    assert CodeStore(tmp_path, source).folder != CodeStore(tmp_path, CodecSource(source.checkpoint, None, 4)).folder


def test_conversations_keep_their_order_and_stay_together(source, tmp_path):
    for index in range(9):
        write_noise(tmp_path / f"{index}.wav", seconds=0.2 + index / 20)
    lines = [{"audio": f"{n}.wav", "text": f"Turn {n}.", "speaker": n % 2} for n in range(9)]
    for n, order in ((0, 2), (1, 0), (2, 1)):
        lines[n] |= {"conversation": "a", "order": order}
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    groups = conversations(read_manifest(tmp_path).clips)
    assert [clip.text for clip in groups[0]] == ["Turn 1.", "Turn 2.", "Turn 0."]
    assert len(groups) == 7
    train = list(groups)
    held_out = hold_out(train, 0.3)
    assert (len(train), len(held_out)) == (5, 2)
    assert [clip for group in train + held_out for clip in group] != []
    assert not {clip.line for group in train for clip in group} & {clip.line for group in held_out for clip in group}

    tokenizer = TextTokenizer(source.checkpoint.tokenizer_path, CONFIG.text_vocab_size)
    options = DataOptions(tmp_path, tmp_path / "codes", valid_share=0, context=2, mask_context=True)
    corpus = load_corpus(options, source, tokenizer, CONFIG, progress=False)
    assert [(len(example.turns), example.first_trained) for example in corpus.train[:3]] == [(1, 0), (2, 1), (3, 2)]
    assert (len(corpus.train), len(corpus.valid)) == (9, 0)


def turns_of(*lengths):
    return [Turn([1], torch.zeros(length - 2, 4, dtype=torch.int16)) for length in lengths]


def test_context_is_limited_by_max_positions():
    turns = turns_of(10, 20, 30, 40)
    masked = conversation_examples(turns, context=2, mask_context=True, max_positions=70)
    assert [(len(e.turns), e.first_trained, e.num_positions) for e in masked] == [
        (1, 0, 10),
        (2, 1, 30),
        (3, 2, 60),
        (2, 1, 70),
    ]
    whole = conversation_examples(turns, context=2, mask_context=False, max_positions=70)
    assert [(len(e.turns), e.first_trained, e.num_positions) for e in whole] == [(3, 0, 60), (1, 0, 40)]
    alone = conversation_examples(turns, context=0, mask_context=False, max_positions=70)
    assert [e.num_positions for e in alone] == [10, 20, 30, 40]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 9), st.integers(1, 300), st.integers(0, 5)
)
def test_an_epoch_has_every_example_once(lengths, batch_size, batch_rows, epoch):
    batches = plan_epoch(lengths, batch_size, batch_rows, seed=1, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_rows
    assert batches == plan_epoch(lengths, batch_size, batch_rows, seed=1, epoch=epoch)


def test_batches_have_similar_lengths_and_are_reshuffled_each_epoch():
    lengths = torch.randint(20, 500, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    epochs = [plan_epoch(lengths, 16, 100_000, seed=0, epoch=epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in epochs[0])
    print(f"\npadding: {padded / sum(lengths) - 1:.1%}")
    assert padded < 1.05 * sum(lengths)
    firsts = [max(lengths[index] for index in batch) for batch in epochs[0][:40]]
    assert max(firsts) > 2 * min(firsts)  # long and short batches are mixed


def test_positions_of_text_and_audio_in_a_batch():
    examples = random_examples(4, turns=(2, 2))
    batch = collate(examples, "abcd", 1 / 16)
    rows = torch.full((batch.num_sequences, batch.num_positions), -1)
    rows.view(-1)[batch.token_position_M] = 0
    rows.view(-1)[batch.code_position_A] = 1
    for index, example in enumerate(examples):
        expected = []
        for turn in example.turns:
            expected += [0] * len(turn.text_ids) + [1] * (turn.codes_TK.shape[0] + 1)
        expected += [-1] * (batch.num_positions - len(expected))
        assert rows[index].tolist() == expected
    assert batch.frame_S.shape[0] >= len(examples)  # at least one per sequence


def test_code_noise_changes_inputs_and_not_targets():
    example = random_examples(1, turns=(2, 2), frames=(300, 301))[0]
    plain, noisy, again = (collate([example], "a", 1.0, code_noise=share) for share in (0.0, 0.2, 0.2))
    assert torch.equal(plain.input_code_AK, plain.code_AK) and torch.equal(plain.code_AK, noisy.code_AK)
    assert torch.equal(noisy.input_code_AK, again.input_code_AK)
    assert not torch.equal(noisy.input_code_AK, collate([example], "b", 1.0, code_noise=0.2).input_code_AK)
    changed_A = (noisy.input_code_AK != noisy.code_AK).any(dim=1)
    assert 0.12 < changed_A.float().mean() < 0.28  # a frame may be replaced by itself
    ends = [300, 601]
    assert not changed_A[ends].any()  # end frames are never replaced
    for turn, first in zip(example.turns, (0, 301), strict=True):
        frames = {tuple(frame) for frame in turn.codes_TK.tolist()}
        assert {tuple(frame) for frame in noisy.input_code_AK[first : first + 300].tolist()} <= frames


def test_a_trained_model_loads_everywhere(tmp_path):
    """In Generator, in HF Transformers, and as the base model of another run."""
    from transformers import CsmForConditionalGeneration

    data, config = write_data(tmp_path / "data"), write_config(tmp_path / "config.json")
    arguments = ["finetune", "--data", data, "--model", NOISE, "--device", "cpu", "--quiet", "--steps", 2]
    assert main([*map(str, [*arguments, "--config", config, "--out", tmp_path / "run"])]) == 0
    ours = Generator.from_pretrained(tmp_path / "run" / "model", device="cpu")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    values |= {"audio_token_id": 1, "audio_eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 256}
    values["depth_decoder_config"]["max_position_embeddings"] = 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    hf, info = CsmForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(hf.lm_head.weight, ours.model.codebook0_head)
    assert main([*map(str, [*arguments, "--out", tmp_path / "more", "--model", tmp_path / "run" / "model"])]) == 0
    assert Generator.from_pretrained(tmp_path / "more" / "model", device="cpu").config == ours.config
