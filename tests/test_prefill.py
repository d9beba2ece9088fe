"""Prefill in chunks of any size gives the keys and values of prefilling the whole prompt at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from csm.frame import FrameState, decode_frame
from csm.graph import Pool
from csm.model import CSM
from csm.prefill import CHUNK_SIZES, Prefill
from csm.prefix_cache import PrefixCache
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


def start(prefill, rows, slot=1, turn_ends=(), params=None):
    state = FrameState.allocate(prefill.model.config, 3, CPU, prefill.model.dtype)
    state.backbone_cache.k_LBGSd.fill_(7)
    prefill.start(state, slot, *rows, params or SamplingParams(temperature=0), turn_ends)
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
    prefill, rows = Prefill(noisy.model, PrefixCache(1 << 24), chunk_sizes), prompt(600)
    turn_ends = (130, 433)
    new = start(prefill, rows, turn_ends=turn_ends)
    prefill.cache.k_LBGSd.fill_(1e4)
    copied = start(prefill, rows, turn_ends=turn_ends)
    equal_states(new, copied)


def test_captured_chunks_are_replayed(noisy, captures):
    prefill = Prefill(noisy.model, chunk_sizes=(32, 256))
    prefill.capture(Pool(CPU))
    assert sorted(prefill._graphs) == [(size, bucket) for size in (32, 256) for bucket in (256, 512, 1024, 2048)]
    assert len(captures) == 8
    state, expected = start(prefill, prompt(600)), expected_cache(noisy.model, *prompt(600))
    replayed = [key for key, graph in prefill._graphs.items() for _ in range(graph._graph.replays)]
    assert sorted(replayed) == [(256, 256), (256, 512), (256, 1024)]
    ours, theirs = state.backbone_cache.k_LBGSd[:, 1:2, :, :599], expected.k_LBGSd[:, :, :, :599]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def equal_states(one, other):
    for name, buffer in one.buffers().items():
        assert torch.equal(buffer, other.buffers()[name]), name


def test_chunks_can_be_interleaved_with_frames(noisy):
    """Slot 0 generates while slot 1 is prefilled: both give the codes that they give without the other."""
    short, long, params = prompt(20), prompt(600), SamplingParams(seed=3)
    prefill = Prefill(noisy.model)
    state, alone = (FrameState.allocate(noisy.config, 2, CPU, noisy.model.dtype) for _ in range(2))
    for one in (state, alone):
        prefill.start(one, 0, *short, params)
    job = prefill.begin(state, 1, *long, params, turn_ends=(100,))
    chunks = 0
    while not job.is_done:
        chunks += 1
        assert job.num_chunks_left == 4 - chunks
        assert job.run_chunk() == (chunks == 3)
        decode_frame(noisy.model, state)
        decode_frame(noisy.model, alone)
        assert torch.equal(state.codes_BK[0], alone.codes_BK[0])
    fresh = FrameState.allocate(noisy.config, 2, CPU, noisy.model.dtype)
    Prefill(noisy.model).start(fresh, 1, *long, params, turn_ends=(100,))
    decode_frame(noisy.model, fresh)
    for _ in range(4):
        assert torch.equal(state.codes_BK[1], fresh.codes_BK[1])
        decode_frame(noisy.model, state)
        decode_frame(noisy.model, fresh)


def test_a_job_may_change_its_slot(noisy):
    prefill, rows, params = Prefill(noisy.model), prompt(300), SamplingParams(seed=2**62 + 7, temperature=0.3, top_k=9)
    states = [FrameState.allocate(noisy.config, 3, CPU, noisy.model.dtype) for _ in range(2)]
    prefill.start(states[0], 2, *rows, params)
    job = prefill.begin(states[1], 0, *rows, params)
    assert not job.run_chunk()
    job.slot = 2
    assert job.run_chunk()
    equal_states(*states)


def test_one_job_at_a_time(noisy):
    prefill, rows = Prefill(noisy.model), prompt(600)
    state = FrameState.allocate(noisy.config, 1, CPU, noisy.model.dtype)
    before = {name: buffer.clone() for name, buffer in state.buffers().items()}
    job = prefill.begin(state, 0, *rows, SamplingParams())
    job.run_chunk()
    with pytest.raises(AssertionError, match="previous job"):
        prefill.begin(state, 0, *rows, SamplingParams())
    job.cancel()
    assert all(torch.equal(buffer, before[name]) for name, buffer in state.buffers().items())
    assert prefill.begin(state, 0, *prompt(1), SamplingParams()).run_chunk()


def test_the_slot_has_the_requests_parameters(noisy):
    rows, params = prompt(5), SamplingParams(seed=2**63 - 1, temperature=0.3, top_k=9999)
    state = start(Prefill(noisy.model), rows, slot=1, params=params)
    assert state.seed_B.tolist() == [0, 2**63 - 1, 0]
    assert state.top_k_B.tolist() == [1, noisy.config.codebook_size, 1]
    assert torch.equal(state.temperature_B, torch.tensor([0, 0.3, 0]))
    assert (state.position_B.tolist(), state.frame_B.tolist()) == ([0, 4, 0], [0, 0, 0])
    assert torch.equal(state.pending_row_BC[1], rows[0][-1])
    assert torch.equal(state.pending_mask_BC[1], rows[1][-1])


class HostCopies(TorchDispatchMode):
    """Counts ops that read a CPU tensor and write one on another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor) and x.ndim}
        self.count += len(devices) > 1
        return func(*args, **(kwargs or {}))


def test_a_request_takes_one_copy_to_the_device(noisy):
    """On the meta device, where reading a value back would raise."""
    meta = torch.device("meta")
    weights = {name: tensor.to(meta) for name, tensor in noisy.model.state_dict().items()}
    model = CSM.from_state_dict(noisy.config, weights, meta)
    prefill, state = Prefill(model, chunk_sizes=CHUNK_SIZES), FrameState.allocate(noisy.config, 2, meta, model.dtype)
    with HostCopies() as copies:
        prefill.start(state, 1, *prompt(900), SamplingParams(), turn_ends=(100, 300))
    assert copies.count == 1
