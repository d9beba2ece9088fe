"""How many threads a model runs on, on a CPU."""

from __future__ import annotations

import os

import torch

from csm.errors import CSMError
from csm.model import CSM
from csm.quantize import quantized_weights

VARIABLE = "CSM_THREADS"
SMALL_BYTES = 64 << 20  # of the weights that a frame reads: below, two threads wait for each other more than they gain


def choose_threads(model: CSM, requested: int | None = None) -> int:
    """The number of threads for ``torch.set_num_threads``: ``requested``, else ``CSM_THREADS``, else one for a small
    model such as the embedded voice, else what PyTorch would take (``OMP_NUM_THREADS``, or the physical cores).

    Raises CSMError for less than one.
    """
    if requested is None and VARIABLE in os.environ:
        text = os.environ[VARIABLE]
        if not text.isdecimal():
            raise CSMError(f"{VARIABLE} must be a number of threads, not {text!r}")
        requested = int(text)
    if requested is not None:
        if requested < 1:
            raise CSMError(f"the number of threads must be at least 1, not {requested}")
        return requested
    small = sum(weight.value.nbytes for weight in quantized_weights(model)) < SMALL_BYTES
    return 1 if small and "OMP_NUM_THREADS" not in os.environ else torch.get_num_threads()
