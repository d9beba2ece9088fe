"""Times of words, from the model's attention: compared with the phone times of the synthesiser that the voice is of."""

import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
import sphn
import torch

from csm import Segment
from csm.align import MAX_ADVANCE, monotone_paths, text_attention
from csm.weights.recipe.recordings import VOICES
from csm.weights.recipe.sentences import sentences

PLAIN = re.compile(r"[A-Za-z ,]{18,60}[.?!]")


def test_the_best_path_is_the_best_of_all():
    """Against every path of 5 frames over 8 tokens."""
    score_HFC = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    path_HF, score_H = monotone_paths(score_HFC)
    paths = [
        path
        for path in itertools.combinations_with_replacement(range(8), 5)
        if path[0] < MAX_ADVANCE and path[-1] >= 8 - MAX_ADVANCE
        if max(two - one for one, two in itertools.pairwise(path)) <= MAX_ADVANCE
    ]
    for head in range(3):
        sums = [sum(float(score_HFC[head, frame, token]) for frame, token in enumerate(path)) for path in paths]
        assert float(score_H[head]) == pytest.approx(max(sums) / 5, abs=1e-5)
        assert tuple(path_HF[head].tolist()) == paths[int(np.argmax(sums))]


def test_attention_is_causal_and_depends_on_the_codes(noisy):
    """Weights of a frame's row do not see that frame or later ones, and sum to at most 1."""
    codes_TK = torch.randint(256, (6, 8), generator=torch.Generator().manual_seed(0))
    ids = noisy._tokenizer.encode(0, "Hello there.")
    weight_HFC = text_attention(noisy.model, ids, codes_TK)
    config = noisy.config.backbone
    assert weight_HFC.shape == (config.num_layers * config.num_heads, 6, len(ids))
    assert torch.allclose(weight_HFC[:, 0].sum(-1), torch.ones(weight_HFC.shape[0]), atol=1e-5)
    assert (weight_HFC[:, 1:].sum(-1) < 1).all()
    changed_TK = codes_TK.clone()
    changed_TK[3] = (changed_TK[3] + 1) % 256
    changed_HFC = text_attention(noisy.model, ids, changed_TK)
    assert torch.allclose(changed_HFC[:, :4], weight_HFC[:, :4], atol=1e-6)
    assert not torch.allclose(changed_HFC[:, 4], weight_HFC[:, 4], atol=1e-6)


def test_words_and_their_tokens(noisy):
    """A byte is a token here: the begin token, "[3]", then the text."""
    words = noisy._tokenizer.words(3, '"Well," said  Amy-Lou - é!')
    assert [(word.text, word.first, word.last) for word in words] == [
        ('"Well,"', 4, 11),
        ("said", 12, 16),
        ("Amy-Lou", 18, 25),
        ("é!", 28, 31),
    ]
    turn = Segment(0, "Too many letters for one frame.", codes=torch.zeros(1, 8, dtype=torch.int64))
    assert noisy.word_times(turn) == []
    times = noisy.word_times(Segment(0, "One two.", codes=torch.zeros(6, 8, dtype=torch.int64)))
    assert [word for word, _, _ in times] == ["One", "two."]
    assert 0 == times[0][1] <= times[0][2] == times[1][1] <= times[1][2] == 1


def flite(voice, text, *options, out="none"):
    command = ["flite", "-voice", voice, *options, "-t", text, "-o", out]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def synthesised(voice, text, path):
    """When flite begins each word, in seconds; None where the words by themselves have other phones."""
    segments, start = [], 0.0
    for part in flite(voice, text, "-psdur", out=str(path)):
        phone, end = part.split(":")
        segments += [] if phone == "pau" else [start]
        start = float(end)
    counts = [sum(phone != "pau" for phone in flite(voice, word, "-ps")) for word in re.findall("[A-Za-z]+", text)]
    return [segments[sum(counts[:index])] for index in range(len(counts))] if sum(counts) == len(segments) else None


def errors_of(generator, speaker, texts, folder):
    """Seconds between flite's and the model's beginnings of words, and the same for equal times for equal letters."""
    aligned, proportional = [], []
    for text in texts:
        truth = synthesised(VOICES[speaker], text, folder / "x.wav")
        if truth is None:
            continue
        samples, rate = sphn.read(str(folder / "x.wav"))
        turn = generator.prepare(Segment(speaker, text, torch.from_numpy(samples), sample_rate=rate))
        seconds = turn.codes.shape[0] * 0.08
        starts = [start * seconds for _, start, _ in generator.word_times(turn)]
        letters = [match.start() / len(text) * seconds for match in re.finditer("[A-Za-z]+", text)]
        aligned += np.abs(np.subtract(starts, truth)).tolist()
        proportional += np.abs(np.subtract(letters, truth)).tolist()
    return aligned, proportional


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
@pytest.mark.parametrize(
    ("speaker", "count"), [(0, 4), *(pytest.param(speaker, 40, marks=pytest.mark.slow) for speaker in range(4))]
)
def test_words_begin_where_the_synthesiser_begins_them(tiny, tmp_path, speaker, count):
    texts = [text for text in sentences("test", 400) if PLAIN.fullmatch(text)][:count]
    aligned, proportional = errors_of(tiny, speaker, texts, tmp_path)
    print(
        f"{VOICES[speaker]}: {len(aligned)} words, mean {np.mean(aligned):.3f} s, median {np.median(aligned):.3f} s, "
    )
    print(f"by letters: mean {np.mean(proportional):.3f} s")
    assert np.mean(aligned) < min(0.1, np.mean(proportional))
