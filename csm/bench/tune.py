"""Measure launch configurations on the GPU that is here, for ``tuned.json``: ``python bench.py --tune``.

A kernel's registers decide how early the next kernel can start, so an op measured alone says little. Timed are two
captured segments of a frame: one pass of the depth decoder with its head, and one layer of the backbone. Both read more
weights than an L2 cache holds. Coordinate descent: one product after the other tries the neighbours of its entry, while
all others keep theirs, until nothing improves or the time is over.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from csm.bench.model_setup import forced_ops, random_weights
from csm.bench.report import table
from csm.config import CSMConfig
from csm.errors import CSMError
from csm.frame import FrameState
from csm.graph import Graph, graphs_enabled
from csm.kernels import launch_config
from csm.kernels.launch import COMPILE_ERRORS, Launch, gpu_arch, launches
from csm.model import CSM

POSITION, CONTEXT_BUCKET = 200, 256  # of the backbone's layer
LEAST_GAIN = 0.005  # of a segment's time: less is noise
SEGMENT_RUNS, REPLAYS = 8, 20  # a graph of so many segments in a row, as in a frame; and how often it is timed
# A configuration that needs more registers or shared memory than the GPU has.
DOES_NOT_FIT: tuple[type[Exception], ...] = (RuntimeError, *COMPILE_ERRORS)

FALLBACK = {"fallback": 1}

Step = Callable[[], None]
Timer = Callable[[Step, torch.device], float]  # seconds of a step
Entry = dict[str, int]


class Product(NamedTuple):
    """A product of a weight (N, K) with M rows (0: up to MAX_GEMV_ROWS, one after the other), as an op asks for it."""

    op: str
    n: int
    k: int
    dtype: torch.dtype
    m: int

    @property
    def key(self) -> str:
        return launch_config.key(self.op, self.n, self.k, str(self.dtype).removeprefix("torch."), self.m)

    @property
    def by_rule(self) -> Entry:
        """The configuration without a table."""
        config = launch_config.by_rule(self.op, self.n, self.k, self.dtype.itemsize, self.m)
        return {name: value for name, value in config.options.items() if name != "M"}


def products(seen: Sequence[Launch]) -> list[Product]:
    """The distinct products among launches, those with the most weights first."""
    found: dict[str, Product] = {}
    for launch in seen:
        op, _, way = launch.name.rpartition("_")
        tensors = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        weight = tensors.get("weight_ptr")
        if weight is None or launch.constants["KIND"] != "dense" or way not in ("rows", "row", "matmul"):
            continue
        m = int(launch.constants["M"]) if way == "matmul" else 0
        product = Product(op, weight.shape[0], weight.shape[1], weight.dtype, m)
        found[product.key] = product
    return sorted(found.values(), key=lambda product: -product.n * product.k)


def neighbours(product: Product, entry: Entry) -> Iterator[Entry]:
    """Entries one step away: half or twice the outputs a program, warps, or both.

    On tensor cores also half or twice the inputs a block, and two blocks in flight more or less.
    """
    limits = {"num_warps": (1, 16), "BLOCK_N": (8, 128) if product.m else (2, 64)}
    steps = [("num_warps",), ("BLOCK_N",), ("num_warps", "BLOCK_N")]
    if product.m:
        limits |= {"BLOCK_K": (32, 256), "num_stages": (3, 9)}
        steps += [("num_stages",), ("BLOCK_K",)]
    for names in steps:
        for factor in (0.5, 2):
            changed = {name: int(entry[name] * factor) for name in names}
            if names == ("num_stages",):
                changed = {"num_stages": entry["num_stages"] + (2 if factor > 1 else -2)}
            if all(limits[name][0] <= value <= limits[name][1] for name, value in changed.items()):
                yield {**entry, **changed}


def segments(config: CSMConfig, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Step]:
    """One pass of the depth decoder with its head, and one layer of the backbone, over buffers of their own."""
    small = replace(config, backbone=replace(config.backbone, num_layers=1), text_vocab_size=256)
    model = CSM.from_state_dict(small, random_weights(small, device, dtype), device)
    state = FrameState.allocate(small, batch, device, dtype)
    row = config.num_codebooks // 2
    depth_meta = model.depth_decoder.attention_metadata(state.depth_position_BK, config.num_codebooks).rows(
        row, row + 1
    )
    position_B1 = torch.full_like(state.position_B, POSITION).unsqueeze(1)
    backbone_meta = model.backbone.attention_metadata(position_B1, CONTEXT_BUCKET)
    depth_x_B1D = torch.randn(batch, 1, config.depth_decoder.dim, device=device).to(dtype)
    backbone_x_B1D = torch.randn(batch, 1, config.backbone.dim, device=device).to(dtype)

    def depth_pass() -> None:
        model.logits(row, model.depth_decoder(depth_x_B1D, state.depth_cache, depth_meta))

    def backbone_layer() -> None:
        model.backbone(backbone_x_B1D, state.backbone_cache, backbone_meta)

    return {"depth pass": depth_pass, "backbone layer": backbone_layer}


def products_by_rule(step: Step, device: torch.device) -> list[Product]:
    """The products of a step without its entries in the table: one that falls back to PyTorch launches nothing.

    A fallback is removed from the table, so that it has to win again.
    """
    table = launch_config.tuned_configs().setdefault(gpu_arch(device), {})
    kept = dict(table)
    table.clear()
    launch_config._launch_config.cache_clear()
    with launches() as seen:
        step()
    found = products(seen)
    table.update({key: entry for key, entry in kept.items() if entry != FALLBACK or key not in {p.key for p in found}})
    launch_config._launch_config.cache_clear()
    return found


class Tuning:
    """Coordinate descent over the entries of one segment's products. The table in memory always holds the best."""

    def __init__(self, step: Step, device: torch.device, seconds: Timer, deadline: float):
        self.step, self.device, self.seconds, self.deadline = step, device, seconds, deadline
        self.table = launch_config.tuned_configs().setdefault(gpu_arch(device), {})
        self.best = self.first = self.measure()

    def measure(self) -> float:
        """Seconds of the segment with the table as it is; infinite where a configuration does not fit the GPU."""
        launch_config._launch_config.cache_clear()
        try:
            return self.seconds(self.step, self.device)
        except DOES_NOT_FIT:
            return float("inf")

    def improve(self, product: Product) -> bool:
        """Try the neighbours of one product's entry, and keep the best. Whether it is better than before."""
        kept = self.table.get(product.key)
        entry = {**product.by_rule, **(kept or {})}
        if "fallback" in entry:
            return False
        improved = False
        for candidate in [*neighbours(product, entry), FALLBACK]:
            if time.perf_counter() > self.deadline:
                break
            self.table[product.key] = candidate
            took = self.measure()
            if took < self.best * (1 - LEAST_GAIN):
                self.best, kept, improved = took, candidate, True
        if kept is None:
            self.table.pop(product.key, None)
        else:
            self.table[product.key] = kept
        launch_config._launch_config.cache_clear()
        return improved

    def run(self, wanted: Sequence[Product], quiet: bool) -> None:
        """Rounds over all products until one round improves nothing, or the time is over."""
        improving = True
        while improving and time.perf_counter() < self.deadline:
            bar = tqdm(wanted, unit="product", disable=quiet, leave=False)
            improving = any([self.improve(product) for product in bar])


