"""Graph where nothing is captured: the same callable runs, and moved buffers are named."""

import pytest
import torch

from csm.graph import Graph, GraphError, graphs_enabled

CPU = torch.device("cpu")


def counter():
    buffers = {"count": torch.zeros(3), "by": torch.ones(3)}
    return buffers, Graph(lambda: buffers["count"].add_(buffers["by"]), lambda: buffers, CPU)


def test_on_a_cpu_the_callable_itself_runs():
    buffers, graph = counter()
    assert not graph.is_captured
    assert buffers["count"].tolist() == [0, 0, 0]  # nothing to capture, so nothing was run
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
    kept = buffers["count"]  # its memory must not be handed out again
    buffers["count"] = MOVES[what](kept)
    with pytest.raises(GraphError, match=f"buffer count: its {what} was"):
        graph.check()


def test_a_buffer_that_is_gone_is_named():
    buffers, graph = counter()
    del buffers["by"]
    with pytest.raises(GraphError, match="buffer by is gone"):
        graph.check()


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_the_switch(monkeypatch, value, enabled):
    if value is None:
        monkeypatch.delenv("CSM_NO_GRAPH", raising=False)
    else:
        monkeypatch.setenv("CSM_NO_GRAPH", value)
    assert graphs_enabled(torch.device("cuda")) is enabled
    assert not graphs_enabled(CPU)
