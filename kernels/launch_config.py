"""Launch configurations of the matrix products: measured for a GPU architecture, else computed by a rule.

``python bench.py --tune`` measures configurations and writes them to ``tuned.json``. Nothing is tuned while a model
runs. An entry holds num_warps and block sizes, or ``{"fallback": 1}`` if the alternative was faster: PyTorch's own
product or, for an op that fuses several, the separate ops.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from csm.kernels.launch import DEFAULT_STAGES, gpu_arch, power_of_two
from csm.kernels.quantized import QuantizedWeight, Weight
from csm.kernels.quantized_rows import BLOCK, KINDS, PAIR, QuantizedRows

TABLE = Path(__file__).parent / "tuned.json"
MAX_GEMV_ROWS = 8  # up to here a program multiplies its weight tile by one row after another; above, tensor cores
# Weights that a program loads before it waits. Several programs share a multiprocessor, and 100 to 160 KB in flight
# keep its share of the memory bandwidth busy.
PROGRAM_WEIGHT_BYTES = 1 << 15
MIN_PROGRAM_WEIGHT_BYTES = 1 << 14  # not less, if there would otherwise be fewer than MIN_PROGRAMS
MIN_PROGRAMS = 264  # two per multiprocessor of an H100
MIN_MATMUL_PROGRAMS = 128  # of the tensor-core kernels, which have more work per program
INT8_OUTPUTS = 8  # of a tensor core's fragment, the least for which a program has int8 weights
# A program computes with as many quantised weights as with weights of this many bytes: registers hold them unpacked.
QUANTIZED_SIZE = 2
NUM_WEIGHT_TILES = {"norm_swiglu": 2}  # ops whose program reads several rows per output (gate and up)


class LaunchConfig(NamedTuple):
    """``constants`` holds BLOCK_N, BLOCK_K and, for tensor cores, M: the number of rows rounded up.

    ``num_stages``: how many blocks of K the loop of a tensor-core kernel has in flight; the others have no such loop.
    """

    num_warps: int
    constants: dict[str, int]
    num_stages: int = DEFAULT_STAGES

    def num_programs(self, n: int) -> int:
        """Programs for ``n`` outputs."""
        return -(-n // self.constants["BLOCK_N"])

    @property
    def options(self) -> dict[str, Any]:
        pipeline = {"num_stages": self.num_stages} if "M" in self.constants else {}
        return {"num_warps": self.num_warps, **pipeline, **self.constants}


def launch_config(op: str, weight: Weight, num_rows: int) -> LaunchConfig | None:
    """For the product of ``num_rows`` rows and a weight (N, K): from the table, else by rule. None: fall back."""
    if isinstance(weight, QuantizedWeight):  # packed for a CPU
        return None
    n, k = weight.shape
    m = 0 if num_rows <= MAX_GEMV_ROWS else max(16, power_of_two(num_rows))
    if isinstance(weight, QuantizedRows):
        assert weight.values.is_contiguous() and weight.scales.is_contiguous()
        size = weight.dtype.itemsize if m else QUANTIZED_SIZE
        return _launch_config(op, n, k, weight.kind, size, m, gpu_arch(weight.device))
    assert weight.is_contiguous()
    dtype = str(weight.dtype).removeprefix("torch.")
    return _launch_config(op, n, k, dtype, weight.element_size(), m, gpu_arch(weight.device))


def weight_arguments(weight: Weight) -> dict[str, Any]:
    """What a kernel gets of a weight: its values and scales, and how they are stored and cached."""
    if isinstance(weight, QuantizedRows):
        eviction = "evict_last" if weight.keep else "evict_first"
        return dict(weight_ptr=weight.values, scale_ptr=weight.scales, KIND=weight.kind, EVICT=eviction)
    return dict(weight_ptr=weight, scale_ptr=weight, KIND="dense", EVICT="evict_first")


@cache
def _launch_config(op: str, n: int, k: int, dtype: str, size: int, m: int, gpu: str) -> LaunchConfig | None:
    rule = by_rule(op, n, k, size, m, kind=dtype if dtype in KINDS else "dense")
    tuned = tuned_configs().get(gpu, {}).get(key(op, n, k, dtype, m), {})
    if "fallback" in tuned:
        return None
    constants = {name: tuned.get(name, value) for name, value in rule.constants.items()}
    return LaunchConfig(tuned.get("num_warps", rule.num_warps), constants, tuned.get("num_stages", rule.num_stages))


@cache
def tuned_configs() -> dict[str, dict[str, dict[str, int]]]:
    """The table: GPU architecture -> key -> num_warps and block sizes."""
    table: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def key(op: str, n: int, k: int, dtype: str, m: int) -> str:
    """The table's key of a product, such as ``norm_swiglu 16384x1024 bfloat16 rows``."""
    return f"{op} {n}x{k} {dtype} {f'matmul {m}' if m else 'rows'}"


def by_rule(op: str, n: int, k: int, size: int, m: int, kind: str = "dense") -> LaunchConfig:
    """Configuration of a product that is not in the table. ``size`` is bytes per element; ``m`` is M or 0.

    Weights in int4 and fp8 take three instructions each to unpack and multiply. Where few programs share a
    multiprocessor, these instructions are what a frame waits for, so more warps share them.
    """
    tiles, block_k, quantized = NUM_WEIGHT_TILES.get(op, 1), max(BLOCK, power_of_two(k)), kind in KINDS
    if m:
        block_n = 32 if n // tiles >= 32 * MIN_MATMUL_PROGRAMS else 16
        block_k = 32 if size == 4 else 128 if m < 64 and not quantized else 64  # unpacked tiles spill at 128 on sm_80
        block_k = max(PAIR, block_k) if kind == "int8" else block_k
        return LaunchConfig(4, {"M": m, "BLOCK_N": block_n, "BLOCK_K": block_k})
    if kind == "int8":
        return int8_by_rule(op, n, k)
    row_bytes = tiles * block_k * size
    block_n = max(1, PROGRAM_WEIGHT_BYTES // row_bytes)
    while n // tiles < block_n * MIN_PROGRAMS and block_n * row_bytes > MIN_PROGRAM_WEIGHT_BYTES:
        block_n //= 2
    few_programs = n // tiles < block_n * MIN_PROGRAMS
    num_warps = 8 if op == "attention_linear_add" or block_k >= 8192 or (quantized and few_programs) else 4
    return LaunchConfig(num_warps, {"BLOCK_N": max(2, block_n), "BLOCK_K": block_k})  # RoPE rotates pairs of outputs


def int8_by_rule(op: str, n: int, k: int) -> LaunchConfig:
    """Of an int8 weight and few rows: programs of as few outputs as there can be, 8 warps each.

    Fewer warps, which repeat fewer instructions, where many programs share a multiprocessor; more, which leave fewer
    inputs to each, where one has it for itself and its rows are long.
    """
    tiles, block_k = NUM_WEIGHT_TILES.get(op, 1), max(PAIR, power_of_two(k))
    programs, program_bytes = n // (tiles * INT8_OUTPUTS), tiles * INT8_OUTPUTS * block_k
    num_warps = 8
    if program_bytes <= MIN_PROGRAM_WEIGHT_BYTES and programs >= 2 * MIN_PROGRAMS:
        num_warps = 4
    if program_bytes > PROGRAM_WEIGHT_BYTES and programs <= MIN_PROGRAMS // 2:
        num_warps = 16
    return LaunchConfig(num_warps, {"BLOCK_N": INT8_OUTPUTS, "BLOCK_K": block_k})
