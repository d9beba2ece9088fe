"""Capture and replay of any callable over static buffers, as one CUDA graph.

A graph replays the very kernels that the callable launched, at the very addresses: one launch from the host instead of
thousands. What it computes may depend on its inputs only through buffers that stay where they are. This module knows
neither model nor codec.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

WARMUP_RUNS = 3  # libraries choose their kernels and allocate their workspaces before the capture


class GraphError(RuntimeError):
    """A buffer of a captured graph is no longer what it was: the graph would read or write memory that is not its."""


def graphs_enabled(device: torch.device) -> bool:
    """Whether callables on this device are captured. ``CSM_NO_GRAPH=1`` runs the same callables eagerly."""
    return device.type == "cuda" and os.environ.get("CSM_NO_GRAPH", "0") in ("", "0")


class Pool:
    """What captures may share: memory, and the stream that they are captured on.

    Two graphs that run at the same time need a pool each. The stream counts too: cuBLAS keeps a workspace a stream, and
    graphs captured on the same one write to the same workspace.
    """

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            self.memory = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()


class Graph:
    """A callable without arguments, captured where the device allows it.

    Capturing runs ``step`` for real a few times: its buffers hold what that leaves, so capture before they are used.
    """

    def __init__(
        self,
        step: Callable[[], None],
        buffers: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
        pool: Pool | None = None,
    ):
        """``buffers`` names every buffer that ``step`` reads or writes, each time anew; graphs that never run at the
        same time may share a ``pool``."""
        self._step = step
        self._buffers = buffers
        self._captured_at = _describe(buffers())
        self._graph = _capture(step, device, pool or Pool(device)) if graphs_enabled(device) else None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def replay(self) -> None:
        """Run the step: a replay if it was captured, else the callable itself."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def check(self) -> None:
        """Raise GraphError, naming the buffer, if one has another address, shape, stride or dtype than at capture."""
        now = _describe(self._buffers())
        for name, then in self._captured_at.items():
            if name not in now:
                raise GraphError(f"buffer {name} is gone")
            for what, before, after in zip(("address", "shape", "stride", "dtype"), then, now[name], strict=True):
                if before != after:
                    raise GraphError(f"buffer {name}: its {what} was {before} at capture and is {after} now")


def _describe(buffers: Mapping[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]]:
    return {name: (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) for name, t in buffers.items()}


def _capture(step: Callable[[], None], device: torch.device, pool: Pool) -> torch.cuda.CUDAGraph:
    # In inference mode throughout: torch.compile's own graphs, run in it before, leave tensors that may be written in
    # it only (pytorch issue 166792).
    with torch.inference_mode(), torch.cuda.device(device):
        pool.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(pool.stream):
            for _ in range(WARMUP_RUNS):
                step()
        torch.cuda.current_stream().wait_stream(pool.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with CUDA work of their own meanwhile.
        with torch.cuda.graph(graph, pool=pool.memory, stream=pool.stream, capture_error_mode="thread_local"):
            step()
    return graph
