"""How many streams a GPU takes, how long requests wait, how much memory they need: ``python -m csm.bench.scale``.

Prints the tables of docs/scale.md. Step times are those that ``bench.py --predict`` gave (``PREDICTED``), or measured
ones: ``--times results/bench.json``, which ``bench.py --out results`` writes. The simulation is in
``csm.bench.queueing``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from csm.bench.predict import GPUS
from csm.bench.queueing import FRAME_SECONDS, Server, erlang_c, highest_load, highest_rate, mean_wait, simulate
from csm.bench.report import table
from csm.cache import kv_bytes_per_position
from csm.config import CSM_1B, TransformerConfig
from csm.errors import CSMError
from csm.frame import FrameState
from csm.generator import PREFIX_POSITIONS
from csm.weights.layouts import sesame_table, target_shapes

# Milliseconds of a frame by batch size, without reading the KV cache beyond 256 positions: a prediction, not a
# measurement. CSM-1B in bfloat16, `python bench.py --predict GPU --batch N` at commit d40ca15.
PREDICTED: dict[str, dict[int, float]] = {
    "h100": {1: 3.49, 2: 5.27, 4: 9.03, 8: 15.20, 16: 27.42, 32: 30.35, 64: 59.39},
    "h200": {1: 3.04, 2: 4.94, 4: 8.67, 8: 14.93, 16: 27.42, 32: 30.35, 64: 59.39},
    "4090": {1: 11.85, 2: 12.42, 4: 13.67, 8: 17.72, 16: 24.32, 32: 27.76, 64: 45.50},
    "5090": {1: 5.59, 2: 5.97, 4: 8.28, 8: 12.47, 16: 21.46, 32: 25.52, 64: 44.32},
}
PEAK_TFLOPS = {"h100": 989.0, "h200": 989.0, "4090": 165.2, "5090": 209.5}  # bfloat16, dense; NVIDIA's data sheets
MEMORY_GB = {"h100": 80, "h200": 141, "4090": 24, "5090": 32}
PREFILL_EFFICIENCY = 0.5  # assumed: share of the peak that a prefill chunk reaches
PREFILL_ROWS = 64  # of a request whose voice is in the prefix cache: its text, padded to a chunk size
MEAN_FRAMES = 75  # 6 s of audio
MEAN_POSITIONS = 256  # of a running request: voice of 10 s, text, half of the audio
VOICE_POSITIONS = 165  # 10 s of audio and its transcript
REQUESTS = 3000  # of one simulation
CODEC_WEIGHT_BYTES = 384_605_572  # Mimi in float32
CODEC_STATE_BYTES = 8_275_592  # of a slot's streaming state
CUDA_BYTES = 1_500_000_000  # assumed: CUDA context, captured graphs, activations
BITS = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}  # int8 and int4 with a float16 scale for each 32 weights
SCHEMES = {  # type of backbone, depth decoder, heads
    "bfloat16": ("bf16", "bf16", "bf16"),
    "int8": ("int8", "int8", "int8"),
    "int4": ("int4", "int4", "int8"),
}


@dataclass(frozen=True)
class StepTimes:
    """The time of a frame by batch size, and what else a round costs. ``source`` is "predicted" or "measured"."""

    name: str
    source: str
    milliseconds: dict[int, float]
    bytes_per_second: float
    flops: float

    def step_seconds(self, running: int, positions: int = MEAN_POSITIONS) -> float:
        """One frame of so many requests: that of the next captured batch size, and the bytes of the KV cache."""
        batch = next((size for size in sorted(self.milliseconds) if size >= running), None)
        if batch is None:
            raise CSMError(f"{self.name}: no step time for batch {running}, only up to {max(self.milliseconds)}")
        kv_bytes = running * positions * kv_bytes_per_position(CSM_1B.backbone, torch.bfloat16)
        return self.milliseconds[batch] / 1e3 + kv_bytes / self.bytes_per_second

    def chunk_seconds(self, rows: int = PREFILL_ROWS) -> float:
        """One prefill chunk: its weights at the memory's bandwidth, or its products at ``PREFILL_EFFICIENCY``."""
        parameters = block_parameters(CSM_1B.backbone)
        return max(2 * parameters / self.bytes_per_second, 2 * parameters * rows / (self.flops * PREFILL_EFFICIENCY))

    def server(self, slots: int) -> Server:
        return Server(slots, self.step_seconds, self.chunk_seconds())

    def always_on(self) -> int:
        """The most requests that can run without pause: a frame of each and a prefill chunk take at most 80 ms."""
        fits = [n for n in range(1, max(self.milliseconds) + 1) if self._round(n) <= FRAME_SECONDS]
        return max(fits, default=0)

    def _round(self, running: int) -> float:
        return self.step_seconds(running) + self.chunk_seconds()


