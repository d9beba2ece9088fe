"""Captures a callable over static buffers as one CUDA graph, and replays it.

A replay launches the same kernels on the same addresses with one call from the host instead of thousands. Inputs and
outputs of the callable are therefore buffers with fixed addresses. This module knows neither the model nor the codec.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

WARMUP_RUNS = 3  # before the capture, so that libraries select kernels and allocate workspaces outside it


class GraphError(RuntimeError):
    """A buffer has changed since its graph was captured: a replay would access memory that it no longer owns."""


def graphs_enabled(device: torch.device) -> bool:
    """Whether callables on this device are captured. With ``CSM_NO_GRAPH=1`` they run eagerly instead."""
    return device.type == "cuda" and os.environ.get("CSM_NO_GRAPH", "0") in ("", "0")


class Pool:
    """A memory pool and a capture stream, shared by graphs that never run at the same time.

    Graphs that run concurrently need separate pools. The stream matters as well as the memory: cuBLAS keeps one
    workspace for each stream, and graphs captured on the same stream write to the same workspace.
    """

    def __init__(self, device: torch.device):
        """On a device other than CUDA, where nothing is captured, the pool is empty."""
        self.memory: Any = None
        self.stream: Any = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.memory = torch.cuda.graph_pool_handle()
                self.stream = torch.cuda.Stream()


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...


class Graph:
    """A callable without arguments, captured if the device supports it.

    Capturing runs ``step`` a few times, which writes to its buffers. Capture before their contents matter. Raises what
    ``step`` or CUDA raises in the capture.
    """

    def __init__(
        self,
        step: Callable[[], None],
        buffers: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
        pool: Pool | None = None,
    ):
        """``buffers`` returns all buffers that ``step`` reads or writes by name; ``check`` calls it again. ``pool`` may
        be shared by graphs that never run at the same time."""
        self._step = step
        self._buffers = buffers
        self._captured_at = _describe(buffers())
        self._graph = capture(step, device, pool or Pool(device)) if graphs_enabled(device) else None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def replay(self) -> None:
        """Run the step: replay the graph if there is one, else call ``step``."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def check(self) -> None:
        """Raise GraphError if a buffer's address, shape, stride or dtype has changed since the capture."""
        now = _describe(self._buffers())
        for name, then in self._captured_at.items():
            if name not in now:
                raise GraphError(f"buffer {name} no longer exists: capture again")
            for what, before, after in zip(("address", "shape", "stride", "dtype"), then, now[name], strict=True):
                if before != after:
                    raise GraphError(f"buffer {name}: {what} was {before} at capture and is {after} now: capture again")


def _describe(buffers: Mapping[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]]:
    return {name: (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for name, t in buffers.items()}


def capture(step: Callable[[], None], device: torch.device, pool: Pool) -> Replayable:
    """Capture ``step`` on a CUDA device, after a few warm-up runs, and replay it once."""
    # Inference mode, because torch.compile's CUDA graphs leave inference tensors behind that can be written in that
    # mode only (pytorch issue 166792).
    with torch.inference_mode(), torch.cuda.device(device):
        pool.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(pool.stream):
            for _ in range(WARMUP_RUNS):
                step()
        torch.cuda.current_stream().wait_stream(pool.stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local, so that other threads may use CUDA meanwhile.
        options = dict(pool=pool.memory, stream=pool.stream, capture_error_mode="thread_local")
        with _no_garbage_collection(), _own_cublas_workspaces(), torch.cuda.graph(graph, **options):
            step()
        graph.replay()  # the first replay uploads the graph to the device
    return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not within: freeing a CUDA event or graph would invalidate a capture."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _own_cublas_workspaces() -> Iterator[None]:
    """Make cuBLAS allocate its workspaces in the capture's pool, and anew afterwards.

    A workspace from before the capture could be freed while the graph still uses it (torch.compile clears them).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
