"""The plan for scale: its queue against formulas, its memory against the code's own buffers, its tables in the docs."""

import json
import math
import re

import numpy as np
import pytest
import torch
from test_structure import ROOT

from csm.bench import scale
from csm.bench.queueing import (
    FRAME_SECONDS,
    PLAYER_BUFFER,
    SEEDS,
    Server,
    erlang_c,
    highest_load,
    highest_rate,
    late_frames,
    mean_wait,
    simulate,
)
from csm.codec import Codec, moshi_config
from csm.config import CSM_1B, MIMI
from csm.metrics import Listener
from csm.model import CSM
from csm.weights.layouts import sesame_table, target_shapes


@pytest.mark.parametrize(("slots", "load"), [(1, 0.7), (4, 3.0), (16, 12.8)])
def test_the_queue_is_erlangs(slots, load):
    """A step whose time does not depend on the batch makes the engine an M/M/c queue."""
    frames, step = 100, 0.001
    outcome = simulate(Server(slots, lambda running: step), load / (frames * step), frames, 20_000)
    waited = float((outcome.wait_N > step).mean())  # an arrival within a round waits for its end
    assert waited == pytest.approx(erlang_c(slots, load), abs=0.04)
    assert outcome.wait_N.mean() - step / 2 == pytest.approx(mean_wait(slots, load, frames * step), rel=0.2)


def test_erlangs_formula():
    """Against its definition as a sum; with one server it is the load."""
    assert erlang_c(1, 0.3) == pytest.approx(0.3)
    servers, load = 10, 8.0
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    assert erlang_c(servers, load) == pytest.approx(
        last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)
    )
    assert mean_wait(1, 0.5, 2.0) == pytest.approx(2.0)  # M/M/1: load / (1 - load) of a service
    assert erlang_c(3, 3.0) == 1.0 and mean_wait(3, 3.0, 1.0) == math.inf
    assert erlang_c(40, highest_load(40, 0.01)) == pytest.approx(0.01, rel=0.1)


def test_late_frames_are_those_of_the_servers_clock():
    random = np.random.default_rng(0)
    for _ in range(200):
        time_T = np.cumsum(random.exponential(random.uniform(0.03, 0.12), 60))
        listener = Listener()
        for now in time_T:
            listener.arrive(float(now), FRAME_SECONDS)
        assert late_frames(time_T) == listener.num_underruns


def test_frames_are_late_once_a_step_takes_longer_than_a_frame():
    slow = simulate(Server(4, lambda running: 0.1), 1.0, 200, 300)
    assert slow.in_time < 0.5 and not slow.acceptable
    assert simulate(Server(4, lambda running: 0.07), 0.2, 50, 300).in_time == 1
    frames = round(PLAYER_BUFFER / 0.02) + 1  # the buffer covers five of 0.1 s, and the first frame
    assert late_frames(np.arange(frames) * 0.1) == 0 and late_frames(np.arange(frames + 1) * 0.1) == 1


def test_prefill_delays_the_frames_of_others():
    """One chunk a round: ten chunks of 0.2 s are more than a player's buffer covers, ten of 10 ms are not."""
    server = Server(2, lambda running: 0.07, chunk_seconds=0.2, chunks=10)
    assert simulate(server, 0.1, 100, 400).in_time < 0.99
    assert simulate(Server(2, lambda running: 0.07, chunk_seconds=0.01, chunks=10), 0.1, 100, 400).in_time == 1


def test_the_highest_rate_is_acceptable_and_more_is_not():
    server = Server(8, lambda running: 0.02 + 0.001 * running, chunk_seconds=0.002)
    rate = highest_rate(server, 75, 2000)
    assert 0.5 * server.capacity(75) < rate < server.capacity(75)
    assert simulate(server, rate, 75, 2000).acceptable
    more = rate + 0.02 * server.capacity(75)
    assert not all(simulate(server, more, 75, 2000, seed).acceptable for seed in SEEDS)
    assert highest_rate(Server(8, lambda running: 0.2), 75, 500) == 0


def test_memory_is_that_of_the_models_own_tensors():
    meta = torch.device("meta")
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=meta)
        for name, shape in target_shapes(sesame_table(CSM_1B)).items()
    }
    model = CSM.from_state_dict(CSM_1B, weights, meta)
    tensors = {tensor.untyped_storage()._cdata: tensor for tensor in [*model.parameters(), *model.buffers()]}
    assert 0 <= sum(t.nbytes for t in tensors.values()) / scale.weight_bytes("bfloat16") - 1 < 0.07  # and small tables
    assert 64 << 20 < scale.slot_bytes() - scale.CODEC_STATE_BYTES < 65 << 20


@pytest.mark.slow
def test_codec_memory_is_that_of_mimi():
    from moshi.models import loaders

    cpu = torch.device("cpu")
    mimi = loaders.get_mimi(None, mimi_config=moshi_config(MIMI), device=cpu, num_codebooks=CSM_1B.num_codebooks)
    state = mimi.state_dict()
    decoder = Codec(MIMI, CSM_1B.num_codebooks, state, cpu).stream_decoder(2)
    own = (decoder._conv_BN, decoder._offset_BN, decoder._keys_L2BHSd)
    assert sum(tensor.nbytes for tensor in own) == 2 * scale.CODEC_STATE_BYTES
    assert sum(tensor.nbytes for tensor in state.values()) == scale.CODEC_WEIGHT_BYTES


def documented(name):
    """The table of docs/scale.md after the comment with its name."""
    text = (ROOT / "docs" / "scale.md").read_text()
    found = re.search(rf"<!-- table: {name} -->\n\n((?:\|.*\n)+)", text)
    assert found, f"docs/scale.md has no table {name}"
    return found[1].strip()


@pytest.mark.parametrize("name", ["steps", "queue", "replicas", "memory", "speakers"])
def test_the_tables_of_the_docs_are_printed_by_the_script(name, capsys):
    assert scale.main(["--table", name]) == 0
    assert capsys.readouterr().out == f"{name}:\n\n{documented(name)}\n\n"


@pytest.mark.slow
def test_the_table_of_streams_is_printed_by_the_script(capsys):
    assert scale.main(["--table", "streams"]) == 0
    assert capsys.readouterr().out == f"streams:\n\n{documented('streams')}\n\n"


def test_measured_step_times(tmp_path, capsys):
    file = tmp_path / "bench.json"
    row = {"name": "graph, kernels", "batch": 1, "median_ms": 50.0}
    rows = [row, row | {"batch": 2, "median_ms": 79.0}, row | {"name": "eager", "batch": 4}]
    file.write_text(json.dumps({"machine": {"device": "A card", "copy_gb_s": 1000.0}, "rows": rows}))
    assert scale.main(["--times", str(file), "--table", "steps"]) == 0
    printed = capsys.readouterr().out
    assert "| A card | measured | 50 | 79 |" in re.sub(r"(\d\d)\.\d", r"\1", printed) and "batch 4" not in printed
    assert scale.measured(file).always_on() == 1
    with pytest.raises(scale.CSMError, match="batch 3"):
        scale.measured(file).step_seconds(3)
    file.write_text("{}")
    assert scale.main(["--times", str(file)]) == 2
    assert "no bench.json" in capsys.readouterr().err
    assert scale.main(["--table", "speed"]) == 2
