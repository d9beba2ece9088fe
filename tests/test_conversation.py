"""Conversations: past the window, saved and loaded, with text that arrives in pieces."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from csm import Conversation, CSMError, Generator, PromptError, RoomWarning, Segment, Voice
from noise import NOISE

RNG = torch.Generator().manual_seed(1)


def codes(frames):
    return torch.randint(256, (frames, 8), generator=RNG)


def voice(name, frames=20):
    return Voice(name, (f"This is {name}.",), (codes(frames),))


VOICES = {0: voice("anna"), 1: voice("bea")}
GREEDY = dict(max_turn_ms=800, temperature=0.0)


def test_twenty_turns_run_past_the_window(noisy, one_thread):
    """At each turn: no error, the voices are still there, and the codes are those of a generation from scratch."""
    fresh = Generator.from_pretrained(NOISE, device="cpu")
    talk = Conversation(noisy, VOICES, **GREEDY)
    references = [segment for speaker, one in VOICES.items() for segment in one.segments(speaker)]
    evicted, longest = [], 0
    for turn in range(20):
        if turn % 2:
            talk.add(Segment(1, f"Somebody says {turn}.", codes=codes(200)))
            continue
        before = talk.num_positions
        stream = talk.say(0, f"Turn {turn} of twenty.")
        context = talk.context
        for one, two in zip(references, context, strict=False):
            assert (one.speaker, one.text) == (two.speaker, two.text)
            assert torch.equal(one.codes, two.codes)
        audio = torch.cat(list(stream))
        assert audio.shape == (10 * 1920,)
        assert talk.num_positions <= before + 40
        fresh._prefix_cache.clear()
        expected = fresh.generate_codes(f"Turn {turn} of twenty.", 0, context, 800, 0.0)
        assert torch.equal(talk.turns[-1].codes, expected), turn
        longest = max(longest, talk.num_positions)
        evicted.append(talk.stats.num_evicted)
    assert talk.stats.num_turns == 20
    assert len(talk.turns) == 20 - evicted[-1]
    assert 0 < evicted[-1] < 20
    assert len(set(evicted)) < 5  # several turns leave at a time
    assert 1500 < longest <= 2048
    assert talk.stats.positions_evicted > 200
    assert talk.stats.seconds == pytest.approx(8.0)


def test_the_next_turn_reads_the_earlier_ones_from_the_cache(noisy, monkeypatch):
    found = []
    load = noisy._prefix_cache.load
    monkeypatch.setattr(noisy._prefix_cache, "load", lambda *args: found.append(load(*args)) or found[-1])
    talk = Conversation(noisy, {0: voice("carla", 100)}, **GREEDY)
    for text in ("One.", "Two.", "Three."):
        before = talk.num_positions
        list(talk.say(0, text))
        if text != "One.":
            assert found[-1] >= before - 2  # all but the last frame's row and the end of the turn


def test_a_text_that_is_too_long_moves_no_turn(noisy):
    talk = Conversation(noisy, VOICES, **GREEDY)
    talk.add(Segment(1, "Somebody says this.", codes=codes(200)))
    with pytest.raises(PromptError):
        talk.say(0, "word " * 5000)
    assert len(talk.turns) == 1 and talk.stats.num_evicted == 0


def test_a_low_water_mark(noisy):
    talk = Conversation(noisy, low_water=0.5, **GREEDY)
    for _ in range(9):
        talk.add(Segment(1, "Something.", codes=codes(200)))
    assert talk.stats.num_evicted == 0
    talk.add(Segment(1, "Something.", codes=codes(200)))
    assert talk.num_positions <= 1024 + 220
    assert len(talk.turns) == 10 - talk.stats.num_evicted


def test_text_in_pieces(noisy):
    """Each whole clause is a turn, and is generated before the next piece is asked for."""
    talk, asked = Conversation(noisy, seed=3, max_turn_ms=160), []

    def pieces():
        for piece in ("Well, I think that this wor", "ks. And ", "this is the end"):
            asked.append((piece, talk.stats.num_turns))
            yield piece

    audio = list(talk.say(0, pieces()))
    assert [turn.text for turn in talk.turns] == ["Well, I think that this works.", "And this is the end"]
    assert [turns for _, turns in asked] == [0, 0, 1]
    assert len(audio) == 4


def test_voices_that_leave_little_room_shorten_the_turn(noisy):
    talk = Conversation(noisy, {0: voice("anna", 1990)}, max_turn_ms=8000, temperature=0.0)
    with pytest.warns(RoomWarning, match=r"room for 2\.\d+ s of audio, of the 8 s"):
        stream = talk.say(0, "Hi.")
    assert 20 < len(list(stream)) < 40
    list(talk.say(0, "Hi."))  # the first turn has left
    assert talk.stats.num_evicted == 1


def test_seeds(noisy):
    one, two, other = (Conversation(noisy, seed=seed, max_turn_ms=240) for seed in (1, 1, 2))
    for talk in (one, two, other):
        for text in ("Hello.", "Hello."):
            list(talk.say(0, text))
    assert [torch.equal(a.codes, b.codes) for a, b in zip(one.turns, two.turns, strict=True)] == [True, True]
    assert not torch.equal(one.turns[0].codes, other.turns[0].codes)


def test_a_reader_that_stops_keeps_what_it_read(noisy):
    talk = Conversation(noisy, seed=1, max_turn_ms=800)
    stream = talk.say(0, "Hello there.")
    next(stream), next(stream)
    stream.close()
    assert talk.turns[0].codes.shape == (2, 8)
    never = talk.say(0, "Never read.")
    del never
    assert len(talk.turns) == 1


def test_audio_of_the_other_side_is_encoded_once(noisy):
    talk = Conversation(noisy, max_turn_ms=160)
    talk.add(Segment(1, "La.", torch.sin(torch.arange(24_000) / 20)))
    assert talk.turns[0].codes.shape == (13, 8)


def test_save_and_load(noisy, tmp_path):
    path = tmp_path / "talk.safetensors"
    talk = Conversation(noisy, VOICES, seed=5, max_turn_ms=400)
    list(talk.say(0, "One."))
    talk.add(Segment(7, "Two.", torch.sin(torch.arange(9600) / 20)))
    talk.save(path)
    again = Conversation.load(noisy, path)
    assert again.stats == talk.stats
    assert again.num_positions == talk.num_positions
    for one in (talk, again):
        list(one.say(1, "Three."))
    assert torch.equal(talk.turns[-1].codes, again.turns[-1].codes)
    assert list(tmp_path.iterdir()) == [path]


def junk(path):
    path.write_bytes(b"junk")


def another_format(path):
    save_file({"a": torch.zeros(1)}, path, {"format": "2"})


def missing_codes(path):
    state = {"turns": [[0, "One."]], "voices": [], "settings": {}, "stats": {}}
    save_file({"a": torch.zeros(1)}, path, {"format": "csm-conversation-1", "state": json.dumps(state)})


@pytest.mark.parametrize("damage", [junk, another_format, missing_codes, lambda path: None])
def test_files_that_are_no_conversations(noisy, tmp_path, damage):
    damage(tmp_path / "talk.safetensors")
    with pytest.raises(CSMError, match=r"talk\.safetensors: cannot be read as a conversation"):
        Conversation.load(noisy, tmp_path / "talk.safetensors")


BAD = {
    "voices too long": (
        lambda noisy: Conversation(noisy, {0: voice("anna", 2040)}).say(0, "Hi."),
        PromptError,
        "takes",
    ),
    "low water 0": (lambda noisy: Conversation(noisy, low_water=0), CSMError, "low_water"),
    "no such voice": (lambda noisy: Conversation(noisy, {0: "nobody_here"}), CSMError, "nobody_here"),
    "a text too long": (
        lambda noisy: Conversation(noisy).say(0, "word " * 420),
        PromptError,
        "the prompt takes 21.. pos",
    ),
    "an empty text": (lambda noisy: Conversation(noisy).say(0, " "), PromptError, "text is empty"),
    "speaker -1": (lambda noisy: Conversation(noisy).say(-1, "Hi."), PromptError, "speaker"),
    "no audio": (lambda noisy: Conversation(noisy).add(Segment(1, "Hi.")), PromptError, "neither audio nor codes"),
    "a turn too long": (
        lambda noisy: Conversation(noisy).add(Segment(1, "Hi.", codes=codes(1800))),
        PromptError,
        "the turn takes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(noisy, case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=re.compile(message)):
        call(noisy)
