"""How many threads are chosen."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from csm import Generator, threads
from csm.config import CSM_1B
from csm.errors import CSMError
from csm.model import CSM
from csm.threads import choose_threads


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        large = CSM(CSM_1B, torch.device("cpu"))
    return Generator.from_pretrained("tiny", device="cpu", progress=False).model, large


def test_a_small_model_takes_one_thread_and_csm_1b_what_pytorch_takes(models, monkeypatch):
    for name in ("CSM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    small, large = models
    monkeypatch.setattr(threads._Load, "busy_cores", lambda _: 0.3)
    assert choose_threads(small) == 1
    assert choose_threads(large) == torch.get_num_threads()


@pytest.mark.skipif(not threads.STAT.exists(), reason="the load is read on Linux")
def test_csm_1b_leaves_busy_cores_alone(models, monkeypatch):
    monkeypatch.delenv("CSM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(threads, "_load", threads._Load())
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as loop:
        loop.stdout.readline()
        try:
            busy = threads._load.busy_cores()
            assert busy > 0.4  # the loop may share a core with other processes, which count as well
            assert choose_threads(models[1]) == max(1, 4 - round(busy))
            assert choose_threads(models[0]) == 1
        finally:
            loop.kill()


@pytest.mark.skipif(not threads.STAT.exists(), reason="the load is read on Linux")
def test_own_work_is_not_load():
    def machine_seconds():
        return sum(map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])) / os.sysconf("SC_CLK_TCK")

    machine, own, others = machine_seconds(), time.process_time(), threads._others_seconds()
    while time.process_time() - own < 0.5:
        pass
    others = threads._others_seconds() - others
    assert others == pytest.approx(machine_seconds() - machine - 0.5, abs=0.1)


def test_the_load_is_zero_where_it_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "STAT", tmp_path / "none")
    assert threads._Load().busy_cores() == 0


def test_what_is_asked_for_wins(models, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(models[0]) == torch.get_num_threads()
    monkeypatch.setenv("CSM_THREADS", "3")
    assert choose_threads(models[0]) == choose_threads(models[1]) == 3
    assert choose_threads(models[0], 5) == 5


@pytest.mark.parametrize("value", ["0", "two", "-1", ""])
def test_a_wrong_number_is_named(models, monkeypatch, value):
    monkeypatch.setenv("CSM_THREADS", value)
    with pytest.raises(CSMError, match="threads"):
        choose_threads(models[0])
    with pytest.raises(CSMError, match="at least 1"):
        choose_threads(models[0], 0)
