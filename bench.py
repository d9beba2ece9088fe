"""Measure frames a second on the machine that is here: ``python bench.py``. ``--help`` lists the options.

Prints Markdown tables and, last, one line of JSON. A configuration is timed only after it has spoken the same greedy
codes as the plain eager step on a small float32 model. With random weights (the default) only time is measured: it does
not depend on their values.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from csm import DEFAULT_MODEL, CSMError, Generator
from csm.codec import Codec
from csm.config import CSM_1B, MIMI, CodecConfig, CSMConfig
from csm.frame import FrameState, decode_frame
from csm.graph import Graph, graphs_enabled
from csm.kernels.launch import launches
from csm.kernels.launch_config import TABLE, tuned_configs
from csm.kernels.report import GPU_ARCHS, Compiled, distinct, examine
from csm.kernels.tune import products, tune
from csm.model import CSM
from csm.prefill import Prefill
from csm.prompt import text_rows
from csm.sampling import SamplingParams
from csm.weights import open_checkpoint, read_model
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table, sesame_table, target_shapes

PROMPT_ROWS = 100
CHECKED_FRAMES, SKIPPED_FRAMES, MAX_FRAMES = 12, 3, 150
FRAME_SECONDS = 0.08
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SENTENCES = (
    "Good morning.",
    "The train to the coast leaves at nine.",
    "I would not have believed it if I had not seen it.",
    "Could you pass me the salt, please?",
    "She counted the steps twice, and each time there was one more.",
    "It rained.",
    "Every good answer begins with a better question.",
    "They painted the door green, then blue, then green again.",
    "Nothing in the letter explained why it had been sent.",
    "See you on Thursday, unless the bridge is closed.",
)

# Speaks so many greedy frames from the prompt: milliseconds and codes (B, K) of each.
FrameRunner = Callable[[int], list[tuple[float, Tensor]]]
Make = Callable[["Setup", int], FrameRunner]


@dataclass(frozen=True)
class Setup:
    """A model to measure: its shape, the state dict in our names, and where it is."""

    config: CSMConfig
    codec_config: CodecConfig
    weights: dict[str, Tensor]
    label: str

    @property
    def device(self) -> torch.device:
        return self.weights["codebook0_head"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["codebook0_head"].dtype


@dataclass(frozen=True)
class Row:
    """One measured configuration. Times in milliseconds, sizes in GB."""

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


# --- what is measured -------------------------------------------------------------------------------------------------


def prompt_rows(config: CSMConfig) -> tuple[Tensor, Tensor]:
    """The same prompt for everybody: text rows of arbitrary ids."""
    ids = [(7 * i + 3) % min(config.text_vocab_size, 200) for i in range(PROMPT_ROWS)]
    return text_rows(ids, config.num_codebooks)[:2]


def stepping(
    setup: Setup, batch: int, make_step: Callable[[CSM, FrameState], Callable[[], None]], ops: str = "reference"
) -> FrameRunner:
    """A speaker around a step over buffers of its own, with PyTorch's ops or the kernels."""
    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    state = FrameState.allocate(model.config, batch, model.device, model.dtype)
    with forced_ops(ops):
        prefill, step = Prefill(model), make_step(model, state)

    def speak(frames: int) -> list[tuple[float, Tensor]]:
        with forced_ops(ops):
            for slot in range(batch):
                prefill.start(state, slot, *prompt_rows(model.config), SamplingParams(temperature=0))
            return [(milliseconds(step, setup.device), state.codes_BK.clone()) for _ in range(frames)]

    return speak


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return (time.perf_counter() - started) * 1000


def bench_span(state: FrameState) -> int:
    """A span that holds the prompt and every frame that is timed."""
    return state.backbone_cache.bucket_for(PROMPT_ROWS + MAX_FRAMES)


def eager(setup: Setup, batch: int) -> FrameRunner:
    """The plain step."""
    return stepping(setup, batch, lambda model, state: lambda: decode_frame(model, state, bench_span(state)))


