"""Graphs on the CPU, where the step is called instead of captured, and checks for changed buffers."""

import gc

import pytest
import torch

import csm.graph
from csm.graph import Graph, GraphError, graphs_enabled

CPU = torch.device("cpu")


def counter():
    buffers = {"count": torch.zeros(3), "by": torch.ones(3)}
    return buffers, Graph(lambda: buffers["count"].add_(buffers["by"]), lambda: buffers, CPU)


def test_on_a_cpu_the_step_itself_is_called():
    buffers, graph = counter()
    assert not graph.is_captured
    assert buffers["count"].tolist() == [0, 0, 0]  # no capture, so no warm-up runs
    for _ in range(4):
        graph.replay()
    graph.check()
    assert buffers["count"].tolist() == [4, 4, 4]


MOVES = {
    "address": lambda old: old.clone(),
    "shape": lambda old: old[:2],
    "dtype": lambda old: old.view(torch.int32),
    "stride": lambda old: old.as_strided((3,), (0,)),
}


@pytest.mark.parametrize("what", MOVES)
def test_a_buffer_that_changed_is_named(what):
    buffers, graph = counter()
    kept = buffers["count"]  # so that the allocator does not reuse its memory
    buffers["count"] = MOVES[what](kept)
    with pytest.raises(GraphError, match=f"buffer count: {what} was"):
        graph.check()


def test_a_missing_buffer_is_named():
    buffers, graph = counter()
    del buffers["by"]
    with pytest.raises(GraphError, match="buffer by no longer exists"):
        graph.check()


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_graphs_can_be_disabled(monkeypatch, value, enabled):
    if value is None:
        monkeypatch.delenv("CSM_NO_GRAPH", raising=False)
    else:
        monkeypatch.setenv("CSM_NO_GRAPH", value)
    assert graphs_enabled(torch.device("cuda")) is enabled
    assert not graphs_enabled(CPU)


def test_a_stand_in_for_the_capture_is_replayed(captures):
    """The fixture ``captures`` replaces what needs CUDA, so that callers of Graph can be tested on a CPU."""
    buffers, graph = counter()
    assert graph.is_captured and len(captures) == 1
    assert buffers["count"].tolist() == [0, 0, 0]
    for _ in range(4):
        graph.replay()
    assert buffers["count"].tolist() == [4, 4, 4] and captures[0].replays == 4


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, ValueError])
def test_garbage_collection_is_off_only_during_a_capture(enabled, error):
    (gc.enable if enabled else gc.disable)()
    try:
        with csm.graph._no_garbage_collection():
            assert not gc.isenabled()
            if error:
                raise error
    except ValueError:
        assert error
    finally:
        is_enabled = gc.isenabled()
        gc.enable()
    assert is_enabled == enabled


def test_cublas_workspaces_are_cleared_before_and_after_a_capture(monkeypatch):
    events = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("clear"), raising=False)
    with pytest.raises(ValueError), csm.graph._own_cublas_workspaces():
        events.append("capture")
        raise ValueError
    assert events == ["clear", "capture", "clear"]
