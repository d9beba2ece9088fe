"""What one generation took: speed, first audio, underruns, retries, evictions, memory. The terms are defined here.

The command line, the API, the server's ``/metrics`` and the load test of ``bench.py`` all use these definitions.
docs/metrics.md explains them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLAYER_BUFFER = 0.1  # seconds that a player holds back before it starts


class Listener:
    """A player that starts ``PLAYER_BUFFER`` after the first audio, and waits where audio is missing.

    ``num_underruns`` counts the arrivals that came too late for it.
    """

    def __init__(self) -> None:
        self._due: float | None = None
        self.num_underruns = 0

    def arrive(self, now: float, seconds: float) -> float:
        """Audio of this length arrives at the time ``now``. Returns by how many seconds it is late."""
        if self._due is None:
            self._due = now + PLAYER_BUFFER
        late = max(0.0, now - self._due)
        self.num_underruns += late > 0
        self._due = max(self._due, now) + seconds
        return late

    def remaining(self, now: float) -> float:
        """Seconds until everything that has arrived is played."""
        return max(0.0, (self._due or now) - now)


def resident_bytes() -> int:
    """Memory of this process: now on Linux, at its highest on other systems, 0 on Windows, which is not measured."""
    statm = Path("/proc/self/statm")
    if sys.platform == "win32":
        return 0
    import resource  # Unix only

    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_bytes() -> int:
    """Memory that PyTorch has reserved on all GPUs."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))


@dataclass(frozen=True)
class GenerationMetrics:
    """What one generation took.

    ``elapsed_seconds`` is the time from the request to its last frame, the wait for a slot included, and
    ``first_audio_seconds`` that to its first frame (None without audio). ``underruns`` are a Listener's, ``retries``
    the takes that a guard replaced, ``evictions`` the turns that left a conversation's window to make room.
    ``resident_bytes`` and ``gpu_bytes`` are the process's memory at the end.
    """

    audio_seconds: float
    elapsed_seconds: float
    first_audio_seconds: float | None
    underruns: int = 0
    retries: int = 0
    evictions: int = 0
    resident_bytes: int = 0
    gpu_bytes: int = 0

    @property
    def rtf(self) -> float | None:
        """Real-time factor: elapsed time over length of the audio, less than 1 where faster than a player."""
        return self.elapsed_seconds / self.audio_seconds if self.audio_seconds else None

    def as_dict(self) -> dict[str, Any]:
        """All values by name, ``rtf`` included, for JSON."""
        return {**asdict(self), "rtf": self.rtf}

    def __str__(self) -> str:
        rtf = "none" if self.rtf is None else f"{self.rtf:.2f}"
        first = "none" if self.first_audio_seconds is None else f"{self.first_audio_seconds * 1000:.0f} ms"
        memory = f"{self.resident_bytes / 1e6:.0f} MB" + (
            f", GPU {self.gpu_bytes / 1e6:.0f} MB" if self.gpu_bytes else ""
        )
        return (
            f"RTF {rtf}, first audio {first}, {_count(self.underruns, 'underrun')}, "
            f"{_count(self.retries, 'retry', 'retries')}, {_count(self.evictions, 'eviction')}, memory {memory}"
        )


def combined(parts: Sequence[GenerationMetrics], elapsed_seconds: float) -> GenerationMetrics:
    """The metrics of generations that ran together: sums, over the time that all of them took, and the median of
    their first audio.
    """
    first = [part.first_audio_seconds for part in parts if part.first_audio_seconds is not None]
    return GenerationMetrics(
        audio_seconds=sum(part.audio_seconds for part in parts),
        elapsed_seconds=elapsed_seconds,
        first_audio_seconds=statistics.median(first) if first else None,
        underruns=sum(part.underruns for part in parts),
        retries=sum(part.retries for part in parts),
        evictions=sum(part.evictions for part in parts),
        resident_bytes=resident_bytes(),
        gpu_bytes=gpu_bytes(),
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


class Meter:
    """Measures one generation, from its construction to its last audio. ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._started = self._last = clock()
        self.retries = 0
        self.begin_take()

    def begin_take(self) -> None:
        """Forget the audio so far: a new take replaces it. The time goes on."""
        self._first: float | None = None
        self._audio_seconds = 0.0
        self._listener = Listener()

    def audio(self, seconds: float, at: float | None = None) -> None:
        """Audio of this length has arrived, now or at an earlier time of the clock."""
        now = self._clock() if at is None else at
        if self._first is None:
            self._first = now - self._started
        self._last = now
        self._audio_seconds += seconds
        self._listener.arrive(now, seconds)

    def begin(self, sample_rate: int) -> None:
        """As an output of audio: the sample rate of what ``write`` gets."""
        self._sample_rate = sample_rate

    def write(self, audio: Tensor) -> None:
        """As an output of audio: (samples,) have arrived."""
        self.audio(audio.shape[0] / self._sample_rate)

    def finish(self) -> None:
        """The generation has ended. Without audio, its time ends here."""
        if self._first is None:
            self._last = self._clock()

    def metrics(self, audio_seconds: float | None = None, evictions: int = 0) -> GenerationMetrics:
        """The figures so far. ``audio_seconds`` replaces the length that has arrived, where some of it was dropped."""
        return GenerationMetrics(
            audio_seconds=self._audio_seconds if audio_seconds is None else audio_seconds,
            elapsed_seconds=self._last - self._started,
            first_audio_seconds=self._first,
            underruns=self._listener.num_underruns,
            retries=self.retries,
            evictions=evictions,
            resident_bytes=resident_bytes(),
            gpu_bytes=gpu_bytes(),
        )