def tune(
    config: CSMConfig, batch: int, dtype: torch.dtype, device: torch.device, seconds: Timer, budget: float, quiet: bool
) -> list[dict[str, Any]]:
    """Tune every product of both segments in ``budget`` seconds, half for each. One row for each product."""
    rows = []
    with torch.inference_mode(), forced_ops("triton"):
        for name, step in segments(config, batch, device, dtype).items():
            wanted = products_by_rule(step, device)
            tuning = Tuning(step, device, seconds, time.perf_counter() + budget / 2)
            tuning.run(wanted, quiet)
            for product in wanted:
                entry = tuning.table.get(product.key)
                row = {"segment": name, "batch": batch, "product": product.key, "by_rule": str(product.by_rule)}
                times = {"us_before": 1e6 * tuning.first, "us_after": 1e6 * tuning.best}
                rows.append({**row, "tuned": str(entry) if entry else "as by rule", **times})
    return rows


def graph_seconds(step: Step, device: torch.device) -> float:
    """Seconds of a step: the median of several replays of a graph with SEGMENT_RUNS steps."""

    def steps() -> None:
        for _ in range(SEGMENT_RUNS):
            step()

    captured = Graph(steps, dict, device)
    times = []
    for _ in range(REPLAYS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        captured.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1000)
    return statistics.median(times) / SEGMENT_RUNS


def tune_report(
    config: CSMConfig, batches: Sequence[int], dtype: torch.dtype, budget: float, quiet: bool
) -> tuple[str, dict[str, Any]]:
    """Tune for this GPU and write the table that the kernels read, after every batch size."""
    device = torch.device("cuda")
    if not graphs_enabled(device) or not torch.cuda.is_available():
        raise CSMError("--tune measures on an NVIDIA GPU, and PyTorch finds none")
    rows: list[dict[str, Any]] = []
    for batch in sorted(batches):
        rows += tune(config, batch, dtype, device, graph_seconds, budget / len(batches), quiet)
        entries = json.dumps(launch_config.tuned_configs(), indent=1, sort_keys=True)
        launch_config.TABLE.write_text(entries + "\n", encoding="utf-8")
    return table(rows), {"tuned": rows}
