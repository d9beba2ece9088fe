"""How many threads are chosen."""

import pytest
import torch

from csm import Generator
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
    assert choose_threads(small) == 1
    assert choose_threads(large) == torch.get_num_threads()


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
