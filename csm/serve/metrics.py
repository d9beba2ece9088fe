"""Figures for Prometheus, and the clock that tells whether a listener would have heard a gap."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PLAYER_BUFFER = 0.1  # seconds that a player holds back before it starts
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """All metrics of one server. ``streams`` and ``waiting`` return the current numbers of requests."""

    def __init__(self, streams: Callable[[], int], waiting: Callable[[], int], sockets: Callable[[], int]):
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("csm_requests", "Requests for speech by outcome", ["outcome"], registry=registry)
        self.audio = Counter("csm_audio_seconds", "Audio generated", registry=registry)
        self.first_audio = Histogram(
            "csm_first_audio_seconds", "From the request to its first frame", buckets=SECONDS, registry=registry
        )
        self.rtf = Histogram(
            "csm_rtf", "Time a request / its audio", buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), registry=registry
        )
        self.lateness = Histogram(
            "csm_frame_lateness_seconds", "How late a frame was for a player", buckets=SECONDS, registry=registry
        )
        self.underruns = Counter("csm_underruns", "Frames that came too late for a player", registry=registry)
        self.guards = Counter("csm_guard_events", "What the guards did", ["guard"], registry=registry)
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("csm_streams", "Requests that are being generated", streams),
            ("csm_queue", "Requests that wait for a slot", waiting),
            ("csm_sockets", "WebSockets that are open", sockets),
            ("csm_memory_bytes", "Resident memory of the process", resident_bytes),
            ("csm_gpu_memory_bytes", "Memory that PyTorch holds on the GPU", gpu_bytes),
        ]
        for name, text, function in gauges:
            Gauge(name, text, registry=registry).set_function(function)

    def render(self) -> bytes:
        """The exposition format, text version 0.0.4."""
        return generate_latest(self.registry)


def resident_bytes() -> float:
    """Memory of this process: now on Linux, at its highest elsewhere."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_bytes() -> float:
    """Memory that PyTorch has reserved on all GPUs."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))


class PlayerClock:
    """A player that starts ``PLAYER_BUFFER`` after the first frame, and waits where a frame is missing."""

    def __init__(self, frame_seconds: float):
        self._frame_seconds = frame_seconds
        self._due: float | None = None
        self.num_late = 0

    def arrive(self, now: float) -> float:
        """A frame arrives: by how many seconds it is late."""
        if self._due is None:
            self._due = now + PLAYER_BUFFER
        late = max(0.0, now - self._due)
        self.num_late += late > 0
        self._due = max(self._due, now) + self._frame_seconds
        return late
