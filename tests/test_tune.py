"""Tuning: the products of a frame, the candidates, and the entry that is kept. Timings come from the test."""

import json
import time

import pytest
import torch

from csm.bench import tune
from csm.bench.command import main
from csm.bench.launches import frame_launches
from csm.bench.tune import Tuning, neighbours, products, segments
from csm.config import CSM_1B
from csm.kernels import launch_config
from csm.kernels.launch import launches

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which is off with a GPU")


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    monkeypatch.setenv("CSM_OPS", "triton")
    launch_config.tuned_configs.cache_clear()
    launch_config._launch_config.cache_clear()
    yield
    launch_config.tuned_configs.cache_clear()
    launch_config._launch_config.cache_clear()


def products_of(config, batch):
    return products(frame_launches(config, batch, torch.bfloat16))


def test_products_of_a_frame():
    keys = [product.key for product in products_of(CSM_1B, 1)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "norm_swiglu 16384x2048 bfloat16 rows"  # the largest first
    assert {
        "norm_rope_cache 3072x2048 bfloat16 rows",
        "norm_rope_cache 1536x1024 bfloat16 rows",
        "norm_swiglu 16384x1024 bfloat16 rows",
        "linear_add 1024x8192 bfloat16 rows",
        "attention_linear_add 1024x1024 bfloat16 rows",
        "norm_linear 2048x1024 bfloat16 rows",
    } <= set(keys)
    assert "norm_swiglu 16384x2048 bfloat16 matmul 32" in {product.key for product in products_of(CSM_1B, 32)}


def test_neighbours_are_one_step_away():
    product = products_of(CSM_1B, 1)[0]
    entry = {"num_warps": 4, "BLOCK_N": 2, "BLOCK_K": 2048}
    assert list(neighbours(product, entry)) == [
        {**entry, "num_warps": 2},
        {**entry, "num_warps": 8},
        {**entry, "BLOCK_N": 4},
        {**entry, "num_warps": 8, "BLOCK_N": 4},
    ]


@pytest.mark.parametrize("batch", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_segments_products_run_with_the_entries_of_the_table(noisy, batch):
    """The timed step runs in the interpreter, with the configuration that won."""
    for step in segments(noisy.config, batch, CPU, torch.float32).values():
        with launches() as seen:
            step()
        product = products(seen)[0]
        wanted = next(neighbours(product, product.by_rule))

        def seconds(step, device, product=product, wanted=wanted):
            return 0.5 if launch_config.tuned_configs()["cpu"].get(product.key) == wanted else 1.0

        tuning = Tuning(step, CPU, seconds, time.perf_counter() + 60)
        tuning.run([product], quiet=True)
        assert (tuning.first, tuning.best) == (1.0, 0.5)
        assert launch_config.tuned_configs()["cpu"][product.key] == wanted
        with launches() as seen:
            step()
        launch = next(launch for launch in seen if product in products([launch]))
        assert {"num_warps": launch.num_warps, **launch.constants}.items() >= wanted.items()


def test_descent_finds_the_lowest_point_of_a_valley(noisy):
    """Several steps away, in two coordinates of two products, with noise that is no improvement."""
    step = segments(noisy.config, 1, CPU, torch.float32)["depth pass"]
    with launches() as seen:
        step()
    wanted = products(seen)[:2]
    target = {"num_warps": 16, "BLOCK_N": 32}

    def seconds(step, device):
        cost = 1.0
        for product in wanted:
            entry = launch_config.tuned_configs()["cpu"].get(product.key, product.by_rule)
            cost += 9.0 if "fallback" in entry else sum(abs(entry[k] - v) / v for k, v in target.items())
        return cost

    tuning = Tuning(step, CPU, seconds, time.perf_counter() + 60)
    tuning.run(wanted, quiet=True)
    for product in wanted:
        assert launch_config.tuned_configs()["cpu"][product.key].items() >= target.items()
    assert tuning.best == 1.0


def test_what_does_not_fit_the_gpu_is_not_kept(noisy):
    step = segments(noisy.config, 1, CPU, torch.float32)["backbone layer"]
    with launches() as seen:
        step()

    def seconds(step, device):
        if launch_config.tuned_configs()["cpu"]:
            raise RuntimeError("out of resource: registers")
        return 1.0

    tuning = Tuning(step, CPU, seconds, time.perf_counter() + 60)
    tuning.run(products(seen), quiet=True)
    assert launch_config.tuned_configs()["cpu"] == {} and tuning.best == 1.0


def test_when_the_time_is_over_the_best_so_far_stays(noisy):
    rows = tune.tune(noisy.config, 1, torch.float32, CPU, lambda step, device: 1.0, budget=0, quiet=True)
    assert {row["segment"] for row in rows} == {"depth pass", "backbone layer"}
    assert {row["tuned"] for row in rows} == {"as by rule"}
    assert launch_config.tuned_configs()["cpu"] == {}


def test_the_time_can_be_over_between_two_products(noisy):
    """The product that is not reached keeps its rule, and the result is written all the same."""
    step = segments(noisy.config, 1, CPU, torch.float32)["depth pass"]
    with launches() as seen:
        step()

    def seconds(step, device):
        tuning_ended[0].deadline = 0.0  # after the first measurement of a candidate
        return 1.0

    tuning_ended = [Tuning(step, CPU, lambda step, device: 1.0, time.perf_counter() + 60)]
    tuning_ended[0].seconds = seconds
    tuning_ended[0].run(products(seen), quiet=True)
    assert launch_config.tuned_configs()["cpu"] == {}


def test_a_fallback_has_to_win_again(noisy):
    """It launches no kernel, so it is found with an empty table; other entries stay."""
    step = segments(noisy.config, 1, CPU, torch.float32)["depth pass"]
    first, second, *_ = tune.products_by_rule(step, CPU)
    entry = {**second.by_rule, "num_warps": 1}
    launch_config.tuned_configs()["cpu"].update({first.key: {"fallback": 1}, second.key: entry, "another": {"x": 1}})
    assert [product.key for product in tune.products_by_rule(step, CPU)][:2] == [first.key, second.key]
    assert launch_config.tuned_configs()["cpu"] == {second.key: entry, "another": {"x": 1}}


def test_an_entry_may_leave_out_what_the_rule_has(noisy):
    """As the entries of earlier versions, which have no num_stages."""
    product = products_of(CSM_1B, 32)[0]
    tuning = Tuning(lambda: None, CPU, lambda step, device: 1.0, time.perf_counter() + 60)
    tuning.table[product.key] = {"num_warps": 8}
    assert not tuning.improve(product)
    assert tuning.table[product.key] == {"num_warps": 8}
    assert {"num_stages": 5}.items() <= list(neighbours(product, product.by_rule))[-3].items()


@pytest.mark.parametrize("gpu", sorted(json.loads(launch_config.TABLE.read_text())))
def test_every_entry_of_the_table_is_a_configuration(gpu):
    for key, entry in json.loads(launch_config.TABLE.read_text())[gpu].items():
        op, shape, dtype, *way = key.split(" ")
        n, k = map(int, shape.split("x"))
        m = int(way[1]) if way[0] == "matmul" else 0
        assert key == launch_config.key(op, n, k, dtype, m)
        config = launch_config._launch_config(op, n, k, dtype, getattr(torch, dtype).itemsize, m, gpu)
        assert config is None if entry == {"fallback": 1} else config.options.items() >= entry.items()


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
