"""All passes of the depth decoder in one native call: the codes and caches of the loop of single ops, bit for bit."""

import pytest
import torch

from csm.bench.model_setup import random_weights
from csm.frame import FrameState, decode_frame
from csm.kernels.native import library, ops
from csm.kernels.row_file import IS_SUPPORTED, RowFile
from csm.model import CSM
from csm.quantize import quantize_model, set_weight
from micro import MICRO

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def native_ops(monkeypatch):
    monkeypatch.delenv("CSM_OPS", raising=False)


def random_model(kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = CSM.from_state_dict(MICRO, random_weights(MICRO, CPU, dtype), CPU)
    if kind.startswith("int"):
        quantize_model(model, kind)
    return model


def table_in_file(model, folder):
    """The embeddings of codes move to a file."""
    table_WD, path = model.depth_embedding, folder / "table"
    path.write_bytes(b"header" + table_WD.view(torch.uint8).numpy().tobytes())
    set_weight(model, "depth_embedding", RowFile(path, 6, table_WD.shape, table_WD.dtype))
    return path


def generate(model, slots, frames=3):
    """Codes of each frame, and the depth decoder's keys and values after the last one."""
    state = FrameState.allocate(model.config, slots, CPU, model.dtype)
    state.seed_B.copy_(torch.arange(slots) + 5)
    state.temperature_B.copy_(torch.tensor([0.9, 0.0, 1.3, 0.7][:slots]))
    state.top_k_B.copy_(torch.tensor([50, 1, 256, 3][:slots]))
    codes = []
    for _ in range(frames):
        decode_frame(model, state)
        codes.append(state.codes_BK.clone())
    return torch.stack(codes), state.depth_cache.k_LBGSd, state.depth_cache.v_LBGSd


def count_calls(monkeypatch):
    calls, native = [], ops.depth_codes
    monkeypatch.setattr(ops, "depth_codes", lambda **arguments: calls.append(arguments) or native(**arguments))
    return calls


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("slots", [1, 3, 4])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_depth_codes_are_those_of_single_ops(kind, slots, where, tmp_path, monkeypatch):
    if where == "file" and not IS_SUPPORTED:
        pytest.skip("this system has no preadv")
    model, calls = random_model(kind), count_calls(monkeypatch)
    whole = generate(model, slots)
    if where == "file":
        table_in_file(model, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(generate(model, slots), whole, strict=True))
    assert len(calls) == (3 if where == "memory" else 6)
    monkeypatch.setattr(ops, "use_native_depth_codes", lambda *_: False)
    single = generate(model, slots)
    assert all(torch.equal(a, b) for a, b in zip(single, whole, strict=True))
    assert len(whole[0].unique()) > 10  # the codes are not all alike


def test_depth_codes_do_not_depend_on_the_number_of_threads():
    model, before, results = random_model("int4"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(generate(model, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_more_rows_than_the_ops_take_run_one_by_one(monkeypatch):
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(ops, "MAX_ROWS", 5)
    generate(random_model("float32"), 3)
    assert calls == []


@pytest.mark.skipif(not IS_SUPPORTED, reason="this system has no preadv")
def test_a_table_whose_file_shrank_is_an_error(tmp_path):
    model = random_model("bfloat16")
    path = table_in_file(model, tmp_path)
    with path.open("r+b") as file:
        file.truncate(6 + MICRO.audio_vocab_size * 2 * MICRO.depth_decoder.dim)
    with pytest.raises(OSError, match="the file ends before row"):
        generate(model, 1)
