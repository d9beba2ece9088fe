"""How many threads a model runs on, on a CPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from csm.errors import CSMError
from csm.model import CSM
from csm.quantize import quantized_weights

VARIABLE = "CSM_THREADS"
SMALL_BYTES = 64 << 20  # of the weights that a frame reads: below, two threads wait for each other more than they gain
STAT = Path("/proc/stat")
WINDOW_SECONDS, KEPT_SECONDS = 0.05, 2.0  # of a look at the machine's load, and how long its result is used


def choose_threads(model: CSM, requested: int | None = None) -> int:
    """The number of threads for ``torch.set_num_threads``: ``requested``, else ``CSM_THREADS``, else one for a small
    model such as the embedded voice, else ``OMP_NUM_THREADS``, else one for each core of PyTorch's number that other
    processes leave free, and at least one. A core that another process keeps busy would hold up all threads.

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
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    if sum(weight.value.nbytes for weight in quantized_weights(model)) < SMALL_BYTES:
        return 1
    return max(1, torch.get_num_threads() - round(_load.busy_cores()))


class _Load:
    """Processor time that other processes take, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self._measured = -KEPT_SECONDS
        self._busy = 0.0

    def busy_cores(self) -> float:
        """How many cores other processes keep busy, over WINDOW_SECONDS; 0 on other systems."""
        if time.monotonic() - self._measured >= KEPT_SECONDS:
            started, before = time.monotonic(), _others_seconds()
            if before is not None:
                time.sleep(WINDOW_SECONDS)
                after = _others_seconds()
                self._busy = max(0.0, (after or before) - before) / (time.monotonic() - started)
            self._measured = time.monotonic()
        return self._busy


def _others_seconds() -> float | None:
    """Processor seconds of all other processes so far: the machine's user, nice and system time less our own."""
    try:
        fields = STAT.read_text(encoding="ascii").split(maxsplit=4)
    except OSError:
        return None
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK") - time.process_time()


_load = _Load()
