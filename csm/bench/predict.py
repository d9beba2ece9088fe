"""A prediction of a frame's time on a GPU that need not be here: ``python bench.py --predict h200``.

It is a prediction, not a measurement. Kernels are compiled and their machine code is read (``machine_code``); a small
model then steps through the launches of one frame on one multiprocessor, the busiest, which runs ceil(programs /
multiprocessors) programs of each kernel:

- A program starts when registers, threads and shared memory are free beside the programs that are resident, and, with
  dependent launch, when every program of the previous kernel has triggered. Without it, when the previous kernel has
  ended, GRAPH_GAP_US later.
- Weights share the memory's bandwidth in the order of their requests. Those that a program loads before its wait are
  requested when it starts; all others when its wait is over.
- The wait is over RELEASE_US after the last program of the previous kernel has ended. Then inputs come from L2, and a
  program's instructions take issue slots, of which a multiprocessor has four a cycle. A product on tensor cores counts
  as many as the cycles for which it occupies them (``machine_code.MMA_PER_CYCLE``).
- Weights come from L2 if everything that was read since their last use fits it. The depth decoder's layers do not:
  222 MB in bfloat16, read 31 times a frame, against 50 MB (H100, H200), 72 MB (4090) and 96 MB (5090). Quantised
  weights that are kept there (``csm.quantize.keep_in_cache``) come from it from their second use on.

Left out: Hopper's wgmma, which Triton uses from 64 rows on and which counts as one issue slot; clock changes, DRAM
refresh and page conflicts, uneven placement of programs, instruction cache misses, and how often the loop of the
sampling kernel runs (once).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from csm.bench.launches import frame_sequence
from csm.bench.machine_code import REGISTER_FILE, WARP, Compiled, allocated_registers, distinct, examine_all, kind
from csm.bench.report import table
from csm.config import LLAMA_1B, CSMConfig
from csm.kernels.launch import Launch
from csm.quantize import KEEPING_CAPABILITIES, L2_SHARE

RELEASE_US = 1.17  # calibrated, see ``calibration``: from a kernel's end until the next one's wait returns
COPY_FRACTION = 0.9  # of the nominal bandwidth: an H200 copies at 4.3 of 4.8 TB/s
MEMORY_LATENCY_US = 0.7  # of a load from DRAM
L2_LATENCY_US = 0.25  # of a load from L2
L2_BYTES_PER_CYCLE = 32  # that a multiprocessor reads from L2
ISSUE_PER_CYCLE = 4  # warp instructions of a multiprocessor
CYCLES_PER_INSTRUCTION = 4  # of one warp alone: it waits for its own results, 4 cycles in arithmetic
GRAPH_GAP_US = 1.3  # between two kernels of a graph without dependent launch
PLAIN_OP_US = 0.7  # of a PyTorch op over a few elements
RESERVED_SHARED = 1024  # bytes that CUDA takes of a program's shared memory

WEIGHTS = ("weight_ptr", "scale_ptr")  # one tensor if the weight is not quantised
PUBLISHED_MS = 0.795  # Llama-3.2-1B, one token, batch 1, bfloat16, CUDA graph with dependent launch, H200


class GPU(NamedTuple):
    """Nominal figures of a GPU (NVIDIA's data sheets and the CUDA programming guide's table of capabilities)."""

    name: str
    gpu_arch: int
    multiprocessors: int
    tb_per_s: float
    ghz: float
    l2_mb: float
    max_threads: int
    shared_kb: int
    max_programs: int

    @property
    def bytes_per_us(self) -> float:
        """What a copy reaches."""
        return self.tb_per_s * 1e6 * COPY_FRACTION

    @property
    def dependent_launch(self) -> bool:
        return self.gpu_arch >= 90


GPUS = {
    "h100": GPU("H100 SXM", 90, 132, 3.35, 1.755, 50, 2048, 228, 32),
    "h200": GPU("H200 SXM", 90, 132, 4.8, 1.755, 50, 2048, 228, 32),
    "4090": GPU("RTX 4090", 89, 128, 1.008, 2.52, 72, 1536, 100, 24),
    "5090": GPU("RTX 5090", 120, 170, 1.792, 2.41, 96, 1536, 100, 24),
}


class Work(NamedTuple):
    """One launch as the model sees it. Bytes and instructions are of one program, ``weight_bytes`` of the launch."""

    name: str
    constants: str
    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    weight_bytes: int
    early_bytes: int
    late_bytes: int
    after_wait: int
    triggers_late: bool = False  # only when loads have arrived
    round_trips: int = 1  # one after the other, of loads after the wait
    in_l2: bool = False
    plain: bool = False  # one of PyTorch's ops, which knows nothing of dependent launch


@dataclass
class Total:
    """All launches of a kernel with the same constants."""

    work: Work
    launches: int = 0
    microseconds: float = 0.0


def programs_per_multiprocessor(work: Work, gpu: GPU) -> int:
    """How many programs of a kernel are resident together, alone on a multiprocessor."""
    registers = REGISTER_FILE // allocated_registers(work.registers, work.num_warps)
    threads = gpu.max_threads // (WARP * work.num_warps)
    shared = gpu.shared_kb * 1024 // (work.shared_bytes + RESERVED_SHARED)
    return min(registers, threads, shared, gpu.max_programs)


class Multiprocessor:
    """The busiest multiprocessor of a GPU, and its share of memory bandwidth and issue slots. Times in microseconds."""

    def __init__(self, gpu: GPU):
        self.gpu = gpu
        self.resident: list[tuple[float, int, int, int]] = []  # end, registers, threads, shared bytes
        self.memory_free = self.issue_free = self.l2_free = 0.0
        self.ended = self.triggered = 0.0  # of the previous kernel, all programs

    def run(self, work: Work) -> float:
        """Run a kernel after those before it; the time that the frame gets longer."""
        before, gpu = self.ended, self.gpu
        if work.plain:
            self.ended += GRAPH_GAP_US + PLAIN_OP_US
            self.triggered = self.ended
            return self.ended - before
        on_it = -(-work.programs // gpu.multiprocessors)
        earliest = self.triggered if gpu.dependent_launch else self.ended + GRAPH_GAP_US
        released = self.ended + RELEASE_US if gpu.dependent_launch else earliest
        ends, triggers = [], []
        for _ in range(on_it):
            earliest = self.place(work, earliest)
            end, trigger = self.program(work, on_it, earliest, max(released, earliest))
            heapq.heappush(self.resident, (end, *self.needs(work)))
            ends.append(end)
            triggers.append(trigger)
        self.ended, self.triggered = max(before, *ends), max(triggers)
        return self.ended - before

    def needs(self, work: Work) -> tuple[int, int, int]:
        """Registers, threads and shared bytes of one program."""
        registers = allocated_registers(work.registers, work.num_warps)
        return registers, WARP * work.num_warps, work.shared_bytes + RESERVED_SHARED

    def place(self, work: Work, earliest: float) -> float:
        """When a program finds room, from ``earliest`` on."""
        limits = (REGISTER_FILE, self.gpu.max_threads, self.gpu.shared_kb * 1024)
        while self.resident:
            used = [sum(one[i] for one in self.resident) for i in (1, 2, 3)]
            fits = all(u + n <= limit for u, n, limit in zip(used, self.needs(work), limits, strict=True))
            if self.resident[0][0] > earliest and fits and len(self.resident) < self.gpu.max_programs:
                break
            earliest = max(earliest, heapq.heappop(self.resident)[0])
        return earliest

    def program(self, work: Work, on_it: int, start: float, released: float) -> tuple[float, float]:
        """When one program that starts at ``start`` ends, and when it triggers the next kernel."""
        gpu = self.gpu
        weight = work.weight_bytes / work.programs if work.programs else 0.0
        early = min(weight, work.early_bytes) if gpu.dependent_launch else 0.0
        scale = work.weight_bytes / weight / on_it if weight else 0.0  # multiprocessors' worth of one program's bytes
        arrived = self.load(early * scale, start, work.in_l2)
        trigger = arrived if work.triggers_late else start
        arrived = max(arrived, self.load((weight - early) * scale, released, work.in_l2))
        inputs = max(0.0, work.late_bytes - (weight - early))
        self.l2_free = max(self.l2_free, released) + inputs / (L2_BYTES_PER_CYCLE * gpu.ghz * 1e3)
        ready = max(arrived, self.l2_free + L2_LATENCY_US + (work.round_trips - 1) * MEMORY_LATENCY_US)
        issue = work.after_wait * work.num_warps / (ISSUE_PER_CYCLE * gpu.ghz * 1e3)
        self.issue_free = max(self.issue_free, ready) + issue
        alone = work.after_wait * CYCLES_PER_INSTRUCTION / (gpu.ghz * 1e3)
        return max(self.issue_free, ready + alone), trigger

    def load(self, size: float, requested: float, in_l2: bool) -> float:
        """When ``size`` bytes, of all multiprocessors together, have arrived."""
        if not size:
            return requested
        if in_l2:
            rate = L2_BYTES_PER_CYCLE * self.gpu.ghz * 1e3 * self.gpu.multiprocessors
            return requested + L2_LATENCY_US + size / rate
        self.memory_free = max(self.memory_free, requested) + size / self.gpu.bytes_per_us
        return self.memory_free + MEMORY_LATENCY_US


def simulate(frame: Iterable[Work], gpu: GPU) -> tuple[float, list[Total]]:
    """Microseconds of a frame, and those of each kernel in the order of their first launch."""
    multiprocessor = Multiprocessor(gpu)
    totals: dict[tuple[str, str], Total] = {}
    for work in frame:
        total = totals.setdefault((work.name, work.constants), Total(work))
        total.launches += 1
        total.microseconds += multiprocessor.run(work)
    return multiprocessor.ended, list(totals.values())


# --- from launches to work --------------------------------------------------------------------------------------------


def frame_work(
    config: CSMConfig, batch: int, dtype: torch.dtype, gpu: GPU, quiet: bool, scheme: str | None = None
) -> list[Work]:
    """Everything that one frame launches, compiled for a GPU."""
    keeps = divmod(gpu.gpu_arch, 10) in KEEPING_CAPABILITIES
    l2_bytes = int(gpu.l2_mb * 1e6 * L2_SHARE) if keeps else 0
    sequence = frame_sequence(config, batch, dtype, scheme, l2_bytes)
    kernels = list(distinct([one for one in sequence if isinstance(one, Launch)]))
    compiled = dict(
        zip(
            [kind(launch) for launch in kernels],
            examine_all([(launch, gpu.gpu_arch) for launch in kernels], quiet),
            strict=True,
        )
    )
    cache = L2(gpu.l2_mb * 1e6 * L2_SHARE)
    return [
        plain_work(one) if isinstance(one, str) else launch_work(one, compiled[kind(one)], cache) for one in sequence
    ]


def plain_work(name: str) -> Work:
    """One of PyTorch's ops."""
    return Work(f"{name} (PyTorch)", "", 1, 4, 32, 0, 0, 0, 0, 0, plain=True)