def compiled(mode: str) -> Make:
    """The plain step with both transformers under ``torch.compile``."""

    def make_step(model: CSM, state: FrameState) -> Callable[[], None]:
        torch.compiler.reset()  # what was compiled for another row counts against this one's limit
        for cache in (state.backbone_cache, state.depth_cache):
            torch._dynamo.mark_static_address(cache.k_LBGSd)
            torch._dynamo.mark_static_address(cache.v_LBGSd)
        model.backbone.compile(mode=mode, dynamic=False)
        model.depth_decoder.compile(mode=mode, dynamic=False)

        def step() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            decode_frame(model, state, bench_span(state))

        return step

    return lambda setup, batch: stepping(setup, batch, make_step)


def graph(ops: str) -> Make:
    """The step, captured whole."""

    def make(setup: Setup, batch: int) -> FrameRunner:
        if not graphs_enabled(setup.device):
            raise CSMError(f"no graph is captured here: on {setup.device}, or CSM_NO_GRAPH is set")

        def make_step(model: CSM, state: FrameState) -> Callable[[], None]:
            step = lambda: decode_frame(model, state, bench_span(state))  # noqa: E731
            with launches() as seen:
                replay = Graph(step, state.buffers, setup.device).replay
            if bool(seen) != (ops == "triton"):
                raise RuntimeError(f"with CSM_OPS={ops} the step launched {len(seen)} kernels")
            return replay

        return stepping(setup, batch, make_step, ops)

    return make


def transformers_model(setup: Setup) -> Any:
    """HF Transformers' CSM around the same weights. Its codec stays on the meta device: codes do without."""
    from transformers import CsmConfig, CsmForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    values = write_hf_config(setup.config, setup.codec_config)
    values["depth_decoder_config"]["max_position_embeddings"] = setup.config.num_codebooks + 1
    values |= {"audio_token_id": 1, "audio_eos_token_id": 2, "pad_token_id": 0}
    with torch.device("meta"):
        model = CsmForConditionalGeneration(CsmConfig(**values))
    tensors = dict(export(setup.weights, hf_table(setup.config)))
    model.load_state_dict(tensors, strict=False, assign=True)
    with setup.device:
        for part in (model.backbone_model, model.depth_decoder.model):  # buffers that no checkpoint holds
            part.rotary_emb = type(part.rotary_emb)(part.config)
    offsets = torch.arange(setup.config.num_codebooks, device=setup.device) * setup.config.audio_vocab_size
    model.backbone_model.embed_tokens.audio_tokens_offsets = offsets
    return model.eval()


class Clock:
    """A streamer for ``generate``: keeps each frame, and the time since the one before."""

    def __init__(self, num_codebooks: int):
        self.num_codebooks = num_codebooks
        self.frames: list[tuple[float, Tensor]] = []
        self.last = time.perf_counter()

    def put(self, codes_BK: Tensor) -> None:
        if codes_BK.shape[-1] == self.num_codebooks:  # not the prompt, which is put too
            now = time.perf_counter()
            self.frames.append(((now - self.last) * 1000, codes_BK))
            self.last = now

    def end(self) -> None:
        pass


def transformers(static_cache: bool) -> Make:
    """HF Transformers' ``generate``; compiled, as documented, through a static cache."""

    def make(setup: Setup, batch: int) -> FrameRunner:
        model = transformers_model(setup)
        if static_cache:
            torch.compiler.reset()
            model.generation_config.cache_implementation = "static"
            model.depth_decoder.generation_config.cache_implementation = "static"
        ids = prompt_rows(setup.config)[0][:, -1].to(setup.device).repeat(batch, 1)

        @torch.no_grad()
        def speak(frames: int) -> list[tuple[float, Tensor]]:
            clock = Clock(setup.config.num_codebooks)
            options = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=frames)
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
            return clock.frames

        return speak

    return make


