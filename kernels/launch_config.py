"""How a product is launched: from a table of what was measured on a GPU architecture, else by a rule.

``python bench.py --tune`` measures and writes the table, ``tuned.json``. Nothing is ever tuned while a model runs. An
entry gives num_warps and the tile's blocks, or ``{"fallback": 1}`` where what the op falls back on wins: PyTorch's own
product or, of an op that fuses several, these one by one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from csm.kernels.launch import gpu_arch, power_of_two

TABLE = Path(__file__).parent / "tuned.json"
MAX_GEMV_ROWS = 8  # up to here one row after the other; beyond, tensor cores
TILE_BYTES = 1 << 14  # of a weight, a program: what it has in flight while it waits
LEAST_PROGRAMS = 256  # about two for every multiprocessor of the largest GPUs
ALONE = ("attention_linear_add",)  # programs that fill a multiprocessor each: one for each will do
PARTS = {"norm_swiglu": 2}  # weights of the same shape that a program reads


class LaunchConfig(NamedTuple):
    """``constants`` are BLOCK_N, BLOCK_K and, where rows are multiplied by tensor cores, M: rows, filled up."""

    num_warps: int
    constants: dict[str, int]

    def blocks(self, n: int) -> int:
        """Programs for so many outputs."""
        return -(-n // self.constants["BLOCK_N"])

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, **self.constants}


def launch_config(op: str, weight: Tensor, num_rows: int) -> LaunchConfig | None:
    """For a product of so many rows with a weight (N, K): the table's, or by rule. None is the fallback."""
    assert weight.is_contiguous()
    n, k = weight.shape
    m = 0 if num_rows <= MAX_GEMV_ROWS else max(16, power_of_two(num_rows))
    return _launch_config(
        op, n, k, str(weight.dtype).removeprefix("torch."), weight.element_size(), m, gpu_arch(weight.device)
    )


@cache
def _launch_config(op: str, n: int, k: int, dtype: str, size: int, m: int, gpu: str) -> LaunchConfig | None:
    rule = by_rule(op, n, k, size, m)
    tuned = tuned_configs().get(gpu, {}).get(key(op, n, k, dtype, m), {})
    if "fallback" in tuned:
        return None
    constants = {name: tuned.get(name, value) for name, value in rule.constants.items()}
    return LaunchConfig(tuned.get("num_warps", rule.num_warps), constants)


@cache
def tuned_configs() -> dict[str, dict[str, dict[str, int]]]:
    """GPU architecture -> key -> num_warps and constants."""
    table: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def key(op: str, n: int, k: int, dtype: str, m: int) -> str:
    """A line of the table: ``norm_swiglu 16384x1024 bfloat16 rows``."""
    return f"{op} {n}x{k} {dtype} {f'matmul {m}' if m else 'rows'}"


def by_rule(op: str, n: int, k: int, size: int, m: int) -> LaunchConfig:
    """Where nothing was measured. ``size`` is bytes of an element, ``m`` rows of a tensor core's tile or 0."""
    parts, block_k = PARTS.get(op, 1), power_of_two(k)
    if m:
        block_n = 32 if n // parts >= 32 * LEAST_PROGRAMS // 2 else 16
        return LaunchConfig(4, {"M": m, "BLOCK_N": block_n, "BLOCK_K": 32 if size == 4 else 128 if m < 64 else 64})
    block_n = power_of_two(max(1, TILE_BYTES // (parts * block_k * size)))
    while block_n > 2 and n // parts < block_n * (LEAST_PROGRAMS // 2 if op in ALONE else LEAST_PROGRAMS):
        block_n //= 2
    block_n = max(2, block_n)  # the rotary embedding turns neighbours
    elements = parts * block_n * block_k
    num_warps = 16 if op in ALONE or elements >= 1 << 14 else 8 if elements > 1 << 13 or (size == 4 and k > 1024) else 4
    return LaunchConfig(num_warps, {"BLOCK_N": block_n, "BLOCK_K": block_k})
