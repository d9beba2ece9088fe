"""Turns to examples, examples to batches.

A batch stores text tokens and audio frames in separate tensors, each with its position in the padded batch. No mostly
masked 33-column rows are built, and padding is not embedded. Every random number is derived from the seed, the epoch
and the example, so neither resuming nor the number of processes changes a batch.

Shapes: B sequences, T positions, K codebooks, M text tokens, A audio frames (including each turn's end frame of zeros),
N trained frames, S frames that the depth decoder is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

POOL_BATCHES = 64  # batches sorted by length together: large enough for little padding, small enough to shuffle well


class Turn(NamedTuple):
    """Text ids with begin and end tokens, and the codes (frames, K) of the audio; (0, K) is silence."""

    text_ids: list[int]
    codes_TK: Tensor

    @property
    def num_positions(self) -> int:
        return len(self.text_ids) + self.codes_TK.shape[0] + 1


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of turns. The loss covers the turns from index ``first_trained`` on."""

    turns: tuple[Turn, ...]
    first_trained: int = 0

    @property
    def num_positions(self) -> int:
        return sum(turn.num_positions for turn in self.turns)


def conversation_examples(turns: Sequence[Turn], context: int, mask_context: bool, max_positions: int) -> list[Example]:
    """Sequences of up to ``context`` + 1 turns in order, each of at most ``max_positions`` positions.

    With ``mask_context`` there is one sequence for every turn, which ends with it; the loss covers that turn only.
    Without it, every turn is in exactly one sequence, and the loss covers all turns.
    """
    examples: list[Example] = []
    if mask_context:
        for last in range(len(turns)):
            first = max(0, last - context)
            while first < last and sum(turn.num_positions for turn in turns[first : last + 1]) > max_positions:
                first += 1
            examples.append(Example(tuple(turns[first : last + 1]), first_trained=last - first))
        return examples
    window: list[Turn] = []
    for turn in turns:
        if window and (
            len(window) > context or sum(t.num_positions for t in window) + turn.num_positions > max_positions
        ):
            examples.append(Example(tuple(window)))
            window = []
        window.append(turn)
    return [*examples, Example(tuple(window))] if window else examples


class Batch(NamedTuple):
    """Sequences padded to equal length.

    ``token_position_M`` and ``code_position_A`` are positions b * T + t in the flattened batch. ``target_N`` indexes A,
    ``frame_S`` indexes N. ``input_code_AK`` is the backbone's input, ``code_AK`` the prediction target; they differ by
    the code noise only. Each sampled frame is weighted (``weight_S``) by num_frames / num_sampled of its sequence; the
    weights sum to N. ``has_loss`` is False for the dummy batch of a rank without data: its loss is multiplied by zero.
    """

    num_sequences: int
    num_positions: int
    token_M: Tensor
    token_position_M: Tensor
    code_AK: Tensor
    input_code_AK: Tensor
    code_position_A: Tensor
    target_N: Tensor
    frame_S: Tensor
    weight_S: Tensor
    has_loss: bool = True

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        moved: list[Any] = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self]
        return Batch(*moved)


def sample_frames(num_frames: int, share: float, key: str) -> tuple[list[int], float]:
    """Sorted indices of a random ``share`` of the frames, at least one, and the weight of each.

    Every frame is sampled with the same probability n / num_frames and weighted by num_frames / n. The weighted sum is
    therefore an unbiased estimate of the sum over all frames (Horvitz and Thompson, 1952), however n is rounded.
    """
    count = num_frames if share >= 1 else max(1, round(share * num_frames))
    sampled = range(num_frames) if count == num_frames else random.Random(key).sample(range(num_frames), count)
    return sorted(sampled), num_frames / count


def add_code_noise(codes_TK: Tensor, share: float, key: str) -> Tensor:
    """A copy of the codes (T, K) in which each frame, with probability ``share``, is replaced by a random frame."""
    num_frames = codes_TK.shape[0]
    if share == 0 or num_frames == 0:
        return codes_TK
    rng = random.Random(f"swap/{key}")
    return codes_TK[[rng.randrange(num_frames) if rng.random() < share else frame for frame in range(num_frames)]]


def collate(
    examples: Sequence[Example], keys: Sequence[str], depth_share: float, has_loss: bool = True, code_noise: float = 0.0
) -> Batch:
    """A batch of examples.

    ``keys`` seed the random choices for each example: a share ``depth_share`` of its trained frames for the depth
    decoder, and a share ``code_noise`` of each turn's input frames, which are replaced by other frames of the turn.
    """
    num_positions = max(example.num_positions for example in examples)
    tokens: list[int] = []
    token_positions, codes, inputs, code_positions, targets, frames, weights = [], [], [], [], [], [], []
    num_codes = num_targets = 0
    for index, (example, key) in enumerate(zip(examples, keys, strict=True)):
        position, trained = index * num_positions, num_targets
        for order, (ids, codes_TK) in enumerate(example.turns):
            tokens += ids
            token_positions.append(torch.arange(position, position + len(ids)))
            position += len(ids)
            num_rows = codes_TK.shape[0] + 1
            end_1K = codes_TK.new_zeros(1, codes_TK.shape[1], dtype=torch.int64)
            codes += [codes_TK.long(), end_1K]
            inputs += [add_code_noise(codes_TK, code_noise, f"{key}/{order}").long(), end_1K]
            code_positions.append(torch.arange(position, position + num_rows))
            position += num_rows
            if order >= example.first_trained:
                targets.append(torch.arange(num_codes, num_codes + num_rows))
                num_targets += num_rows
            num_codes += num_rows
        sampled, weight = sample_frames(num_targets - trained, depth_share, key)
        frames.append(torch.tensor(sampled) + trained)
        weights.append(torch.full((len(sampled),), weight))
    return Batch(
        num_sequences=len(examples),
        num_positions=num_positions,
        token_M=torch.tensor(tokens),
        token_position_M=torch.cat(token_positions),
        code_AK=torch.cat(codes),
        input_code_AK=torch.cat(inputs),
        code_position_A=torch.cat(code_positions),
        target_N=torch.cat(targets),
        frame_S=torch.cat(frames),
        weight_S=torch.cat(weights),
        has_loss=has_loss,
    )


def plan_epoch(lengths: Sequence[int], batch_size: int, batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of example indices in random order; each example is in one batch, with others of similar length.

    A batch has at most ``batch_size`` sequences and ``batch_rows`` padded positions. A single sequence may have more.
    """
    rng = random.Random(f"order/{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for first in range(0, len(order), POOL_BATCHES * batch_size):
        pool = sorted(order[first : first + POOL_BATCHES * batch_size], key=lambda index: lengths[index])
        batches += split_batches(pool, lengths, batch_size, batch_rows)
    rng.shuffle(batches)
    return batches


def split_batches(order: Sequence[int], lengths: Sequence[int], batch_size: int, batch_rows: int) -> list[list[int]]:
    """Split ``order``, sorted by length, shortest first, into batches within the limits of ``plan_epoch``."""
    batches: list[list[int]] = [[]]
    for index in order:
        full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[index] > batch_rows
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(index)
    return batches if batches[-1] else []
