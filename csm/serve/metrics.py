"""Figures for Prometheus. ``csm.metrics`` defines the terms."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from csm.metrics import gpu_bytes, resident_bytes

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
        self.evictions = Counter("csm_evictions", "Turns that left a session's context", registry=registry)
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
