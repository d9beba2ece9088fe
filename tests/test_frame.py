"""The step: no host synchronisation, fixed buffers, and independent slots."""

import ast
import inspect
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import csm.cache
import csm.frame
import csm.model
from csm.frame import FrameState, decode_frame
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams

CPU = torch.device("cpu")
# Ops whose output shape or type depends on tensor values, so that the host has to wait for the device.
SYNCS = {
    f"aten::{name}"
    for name in """
    _local_scalar_dense nonzero is_nonzero equal item masked_select unique_dim _unique _unique2 unique_consecutive
    repeat_interleave allclose bincount where
    """.split()
}
OVERLOADS = {"aten::where": "", "aten::repeat_interleave": "Tensor"}  # synchronises in this overload only


class Recorder(TorchDispatchMode):
    """Raises at every op that synchronises or copies to another device; records ops and shapes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in SYNCS and OVERLOADS.get(name, func._schema.overload_name) == func._schema.overload_name:
            raise AssertionError(f"{name} waits for the device")
        indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") else ()
        if any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices):
            raise AssertionError(f"{name} by a mask waits for the device")
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            raise AssertionError(f"{name} goes to another device")
        result = func(*args, **kwargs)
        self.calls.append((name, tuple(self._describe(x) for x in args), tuple(sorted(map(str, kwargs.items())))))
        return result

    def _describe(self, value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, (list, tuple)):
            return tuple(self._describe(x) for x in value)
        return value


def prompt(text, codebooks=8):
    return text_rows([256, *text.encode(), 257], codebooks)


def started(model, texts, **params):
    state = FrameState.allocate(model.config, len(texts), CPU, model.dtype)
    prefill = Prefill(model)
    for slot, text in enumerate(texts):
        prefill.start(state, slot, *prompt(text)[:2], SamplingParams(seed=slot + 7, **params))
    return state


@pytest.mark.parametrize(("choice", "fewest"), [("reference", 100), ("", 30)])  # native ops are not PyTorch's
def test_the_step_depends_on_no_host_value(noisy, choice, fewest, monkeypatch):
    """The ops of a step, with their shapes and constants, do not depend on the contents of the state."""
    monkeypatch.setenv("CSM_OPS", choice)
    calls = []
    for texts, frames in ((["Hello.", "a"], 0), (["Something longer than that.", "bc"], 5)):
        state = started(noisy.model, texts)
        for _ in range(frames):
            decode_frame(noisy.model, state)
        with Recorder() as recorder:
            decode_frame(noisy.model, state)
        calls.append(recorder.calls)
    assert len(calls[0]) > fewest
    assert calls[0] == calls[1]


LEAKS = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x[0]),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.index_put_((x > 0,), x[:1]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "allclose": lambda x: torch.allclose(x, x),
    "another device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_recorder_catches_a_sync(name):
    with pytest.raises(AssertionError), Recorder():
        LEAKS[name](torch.ones(3))


def test_no_host_access_in_the_steps_source():
    """Copies to the host, which a dispatch mode does not see on a CPU."""
    kernels = [module for name, module in sys.modules.items() if name.startswith("csm.kernels.")]
    assert len(kernels) > 8
    for module in (csm.frame, csm.model, csm.cache, *kernels):
        tree = ast.parse(inspect.getsource(module))
        called = {
            node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
        }
        # csm.cache hashes a prompt's rows, outside the step; row_file reads rows from a file, on a CPU only.
        allowed = {csm.cache: {"numpy"}, csm.kernels.row_file: {"numpy", "tolist"}}.get(module, set())
        assert not called & {"item", "tolist", "cpu", "numpy", "cuda", "synchronize"} - allowed, module.__name__


def test_buffers_keep_their_addresses(noisy):
    state = started(noisy.model, ["Hello.", "Hi."])
    addresses = [buffer.data_ptr() for buffer in state.buffers().values()]
    assert len(set(addresses)) == len(addresses) == 15
    for _ in range(1000):
        decode_frame(noisy.model, state)
    assert [buffer.data_ptr() for buffer in state.buffers().values()] == addresses
    assert state.frame_B.tolist() == [1000, 1000]


def test_positions_stop_at_the_end_of_the_cache(noisy):
    state = started(noisy.model, ["Hello."])
    first = len("Hello.") + 1
    assert state.position_B.item() == first
    decode_frame(noisy.model, state)
    assert (state.position_B.item(), state.frame_B.item()) == (first + 1, 1)
    limit = noisy.config.backbone.max_positions - 1
    state.position_B.fill_(limit)
    decode_frame(noisy.model, state)
    assert state.position_B.item() == limit


def test_a_restarted_slot_is_independent_of_its_past(noisy):
    """A used slot with poisoned caches gives the codes of a new one."""
    state = started(noisy.model, ["Something else entirely, and long."])
    for _ in range(6):
        decode_frame(noisy.model, state)
    Prefill(noisy.model).start(state, 0, *prompt("Hello.")[:2], SamplingParams(seed=7))
    fresh = started(noisy.model, ["Hello."])
    beyond = len("Hello.") + 1
    state.backbone_cache.k_LBGSd[:, :, :, beyond:] = 1e4
    state.depth_cache.k_LBGSd.fill_(1e4)
    for _ in range(5):
        decode_frame(noisy.model, state)
        decode_frame(noisy.model, fresh)
        assert torch.equal(state.codes_BK, fresh.codes_BK)


def test_codes_do_not_depend_on_the_context_bucket(noisy):
    texts = ["Hello.", "x" * 250]
    whole, bounded = started(noisy.model, texts), started(noisy.model, texts)
    for frame in range(8):
        decode_frame(noisy.model, whole)
        decode_frame(noisy.model, bounded, bounded.backbone_cache.bucket_for(252 + 1 + frame))
        assert torch.equal(whole.codes_BK, bounded.codes_BK)
    bucket_for = whole.backbone_cache.bucket_for
    assert [bucket_for(n) for n in (1, 256, 257, 2047, 2048, 9999)] == [256, 256, 512, 2048, 2048, 2048]


def test_slots_are_independent(noisy):
    texts = ["Hello.", "A much longer sentence than the first one.", "No."]
    together = started(noisy.model, texts)
    alone = [FrameState.allocate(noisy.config, 1, CPU, noisy.model.dtype) for _ in texts]
    for slot, (text, state) in enumerate(zip(texts, alone, strict=True)):
        Prefill(noisy.model).start(state, 0, *prompt(text)[:2], SamplingParams(seed=slot + 7))
    for _ in range(20):
        decode_frame(noisy.model, together)
        for slot, state in enumerate(alone):
            decode_frame(noisy.model, state)
            assert torch.equal(together.codes_BK[slot], state.codes_BK[0])


def test_a_moved_slot_continues_its_request(noisy):
    texts = ["Hello.", "A much longer sentence than the first one.", "No."]
    moved, expected = started(noisy.model, texts), started(noisy.model, texts)
    for frame in range(12):
        if frame == 5:
            moved.backbone_cache.k_LBGSd[:, 0] = 1e4
            moved.move(2, 0, num_positions=moved.position_B[2].item())
        decode_frame(noisy.model, moved)
        decode_frame(noisy.model, expected)
        if frame >= 5:
            assert torch.equal(moved.codes_BK, expected.codes_BK[[2, 1, 2]])


def test_ids_that_are_not_codes_are_never_sampled(noisy):
    """Even if their logits are by far the largest."""
    state = {name: tensor.clone() for name, tensor in noisy.model.state_dict().items()}
    size = noisy.config.codebook_size
    state["codebook0_head"][size:] = 1e3 * state["codebook0_head"][:1].sign()
    state["depth_heads"][:, size:] = 1e3
    model = type(noisy.model).from_state_dict(noisy.config, state, CPU)
    frames = started(model, ["Hello.", "Hi."], temperature=5.0, top_k=size)
    for _ in range(20):
        decode_frame(model, frames)
        assert frames.codes_BK.max() < size
