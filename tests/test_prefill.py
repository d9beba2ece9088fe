"""Prefill in chunks of any size gives the keys and values of prefilling the whole prompt at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm.cache import PrefixCache
from csm.frame import FrameState, decode_frame
from csm.graph import Pool
from csm.prefill import CHUNK_SIZES, Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams

CPU = torch.device("cpu")
CHUNKINGS = [(), (8,), (1, 4, 32), CHUNK_SIZES]


def prompt(num_rows, codebooks=8):
    return text_rows([(5 * i + 7) % 256 for i in range(num_rows)], codebooks)[:2]


def expected_cache(model, row_TC, mask_TC):
    """The cache after computing all rows but the last at once."""
    cache = Prefill(model).cache
    x_1TD = model.embed_rows(row_TC[None, :-1], mask_TC[None, :-1])
    model.backbone(x_1TD, cache, model.backbone.attention_metadata(torch.arange(x_1TD.shape[1])[None], x_1TD.shape[1]))
    return cache


def start(prefill, rows, slot=1, turn_ends=()):
    state = FrameState.allocate(prefill.model.config, 3, CPU, prefill.model.dtype)
    state.backbone_cache.k_LBGSd.fill_(7)
    prefill.start(state, slot, *rows, SamplingParams(temperature=0), turn_ends)
    return state


@pytest.mark.parametrize("chunk_sizes", CHUNKINGS, ids=str)
@settings(deadline=None, max_examples=12)
@given(num_rows=st.integers(1, 700), cuts=st.sets(st.integers(1, 600), max_size=3))
def test_chunks_equal_one_chunk(noisy, chunk_sizes, num_rows, cuts):
    rows, turn_ends = prompt(num_rows), tuple(sorted(cut for cut in cuts if cut < num_rows))
    state, expected = (
        start(Prefill(noisy.model, chunk_sizes=chunk_sizes), rows, 1, turn_ends),
        expected_cache(noisy.model, *rows),
    )
    own = state.backbone_cache.slots(1, 2)
    for actual, whole in ((own.k_LBGSd, expected.k_LBGSd), (own.v_LBGSd, expected.v_LBGSd)):
        ours, theirs = actual[:, :, :, : num_rows - 1], whole[:, :, :, : num_rows - 1]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert (own.k_LBGSd[:, :, :, num_rows - 1 :] == 7).all()
    assert (state.backbone_cache.k_LBGSd[:, [0, 2]] == 7).all()
    assert state.position_B.tolist() == [0, num_rows - 1, 0]


@pytest.mark.parametrize("num_rows", [2047, 2048])
def test_padding_stays_within_the_cache(noisy, num_rows):
    rows = prompt(num_rows)
    state, expected = start(Prefill(noisy.model, chunk_sizes=(256,)), rows), expected_cache(noisy.model, *rows)
    ours, theirs = state.backbone_cache.k_LBGSd[:, 1:2, :, : num_rows - 1], expected.k_LBGSd[:, :, :, : num_rows - 1]
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_sizes", CHUNKINGS, ids=str)
def test_the_previous_prompt_has_no_influence(noisy, chunk_sizes):
    """A Prefill that was used for a longer prompt gives the same codes as a new one."""
    used = Prefill(noisy.model, chunk_sizes=chunk_sizes)
    start(used, prompt(400))
    used.cache.k_LBGSd.fill_(1e4)
    again, fresh = start(used, prompt(50)), start(Prefill(noisy.model, chunk_sizes=chunk_sizes), prompt(50))
    for _ in range(6):
        decode_frame(noisy.model, again)
        decode_frame(noisy.model, fresh)
        assert torch.equal(again.codes_BK[1], fresh.codes_BK[1])


@pytest.mark.parametrize("chunk_sizes", CHUNKINGS, ids=str)
def test_a_copied_prefix_equals_a_computed_one(noisy, chunk_sizes):
    prefill, rows = Prefill(noisy.model, PrefixCache(4096), chunk_sizes), prompt(600)
    turn_ends = (130, 433)
    new = start(prefill, rows, turn_ends=turn_ends)
    prefill.cache.k_LBGSd.fill_(1e4)
    copied = start(prefill, rows, turn_ends=turn_ends)
    for name, buffer in new.buffers().items():
        assert torch.equal(buffer, copied.buffers()[name]), name


def test_captured_chunks_are_replayed(noisy, monkeypatch):
    """Every chunk of a prompt runs one of the captured graphs (which on a CPU call their step)."""
    monkeypatch.setattr("csm.graph.graphs_enabled", lambda device: False)
    prefill = Prefill(noisy.model, chunk_sizes=(32, 256))
    prefill.capture(Pool.__new__(Pool))
    assert sorted(prefill._graphs) == [
        (n, context_bucket) for n in (32, 256) for context_bucket in (256, 512, 1024, 2048)
    ]
    replayed = []
    for key, graph in prefill._graphs.items():
        monkeypatch.setattr(graph, "_step", lambda step=graph._step, key=key: (replayed.append(key), step()))
    rows = prompt(600)
    state, expected = start(prefill, rows), expected_cache(noisy.model, *rows)
    assert replayed == [(256, 256), (256, 512), (256, 1024)]
    ours, theirs = state.backbone_cache.k_LBGSd[:, 1:2, :, :599], expected.k_LBGSd[:, :, :, :599]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
