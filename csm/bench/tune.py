"""Measure launch configurations on the GPU that is here, for ``tuned.json``: ``python bench.py --tune``."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from csm.bench.launches import frame_launches
from csm.bench.model_setup import forced_ops, milliseconds
from csm.bench.report import table
from csm.config import CSMConfig
from csm.errors import CSMError
from csm.graph import Graph, graphs_enabled
from csm.kernels import launch_config
from csm.kernels.attention_linear_add import attention_linear_add
from csm.kernels.launch import COMPILE_ERRORS, Launch, gpu_arch
from csm.kernels.linear_add import linear_add
from csm.kernels.norm_linear import norm_linear
from csm.kernels.norm_swiglu import norm_swiglu
from csm.kernels.rope_cache import norm_rope_cache

POOL_BYTES = 1 << 28  # weights that are read in turns, so that no cache holds the next one
POSITIONS = 32  # of a cache: the depth decoder's
TOO_MUCH: tuple[type[Exception], ...] = (
    RuntimeError,
    *COMPILE_ERRORS,
)  # registers or shared memory, of some candidates
Timer = Callable[[Callable[[], None], torch.device], float]  # seconds of a step


class Product(NamedTuple):
    """An op's product as a model asks for it: rows (slots, rows of each) times a weight (N, K)."""

    op: str
    n: int
    k: int
    dtype: torch.dtype
    rows: tuple[int, int]
    heads: tuple[int, int, int] = (1, 1, 2)  # query heads, key heads, head dim: of the ops that have any

    @property
    def m(self) -> int:
        """Rows of a tensor core's tile, 0 where rows are looped over."""
        count = self.rows[0] * self.rows[1]
        return 0 if count <= launch_config.MAX_GEMV_ROWS else max(16, launch_config.power_of_two(count))

    @property
    def key(self) -> str:
        return launch_config.key(self.op, self.n, self.k, str(self.dtype).removeprefix("torch."), self.m)


def products(launches: list[Launch]) -> list[Product]:
    """The distinct products among the launches of frames, those of the smallest batch first."""
    found: dict[str, Product] = {}
    for launch in launches:
        op, _, way = launch.name.rpartition("_")
        if way not in ("rows", "row", "matmul") or op not in CALLS:
            continue
        tensors = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        weight = tensors["gate_up_ptr"] if op == "norm_swiglu" else tensors["weight_ptr"]
        c = launch.constants
        heads = (c["H"], c["G"], c["d"]) if "H" in c else (1, 1, 2)
        rows = tensors["residual_ptr" if "residual_ptr" in tensors else "x_ptr"].shape[:2]
        product = Product(op, weight.shape[0], weight.shape[1], weight.dtype, (rows[0], rows[1]), heads)
        found.setdefault(product.key, product)  # the fewest rows of those that share a shape
    return list(found.values())


def candidates(product: Product) -> Iterator[dict[str, int]]:
    """Entries of the table to try, the fallback first."""
    yield {"fallback": 1}
    warps = (4, 8) if product.m else (4, 8, 16)
    blocks_n = (16, 32, 64) if product.m else (2, 4, 8, 16)
    blocks_k = (64, 128, 256) if product.m else (launch_config.power_of_two(product.k),)
    for num_warps, block_n, block_k in itertools.product(warps, blocks_n, blocks_k):
        if product.m or block_n * block_k <= 1 << 16:
            yield {"num_warps": num_warps, "BLOCK_N": block_n, "BLOCK_K": block_k}


def tune(
    wanted: list[Product], device: torch.device, seconds: Timer, quiet: bool = False
) -> dict[str, tuple[dict[str, int], float, float]]:
    """Of each product: the best entry, its seconds, and the rule's. The table in memory ends up with the best.

    Seconds are of one product, its launch included.
    """
    table = launch_config.tuned_configs().setdefault(gpu_arch(device), {})
    best: dict[str, tuple[dict[str, int], float, float]] = {}
    for product in tqdm(wanted, unit="product", disable=quiet, leave=False):
        step, count = calls(product, device)
        table.pop(product.key, None)
        times: list[tuple[dict[str, int], float]] = [({}, _time(step, device, seconds) / count)]
        for entry in candidates(product):
            table[product.key] = entry
            times.append((entry, _time(step, device, seconds) / count))
        entry, least = min(times, key=lambda pair: pair[1])
        best[product.key] = (entry, least, times[0][1])
        table[product.key] = entry
    launch_config._launch_config.cache_clear()
    return best