def predicted() -> list[StepTimes]:
    """The GPUs whose step times were predicted."""
    return [
        StepTimes(GPUS[key].name, "predicted", times, GPUS[key].bytes_per_us * 1e6, PEAK_TFLOPS[key] * 1e12)
        for key, times in PREDICTED.items()
    ]


def measured(file: Path) -> StepTimes:
    """What ``bench.py --out`` wrote, from its row "graph, kernels". Raises CSMError."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = {row["batch"]: row["median_ms"] for row in result["rows"] if row["name"] == "graph, kernels"}
        name, bandwidth = result["machine"]["device"], result["machine"]["copy_gb_s"] * 1e9
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CSMError(f"{file} is no bench.json of bench.py --out: {error}") from error
    if not rows:
        raise CSMError(f'{file} has no row "graph, kernels": run bench.py --batch 1 2 4 8 16 32 64 on a GPU')
    return StepTimes(name, "measured", rows, bandwidth, min(PEAK_TFLOPS.values()) * 1e12)


# --- speed ------------------------------------------------------------------------------------------------------------


def step_rows(gpus: Iterable[StepTimes]) -> list[dict[str, Any]]:
    """The time of a frame by batch size."""
    return [
        {"GPU": gpu.name, "step": gpu.source}
        | {f"batch {size}": 1e3 * gpu.step_seconds(size) for size in sorted(gpu.milliseconds)}
        | {"prefill chunk": 1e3 * gpu.chunk_seconds()}
        for gpu in gpus
    ]


def best_server(gpu: StepTimes) -> tuple[int, float]:
    """The number of slots that takes the highest load, and the load: requests a second."""
    sizes = sorted(gpu.milliseconds)[-3:]  # smaller batches use a GPU less
    rates = {slots: highest_rate(gpu.server(slots), MEAN_FRAMES, REQUESTS) for slots in sizes}
    slots = max(rates, key=lambda size: (rates[size], -size))
    return slots, rates[slots]


def stream_rows(gpus: Iterable[StepTimes]) -> list[dict[str, Any]]:
    """Streams a GPU."""
    rows = []
    for gpu in gpus:
        slots, rate = best_server(gpu)
        streams = rate * MEAN_FRAMES * FRAME_SECONDS
        outcome = simulate(gpu.server(slots), rate, MEAN_FRAMES, REQUESTS) if rate else None
        rows.append(
            {
                "GPU": gpu.name,
                "step": gpu.source,
                "always on": gpu.always_on(),
                "slots": slots,
                "requests/s": rate,
                "streams": streams,
                "in time %": None if outcome is None else f"{100 * outcome.in_time:.2f}",
                "first frame p95 ms": None if outcome is None else 1e3 * quantile(outcome.first_frame_N, 0.95),
                "GPU hours per hour": 1 / streams if streams else None,
            }
        )
    return rows


def quantile(values: Any, share: float) -> float:
    """The value below which so large a share lies."""
    return float(torch.as_tensor(values, dtype=torch.float64).quantile(share))


def queue_rows(gpu: StepTimes, slots: int) -> list[dict[str, Any]]:
    """Waits by load, beside M/M/c of as many servers as there are slots, all at the speed of a full batch."""
    server, rows = gpu.server(slots), []
    service = MEAN_FRAMES * gpu.step_seconds(slots)
    for percent in (50, 70, 80, 90, 95):
        rate = server.capacity(MEAN_FRAMES) * percent / 100
        outcome = simulate(server, rate, MEAN_FRAMES, REQUESTS, seed=2)
        rows.append(
            {
                "load %": percent,
                "requests/s": rate,
                "mean wait ms": 1e3 * float(outcome.wait_N.mean()),
                "wait p95 ms": 1e3 * quantile(outcome.wait_N, 0.95),
                "first frame p95 ms": 1e3 * quantile(outcome.first_frame_N, 0.95),
                "frames in time %": f"{100 * outcome.in_time:.2f}",
                "M/M/c: mean wait ms": 1e3 * mean_wait(slots, rate * service, service),
            }
        )
    return rows


def replica_rows(slots: int) -> list[dict[str, Any]]:
    """How far replicas can be loaded if at most 1 % of the requests may wait: one queue for all, or one for each."""
    rows = []
    for replicas in (1, 2, 4, 8, 16):
        shared = highest_load(replicas * slots, 0.01) / (replicas * slots)
        rows.append(
            {
                "replicas": replicas,
                "load %, one queue": f"{100 * shared:.0f}",
                "load %, a queue each": f"{100 * highest_load(slots, 0.01) / slots:.0f}",
                "waits at 80 %, one queue": f"{100 * erlang_c(replicas * slots, 0.8 * replicas * slots):.2g} %",
            }
        )
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def block_parameters(config: TransformerConfig) -> int:
    """Weights of all layers that are multiplied."""
    attention = config.qkv_dim * config.dim + config.num_heads * config.head_dim * config.dim
    return config.num_layers * (attention + 3 * config.hidden_dim * config.dim)


def weight_bytes(scheme: str) -> float:
    """Memory of CSM-1B's weights on a GPU, with the table of the depth decoder's inputs."""
    shapes = target_shapes(sesame_table(CSM_1B))
    backbone, depth = block_parameters(CSM_1B.backbone), block_parameters(CSM_1B.depth_decoder)
    vocab, dim, depth_dim = CSM_1B.audio_vocab_size, CSM_1B.backbone.dim, CSM_1B.depth_decoder.dim
    heads = vocab * dim + (CSM_1B.num_codebooks - 1) * depth_dim * vocab + depth_dim * dim
    everything = sum(torch.Size(shape).numel() for shape in shapes.values())
    table_bytes = 2 * (CSM_1B.num_codebooks - 1) * vocab * depth_dim  # the last codebook is no input
    parts = zip((backbone, depth, heads), SCHEMES[scheme], strict=True)
    multiplied = sum(count * BITS[kind] / 8 for count, kind in parts)
    return 2 * (everything - backbone - depth - heads) + multiplied + table_bytes


def slot_bytes() -> int:
    """Memory of one slot: KV caches for all positions, counters, and the codec's state."""
    state = FrameState.allocate(CSM_1B, 1, torch.device("meta"), torch.bfloat16)
    return sum(buffer.nbytes for buffer in state.buffers().values()) + CODEC_STATE_BYTES


