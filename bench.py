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
from csm.frame import FrameState, decode_frame, prefill
from csm.graph import Graph, graphs_enabled
from csm.model import CSM
from csm.prompt import text_rows
from csm.sampling import SamplingParams
from csm.weights import open_checkpoint, read_model
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table, sesame_table, target_shapes

PROMPT_ROWS = 100
CHECKED_FRAMES = 12
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

Step = Callable[[], Tensor]  # speaks one frame of every slot and returns the codes (B, K), on the device


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


def started_state(model: CSM, batch: int) -> FrameState:
    state = FrameState.allocate(model.config, batch, model.device, model.dtype)
    for slot in range(batch):
        prefill(model, state, slot, *prompt_rows(model.config), SamplingParams(temperature=0))
    return state


def eager(setup: Setup, batch: int) -> Step:
    """The plain step."""
    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    state = started_state(model, batch)

    def step() -> Tensor:
        decode_frame(model, state, state.spans[0])
        return state.codes_BK

    return step


def compiled(mode: str) -> Callable[[Setup, int], Step]:
    """The plain step with both transformers under ``torch.compile``."""

    def make(setup: Setup, batch: int) -> Step:
        model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
        state = started_state(model, batch)
        model.backbone.compile(mode=mode, dynamic=False)
        model.depth_decoder.compile(mode=mode, dynamic=False)

        def step() -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            decode_frame(model, state, state.spans[0])
            return state.codes_BK

        return step

    return make


def graph(setup: Setup, batch: int) -> Step:
    """The plain step, captured whole."""
    if not graphs_enabled(setup.device):
        raise CSMError(f"no graph is captured here: on {setup.device}, or CSM_NO_GRAPH is set")
    model = CSM.from_state_dict(setup.config, setup.weights, setup.device)
    state = started_state(model, batch)
    captured = Graph(lambda: decode_frame(model, state, state.spans[0]), state.buffers, setup.device)
    for slot in range(batch):  # the capture has run the step
        prefill(model, state, slot, *prompt_rows(model.config), SamplingParams(temperature=0))

    def step() -> Tensor:
        captured.replay()
        return state.codes_BK

    return step


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
    for part in (model.backbone_model, model.depth_decoder.model):  # buffers that no checkpoint holds
        part.rotary_emb = type(part.rotary_emb)(part.config, setup.device)
    offsets = torch.arange(setup.config.num_codebooks, device=setup.device) * setup.config.audio_vocab_size
    model.backbone_model.embed_tokens.audio_tokens_offsets = offsets
    return model.eval()


def transformers(static_cache: bool) -> Callable[[Setup, int], Step]:
    """HF Transformers' ``generate``, one frame at a time; compiled, as documented, through a static cache."""

    def make(setup: Setup, batch: int) -> Step:
        model = transformers_model(setup)
        if static_cache:
            model.generation_config.cache_implementation = "static"
            model.depth_decoder.generation_config.cache_implementation = "static"
        row_TC, _ = prompt_rows(setup.config)
        ids = row_TC[:, -1].to(setup.device).repeat(batch, 1)
        frames = generated_frames(model, ids)
        return lambda: next(frames)

    return make