def _time(step: Callable[[], None], device: torch.device, seconds: Timer) -> float:
    launch_config._launch_config.cache_clear()
    try:
        return seconds(step, device)
    except TOO_MUCH:
        return float("inf")


def calls(product: Product, device: torch.device) -> tuple[Callable[[], None], int]:
    """One call of the op on every weight of a pool, and how many these are."""
    size = product.n * product.k * torch.empty((), dtype=product.dtype).element_size()
    weights = [
        torch.randn(product.n, product.k, device=device).to(product.dtype) for _ in range(max(2, POOL_BYTES // size))
    ]
    call = CALLS[product.op](product, device)

    def step() -> None:
        for weight in weights:
            call(weight)

    return step, len(weights)


def _normal(product: Product, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(product.dtype)


def _normed(op: Callable[..., Tensor]) -> Callable[[Product, torch.device], Callable[[Tensor], Tensor]]:
    def make(product: Product, device: torch.device) -> Callable[[Tensor], Tensor]:
        x, norm = _normal(product, device, *product.rows, product.k), _normal(product, device, product.k)
        return lambda weight: op(x, norm, weight, 1e-5)

    return make


def _added(product: Product, device: torch.device) -> Callable[[Tensor], Tensor]:
    x, residual = (_normal(product, device, *product.rows, dim) for dim in (product.k, product.n))
    return lambda weight: linear_add(x, weight, residual)


def _caches(product: Product, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of POSITIONS, and the last of these positions."""
    (batch, rows), (_, groups, d) = product.rows, product.heads
    position = torch.arange(POSITIONS - rows, POSITIONS, device=device).repeat(batch, 1)
    caches = _normal(product, device, 2, batch, groups, POSITIONS, d)
    return caches[0], caches[1], position


def _cached(product: Product, device: torch.device) -> Callable[[Tensor], Tensor]:
    x, norm = _normal(product, device, *product.rows, product.k), _normal(product, device, product.k)
    k_cache, v_cache, position = _caches(product, device)
    turn = torch.zeros(*product.rows, product.heads[2] // 2, 2, device=device)
    slot = torch.arange(product.rows[0], device=device).unsqueeze(1)
    return lambda weight: norm_rope_cache(x, norm, weight, 1e-5, turn, k_cache, v_cache, slot, position)


def _attended(product: Product, device: torch.device) -> Callable[[Tensor], Tensor]:
    heads, _, d = product.heads
    q, residual = _normal(product, device, 1, 1, heads, d), _normal(product, device, 1, 1, product.n)
    k_cache, v_cache, position = _caches(product, device)
    bias = torch.zeros(1, 1, POSITIONS, device=device, dtype=product.dtype)
    return lambda weight: attention_linear_add(q, k_cache, v_cache, bias, position, weight, residual)


CALLS = {
    "norm_linear": _normed(norm_linear),
    "norm_swiglu": _normed(norm_swiglu),
    "linear_add": _added,
    "norm_rope_cache": _cached,
    "attention_linear_add": _attended,
}


def graph_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step, captured: the median of several replays."""
    captured = Graph(step, dict, device)
    times = [milliseconds(captured.replay, device) for _ in range(12)]
    return statistics.median(times[2:]) / 1000


def tune_report(
    config: CSMConfig, batches: Sequence[int], dtype: torch.dtype, quiet: bool
) -> tuple[str, dict[str, Any]]:
    """Measure launch configurations for this GPU and write them into the table that the kernels read."""
    device = torch.device("cuda")
    if not graphs_enabled(device) or not torch.cuda.is_available():
        raise CSMError("--tune measures on an NVIDIA GPU, and PyTorch finds none")
    seen = [launch for batch in sorted(batches) for launch in frame_launches(config, batch, dtype)]
    with torch.inference_mode(), forced_ops("triton"):
        best = tune(products(seen), device, graph_seconds, quiet)
    entries = launch_config.tuned_configs()
    launch_config.TABLE.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    rows = [
        {"product": key, "shape": str(entry), "microseconds": 1e6 * least, "by_rule": 1e6 * rule}
        for key, (entry, least, rule) in best.items()
    ]
    return table(rows), {"tuned": rows}
