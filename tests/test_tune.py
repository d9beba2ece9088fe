"""Tuning: the products of a frame, the candidates, and the entry that is kept. Timings come from the test."""

import math

import pytest
import torch

from csm.bench import tune
from csm.bench.command import main
from csm.bench.launches import frame_launches
from csm.config import CSM_1B
from csm.kernels import launch_config
from csm.kernels.launch import launches

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which is off with a GPU")


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    monkeypatch.setenv("CSM_OPS", "triton")
    monkeypatch.setattr(tune, "POOL_BYTES", 1)
    launch_config.tuned_configs.cache_clear()
    yield
    launch_config.tuned_configs.cache_clear()
    launch_config._launch_config.cache_clear()


def products_of(config, *batches):
    return tune.products([launch for batch in batches for launch in frame_launches(config, batch, torch.bfloat16)])


def test_products_of_a_frame():
    keys = [product.key for product in products_of(CSM_1B, 1)]
    assert len(set(keys)) == len(keys)
    assert {
        "norm_rope_cache 3072x2048 bfloat16 rows",
        "norm_rope_cache 1536x1024 bfloat16 rows",
        "norm_swiglu 16384x1024 bfloat16 rows",
        "linear_add 1024x8192 bfloat16 rows",
        "attention_linear_add 1024x1024 bfloat16 rows",
        "norm_linear 2048x1024 bfloat16 rows",
    } <= set(keys)
    assert products_of(CSM_1B, 1, 8)[0].rows == (1, 1)
    assert "norm_swiglu 16384x2048 bfloat16 matmul 32" in {product.key for product in products_of(CSM_1B, 32)}


@pytest.mark.parametrize("batch", [1, 12])
def test_the_fastest_candidate_is_kept(noisy, batch):
    """The timed calls run in the interpreter with the configuration that won."""
    for product in products_of(noisy.config, batch):
        entries = [{}, *tune.candidates(product)]
        wanted = entries[-1]

        def seconds(step, device, product=product, wanted=wanted):
            return 0.0 if launch_config.tuned_configs()["cpu"].get(product.key, {}) == wanted else 1.0

        best = tune.tune([product], CPU, seconds, quiet=True)
        assert best == {product.key: (wanted, 0.0, 0.5)}  # of each of two calls
        config = launch_config.launch_config(
            product.op, torch.empty(product.n, product.k, dtype=product.dtype), math.prod(product.rows)
        )
        assert config.options.items() >= wanted.items()
        with launches() as seen:
            step, count = tune.calls(product, CPU)
            step()
        assert count == 2
        assert {launch.constants["BLOCK_N"] for launch in seen if "BLOCK_N" in launch.constants} >= {wanted["BLOCK_N"]}


def test_the_fallback_can_win():
    weight = torch.empty(64, 64)
    launch_config.tuned_configs().setdefault("cpu", {})[launch_config.key("linear_add", 64, 64, "float32", 0)] = {
        "fallback": 1
    }
    launch_config._launch_config.cache_clear()
    assert launch_config.launch_config("linear_add", weight, 1) is None
    assert launch_config.launch_config("linear_add", weight, 9) is not None


def test_tuning_needs_a_gpu(capsys):
    before = launch_config.TABLE.read_bytes()
    assert main(["--tune", "--quiet"]) == 2
    assert "GPU" in capsys.readouterr().err
    assert launch_config.TABLE.read_bytes() == before
