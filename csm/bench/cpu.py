"""``python bench.py --cpu``: weights and numbers of threads on a CPU, beside HF Transformers.

Each row is a process of its own (``csm.bench.cpu_worker``). The rows take turns, so that all see the same machine, and
a row is timed only after two checks: logits of several rows near those of PyTorch's ops on the same weights, and greedy
codes of the step that is timed near the best ones by PyTorch's logits. HF Transformers must have the eager step's
greedy codes on a small model. llama.cpp's row reads matrices of the same shapes and generates nothing
(``csm.bench.llama_cpp_row``). Without ``--model`` the weights are random, of CSM-1B's shapes: only time
and memory are measured.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from csm.bench import report
from csm.bench.llama_cpp_row import write_models
from csm.bench.model_setup import load, random_weights
from csm.bench.rows import CONFIGURATIONS, FRAME_SECONDS, differing_frame
from csm.config import CSM_1B, MIMI
from csm.errors import CSMError
from csm.quantize import PRESETS
from csm.quantized_model import save_quantized
from csm.weights import open_checkpoint
from csm.weights.config_json import write_hf_config
from csm.weights.layouts import export, hf_table, mimi_table, target_shapes

ROWS = ("transformers", "bfloat16", "int8", "int4", "llama.cpp")
NEEDS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}  # packages of rows that are measured where they are
ROUNDS, AUDIO_ROUNDS = 5, 2
CHECKED_ROWS = 4  # and frames
AUDIO_FRAMES = 60  # 4.8 s
# Relative errors of logits. Inputs of a quantised weight are rounded to int8 in blocks of 32. A product adds 0.5 %: the
# largest of 32 normal values is 2.1, the step 2.1 / 127, the error 1 / sqrt(12) of a step. 80 products add 4 %, a wrong
# one about 100 %.
LARGEST_ERROR, LARGEST_QUANTIZED_ERROR = 0.03, 0.08
# In standard deviations of the logits (``worst_choice``). Two logits with an error of 8 % each change places if they
# are nearer than about 3 * sqrt(2) * 0.08. A code that has nothing to do with its logits is 3.5 away.
WORST_CHOICE = 0.5


@dataclass
class Worker:
    """The process of one kind of weights with one number of threads, and its results."""

    name: str
    threads: int
    process: subprocess.Popen[str]
    results: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)  # by command and busy loops
    lm_peak_bytes: int = 0
    peak_bytes: int = 0
    reason: str = ""  # why it is not timed

    @classmethod
    def start(cls, name: str, folder: Path, threads: int) -> Worker:
        kind = name if name in NEEDS else "ours"
        command = [sys.executable, "-m", "csm.bench.cpu_worker", kind, str(folder), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["CSM_TRITON"] = ""  # its memory is measured
        pipe = subprocess.PIPE
        return cls(name, threads, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))

    def ask(self, command: str, number: int) -> dict[str, Any]:
        """Send a command and wait. Raises CSMError if the process ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(command, number, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CSMError(f"its process ended with code {self.process.wait()}; its message is above")
        result = json.loads(line)
        self.peak_bytes = result["peak_bytes"]
        return result

    def take_turn(self, command: str, number: int, busy: int) -> None:
        """Run a command beside ``busy`` loops and keep its result."""
        if not self.reason:
            try:
                self.results.setdefault((command, busy), []).append(self.ask(command, number))
            except CSMError as error:
                self.reason = str(error)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def row(self, read_bandwidth: float, busy: int) -> dict[str, Any]:
        """The medians of all turns beside ``busy`` loops.

        GB/s count the depth decoder's weights in each of its passes, most of which a cache serves. The percentage of
        the bandwidth that a sum reads counts every weight once; llama.cpp's has one head of the depth decoder, not 31.
        """
        result: dict[str, Any] = {"weights": self.name, "threads": self.threads, "busy_loops": busy}
        if self.reason:
            return result | {"not_timed_because": self.reason}
        codes, audio = self.results["codes", busy], self.results.get(("audio", busy))
        ms = statistics.median(ms for turn in codes for ms in turn["ms"])
        with_codec = statistics.median(turn["ms"][0] for turn in audio) if audio else None
        multiplied, once = (codes[0].get(name) for name in ("frame_bytes", "weight_bytes"))
        return result | {
            "frame_ms": ms,
            "best_ms": min(ms for turn in codes for ms in turn["ms"]),
            "with_codec_ms": with_codec,
            "rtf_with_codec": with_codec and with_codec / 1000 / FRAME_SECONDS,
            "first_frame_ms": statistics.median(turn["first_ms"] for turn in codes),
            "gb_s": multiplied and multiplied / ms / 1e6,
            "percent_of_read": once and 100 * once / (ms / 1000) / read_bandwidth,
            "peak_gb": self.lm_peak_bytes / 1e9,
            "peak_gb_with_codec": self.peak_bytes / 1e9 if audio else None,
        }


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """So many processes that each keep a core busy, at this process's priority."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def read_bandwidth(threads: int) -> float:
    """Bytes a second that a sum over an array larger than any cache reads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        source.sum()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return source.nbytes / min(times[1:])


def write_random_checkpoint(folder: Path) -> None:
    """CSM-1B's shapes in HF Transformers' layout, bfloat16, with the embedded checkpoint's tokenizer.

    The ids that no codec knows get zero rows in the heads, because HF Transformers does not mask them.
    """
    weights = random_weights(CSM_1B, torch.device("cpu"), torch.bfloat16)
    weights["codebook0_head"][CSM_1B.codebook_size :] = 0
    weights["depth_heads"][:, CSM_1B.codebook_size :] = 0
    codec_table = mimi_table(MIMI)
    codec = {name: torch.randn(shape) / 50 for name, shape in target_shapes(codec_table).items()}
    tensors = dict(export(weights, hf_table(CSM_1B))) | dict(export(codec, codec_table))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = write_hf_config(CSM_1B, MIMI) | {"audio_token_id": 1, "audio_eos_token_id": 2, "pad_token_id": 0}
    config["depth_decoder_config"]["max_position_embeddings"] = CSM_1B.num_codebooks + 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copyfile(open_checkpoint("tiny").tokenizer_path, folder / "tokenizer.json")


def folders(model: str | None, names: Sequence[str], where: Path, quiet: bool) -> dict[str, Path]:
    """The checkpoint that each row loads. Quantised ones are written first."""
    if model is None:
        original = where / "random"
        original.mkdir()
        write_random_checkpoint(original)
    else:
        original = open_checkpoint(model).folder
    found = {}
    for name in names:
        found[name] = original
        if name == "llama.cpp":
            found[name] = where / name
            found[name].mkdir()
            write_models(open_checkpoint(str(original)).config, found[name])
        elif name in PRESETS:
            found[name] = where / name
            save_quantized(open_checkpoint(str(original)), name, found[name], progress=not quiet)
    return found


def reason_not_to_time(name: str, folder: Path, threads: int) -> str:
    """What a row computes wrongly; empty if nothing. In a process that ends, so that it leaves no trace in memory."""
    if name == "transformers":
        frame = differing_frame(CONFIGURATIONS["transformers"].make, load("tiny", "cpu", None), 1)
        return "" if frame is None else f"its greedy codes differ from the eager step's from frame {frame} on"
    if name == "llama.cpp":
        return ""
    worker = Worker.start(name, folder, threads)
    try:
        result = worker.ask("check", CHECKED_ROWS)
    except CSMError as reason:
        return str(reason)
    finally:
        worker.stop()
    error, choice = result["error"], result["worst_choice"]
    if not error <= (LARGEST_QUANTIZED_ERROR if name in PRESETS else LARGEST_ERROR):
        return f"its logits differ by {100 * error:.1f} % from those of PyTorch's ops"
    if not choice <= WORST_CHOICE:
        return f"the logit of one of its greedy codes is {choice:.1f} standard deviations below PyTorch's largest"
    return ""


def cpu_report(
    model: str | None, names: Sequence[str], threads: Sequence[int], frames: int, busy: Sequence[int], quiet: bool
) -> tuple[str, dict[str, Any]]:
    """Every row, as Markdown and for JSON. Raises CSMError for an unknown row, and where /proc is missing."""
    if platform.system() != "Linux":
        raise CSMError("bench.py --cpu reads a process's memory from /proc: it needs Linux")
    unknown = [name for name in names if name not in ROWS and name not in PRESETS]
    if unknown:
        raise CSMError(f"there is no row {unknown[0]!r}; choose from: {', '.join((*ROWS, *PRESETS))}")
    names = list(names) or [name for name in ROWS if name not in NEEDS or find_spec(NEEDS[name])]
    bandwidth = {number: read_bandwidth(number) for number in threads}
    with tempfile.TemporaryDirectory() as where:
        found = folders(model, names, Path(where), quiet)
        wrong = {
            name: reason_not_to_time(name, found[name], max(threads)) for name in tqdm(names, "checking", disable=quiet)
        }
        workers = [Worker.start(name, found[name], number) for number in threads for name in names]
        for worker in workers:
            worker.reason = wrong[worker.name]
        try:
            measure(workers, frames, busy, quiet)
        finally:
            for worker in workers:
                worker.stop()
    rows = [worker.row(bandwidth[worker.threads], number) for number in busy for worker in workers]
    read = {f"read_gb_s_{number}_threads": round(value / 1e9, 1) for number, value in bandwidth.items()}
    here = report.machine(torch.device("cpu")) | read
    label = model or "CSM-1B's shapes, random weights"
    text = "\n".join([f"{label}; " + ", ".join(f"{k} {v}" for k, v in here.items()), "", report.table(rows)])
    return text, {"machine": here, "model": label, "cpu": rows}


def measure(workers: Sequence[Worker], frames: int, busy: Sequence[int], quiet: bool) -> None:
    """Let the workers take turns. The first turn of each is not counted: it loads the codec and touches pages."""
    for rounds, command in ((ROUNDS, "codes"), (AUDIO_ROUNDS, "audio")):
        timed = [worker for worker in workers if command == "codes" or worker.name != "llama.cpp"]
        for worker in timed:
            worker.take_turn(command, 2, 0)
            worker.results.pop((command, 0), None)
        for _ in tqdm(range(rounds), desc=command, unit="round", disable=quiet, leave=False):
            for number in busy:
                with busy_loops(number):
                    for worker in timed:
                        long = command == "audio" and worker.name != "transformers"  # which is slow, at any length
                        worker.take_turn(command, AUDIO_FRAMES if long else frames, number)
        for worker in workers:
            if command == "codes":
                worker.lm_peak_bytes = worker.peak_bytes
