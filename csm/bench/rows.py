"""The rows of the table: each configuration is checked against the eager step, then timed.

A configuration is timed only after it has generated the eager step's greedy codes on a small float32 model. What cannot
be timed is a row too, with its reason.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from csm.bench import end_to_end, peers
from csm.bench.model_setup import Setup, small_setup, synchronize
from csm.bench.stepping import CHECKED_FRAMES, FrameRunner, Make, eager, eager_kernels, graph
from csm.config import CSMConfig
from csm.errors import CSMError
from csm.graph import graphs_enabled
from csm.weights.layouts import sesame_table, target_shapes

SKIPPED_FRAMES = 3
FRAME_SECONDS = 0.08


@dataclass(frozen=True)
class Row:
    """One timed configuration. Times in milliseconds, sizes in GB."""

    name: str
    batch: int
    median_ms: float
    p95_ms: float
    rtf: float
    times_real_time: float
    audio_per_second: float
    peak_gb: float
    frame_gb: float
    percent_of_copy: float


@dataclass(frozen=True)
class NotTimed:
    """One configuration that was not timed, and why."""

    name: str
    batch: int
    not_timed_because: str


class Configuration:
    """How a configuration is built, and what decides whether its codes are right.

    ``make`` builds the frame runner that is timed, ``check`` gives the first frame whose greedy codes differ from the
    eager step's, or None. ``compiles`` marks what compiles anew for each batch size, which takes minutes.
    """

    def __init__(
        self, make: Make, check: Callable[[Setup, int], int | None] | None = None, compiles: bool = False
    ) -> None:
        self.make = make
        self.check = check or (lambda setup, batch: differing_frame(make, setup, batch))
        self.compiles = compiles


CONFIGURATIONS = {
    "eager": Configuration(eager),
    "eager, kernels": Configuration(eager_kernels),
    "graph, PyTorch ops": Configuration(graph("reference")),
    "graph, kernels": Configuration(graph("triton")),
    "text to audio": Configuration(end_to_end.runner, end_to_end.differing_frame),
    "transformers": Configuration(peers.transformers(static_cache=False), compiles=True),
    "transformers, static cache": Configuration(peers.transformers(static_cache=True), compiles=True),
    "compile": Configuration(peers.compiled("default"), compiles=True),
    "compile, reduce-overhead": Configuration(peers.compiled("reduce-overhead"), compiles=True),
}


def check_rows(names: Sequence[str]) -> None:
    """Raise CSMError for a name that no configuration has."""
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown:
        raise CSMError(f"there is no row {unknown[0]!r}; choose from: {'; '.join(CONFIGURATIONS)}")


def configurations(names: Sequence[str], device: torch.device) -> dict[str, Configuration]:
    """The configurations of these names, or those that this machine can run. Raises CSMError for an unknown name."""
    check_rows(names)
    if names:
        return {name: CONFIGURATIONS[name] for name in names}
    captured = {"eager, kernels", "graph, PyTorch ops", "graph, kernels"}
    on_gpu = {"transformers, static cache", "compile", "compile, reduce-overhead"}
    left_out = (captured if not graphs_enabled(device) else set()) | (on_gpu if device.type != "cuda" else set())
    if not importlib.util.find_spec("transformers"):
        left_out |= {"transformers", "transformers, static cache"}
    return {name: configuration for name, configuration in CONFIGURATIONS.items() if name not in left_out}


def differing_frame(make: Make, setup: Setup, batch: int) -> int | None:
    """The first frame whose greedy codes differ from the eager step's on a small float32 model, or None."""
    small = small_setup(setup)
    codes = [[codes_BK for _, codes_BK in m(small, batch)(CHECKED_FRAMES)] for m in (make, eager)]
    if len(codes[0]) != CHECKED_FRAMES:
        return len(codes[0])
    pairs = enumerate(zip(*codes, strict=True))
    return next((frame for frame, (own, plain) in pairs if not torch.equal(own.cpu(), plain.cpu())), None)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy that is too large for any cache."""
    source = torch.ones((1 << 32 if device.type == "cuda" else 1 << 29) // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / min(times[1:])


def frame_bytes(config: CSMConfig, dtype: torch.dtype) -> int:
    """Weights that one frame must read: the backbone once, the depth decoder for each codebook but the first.

    Where the kernels gather layer 0's q, k and v from a table (``csm.kernels.qkv_table``), it is 1 % less.
    """
    depth_passes = config.num_codebooks - 1
    total = 0
    for name, shape in target_shapes(sesame_table(config)).items():
        size = math.prod(shape)
        if name.startswith("depth_decoder."):
            total += depth_passes * size
        elif not name.endswith("_embedding"):
            total += size
    return total * torch.empty((), dtype=dtype).element_size()


def measure(name: str, generate: FrameRunner, setup: Setup, batch: int, frames: int, bandwidth: float) -> Row:
    """Time ``frames`` frames. The first few are not counted; on a GPU neither is a whole first run, which compiles."""
    device = setup.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        generate(frames + SKIPPED_FRAMES)
    times = sorted(ms for ms, _ in generate(frames + SKIPPED_FRAMES)[SKIPPED_FRAMES:])
    if len(times) < frames:
        got = len(times) + SKIPPED_FRAMES if times else f"at most {SKIPPED_FRAMES}"
        raise CSMError(f"generation ended after {got} of {frames + SKIPPED_FRAMES} frames; give fewer --frames")
    median, p95 = statistics.median(times), times[math.ceil(0.95 * len(times)) - 1]
    needed = frame_bytes(setup.config, setup.dtype)
    return Row(
        name=name,
        batch=batch,
        median_ms=median,
        p95_ms=p95,
        rtf=median / 1000 / FRAME_SECONDS,
        times_real_time=FRAME_SECONDS * 1000 / median,
        audio_per_second=batch * FRAME_SECONDS * 1000 / median,
        peak_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0,
        frame_gb=needed / 1e9,
        percent_of_copy=100 * needed / (median / 1000) / bandwidth,
    )


def timed(name: str, configuration: Configuration, setup: Setup, batch: int, frames: int, bandwidth: float) -> Row:
    """A row, checked and measured. Raises CSMError where its codes are not the eager step's."""
    frame = configuration.check(setup, batch)
    if frame is not None:
        raise CSMError(f"its greedy codes differ from the eager step's from frame {frame} on")
    return measure(name, configuration.make(setup, batch), setup, batch, frames, bandwidth)


def measured_rows(
    setup: Setup,
    names: Sequence[str],
    batches: Sequence[int],
    frames: int,
    bandwidth: float,
    keep: Callable[[list[Row | NotTimed]], None],
    quiet: bool = False,
) -> list[Row | NotTimed]:
    """Every row, in order. ``keep`` is called with the rows so far after each, so that an interrupted run has them."""
    jobs = [
        (name, configuration, batch)
        for name, configuration in configurations(names, setup.device).items()
        for batch in (batches[:1] if configuration.compiles and setup.device.type == "cuda" else batches)
    ]
    rows: list[Row | NotTimed] = []
    bar = tqdm(jobs, unit="row", disable=quiet, leave=False)
    for name, configuration, batch in bar:
        bar.set_description(f"{name}, batch {batch}")
        try:
            rows.append(timed(name, configuration, setup, batch, frames, bandwidth))
        except CSMError as error:
            rows.append(NotTimed(name, batch, str(error)))
        except Exception as error:  # noqa: BLE001 - one row that fails must not cost the others
            rows.append(NotTimed(name, batch, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
        keep(rows)
    return rows
