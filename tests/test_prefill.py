"""Passes of a few lengths write what one pass over the whole prompt writes, and nothing that is looked at beside it."""

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
LENGTHS = [(), (8,), (1, 4, 32), CHUNK_SIZES]


def prompt(num_rows, codebooks=8):
    return text_rows([(5 * i + 7) % 256 for i in range(num_rows)], codebooks)[:2]


def expected_cache(model, row_TC, mask_TC):
    """Every row but the last through the backbone at once."""
    cache = Prefill(model).cache
    x_1TD = model.embed_rows(row_TC[None, :-1], mask_TC[None, :-1])
    model.backbone(x_1TD, cache, model.backbone.attention_metadata(torch.arange(x_1TD.shape[1])[None], x_1TD.shape[1]))
    return cache


def start(prefill, rows, slot=1, turn_ends=()):
    state = FrameState.allocate(prefill.model.config, 3, CPU, prefill.model.dtype)
    state.backbone_cache.k_LBGSd.fill_(7)
    prefill.start(state, slot, *rows, SamplingParams(temperature=0), turn_ends)
    return state


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@settings(deadline=None, max_examples=12)
@given(num_rows=st.integers(1, 700), cuts=st.sets(st.integers(1, 600), max_size=3))
def test_passes_write_what_one_pass_writes(noisy, lengths, num_rows, cuts):
    rows, turn_ends = prompt(num_rows), tuple(sorted(cut for cut in cuts if cut < num_rows))
    state, expected = (
        start(Prefill(noisy.model, lengths=lengths), rows, 1, turn_ends),
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
def test_no_pass_runs_beyond_the_end_of_the_cache(noisy, num_rows):
    rows = prompt(num_rows)
    state, expected = start(Prefill(noisy.model, lengths=(256,)), rows), expected_cache(noisy.model, *rows)
    ours, theirs = state.backbone_cache.k_LBGSd[:, 1:2, :, : num_rows - 1], expected.k_LBGSd[:, :, :, : num_rows - 1]
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_a_longer_prompt_left_behind_is_not_looked_at(noisy, lengths):
    """One Prefill for several requests: the same codes as from one that was never used."""
    used = Prefill(noisy.model, lengths=lengths)
    start(used, prompt(400))
    used.cache.k_LBGSd.fill_(1e4)
    again, fresh = start(used, prompt(50)), start(Prefill(noisy.model, lengths=lengths), prompt(50))
    for _ in range(6):
        decode_frame(noisy.model, again)
        decode_frame(noisy.model, fresh)
        assert torch.equal(again.codes_BK[1], fresh.codes_BK[1])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_copied_prefix_is_what_would_be_computed(noisy, lengths):
    prefill, rows = Prefill(noisy.model, PrefixCache(4096), lengths), prompt(600)
    turn_ends = (130, 433)
    new = start(prefill, rows, turn_ends=turn_ends)
    prefill.cache.k_LBGSd.fill_(1e4)
    copied = start(prefill, rows, turn_ends=turn_ends)
    for name, buffer in new.buffers().items():
        assert torch.equal(buffer, copied.buffers()[name]), name


def test_captured_passes_are_the_ones_that_run(noisy, monkeypatch):
    """Where nothing is captured a Graph runs its callable: every pass of a prompt comes from the table."""
    monkeypatch.setattr("csm.graph.graphs_enabled", lambda device: False)
    prefill = Prefill(noisy.model, lengths=(32, 256))
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
