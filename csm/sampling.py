"""From logits to a code: temperature, top-k, and noise that depends on a counter instead of a generator's state.

Shapes: B slots, K codebooks, V ids (a codebook's size).
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from csm.errors import SamplingError

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # divisors that keep float32 finite; 0 itself means greedy


@dataclass(frozen=True)
class SamplingParams:
    """How the codes of one request are drawn.

    ``temperature`` 0 is greedy; ``top_k`` of k keeps the k best ids and those that tie with the last; ``seed`` (0 to
    2**63 - 1) fixes the noise: with the same logits it draws the same codes, alone or in a batch, on any device.
    """

    temperature: float = 0.9
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, numbers.Real) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise SamplingError(f"temperature must be a number from 0 to {MAX_TEMPERATURE:g}, not {self.temperature!r}")
        if not isinstance(self.top_k, numbers.Integral) or self.top_k < 1:
            raise SamplingError(f"top-k must be a whole number of at least 1, not {self.top_k!r}")
        if not isinstance(self.seed, numbers.Integral) or not 0 <= self.seed < 2**63:
            raise SamplingError(f"seed must be a whole number within 0 and 2**63 - 1, not {self.seed!r}")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words to four random words.

    Every word is an int64 tensor that holds an unsigned 32-bit value; all broadcast together. The 64-bit products wrap
    around as two's complement does, so that shifting and masking give their upper and lower halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + PHILOX_W0) & WORD, (k1 + PHILOX_W1) & WORD
    return c0, c1, c2, c3


def gumbel_noise(seed_B: Tensor, frame_B: Tensor, num_codebooks: int, codebook_size: int) -> Tensor:
    """Standard Gumbel noise of all codebooks of a frame: (B, K, V) float32.

    Philox keyed by the seed; the counter is (id // 4, codebook, frame, 0), and word ``id % 4`` of the output belongs to
    ``id``. A word's upper 23 bits, centred in their interval, give a uniform number strictly within 0 and 1 that
    float32 holds exactly.
    """
    device = seed_B.device
    quad_V = torch.arange(-(-codebook_size // 4), device=device)
    codebook_K1 = torch.arange(num_codebooks, device=device).unsqueeze(1)
    seed_B11, frame_B11 = seed_B.view(-1, 1, 1), frame_B.view(-1, 1, 1)
    counter = (quad_V, codebook_K1, frame_B11, torch.zeros_like(frame_B11))
    words = philox(counter, (seed_B11 & WORD, (seed_B11 >> 32) & WORD))
    word_BKV = torch.stack(words, dim=-1).flatten(-2)[..., :codebook_size]
    uniform_BKV = ((word_BKV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_BKV))


def tempered(gumbel_BKV: Tensor, temperature_B: Tensor) -> tuple[Tensor, Tensor]:
    """The noise and the divisor of the logits, (B, 1), at each slot's temperature: none and 1 where it is greedy."""
    greedy_B = temperature_B == 0
    noise_BKV = gumbel_BKV.masked_fill(greedy_B.view(-1, 1, 1), 0.0)
    return noise_BKV, temperature_B.clamp(min=MIN_TEMPERATURE).masked_fill(greedy_B, 1.0).unsqueeze(1)


def sample(logits_BV: Tensor, noise_BV: Tensor, divisor_B1: Tensor, top_k_B: Tensor) -> Tensor:
    """Draw one id a slot: (B, V) -> (B,) int64, with noise and divisor from ``tempered`` and top-k within 1 and V.

    The argmax of ``logits / temperature + gumbel`` over the top k logits is a draw from their softmax (Gumbel-max).
    """
    logits_BV = logits_BV.float()
    rank_B1 = (top_k_B - 1).unsqueeze(1)
    kth_B1 = logits_BV.sort(dim=1, descending=True).values.gather(1, rank_B1)
    key_BV = torch.addcdiv(noise_BV, logits_BV, divisor_B1)
    return key_BV.masked_fill(logits_BV < kth_B1, -torch.inf).argmax(dim=1)