class L2:
    """Which weights are still in L2: those since whose last use no more bytes were read than fit, and those kept."""

    def __init__(self, size: float):
        self.size = size
        self._sizes: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._kept: dict[tuple[int, int], int] = {}

    def read(self, key: tuple[int, int], size: int, keep: bool = False) -> bool:
        """Whether a weight is there; afterwards it is the one read last, and stays if it is to be kept."""
        if keep:
            hit = key in self._kept
            self._kept[key] = size
            return hit
        names, free = list(self._sizes), self.size - sum(self._kept.values())
        hit = key in self._sizes and sum(self._sizes[n] for n in names[names.index(key) :]) <= free
        self._sizes.pop(key, None)
        self._sizes[key] = size
        return hit


def launch_work(launch: Launch, compiled: Compiled, cache: L2) -> Work:
    """A launch with what was read in its machine code."""
    size, turns, weight = weight_bytes(launch), repeats(launch), launch.arguments.get("weight_ptr")
    hit = weight is not None and cache.read(
        (weight.untyped_storage()._cdata, weight.storage_offset()), size, launch.constants["EVICT"] == "evict_last"
    )
    return Work(
        name=launch.name,
        constants=compiled.constants,
        programs=math.prod(launch.grid),
        num_warps=launch.num_warps,
        registers=compiled.registers,
        shared_bytes=compiled.shared_bytes,
        weight_bytes=size,
        early_bytes=compiled.early_bytes,
        late_bytes=compiled.late_bytes * turns,
        after_wait=compiled.issue_slots * turns,
        triggers_late=compiled.used_before_trigger > 0,
        round_trips=-(-turns // launch.num_stages) if launch.name.endswith("_matmul") else 1,
        in_l2=hit,
    )


def weight_bytes(launch: Launch) -> int:
    """Of the weight that a launch multiplies with, and of its scales if it is quantised; 0 if there is none."""
    tensors = {id(launch.arguments[name]): launch.arguments[name] for name in WEIGHTS if name in launch.arguments}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def repeats(launch: Launch) -> int:
    """How often the body of a kernel's loop runs: over blocks of K, or over pairs of rows."""
    constants = launch.constants
    if launch.name.endswith("_matmul"):
        return -(-int(constants["K"]) // int(constants["BLOCK_K"]))
    return -(-int(constants.get("ROWS", 1)) // 2)


# --- calibration and report -------------------------------------------------------------------------------------------


def calibration() -> float:
    """Milliseconds that the model predicts for the published step: Llama-3.2-1B on an H200, one token.

    How the published kernels are written is not known. Assumed: five a layer and the head, with 32 KB of weights a
    program, 4 warps, 96 registers, and 400 instructions after the wait, as in this package's products. Nothing is
    loaded before the wait, as is usual: dependent launch then hides the launch alone. RELEASE_US is chosen so that the
    prediction is the published figure; it absorbs whatever the model leaves out.
    """
    layer = LLAMA_1B
    shapes = [
        (layer.qkv_dim, layer.dim),
        (0, 0),
        (layer.dim, layer.num_heads * layer.head_dim),
        (2 * layer.hidden_dim, layer.dim),
        (layer.dim, layer.hidden_dim),
    ]
    head = [(128_256, layer.dim)]
    return simulate([assumed(n, k) for n, k in shapes * layer.num_layers + head], GPUS["h200"])[0] / 1e3


def assumed(n: int, k: int) -> Work:
    """A kernel of the published step: a product with a bfloat16 weight (N, K), or attention where N is 0."""
    size, tile = 2 * n * k, 1 << 15
    if not n:
        return Work("attention", "", 32, 4, 96, 0, 0, 0, 1 << 14, 400)
    return Work("product", f"{n}x{k}", -(-size // tile), 4, 96, 0, size, 0, tile + 2 * k, 400)


def predict_report(
    config: CSMConfig, batch: int, dtype: torch.dtype, name: str, quiet: bool, scheme: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The table of a frame's kernels with their predicted times: Markdown, and the same for JSON."""
    gpu = GPUS[name]
    frame = frame_work(config, batch, dtype, gpu, quiet, scheme)
    microseconds, totals = simulate(frame, gpu)
    size = sum(work.weight_bytes for work in frame)
    floor_ms = size / gpu.bytes_per_us / 1e3
    summary = {
        "gpu": gpu.name,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": scheme or "as dtype",
        "predicted_ms": microseconds / 1e3,
        "weights_at_copy_bandwidth_ms": floor_ms,
        "weight_gb": size / 1e9,
        "launches": len(frame),
        "calibration_ms": calibration(),
        "published_ms": PUBLISHED_MS,
    }
    rows = kernel_rows(totals, gpu)
    title = (
        f"PREDICTION, not a measurement: one frame on {gpu.name} at batch {batch}, from compiled kernels and a model."
    )
    note = "calibration: the model's time for Llama-3.2-1B, one token, batch 1, H200, beside the published one."
    return "\n".join([title, "", table([summary]), "", note, "", table(rows)]), {"prediction": summary, "kernels": rows}


def kernel_rows(totals: Sequence[Total], gpu: GPU) -> list[dict[str, Any]]:
    """One row a kernel."""
    return [
        {
            "kernel": total.work.name,
            "constants": total.work.constants,
            "launches": total.launches,
            "programs": total.work.programs,
            "registers": total.work.registers,
            "warps": total.work.num_warps,
            "programs_per_SM": programs_per_multiprocessor(total.work, gpu),
            "weights_MB": total.work.weight_bytes / 1e6,
            "after_wait": total.work.after_wait,
            "predicted_us": total.microseconds / total.launches,
            "predicted_frame_us": total.microseconds,
        }
        for total in totals
    ]
