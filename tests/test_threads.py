"""How many threads are chosen, and that the engine runs on them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from csm import Generator, SpeechRequest, threads
from csm.config import CSM_1B
from csm.errors import CSMError
from csm.guards import NO_GUARDS
from csm.model import CSM
from csm.threads import Load, ThreadChoice

needs_stat = pytest.mark.skipif(not threads.STAT.exists(), reason="the load is read on Linux")


@pytest.fixture
def large():
    """CSM-1B without memory; its parameters are on the device of whoever asks for it."""
    with torch.device("meta"):
        return CSM(CSM_1B, torch.device("cpu"))


@pytest.fixture(autouse=True)
def four_threads(monkeypatch, tmp_path):
    """PyTorch's number is 4, nobody asks for another one, and there is no quota."""
    for name in ("CSM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")


def on(device, monkeypatch):
    monkeypatch.setattr(CSM, "device", property(lambda _: torch.device(device)))


def busy(share, monkeypatch):
    monkeypatch.setattr(Load, "busy_share", lambda _: share)


@pytest.mark.parametrize(("share", "count"), [(0.0, 4), (0.1, 4), (0.25, 3), (0.5, 2), (0.9, 1), (1.0, 1)])
def test_csm_1b_takes_the_cores_that_are_free(share, count, large, monkeypatch):
    on("cpu", monkeypatch)
    busy(share, monkeypatch)
    choice = ThreadChoice(large)
    assert choice() == count
    busy(0.0, monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in a thread that was started later
    assert choice() == 4


def test_a_gpu_is_not_looked_at(large, monkeypatch):
    on("cuda", monkeypatch)
    monkeypatch.setattr(Load, "busy_share", lambda _: pytest.fail("the load was read"))
    assert ThreadChoice(large)() == 4


@pytest.mark.parametrize(("text", "count"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("", 4)])
def test_a_container_s_quota(text, count, large, monkeypatch, tmp_path):
    on("cpu", monkeypatch)
    busy(0.0, monkeypatch)
    (tmp_path / "cpu.max").write_text(text)
    assert ThreadChoice(large)() == count


def test_a_small_model_takes_one_thread():
    model = Generator.from_pretrained("tiny", device="cpu", progress=False).model
    assert ThreadChoice(model)() == 1


def test_what_is_asked_for_wins(large, monkeypatch):
    on("cpu", monkeypatch)
    busy(1.0, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert ThreadChoice(large)() == 4
    monkeypatch.setenv("CSM_THREADS", "3")
    assert ThreadChoice(large)() == 3
    assert ThreadChoice(large, 5)() == 5


@pytest.mark.parametrize("value", ["0", "two", "-1", ""])
def test_a_wrong_number_is_named(value, large, monkeypatch):
    monkeypatch.setenv("CSM_THREADS", value)
    with pytest.raises(CSMError, match="threads"):
        ThreadChoice(large)
    with pytest.raises(CSMError, match="at least 1"):
        ThreadChoice(large, 0)


def test_the_engine_runs_on_the_number_that_was_chosen_while_it_was_idle(monkeypatch):
    """Another request beside it changes nothing; the next one after it does."""
    used, chosen = [], iter([2, 3, 5])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    generator = Generator.from_pretrained("tiny", device="cpu", progress=False, threads=1)
    generator._choose_threads = lambda: next(chosen)  # 2 as the engine is made, 3 and 5 as it is asked
    # It pauses until somebody takes its frame.
    ticket = generator.submit(SpeechRequest("Good morning.", max_audio_length_ms=8000), NO_GUARDS, max_unread=1)
    generator.generate_codes("Beside it.", max_audio_length_ms=160)
    assert not ticket.finished
    ticket.cancel()
    assert set(used) == {3}
    deadline = time.monotonic() + 20
    while not generator._worker.engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    generator.generate_codes("After it.", max_audio_length_ms=160)
    assert set(used) == {3, 5}


@needs_stat
def test_a_busy_process_is_seen_on_the_cores_of_this_one(monkeypatch):
    """Both run on one core, so the other one has at least a third of it, whatever else does."""
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {core})
    monkeypatch.setattr(threads, "SHORTEST_SECONDS", 0.0)
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as loop:
        loop.stdout.readline()
        try:
            load = Load()
            time.sleep(0.5)
            assert 0.3 < load.busy_share() <= 1
        finally:
            loop.kill()


@needs_stat
def test_own_work_is_not_load():
    def machine_seconds():
        return sum(map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])) / os.sysconf("SC_CLK_TCK")

    machine, own, others = machine_seconds(), time.process_time(), threads._others_seconds()
    while time.process_time() - own < 0.5:
        pass
    if len(os.sched_getaffinity(0)) == os.cpu_count():
        others = threads._others_seconds() - others
        assert others == pytest.approx(machine_seconds() - machine - 0.5, abs=0.1)


def test_the_load_is_zero_where_it_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "none")
    monkeypatch.setattr(threads, "SHORTEST_SECONDS", 0.0)
    assert Load().busy_share() == 0