def configurations(names: list[str], device: torch.device) -> dict[str, Make]:
    """What can be measured here, or the ones of these names."""
    every: dict[str, Make] = {
        "eager": eager,
        "compile": compiled("default"),
        "compile, reduce-overhead": compiled("reduce-overhead"),
        "graph, PyTorch ops": graph("reference"),
        "graph, kernels": graph("triton"),
        "transformers": transformers(static_cache=False),
        "transformers, static cache": transformers(static_cache=True),
    }
    if names:
        unknown = [name for name in names if name not in every]
        if unknown:
            raise CSMError(f"no row is called {unknown[0]!r}; there are {', '.join(every)}")
        return {name: every[name] for name in names}
    here = ["eager"] + (["graph, PyTorch ops", "graph, kernels"] if graphs_enabled(device) else [])
    if importlib.util.find_spec("transformers"):
        here += ["transformers"] + (["transformers, static cache"] if device.type == "cuda" else [])
    here += ["compile", "compile, reduce-overhead"] if device.type == "cuda" else []
    return {name: every[name] for name in here}


# --- measuring --------------------------------------------------------------------------------------------------------


def small_setup(setup: Setup) -> Setup:
    """The embedded checkpoint's shape in float32 on the same device, with weights that never fall silent.

    They are random, and the ids that no codec knows are out of the running.
    """
    checkpoint = open_checkpoint("tiny")
    weights = random_weights(checkpoint.config, setup.device, torch.float32)
    weights["codebook0_head"][checkpoint.config.codebook_size :] = 0  # Transformers does not mask them
    weights["depth_heads"][:, checkpoint.config.codebook_size :] = 0
    return Setup(checkpoint.config, checkpoint.codec_config, weights, "tiny's shape")