def memory_bytes(scheme: str, slots: int) -> float:
    """GPU memory of a server: weights, codec, slots and one more KV cache for prefill, the prefix cache, CUDA."""
    per_position = kv_bytes_per_position(CSM_1B.backbone, torch.bfloat16)
    caches = (CSM_1B.backbone.max_positions + PREFIX_POSITIONS) * per_position
    return weight_bytes(scheme) + CODEC_WEIGHT_BYTES + slots * slot_bytes() + caches + CUDA_BYTES


def memory_rows() -> list[dict[str, Any]]:
    """GPU memory in GB by scheme and slots, and the slots that fit 24 GB."""
    rows = []
    for scheme in SCHEMES:
        left = 24e9 - memory_bytes(scheme, 0)
        rows.append(
            {"weights": scheme, "weights GB": f"{weight_bytes(scheme) / 1e9:.2f}"}
            | {f"{slots} slots": f"{memory_bytes(scheme, slots) / 1e9:.1f}" for slots in (1, 8, 32, 64)}
            | {"slots in 24 GB": int(left // slot_bytes())}
        )
    return rows


def speaker_rows() -> list[dict[str, Any]]:
    """What voices of 10 s cost, by how many there are; and adapters merged into weights, one model each."""
    per_position = kv_bytes_per_position(CSM_1B.backbone, torch.bfloat16)
    codes = 125 * CSM_1B.num_codebooks * 8
    cached = PREFIX_POSITIONS // VOICE_POSITIONS
    return [
        {
            "speakers": f"{speakers:,}",
            "codes, GB": f"{speakers * codes / 1e9:.4g}",
            "keys and values, GB": f"{speakers * VOICE_POSITIONS * per_position / 1e9:.4g}",
            "share in the prefix cache": f"{min(1.0, cached / speakers):.2%}",
            "a model each, GB": f"{speakers * weight_bytes('bfloat16') / 1e9:,.0f}",
        }
        for speakers in (10, 1000, 100_000)
    ]


# --- report -----------------------------------------------------------------------------------------------------------

QUEUE_GPU, QUEUE_SLOTS = "h100", 32


def tables(gpus: Sequence[StepTimes]) -> dict[str, Callable[[], str]]:
    """The tables by name, each computed when called. Those of one GPU are of ``QUEUE_GPU``, or of a single one."""
    one = gpus[list(PREDICTED).index(QUEUE_GPU)] if len(gpus) > 1 else gpus[0]
    slots = min(QUEUE_SLOTS, max(one.milliseconds))
    return {
        "steps": lambda: table(step_rows(gpus)),
        "streams": lambda: table(stream_rows(gpus)),
        "queue": lambda: table(queue_rows(one, slots)),
        "replicas": lambda: table(replica_rows(slots)),
        "memory": lambda: table(memory_rows()),
        "speakers": lambda: table(speaker_rows()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 with a message on stderr for a file that is no result of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m csm.bench.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=Path, metavar="FILE", help="bench.json of bench.py --out: measured step times")
    parser.add_argument("--table", nargs="+", metavar="NAME", help="only these: " + ", ".join(tables(predicted())))
    args = parser.parse_args(argv)
    try:
        chosen = tables([measured(args.times)] if args.times else predicted())
        unknown = [name for name in args.table or () if name not in chosen]
        if unknown:
            raise CSMError(f"no table is called {', '.join(unknown)}; there are {', '.join(chosen)}")
    except CSMError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        return 2
    for name in args.table or chosen:
        print(f"{name}:\n\n{chosen[name]()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
