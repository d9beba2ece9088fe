"""What the embedded checkpoint says, by the ears of a recogniser: words, ends, streams, conversations.

Every other test of generation is about how; these are about what. The sentences are ones that training never saw.
"""

import shutil
from importlib.util import find_spec

import pytest
import torch

from csm import Segment
from csm.evaluate.words import word_errors
from csm.weights.recipe.open_text import evaluation_sentences
from csm.weights.recipe.recordings import VOICES, speak
from csm.weights.recipe.sentences import sentences

SENTENCES = sentences("test", 12)
SPEAKERS = 4
SEEDS = range(3)
LONGEST_MS = 10_000  # three times the longest sentence: who speaks that long does not end


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Matrices this small gain nothing from two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hear():
    """Samples at 24 kHz to words."""
    if not all(find_spec(name) for name in ("moonshine_voice", "jiwer", "num2words")):
        pytest.skip("no recogniser")
    from csm.evaluate.listen import Recogniser

    recogniser = Recogniser()
    return lambda sound: recogniser.transcribe(sound, 24_000)


def error_rate(texts, heard):
    counts = [word_errors(text, words) for text, words in zip(texts, heard, strict=True)]
    return sum(errors for errors, _ in counts) / sum(words for _, words in counts)


@pytest.fixture(scope="module")
def spoken(tiny):
    """The sentences by the four speakers in turn, once a seed."""
    return {
        seed: tiny.generate_batch(
            [
                {"text": text, "speaker": index % SPEAKERS, "seed": seed, "max_audio_length_ms": LONGEST_MS}
                for index, text in enumerate(SENTENCES)
            ]
        )
        for seed in SEEDS
    }


def test_all_seeds_are_understood(spoken, hear):
    heard = {seed: [hear(sound) for sound in sounds] for seed, sounds in spoken.items()}
    rates = {seed: error_rate(SENTENCES, words) for seed, words in heard.items()}
    print("\nword error rates:", ", ".join(f"{rate:.3f}" for rate in rates.values()))
    assert max(rates.values()) < 0.3
    assert sum(rates.values()) / len(rates) < 0.2
    wrong = error_rate(SENTENCES[1:] + SENTENCES[:1], heard[0])
    assert wrong > 2 * max(rates.values())  # a recogniser that heard what it wanted to hear would be no test


def test_everyday_sentences_are_understood(tiny, hear):
    """Sentences outside the templates and outside every training text."""
    texts = evaluation_sentences()[:16]
    requests = [
        {"text": text, "speaker": n % SPEAKERS, "seed": 0, "max_audio_length_ms": LONGEST_MS}
        for n, text in enumerate(texts)
    ]
    rate = error_rate(texts, [hear(sound) for sound in tiny.generate_batch(requests)])
    print(f"\nword error rate of everyday sentences: {rate:.3f}")
    assert rate < 0.3


def test_it_ends_by_itself(spoken):
    lengths = [len(sound) / 24_000 for sounds in spoken.values() for sound in sounds]
    assert min(lengths) > 0.5
    assert sum(length > LONGEST_MS / 1000 - 0.2 for length in lengths) <= 1


def test_a_stream_says_what_the_whole_says(tiny, hear):
    wholes, streams = [], []
    for speaker in range(SPEAKERS):
        request = {"text": SENTENCES[speaker], "speaker": speaker, "seed": 3, "max_audio_length_ms": LONGEST_MS}
        whole, streamed = tiny.decode(tiny.generate_codes(**request)), torch.cat(list(tiny.stream(**request)))
        assert streamed.shape == whole.shape
        assert (streamed - whole).abs().max() < 1e-4
        wholes.append(hear(whole))
        streams.append(hear(streamed))
    assert error_rate(wholes, streams) < 0.2  # the last bits may turn a word
    assert error_rate(SENTENCES[:SPEAKERS], streams) < 0.5


def test_a_conversation_goes_on_with_new_words(tiny, hear):
    """Answers say the new sentence, not the one before again, and not nothing."""
    heard = []
    for index, text in enumerate(SENTENCES[:6]):
        request = {"speaker": index % SPEAKERS, "seed": index, "max_audio_length_ms": LONGEST_MS}
        before = SENTENCES[index + 6]
        first = tiny.generate(before, **request)
        heard.append(hear(tiny.generate(text, context=[Segment(index % SPEAKERS, before, first)], **request)))
    said, repeated = error_rate(SENTENCES[:6], heard), error_rate(SENTENCES[6:12], heard)
    assert said < 0.5
    assert repeated > said + 0.3


@pytest.mark.skipif(not (find_spec("resemblyzer") and shutil.which("flite")), reason="no Resemblyzer or no flite")
def test_each_speaker_id_has_its_voice(tiny, spoken):
    """Nearer to the synthesiser's recording by that speaker than to any other's."""
    from csm.evaluate.listen import SpeakerEncoder, similarity

    encoder = SpeakerEncoder()
    recorded = [encoder.embed(torch.from_numpy(speak(SENTENCES[0], voice)[0]), 24_000) for voice in VOICES]
    for index, sound in enumerate(spoken[0]):
        likeness = [similarity(encoder.embed(sound, 24_000), voice) for voice in recorded]
        assert max(range(SPEAKERS), key=lambda speaker: likeness[speaker]) == index % SPEAKERS, likeness


@pytest.mark.skipif(shutil.which("flite") is None, reason="no flite")
def test_the_codec_keeps_the_words(tiny, hear):
    recorded = [torch.from_numpy(speak(text, VOICES[n % SPEAKERS])[0]) for n, text in enumerate(SENTENCES)]
    floor = error_rate(SENTENCES, [hear(sound) for sound in recorded])
    through = error_rate(SENTENCES, [hear(tiny.decode(tiny.encode(sound))) for sound in recorded])
    assert floor < 0.2
    assert through < floor + 0.15


def test_the_codec_streams_what_it_decodes(tiny):
    """Its codes of a glide, frame by frame and at once."""
    time = torch.arange(2 * 24_000) / 24_000
    codes_TK = tiny.encode(0.3 * torch.sin(2 * torch.pi * (150 + 100 * time) * time))
    assert codes_TK.shape == (25, tiny.config.num_codebooks)
    decoder = tiny.codec.stream_decoder()
    streamed = torch.cat([decoder.step(frame[None])[0] for frame in codes_TK])
    whole = tiny.decode(codes_TK)
    assert whole.std() > 1e-2
    assert (streamed - whole).abs().max() < 1e-5
