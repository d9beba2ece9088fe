"""How many threads a model runs on, on a CPU."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from csm.errors import CSMError
from csm.model import CSM
from csm.quantize import quantized_weights

VARIABLE = "CSM_THREADS"
SMALL_BYTES = 64 << 20  # of the weights that a frame reads: below, two threads wait for each other more than they gain
STAT, QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")
SHORTEST_SECONDS = 0.2  # between two looks at the load: the kernel counts in hundredths of a second


class ThreadChoice:
    """The number of threads for ``torch.set_num_threads``; ask it anew for each request.

    It is ``requested``, else ``CSM_THREADS``, else ``OMP_NUM_THREADS``, else one for a small model such as the embedded
    voice. A larger model takes PyTorch's number, as far as the cores are free: a core that another process keeps busy
    would hold up all threads. On a GPU it is PyTorch's number, which is read once: the engine's thread changes its own,
    and threads that are started later take that over.

    Raises CSMError for less than one.
    """

    def __init__(self, model: CSM, requested: int | None = None):
        self._pytorch = torch.get_num_threads()
        self._fixed = _asked_for(requested)
        if self._fixed is None and (model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ):
            self._fixed = self._pytorch
        if self._fixed is None and sum(weight.value.nbytes for weight in quantized_weights(model)) < SMALL_BYTES:
            self._fixed = 1
        self._load = Load()

    def __call__(self) -> int:
        if self._fixed is not None:
            return self._fixed
        free = self._pytorch * (1 - self._load.busy_share())
        return max(1, min(round(free), math.ceil(min(quota(), self._pytorch))))


def _asked_for(requested: int | None) -> int | None:
    if requested is None and VARIABLE in os.environ:
        text = os.environ[VARIABLE]
        if not text.isdecimal():
            raise CSMError(f"{VARIABLE} must be a number of threads, not {text!r}")
        requested = int(text)
    if requested is not None and requested < 1:
        raise CSMError(f"the number of threads must be at least 1, not {requested}")
    return requested


def quota() -> float:
    """How many cores' time a container may use; infinity without a limit."""
    try:
        used, period = QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if used == "max" else int(used) / int(period)


class Load:
    """Processor time that other processes take on the cores that this one may use, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self._share = 0.0
        self._at, self._seconds = time.monotonic(), _others_seconds()

    def busy_share(self) -> float:
        """The share of these cores that was busy since the last look; 0 on other systems."""
        elapsed = time.monotonic() - self._at
        if elapsed >= SHORTEST_SECONDS and self._seconds is not None:
            before, self._seconds = self._seconds, _others_seconds()
            share = ((self._seconds or before) - before) / (elapsed * len(os.sched_getaffinity(0)))
            self._share = min(max(share, 0.0), 1.0)
            self._at += elapsed
        return self._share


def _others_seconds() -> float | None:
    """Processor seconds of all other processes so far: the cores' user, nice and system time less our own."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    cores = [line.split() for line in lines]
    ticks = sum(int(value) for core in cores if core and core[0] in names for value in core[1:4])
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
