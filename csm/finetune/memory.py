"""Out of memory, said in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from csm.errors import CSMError
from csm.finetune.options import TrainOptions

SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class OutOfMemoryError(CSMError):
    """A run that does not fit the memory; says which options make it smaller."""


@contextmanager
def advising(options: TrainOptions, lora: bool) -> Iterator[None]:
    """Turn an allocation that failed within into OutOfMemoryError; other errors pass."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        told = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not told and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutOfMemoryError(f"out of memory ({reason}). {advice(options, lora)}") from error


def advice(options: TrainOptions, lora: bool) -> str:
    """What to try, the cheapest first, of what is not on already."""
    rows, size = max(1, options.batch_rows // 2), max(1, options.batch_size // 2)
    smaller = f"--batch-size {size} --batch-rows {rows} --accumulate {2 * options.accumulate}"
    steps = [
        f"{smaller} (as much a step, in smaller batches)",
        "" if options.checkpointing else "--checkpointing (activations computed twice)",
        "" if options.precision == "bfloat16" else "--precision bfloat16",
        "" if options.depth_share <= 1 / 16 else "--depth-share 0.0625 (fewer frames for the depth decoder)",
        "" if options.ema == 0 else "--ema 0 (no second copy of what is trained)",
        "" if lora else "--lora (adapters alone have gradients and optimiser state)",
    ]
    return "What helps: " + "; ".join(step for step in steps if step)
