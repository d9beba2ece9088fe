"""Conversations: past the window, saved and loaded, with text that arrives in pieces."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from csm import Conversation, CSMError, Generator, PromptError, RoomWarning, Segment, Voice
from csm.compare import teacher_forced_logits
from csm.prompt import TextTokenizer, audio_rows, build_prompt
from noise import NOISE

RNG = torch.Generator().manual_seed(1)


def codes(frames):
    return torch.randint(256, (frames, 8), generator=RNG)


def voice(name, frames=20):
    return Voice(name, (f"This is {name}.",), (codes(frames),))


VOICES = {0: voice("anna"), 1: voice("bea")}
GREEDY = dict(max_turn_ms=800, temperature=0.0)
LINES = (
    "Good morning, how are you today?",
    "The weather was warm in the morning.",
    "She opened the window and looked at the garden.",
    "We will meet again at the station in an hour.",
    "He asked for a cup of coffee and a piece of bread.",
    "Please close the window before you leave.",
    "They walked along the river until the evening.",
    "The children were playing in the street.",
    "I have not seen him for a long time.",
    "There is a letter for you on the table.",
)


def test_twenty_turns_run_past_the_window(noisy, one_thread):
    """Two voices in turn. At each turn: no error, and the voices are there.

    At six of the turns, three of each voice, the codes are compared with a generation from scratch; at all of them in
    the slow test below.
    """
    fresh = Generator.from_pretrained(NOISE, device="cpu")
    talk = Conversation(noisy, VOICES, **GREEDY)
    references = [segment for speaker, one in VOICES.items() for segment in one.segments(speaker)]
    evicted, longest = [], 0
    for turn in range(20):
        speaker, text = turn % 2, f"Turn {turn} of twenty."
        before = talk.num_positions
        stream = talk.say(speaker, text)
        context = talk.context
        for one, two in zip(references, context, strict=False):
            assert (one.speaker, one.text) == (two.speaker, two.text)
            assert torch.equal(one.codes, two.codes)
        audio = torch.cat(list(stream))
        assert audio.shape == (10 * 1920,)
        assert talk.num_positions <= before + 40
        if turn in (0, 5, 12, 13, 18, 19):
            fresh._prefix_cache.clear()
            expected = fresh.generate_codes(text, speaker, context, 800, 0.0)
            assert torch.equal(talk.turns[-1].codes, expected), turn
        talk.add(Segment(7, f"Somebody says {turn}.", codes=codes(90)))
        longest = max(longest, talk.num_positions)
        evicted.append(talk.stats.num_evicted)
    assert talk.stats.num_turns == 40
    assert len(talk.turns) == 40 - evicted[-1]
    assert 0 < evicted[-1] < 40
    assert len(set(evicted)) < 5  # several turns leave at a time
    assert 1500 < longest <= 2048
    assert talk.stats.positions_evicted > 200
    assert talk.stats.seconds == pytest.approx(16.0)


MARGIN = 1e-3  # of logits: a code whose logit is so near to the largest may be another one after other roundings


def shortfall(generator, context, speaker, text, codes_TK):
    """By how much the logit of each code is below the largest, (T, K), in one pass over the context and all codes."""
    config = generator.config
    tokenizer = TextTokenizer(generator._checkpoint.tokenizer_path, config.text_vocab_size)
    turns = [(tokenizer.encode(turn.speaker, turn.text), turn.codes) for turn in context]
    prompt, audio = build_prompt(turns, tokenizer.encode(speaker, text), config), audio_rows(codes_TK)
    rows = torch.cat((prompt.row_TC, audio.row_TC[:-1]))
    masks = torch.cat((prompt.mask_TC, audio.mask_TC[:-1]))
    logits_TKV = teacher_forced_logits(generator.model, rows, masks, len(codes_TK))[:, :, : config.codebook_size]
    return logits_TKV.amax(-1) - logits_TKV.gather(-1, codes_TK.unsqueeze(-1)).squeeze(-1)


@pytest.mark.slow
def test_speech_of_twenty_turns_is_that_of_generations_from_scratch(tiny, one_thread):
    """The embedded checkpoint, float32, greedy, two voices in turn, past the window. All codes are compared, twice.

    Free running: a generation from scratch over the same context. Teacher-forced: one pass over context and codes,
    without the engine, in which every code has the largest logit, up to MARGIN.
    """
    fresh = Generator.from_pretrained("tiny", device="cpu")
    sentence = "It was a quiet evening, and the lamp stood on the table."
    voices = {
        speaker: Voice(name, (sentence,), (tiny.generate_codes(sentence, speaker, (), 5000, seed=11),), speaker)
        for speaker, name in enumerate(("anna", "bea"))
    }
    talk = Conversation(tiny, voices, max_turn_ms=8000, temperature=0.0)
    references = list(talk.context)
    equal, largest, num_codes, others = 0, 0.0, 0, 0
    for turn in range(20):
        speaker, text = turn % 2, f"{LINES[turn % 10]} {LINES[(3 * turn + 1) % 10]}"
        stream, context = talk.say(speaker, text), talk.context
        assert context[: len(references)] == references
        assert sum(chunk.shape[0] for chunk in stream) > 0
        codes_TK = talk.turns[-1].codes
        below_TK = shortfall(fresh, context, speaker, text, codes_TK)
        assert float(below_TK.max()) <= MARGIN, (turn, below_TK.max())
        fresh._prefix_cache.clear()
        expected_TK = fresh.generate_codes(text, speaker, context, 1000 * 0.08 * len(codes_TK), 0.0)
        equal += torch.equal(codes_TK, expected_TK)
        largest, num_codes = max(largest, float(below_TK.max())), num_codes + codes_TK.numel()
        others += int((below_TK > 0).sum())
    assert talk.stats.num_evicted > 0
    assert equal == 20
    print(
        f"{num_codes} codes of 20 turns, {talk.stats.num_evicted} turns evicted: {equal} turns equal a free generation "
        f"from scratch; teacher-forced, {others} codes are not the first choice, by at most {largest:.1e}"
    )


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


def test_a_guessed_transcript_stays_one(noisy, tmp_path):
    path = tmp_path / "talk.safetensors"
    guessed = Voice("carl", ("I think.",), (codes(9),), guessed=True)
    Conversation(noisy, {0: voice("anna"), 1: guessed}).save(path)
    assert [one.guessed for one in Conversation.load(noisy, path).voices.values()] == [False, True]
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    state["voices"] = [entry[:5] for entry in state["voices"]]  # as files were before
    save_file(tensors, path, {"format": "csm-conversation-1", "state": json.dumps(state)})
    assert [one.guessed for one in Conversation.load(noisy, path).voices.values()] == [False, False]


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