def differing_frame(make: Make, setup: Setup, batch: int) -> int | None:
    """The first frame in which a configuration's greedy codes are not the plain step's, or None."""
    small = small_setup(setup)
    codes = [[codes_BK for _, codes_BK in m(small, batch)(CHECKED_FRAMES)] for m in (make, eager)]
    if len(codes[0]) != CHECKED_FRAMES:
        return len(codes[0])
    pairs = enumerate(zip(*codes, strict=True))
    return next((frame for frame, (own, plain) in pairs if not torch.equal(own.cpu(), plain.cpu())), None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a plain copy that no cache holds."""
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
    """Weights that one frame must read: the backbone once, the depth decoder for each codebook but the first."""
    depth_passes = config.num_codebooks - 1
    total = 0
    for name, shape in target_shapes(sesame_table(config)).items():
        size = math.prod(shape)
        if name.startswith("depth_decoder."):
            total += depth_passes * size
        elif not name.endswith("_embedding"):
            total += size
    return total * torch.empty((), dtype=dtype).element_size()


def measure(name: str, speak: FrameRunner, setup: Setup, batch: int, frames: int, bandwidth: float) -> Row:
    """Time frames after a few that are not counted, in a run after one that is not: what compiles has compiled."""
    device = setup.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        speak(frames + SKIPPED_FRAMES)
    times = sorted(ms for ms, _ in speak(frames + SKIPPED_FRAMES)[SKIPPED_FRAMES:])
    if len(times) < frames:
        raise CSMError(f"it fell silent {frames - len(times)} frames too early: give fewer --frames")
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


def first_audio(setup: Setup) -> dict[str, float]:
    """Milliseconds from a request with 100 rows of context to its first 80 ms of audio: context new, and cached."""
    from csm.cache import PrefixCache
    from csm.engine import Engine, Request

    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    codec_weights = {n: torch.randn(s) / 50 for n, s in target_shapes(mimi_table(setup.codec_config)).items()}
    codec = Codec(setup.codec_config, setup.config.num_codebooks, codec_weights, setup.device)
    engine = Engine(model, lambda: codec, 1, PrefixCache(8192))
    engine.capture([1])
    result = {}
    for name, first_id in (("warm", 1), ("cold", 2), ("cached", 2)):
        rows = [
            text_rows([first_id] * PROMPT_ROWS, setup.config.num_codebooks),
            text_rows([5] * 20, setup.config.num_codebooks),
        ]
        row_TC, mask_TC = (torch.cat(parts) for parts in zip(*(r[:2] for r in rows), strict=True))
        request = Request(row_TC, mask_TC, (PROMPT_ROWS,), SamplingParams(seed=1), 2)
        synchronize(setup.device)  # of the run before, a frame may be under way
        started = time.perf_counter()
        if next(engine.run([request], audio=True), None) is None:
            raise CSMError("it fell silent at once: its text says nothing")
        result[name] = (time.perf_counter() - started) * 1000
    return {"cold_ms": result["cold"], "cached_ms": result["cached"]}


# --- counting and profiling -------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts the ops that launch something: those that do more than look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, Tensor)]
        same = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        # A cast or a reshape is a view only where nothing has to change.
        looks = func.is_view and all(x.untyped_storage()._cdata in same for x in results)
        allocates = func._schema.name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
        if results and not looks and not allocates:
            self.ops[func._schema.name.removeprefix("aten::")] += 1
        return result


def shadow_step(config: CSMConfig, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """A step that computes nothing: on the meta device every op is asked for, and none runs."""
    meta = torch.device("meta")
    shapes = target_shapes(sesame_table(config))
    weights = {name: torch.empty(shape, dtype=dtype, device=meta) for name, shape in shapes.items()}
    model = CSM.from_state_dict(config, weights, meta)
    state = FrameState.allocate(config, batch, meta, dtype)
    return lambda: decode_frame(model, state, state.backbone_cache.buckets[0])


@contextmanager
def forced_ops(name: str) -> Iterator[None]:
    """``CSM_OPS`` for a while."""
    before = os.environ.get("CSM_OPS")
    os.environ["CSM_OPS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CSM_OPS"]
        else:
            os.environ["CSM_OPS"] = before


def count_launches(config: CSMConfig, ops: str, batch: int = 1) -> Counter[str]:
    """What one frame launches, by name: ``ops`` is "reference" or "triton"."""
    step = shadow_step(config, batch, torch.bfloat16)
    with forced_ops(ops), launches() as seen, Counting() as counting:
        step()
    return counting.ops + Counter(launch.name for launch in seen)


def compiled_kernels(config: CSMConfig, batches: list[int], dtype: torch.dtype, quiet: bool) -> list[Compiled]:
    """Every kernel of a frame at these batch sizes, compiled for every GPU architecture."""
    with forced_ops("triton"), launches() as seen:
        for batch in batches:
            shadow_step(config, batch, dtype)()
    jobs = [(launch, gpu_arch) for launch in distinct(seen) for gpu_arch in GPU_ARCHS]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda job: examine(*job), jobs)
        return list(tqdm(done, total=len(jobs), unit="kernel", disable=quiet, leave=False))


def graph_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a step, captured: the median of several replays."""
    captured = Graph(step, dict, device)
    times = [milliseconds(captured.replay, device) for _ in range(12)]
    return statistics.median(times[2:]) / 1000


def tuning(config: CSMConfig, batches: list[int], dtype: torch.dtype, quiet: bool) -> tuple[str, dict[str, Any]]:
    """Measure launch shapes for this GPU and write them into the table that the kernels read."""
    device = torch.device("cuda")
    if not graphs_enabled(device) or not torch.cuda.is_available():
        raise CSMError("--tune measures on a GPU, and there is none here")
    with forced_ops("triton"), launches() as seen:
        for batch in sorted(batches):
            shadow_step(config, batch, dtype)()
    with torch.inference_mode(), forced_ops("triton"):
        best = tune(products(seen), device, graph_seconds, quiet)
    table_of = tuned_configs()
    TABLE.write_text(json.dumps(table_of, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    rows = [
        {"product": key, "shape": str(entry), "microseconds": 1e6 * least, "by_rule": 1e6 * rule}
        for key, (entry, least, rule) in best.items()
    ]
    return table(rows), {"tuned": rows}


def profile(setup: Setup, ops: str) -> list[dict[str, Any]]:
    """Time of the ops of the prompt and one eager frame, the largest first; ``ops`` as in ``forced_ops``."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    make_step = lambda model, state: lambda: decode_frame(model, state, bench_span(state))  # noqa: E731
    speak = stepping(setup, 1, make_step, ops)
    speak(1)
    on_gpu = setup.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        speak(1)
    rows = []
    for event in recorded.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"op": event.key, "calls": event.count, "ms": micros / 1000})
    return sorted(rows, key=lambda row: -row["ms"])[:20]


# --- reporting --------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; floats to three digits."""

    def cell(value: Any) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and value < 100
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    head = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[name]) for name in head) + " |" for row in rows])


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def plot(rows: list[Row], path: Path) -> bool:
    """ms per frame against batch with its floor, and audio a second; False where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        left.plot([row.batch for row in own], [row.median_ms for row in own], "o-", label=name)
        right.plot([row.batch for row in own], [row.audio_per_second for row in own], "o-", label=name)
    floor = rows[0].median_ms * rows[0].percent_of_copy / 100
    left.axhline(floor, color="grey", linestyle=":", label="weights at copy bandwidth")
    left.set(xlabel="batch", ylabel="ms per frame", yscale="log")
    right.set(xlabel="batch", ylabel="seconds of audio per second")
    left.legend()
    figure.savefig(path, dpi=120)
    return True


def sentences(generator: Generator, seconds: float) -> list[dict[str, Any]]:
    """Ten sentences through the whole of it, and their average."""
    generator.warmup()
    rows: list[dict[str, Any]] = []
    for text in SENTENCES:
        started, first, samples = time.perf_counter(), 0.0, 0
        for chunk in generator.stream(text, 0, max_audio_length_ms=seconds * 1000, seed=0):
            first = first or time.perf_counter() - started
            samples += chunk.shape[0]
        elapsed, audio = time.perf_counter() - started, samples / generator.sample_rate
        rtf = elapsed / audio if audio else math.nan
        row = {
            "rtf": rtf,
            "first_audio_ms": first * 1000,
            "seconds": elapsed,
            "audio_s": audio,
            "frames": samples / 1920,
        }
        rows.append({"sentence": text, **row})
    average = {name: statistics.fmean(row[name] for row in rows) for name in list(rows[0])[1:]}
    return [*rows, {"sentence": "average", **average}]


# --- the program ------------------------------------------------------------------------------------------------------


def random_weights(config: CSMConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the right shapes, made on the device."""
    torch.manual_seed(0)
    weights = {}
    for name, shape in target_shapes(sesame_table(config)).items():
        tensor = torch.empty(shape, device=device, dtype=dtype)
        weights[name] = tensor.fill_(1) if len(shape) == 1 else tensor.normal_(0, 1 / math.sqrt(shape[-1]))
    return weights


