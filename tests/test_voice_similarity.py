"""An added voice keeps, from call to call; a long conversation starts its turns as soon as a short one. Both slow.

They print the figures of docs/voices.md: python -m pytest tests/test_voice_similarity.py -m slow -s
"""

import itertools
import json
import statistics
from importlib.util import find_spec

import pytest
import torch

from csm import Conversation, Segment, Voice
from csm.evaluate.listen import SpeakerEncoder, similarity

SENTENCES = (
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
MAX_MS = 8000


def make_voice(generator, speaker, name):
    """An added voice: a recording of one of the embedded voices, encoded as ``csm voice add`` does."""
    text = "It was a quiet evening, and the lamp stood on the table."
    audio = generator.generate(text, speaker, seed=11, max_audio_length_ms=MAX_MS)
    turn = generator.prepare(Segment(speaker, text, audio))
    return Voice(name, (text,), (turn.codes,), speaker)


def mean_similarity(encoder, recordings, sample_rate):
    """The mean cosine similarity over all pairs."""
    voices = [encoder.embed(audio, sample_rate) for audio in recordings]
    return statistics.fmean(similarity(one, other) for one, other in itertools.combinations(voices, 2))


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("resemblyzer"), reason='resemblyzer is missing: pip install -e ".[eval]"')
def test_a_voice_keeps_from_call_to_call(tiny, one_thread):
    encoder, figures = SpeakerEncoder(), {}
    for speaker in (0, 1):
        voice = make_voice(tiny, speaker, f"voice_{speaker}")
        calls = [
            tiny.generate(text, voice.speaker, voice=voice, seed=seed, max_audio_length_ms=MAX_MS)
            for seed, text in enumerate(SENTENCES)
        ]
        talk = Conversation(tiny, {speaker: voice}, max_turn_ms=MAX_MS, max_turns=1, seed=0)  # as csm generate does
        one_call = [torch.cat(list(talk.say(speaker, text))) for text in SENTENCES]
        figures[speaker] = [mean_similarity(encoder, audio, tiny.sample_rate) for audio in (calls, one_call)]
    print(json.dumps({f"speaker {speaker}: ten calls, one call": pair for speaker, pair in figures.items()}))
    for separate, together in figures.values():
        assert separate >= together - 0.02


@pytest.mark.slow
def test_turn_twenty_starts_as_soon_as_turn_two(tiny, one_thread):
    """Two voices, past the window: the better of two runs, since other processes disturb single times."""
    voices = {speaker: make_voice(tiny, speaker, f"voice_{speaker}") for speaker in (0, 1)}
    first_audio = {2: [], 20: []}
    for run in range(2):
        talk = Conversation(tiny, voices, max_turn_ms=MAX_MS, seed=100 * run)
        pinned = list(talk.context)
        for turn in range(1, 21):
            text = f"{SENTENCES[turn % 10]} {SENTENCES[(3 * turn + run) % 10]}"
            assert sum(chunk.shape[0] for chunk in talk.say(turn % 2, text)) > 0
            assert talk.context[: len(pinned)] == pinned
            if turn in first_audio:
                first_audio[turn].append(talk.metrics.first_audio_seconds)
        assert talk.stats.num_evicted > 0
    best = {turn: min(times) for turn, times in first_audio.items()}
    print(json.dumps({"first audio of turn": best, "evicted": talk.stats.num_evicted}))
    assert best[20] <= 1.5 * best[2]
