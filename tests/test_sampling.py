"""Philox against published test vectors, and sampling against the expected distribution."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm import SamplingError, SamplingParams
from csm.kernels.sample import draw_ids, gumbel_noise, philox

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_published_vectors(counter, key, result):
    assert philox(words(counter), words(key)) == words(result)


def philox_by_definition(counter, key):
    """Philox in Python integers, which do not overflow."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = ((b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32)
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


word = st.integers(0, 2**32 - 1)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_unbounded_integers(counter, key):
    result = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, result)) == philox_by_definition(counter, key)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 31), st.integers(0, 2050))
@settings(max_examples=25, deadline=None)
def test_noise_of_one_id_equals_its_definition(seed, frame, codebook, index):
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([frame]), 32, 2051)
    random = philox_by_definition((index // 4, codebook, frame, 0), (seed % 2**32, seed >> 32))[index % 4]
    uniform = torch.tensor((random >> 9) + 0.5, dtype=torch.float64) * 2.0**-23
    expected = -torch.log(-torch.log(uniform))
    torch.testing.assert_close(noise[0, codebook, index].double(), expected, atol=1e-5, rtol=1e-5)


def test_noise_of_a_slot_is_independent_of_the_batch():
    seeds, frames = torch.tensor([5, 2**62 + 7, 5]), torch.tensor([0, 9, 9])
    together = gumbel_noise(seeds, frames, 4, 10)
    for slot in range(3):
        assert torch.equal(
            together[slot : slot + 1], gumbel_noise(seeds[slot : slot + 1], frames[slot : slot + 1], 4, 10)
        )
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("random", [0, 2**32 - 1])
def test_noise_is_finite_at_the_ends(random, monkeypatch):
    module = sys.modules["csm.kernels.sample"]  # csm.kernels.sample is also the op
    monkeypatch.setattr(module, "philox", lambda counter, key: (torch.full((1, 1, 1), random),) * 4)
    assert torch.isfinite(gumbel_noise(torch.tensor([0]), torch.tensor([0]), 1, 4)).all()


def test_noise_is_gumbel():
    noise = gumbel_noise(torch.arange(40), torch.zeros(40, dtype=torch.int64), 32, 2048).double()
    assert torch.isfinite(noise).all()
    # Mean is Euler's constant, variance pi**2 / 6. 2.6 million samples.
    assert abs(noise.mean() - 0.57722) < 0.003
    assert abs(noise.var() - 1.64493) < 0.01
    below = [(noise < x).double().mean() for x in (-1.0, 0.0, 1.0, 3.0)]
    expected = torch.exp(-torch.exp(-torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)))
    torch.testing.assert_close(torch.stack(below), expected, atol=1e-3, rtol=0)


def draw_rows(logits_BV, seed_B, temperature_B, top_k_B):
    """One sample for each row, as in the step for codebook 0 of frame 0."""
    noise_BKV = gumbel_noise(seed_B, torch.zeros_like(seed_B), 1, logits_BV.shape[1])
    noise_BV = noise_BKV[:, 0] * temperature_B[:, None]
    return draw_ids(logits_BV, noise_BV, top_k_B.clamp(max=logits_BV.shape[1]))


def draw(logits, count, temperature, top_k):
    """``count`` samples from one row of logits, with a different seed for each."""
    temperature_B, top_k_B = torch.full((count,), temperature), torch.full((count,), top_k)
    return draw_rows(logits.expand(count, -1), torch.arange(count), temperature_B, top_k_B)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 12), (0.7, 12), (2.0, 4), (0.9, 1), (1.0, 12 * 99)])
def test_samples_follow_the_softmax_of_the_top_k(temperature, top_k):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.9, -3.0, 0.1, 0.2, -9.0])
    count = 60_000
    kept = logits.double().clone()
    kept[torch.argsort(kept, descending=True)[top_k:]] = -torch.inf
    expected = (kept / temperature).softmax(0)
    seen = torch.bincount(draw(logits, count, temperature, top_k), minlength=12).double() / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs() <= 5 * error + 1e-12).all()
    assert (seen[expected == 0] == 0).all()


def test_ties_with_the_k_th_logit_are_kept():
    drawn = draw(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), 2000, temperature=5.0, top_k=2)
    assert set(drawn.tolist()) == {0, 1, 2, 3}


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40, unique=True), st.integers(1, 60))
@settings(deadline=None)
def test_greedy_is_the_argmax(values, top_k):
    logits = torch.tensor(values)
    assert (draw(logits, 3, temperature=0.0, top_k=top_k) == logits.argmax()).all()


@given(st.integers(1, 30), st.floats(0, 100), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_a_sample_is_among_the_top_k(top_k, temperature, seed):
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed % 1000))
    drawn = draw_rows(logits, torch.tensor([seed, 1]), torch.full((2,), temperature), torch.tensor([top_k, top_k]))
    for row, index in zip(logits, drawn, strict=True):
        assert (row > row[index]).sum() < top_k


def test_each_slot_has_its_own_temperature_and_top_k():
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    columns = (logits, torch.tensor([1, 2, 3]), torch.tensor([0.0, 0.9, 3.0]), torch.tensor([50, 1, 10]))
    together = draw_rows(*columns)
    alone = [draw_rows(*(column[i : i + 1] for column in columns)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(top_k=0),
        dict(seed=-1),
        dict(seed=2**63),
    ],
    ids=str,
)
def test_invalid_parameters_are_rejected(bad):
    name = next(iter(bad)).replace("_", "-")
    with pytest.raises(SamplingError, match=name):
        SamplingParams(**bad)