def load(args: argparse.Namespace) -> Setup:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if args.model is None:
        weights = random_weights(CSM_1B, device, dtype)
        return Setup(CSM_1B, MIMI, weights, "CSM-1B's shape, random weights (speed does not depend on their values)")
    checkpoint = open_checkpoint(args.model)
    return Setup(checkpoint.config, checkpoint.codec_config, read_model(checkpoint, device, dtype), args.model)


def measured_rows(setup: Setup, args: argparse.Namespace, bandwidth: float) -> tuple[list[Row], list[str]]:
    """The rows that passed their check, and what is to be said of those that did not."""
    rows, refused = [], []
    own = (
        "eager",
        "graph, PyTorch ops",
        "graph, kernels",
    )  # of the others, which compile for each batch anew, only the first
    jobs = [
        (name, make, batch)
        for name, make in configurations(args.rows, setup.device).items()
        for batch in (args.batch if name in own or setup.device.type != "cuda" else args.batch[:1])
    ]
    bar = tqdm(jobs, unit="row", disable=args.quiet, leave=False)
    for name, make, batch in bar:
        bar.set_description(f"{name}, batch {batch}")
        try:
            frame = differing_frame(make, setup, batch)
            if frame is None:
                rows.append(measure(name, make(setup, batch), setup, batch, args.frames, bandwidth))
            else:
                refused.append(f"{name}, batch {batch}: not timed, its codes differ from frame {frame} on")
        except CSMError:
            raise
        except Exception as error:  # noqa: BLE001 - one row that cannot run here must not cost the others
            refused.append(f"{name}, batch {batch}: not timed, {type(error).__name__}: {str(error)[:200]}")
        if args.out:
            write(args.out, "rows.json", json.dumps([asdict(row) for row in rows]))
    return rows, refused


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def report(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The Markdown and the JSON of one run."""
    setup = load(args)
    bandwidth = copy_bandwidth(setup.device)
    here = machine(setup.device) | {"copy_gb_s": round(bandwidth / 1e9, 1), "dtype": str(setup.dtype)}
    rows, refused = measured_rows(setup, args, bandwidth)
    result: dict[str, Any] = {
        "machine": here,
        "model": setup.label,
        "rows": [asdict(row) for row in rows],
        "refused": refused,
    }
    text = [f"{setup.label}; " + ", ".join(f"{k} {v}" for k, v in here.items()), ""]
    text += [table(result["rows"]), *refused, ""] if rows else refused
    try:
        result["first_audio"] = first_audio(setup)
        text += ["First audio, 100 rows of context and 20 of text:", "", table([result["first_audio"]]), ""]
    except CSMError as error:
        text += [f"First audio: not measured, {error}", ""]
    if args.profile:
        for ops in ("reference", "triton") if setup.device.type == "cuda" else ("reference",):
            result[f"profile_{ops}"] = profile(setup, ops)
            text += [f"One frame, {ops} ops:", "", table(result[f"profile_{ops}"]), ""]
    if args.model:
        generator = Generator.from_pretrained(args.model, setup.device, setup.dtype, progress=not args.quiet)
        result["sentences"] = sentences(generator, args.max_seconds)
        text += [table(result["sentences"]), ""]
    if args.out and rows:
        plot(rows, args.out / "bench.png")
    return "\n".join(text), result


def count_report(config: CSMConfig) -> tuple[str, dict[str, Any]]:
    """What a frame launches with PyTorch's ops, and with the kernels."""
    counts = {ops: count_launches(config, ops) for ops in ("reference", "triton")}
    names = sorted(counts["reference"] | counts["triton"], key=lambda name: -max(c[name] for c in counts.values()))
    rows = [{"op": name, **{ops: count[name] for ops, count in counts.items()}} for name in names]
    totals = {ops: count.total() for ops, count in counts.items()}
    return table([*rows, {"op": "all", **totals}]), {"launches": totals, "ops": rows}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help=f"tiny, a folder or a hub name ({DEFAULT_MODEL}); default: random weights")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    parser.add_argument("--frames", type=int, default=20, help="frames to time of each row (default: 20)")
    parser.add_argument("--rows", nargs="+", default=[], help="only these configurations")
    parser.add_argument("--max-seconds", type=float, default=4.0, help="most audio of each of the ten sentences")
    parser.add_argument("--count", action="store_true", help="count what a frame launches, and stop")
    parser.add_argument("--kernels", action="store_true", help="compile a frame's kernels for several GPUs, and stop")
    parser.add_argument("--tune", action="store_true", help="measure launch shapes for this GPU, write them, and stop")
    parser.add_argument("--profile", action="store_true", help="add a table of the ops of a frame")
    parser.add_argument("--out", type=Path, help="a folder for bench.md, bench.json and bench.png")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if not 1 <= args.frames <= MAX_FRAMES - SKIPPED_FRAMES or min(args.batch) < 1:
        parser.error(f"--frames must be within 1 and {MAX_FRAMES - SKIPPED_FRAMES}, --batch at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.count or args.kernels or args.tune:
            config = open_checkpoint(args.model).config if args.model else CSM_1B
        if args.count:
            text, result = count_report(config)
        elif args.tune:
            text, result = tuning(config, args.batch, DTYPES[args.dtype or "bfloat16"], args.quiet)
        elif args.kernels:
            kernels = compiled_kernels(config, args.batch, DTYPES[args.dtype or "bfloat16"], args.quiet)
            rows = [kernel._asdict() for kernel in kernels]
            text, result = table(rows), {"kernels": rows, "spilled": [row for row in rows if row["spilled_bytes"]]}
        else:
            text, result = report(args)
    except (CSMError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    line = json.dumps(result)
    print(text, line, sep="\n")
    if args.out:
        write(args.out, "bench.md", text)
        write(args.out, "bench.json", line)
    return 1 if result.get("spilled") else 0


if __name__ == "__main__":
    sys.exit(main())