def generated_frames(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Frames as ``generate`` hands them to a streamer, from a thread of its own that waits for each to be taken."""
    import queue
    import threading

    taken, spoken = threading.Semaphore(0), queue.Queue[Any]()

    class Streamer:
        def put(self, codes_BK: Tensor) -> None:
            if codes_BK.shape[-1] == model.config.num_codebooks:  # not the prompt
                spoken.put(codes_BK)
                taken.acquire()

        def end(self) -> None:
            pass

    def work() -> None:
        options = dict(do_sample=False, depth_decoder_do_sample=False, max_new_tokens=1500)
        try:
            with torch.no_grad():
                model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Streamer(), **options)
        except Exception as error:  # noqa: BLE001 - handed over, and raised where the frame is asked for
            spoken.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        item = spoken.get()
        if isinstance(item, Exception):
            raise item
        yield item
        taken.release()


def configurations(names: list[str], device: torch.device) -> dict[str, Callable[[Setup, int], Step]]:
    """What can be measured here, or the ones of these names."""
    every: dict[str, Callable[[Setup, int], Step]] = {
        "eager": eager,
        "compile": compiled("default"),
        "compile, reduce-overhead": compiled("reduce-overhead"),
        "graph": graph,
        "transformers": transformers(static_cache=False),
        "transformers, static cache": transformers(static_cache=True),
    }
    if names:
        unknown = [name for name in names if name not in every]
        if unknown:
            raise CSMError(f"no row is called {unknown[0]!r}; there are {', '.join(every)}")
        return {name: every[name] for name in names}
    here = ["eager"] if device.type != "cuda" else ["eager", "compile", "compile, reduce-overhead"]
    here += ["graph"] if graphs_enabled(device) else []
    if importlib.util.find_spec("transformers"):
        here += ["transformers"] + (["transformers, static cache"] if device.type == "cuda" else [])
    return {name: every[name] for name in here}


# --- measuring --------------------------------------------------------------------------------------------------------


def small_setup(setup: Setup) -> Setup:
    """The embedded checkpoint in float32 on the same device, with the ids that no codec knows out of the running."""
    checkpoint = open_checkpoint("tiny")
    weights = read_model(checkpoint, setup.device, torch.float32)
    weights["codebook0_head"][checkpoint.config.codebook_size :] = 0  # Transformers does not mask them
    weights["depth_heads"][:, checkpoint.config.codebook_size :] = 0
    return Setup(checkpoint.config, checkpoint.codec_config, weights, "tiny")


def differing_frame(make: Callable[[Setup, int], Step], setup: Setup, batch: int) -> int | None:
    """The first frame in which a configuration's greedy codes are not the plain step's, or None."""
    small = small_setup(setup)
    step, expected = make(small, batch), eager(small, batch)
    for frame in range(CHECKED_FRAMES):
        codes_BK, expected_BK = step().cpu(), expected().cpu()
        if not torch.equal(codes_BK, expected_BK):
            return frame
    return None


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


def frame_times(step: Step, frames: int, device: torch.device, bar: tqdm[Any]) -> list[float]:
    """Milliseconds of each frame, after a few that are not counted."""
    times = []
    for frame in range(frames + 3):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if frame >= 3:
            times.append((time.perf_counter() - started) * 1000)
        bar.update()
    return times


def measure(name: str, step: Step, setup: Setup, batch: int, frames: int, bandwidth: float, bar: tqdm[Any]) -> Row:
    device = setup.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = sorted(frame_times(step, frames, device, bar))
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
        started = time.perf_counter()
        next(engine.run([request], audio=True))
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
        if results and not looks:
            self.ops[func._schema.name.removeprefix("aten::")] += 1
        return result


def count_launches(config: CSMConfig) -> Counter[str]:
    """Ops of one frame at batch 1, by name; nothing is computed, so any shape will do."""
    meta = torch.device("meta")
    shapes = target_shapes(sesame_table(config))
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=meta) for name, shape in shapes.items()}
    model = CSM.from_state_dict(config, weights, meta)
    state = FrameState.allocate(config, 1, meta, torch.bfloat16)
    with Counting() as counting:
        decode_frame(model, state, state.spans[0])
    return counting.ops


def profile(setup: Setup) -> list[dict[str, Any]]:
    """Time of the ops of one eager frame, the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = eager(setup, 1)
    step()
    on_gpu = setup.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        step()
        synchronize(setup.device)
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
    """The rows that passed their check, and the names of what did not."""
    rows, refused = [], []
    jobs = [(name, make, n) for name, make in configurations(args.rows, setup.device).items() for n in args.batch]
    with tqdm(total=len(jobs) * (args.frames + 3), unit="frame", disable=args.quiet, leave=False) as bar:
        for name, make, batch in jobs:
            bar.set_description(f"{name}, batch {batch}")
            frame = differing_frame(make, setup, batch)
            if frame is not None:
                refused.append(f"{name}, batch {batch}: not timed, its codes differ from frame {frame} on")
                continue
            rows.append(measure(name, make(setup, batch), setup, batch, args.frames, bandwidth, bar))
    return rows, refused


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
    result["first_audio"] = first_audio(setup)
    text += ["First audio, 100 rows of context and 20 of text:", "", table([result["first_audio"]]), ""]
    if args.profile:
        result["profile"] = profile(setup)
        text += [table(result["profile"]), ""]
    if args.model:
        generator = Generator.from_pretrained(args.model, setup.device, setup.dtype, progress=not args.quiet)
        result["sentences"] = sentences(generator, args.max_seconds)
        text += [table(result["sentences"]), ""]
    if args.out and rows:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(rows, args.out / "bench.png")
    return "\n".join(text), result


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
    parser.add_argument("--profile", action="store_true", help="add a table of the ops of a frame")
    parser.add_argument("--out", type=Path, help="a folder for bench.md, bench.json and bench.png")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.frames < 1 or min(args.batch) < 1:
        parser.error("--frames and --batch must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        if args.count:
            config = open_checkpoint(args.model).config if args.model else CSM_1B
            ops = count_launches(config)
            rows: list[dict[str, Any]] = [{"op": name, "launches": n} for name, n in ops.most_common()]
            text, result = table(rows), {"launches": ops.total(), "ops": dict(ops)}
        else:
            text, result = report(args)
    except (CSMError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    line = json.dumps(result)
    print(text, line, sep="\n")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench.md").write_text(text + "\n", encoding="utf-8")
        (args.out / "bench.json").write_text(line + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
