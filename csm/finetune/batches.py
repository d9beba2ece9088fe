"""Turns to examples, examples to batches: what a sequence holds, which go together, and which frames are drawn.

A batch holds rows by kind, text tokens and audio frames, each with the place it has among the positions of the padded
batch: no row carries 33 columns of which one or 32 say nothing, and nothing is computed for padding before the first
block. Everything random is drawn from (seed, epoch, example), so that neither resuming nor the number of processes
changes it.

Shapes: B sequences, T positions, K codebooks, M text tokens, A audio frames (with the frame of zeros that ends a turn),
N frames that are trained, S frames that the depth decoder is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

POOL = 64  # batches whose sequences are sorted by length together: long enough for little padding, short enough to mix


class Turn(NamedTuple):
    """Text ids with begin and end, and codes (frames, K) of what was said; (0, K) is silence."""

    text_ids: list[int]
    codes_TK: Tensor

    @property
    def num_positions(self) -> int:
        return len(self.text_ids) + self.codes_TK.shape[0] + 1


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence: turns, of which those from ``first_trained`` on count in the loss."""

    turns: tuple[Turn, ...]
    first_trained: int = 0

    @property
    def num_positions(self) -> int:
        return sum(turn.num_positions for turn in self.turns)


def conversation_examples(turns: Sequence[Turn], context: int, mask_context: bool, max_positions: int) -> list[Example]:
    """Sequences of up to ``context`` turns and one more, in order, each within ``max_positions``.

    With ``mask_context`` every turn is the last of one sequence, and alone counts there. Without, all turns of a
    sequence count, and every turn stands in one sequence.
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
    """Sequences side by side. ``*_at`` are places b * T + t; ``target_N`` indexes A, ``frame_S`` indexes N.

    ``read_AK`` is what the backbone reads, ``code_AK`` what was said and is to be predicted: the same without noise.
    ``weight_S`` is how many trained frames each drawn one stands for: their sum is N, in expectation and in fact.
    ``counts`` says whether the batch counts in the loss at all: a process without a share computes one that does not.
    """

    num_sequences: int
    num_positions: int
    token_M: Tensor
    token_at_M: Tensor
    code_AK: Tensor
    read_AK: Tensor
    code_at_A: Tensor
    target_N: Tensor
    frame_S: Tensor
    weight_S: Tensor
    counts: bool = True

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        moved: list[Any] = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self]
        return Batch(*moved)


def draw_frames(num_frames: int, share: float, key: str) -> tuple[list[int], float]:
    """A random ``share`` of the frames, at least one, in order; and how many each of them stands for.

    Every frame is drawn with the same probability n / num_frames and stands for num_frames / n: the weighted sum over
    the drawn frames has the sum over all as its expectation (Horvitz and Thompson, 1952), for any rounding of n.
    """
    count = num_frames if share >= 1 else max(1, round(share * num_frames))
    chosen = range(num_frames) if count == num_frames else random.Random(key).sample(range(num_frames), count)
    return sorted(chosen), num_frames / count


def swap_frames(codes_TK: Tensor, share: float, key: str) -> Tensor:
    """The codes with a random ``share`` of the frames, each on its own, in the place of which stands another one."""
    num_frames = codes_TK.shape[0]
    if share == 0 or num_frames == 0:
        return codes_TK
    rng = random.Random(f"swap/{key}")
    return codes_TK[[rng.randrange(num_frames) if rng.random() < share else frame for frame in range(num_frames)]]


def collate(
    examples: Sequence[Example], keys: Sequence[str], depth_share: float, counts: bool = True, code_noise: float = 0.0
) -> Batch:
    """A batch of examples.

    ``keys`` seed what is drawn in each: ``depth_share`` of its trained frames, and ``code_noise`` of the frames of a
    turn, which are read as another frame of that turn.
    """
    num_positions = max(example.num_positions for example in examples)
    tokens: list[int] = []
    token_at: list[Tensor] = []
    codes, read, code_at, targets, frames, weights = [], [], [], [], [], []
    num_codes = num_targets = 0
    for index, (example, key) in enumerate(zip(examples, keys, strict=True)):
        place, trained = index * num_positions, num_targets
        for order, turn in enumerate(example.turns):
            ids, codes_TK = turn
            tokens += ids
            token_at.append(torch.arange(place, place + len(ids)))
            place += len(ids)
            num_rows = codes_TK.shape[0] + 1
            end_1K = codes_TK.new_zeros(1, codes_TK.shape[1], dtype=torch.int64)
            codes += [codes_TK.long(), end_1K]
            read += [swap_frames(codes_TK, code_noise, f"{key}/{order}").long(), end_1K]
            code_at.append(torch.arange(place, place + num_rows))
            place += num_rows
            if order >= example.first_trained:
                targets.append(torch.arange(num_codes, num_codes + num_rows))
                num_targets += num_rows
            num_codes += num_rows
        chosen, weight = draw_frames(num_targets - trained, depth_share, key)
        frames.append(torch.tensor(chosen) + trained)
        weights.append(torch.full((len(chosen),), weight))
    rows = (torch.tensor(tokens), torch.cat(token_at), torch.cat(codes), torch.cat(read), torch.cat(code_at))
    return Batch(len(examples), num_positions, *rows, torch.cat(targets), torch.cat(frames), torch.cat(weights), counts)


def plan_epoch(lengths: Sequence[int], batch_size: int, batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of every example once, in batches of like length, in random order.

    A batch has at most ``batch_size`` sequences, and unless it is of one, at most ``batch_rows`` positions, padded.
    """
    rng = random.Random(f"order/{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for first in range(0, len(order), POOL * batch_size):
        pool = sorted(order[first : first + POOL * batch_size], key=lambda index: lengths[index])
        batches += cut(pool, lengths, batch_size, batch_rows)
    rng.shuffle(batches)
    return batches


def cut(order: Sequence[int], lengths: Sequence[int], batch_size: int, batch_rows: int) -> list[list[int]]:
    """Batches of what stands in ``order``, shortest first, within the limits of ``plan_epoch``."""
    batches: list[list[int]] = [[]]
    for index in order:
        full = len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[index] > batch_rows
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(index)
    return batches if batches[-1] else []
