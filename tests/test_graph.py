"""Graphs on the CPU, where the step is called instead of captured, and checks for changed buffers."""

import pytest
import torch

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
