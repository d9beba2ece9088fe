"""Checks the fast path on the device at hand, and falls back to a slower one where a check fails.

There are three rungs: Triton kernels in a captured graph, PyTorch ops in a captured graph, and PyTorch ops run eagerly.
``choose_rung`` launches a probe, compares every op of the step with its reference at the shapes in use, and compares a
captured frame with an eager one. A failed check gives one ``FallbackWarning`` and costs one rung. Results are kept for
the process and, by GPU, driver and versions, in ``$CSM_HOME/selfcheck.json`` (default ``~/.cache/csm``).

A check cannot recover from an illegal memory access: CUDA then fails every later call of the process.

Shapes: B slots, K codebooks, L layers, G key/value heads, S cache positions, d head dim.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

import csm.graph
from csm.cache import MIN_CONTEXT_BUCKET
from csm.errors import FallbackWarning
from csm.frame import FrameState, decode_frame
from csm.graph import Graph
from csm.kernels import linear_add
from csm.kernels.launch import driver_version, enable_kernels, use_kernels
from csm.model import CSM
from csm.opchecks import TEMPERATURES, Check, RandomTensors, op_checks, relative_error
from csm.quantize import describe, quantized_weights

MIN_CAPABILITY = (8, 0)  # of the kernels; also the first with bfloat16
# Largest difference from the reference, relative to the reference's largest value. Two correct implementations that
# round intermediate results differently stay well below; a wrong one is off by about 1.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float64: 1e-6}

_chosen: dict[str, Rung] = {}
_without_graphs: set[torch.device] = set()
_lock = threading.RLock()


@dataclass(frozen=True)
class Rung:
    """How frames are computed: by kernels or PyTorch ops, in captured graphs or eagerly."""

    kernels: bool
    graph: bool

    def __str__(self) -> str:
        ops = "Triton kernels" if self.kernels else "PyTorch ops"
        return f"{ops} in a CUDA graph" if self.graph else f"{ops} without a CUDA graph"

    @property
    def lower(self) -> Rung:
        """The next rung: first without kernels, then without graphs."""
        return replace(self, kernels=False) if self.kernels else replace(self, graph=False)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= MIN_CAPABILITY else torch.float16


def choose_rung(model: CSM, batch_sizes: Sequence[int] = (1,), progress: bool = False) -> Rung:
    """The highest rung that passes all checks for these batch sizes. Call it before the first capture.

    What fails stays off on the model's device, for other models and batch sizes too. Kernels are switched off here; the
    caller captures if ``graph`` is true. The first call compiles the kernels, which takes tens of seconds: ``progress``
    shows a bar. ``CSM_OPS`` and ``CSM_NO_GRAPH`` limit the rungs, and ``CSM_SELFCHECK=0`` skips the checks.
    """
    with _lock:
        highest = _highest_rung(model)
        if highest == Rung(kernels=False, graph=False) or os.environ.get("CSM_SELFCHECK") == "0":
            return highest
        key = _key(model, batch_sizes, highest)
        if key not in _chosen:
            passed = read_results().get(key, {}).get("rung") == asdict(highest)
            _chosen[key] = highest if passed else _check(model, batch_sizes, highest, key, progress)
            _chosen[_key(model, batch_sizes, _highest_rung(model))] = _chosen[key]
        return _chosen[key]


def _highest_rung(model: CSM) -> Rung:
    """What the device, the environment and earlier failures allow."""
    graph = csm.graph.graphs_enabled(model.device) and model.device not in _without_graphs
    return Rung(use_kernels(model.codebook0_head, 1), graph)


def fall_back(device: torch.device, rung: Rung, reason: str) -> Rung:
    """The next lower rung, with a FallbackWarning. For failures that only show after ``choose_rung``, too."""
    lower = rung.lower
    enable_kernels(device, lower.kernels)
    if not lower.graph:
        _without_graphs.add(device)
    message = f"{reason}. Frames on {device} are computed by {lower} instead, which is slower"
    warnings.warn(message, FallbackWarning, stacklevel=2)
    return lower


def _check(model: CSM, batch_sizes: Sequence[int], rung: Rung, key: str, progress: bool) -> Rung:
    """Go down from ``rung`` to the first that passes its checks, and save the result."""
    failures = []
    while rung.kernels or rung.graph:
        failure = _kernel_failure(model, batch_sizes, progress) if rung.kernels else None
        if failure is None and rung.graph:
            failure = _graph_failure(model, batch_sizes)
        if failure is None:
            break
        failures.append(failure)
        rung = fall_back(model.device, rung, failure)
    _save_result(key, {"rung": asdict(rung), "failures": failures})
    return rung


def _kernel_failure(model: CSM, batch_sizes: Sequence[int], progress: bool) -> str | None:
    """What is wrong with the kernels, or None."""
    failure = launch_failure(model.device, model.dtype)
    if failure is not None:
        return failure
    hidden = None if progress else True  # None hides the bar where stderr is not a terminal
    with torch.inference_mode():
        checks = list(op_checks(model, batch_sizes))
        for check in tqdm(checks, desc="Compiling and checking kernels", unit="op", leave=False, disable=hidden):
            failure = _op_failure(check, model)
            if failure is not None:
                return failure
    return None


def launch_failure(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels cannot be launched on a device, or None. Launches one."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        capability, needed = torch.cuda.get_device_capability(device), MIN_CAPABILITY
        return "the GPU has compute capability {}.{}, and the kernels need {}.{}".format(*capability, *needed)
    try:
        probe(device, dtype)
    except Exception as error:  # noqa: BLE001 (compiler, driver, Triton and CUDA raise errors of many classes)
        return f"a Triton kernel cannot be launched: {_summary(error)}{missing_build_tools()}"
    return None


def probe(device: torch.device, dtype: torch.dtype) -> None:
    """Launch one small kernel. Raises what Triton or CUDA raise."""
    x_BTD = torch.ones(1, 1, 16, device=device, dtype=dtype)
    linear_add(x_BTD, torch.ones(16, 16, device=device, dtype=dtype), residual_BTD=x_BTD)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def missing_build_tools() -> str:
    """A hint if Triton's launcher cannot be built, else an empty string."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return " (Triton needs a C compiler: install gcc or clang, or set CC)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return " (Triton needs Python.h: install Python's development headers)"
    return ""


def _op_failure(check: Check, model: CSM) -> str | None:
    """How an op's kernels differ from its reference, or None if within the tolerance."""
    try:
        actual = check.run()
    except Exception as error:  # noqa: BLE001 (see _kernel_failure)
        return f"the kernel of {check.name} raises {_summary(error)}"
    with _reference_ops(model.device):
        expected = check.run()
    tolerance = TOLERANCES[model.dtype]
    difference = max(relative_error(own, other) for own, other in zip(actual, expected, strict=True))
    if difference <= tolerance:
        return None
    return f"the kernel of {check.name} differs from its reference by {difference:.2g} (tolerance {tolerance:g})"


@contextmanager
def _reference_ops(device: torch.device) -> Iterator[None]:
    """PyTorch ops on this device for a while."""
    enable_kernels(device, False)
    try:
        yield
    finally:
        enable_kernels(device, True)


# --- a captured frame -------------------------------------------------------------------------------------------------


def _graph_failure(model: CSM, batch_sizes: Sequence[int]) -> str | None:
    """How a captured frame differs from an eager one, or None."""
    model.precompute_depth_qkv()  # as for the frames that will be captured
    for batch in sorted(set(batch_sizes)):
        with torch.inference_mode():
            state = _random_state(model, batch)
            saved = {name: buffer.clone() for name, buffer in state.buffers().items()}
        step = partial(decode_frame, model, state, MIN_CONTEXT_BUCKET)
        try:
            graph = Graph(step, state.buffers, model.device)
        except Exception as error:  # noqa: BLE001 (see _kernel_failure)
            return f"a frame of batch {batch} cannot be captured: {_summary(error)}"
        for temperature in TEMPERATURES:
            codes_BK = []
            for run in (step, graph.replay):
                with torch.inference_mode():
                    for name, buffer in state.buffers().items():
                        buffer.copy_(saved[name])
                    state.temperature_B.fill_(temperature)
                run()
                codes_BK.append(state.codes_BK.clone())
            different = int((codes_BK[0] != codes_BK[1]).sum())
            if different:
                return (
                    f"a captured frame of batch {batch} at temperature {temperature:g} differs from the eager one in "
                    f"{different} of {codes_BK[0].numel()} codes"
                )
    return None


def _random_state(model: CSM, batch: int) -> FrameState:
    """Slots in the middle of a request, with random keys and values."""
    random, config = RandomTensors(model), model.config
    state = FrameState.allocate(config, batch, model.device, model.dtype, MIN_CONTEXT_BUCKET)
    for cache_LBGSd in (state.backbone_cache.k_LBGSd, state.backbone_cache.v_LBGSd):
        cache_LBGSd.copy_(random.normal(*cache_LBGSd.shape))
    state.pending_row_BC[:, :-1] = random.integers(config.codebook_size, batch, config.num_codebooks)
    state.pending_mask_BC[:, :-1] = True
    state.position_B.copy_(random.integers(state.backbone_cache.max_positions // 2, batch))
    state.seed_B.copy_(random.integers(2**62, batch))
    state.top_k_B.fill_(min(50, config.codebook_size))
    return state


# --- results ----------------------------------------------------------------------------------------------------------


def results_path() -> Path:
    """Where results are kept between processes."""
    return Path(os.environ.get("CSM_HOME") or Path.home() / ".cache" / "csm") / "selfcheck.json"


def _key(model: CSM, batch_sizes: Sequence[int], rung: Rung) -> str:
    """What a result depends on. The rest is in the model's config and its weights' kinds."""
    kinds = [getattr(weight.value, "kind", "dense") for weight in quantized_weights(model)]
    shapes = hashlib.sha256(repr((model.config, kinds)).encode()).hexdigest()[:12]
    batches = ",".join(map(str, sorted(set(batch_sizes))))
    parts = (
        _device_name(model.device),
        _versions(),
        f"model {shapes}",
        f"{model.dtype!s} {describe(model)}".rstrip(),
        f"batch {batches}",
        str(rung),
    )
    return " | ".join(parts)


@cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    driver = Path("/sys/module/nvidia/version")
    version = driver.read_text().strip() if driver.is_file() else str(driver_version())
    return f"{torch.cuda.get_device_name(device)} | driver {version}"


@cache
def _versions() -> str:
    """Versions of PyTorch and Triton, and a hash of this package's code."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    folders = (Path(__file__).parent, Path(csm.kernels.__file__).parent)
    files = sorted(path for folder in folders for path in (*folder.glob("*.py"), *folder.glob("*.json")))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return f"torch {torch.__version__} | triton {triton} | csm {digest}"


def read_results() -> dict[str, dict]:
    """All saved results; none if the file is missing or damaged, since checking again repairs it."""
    try:
        results = json.loads(results_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def _save_result(key: str, result: dict) -> None:
    """Add a result to the file. Failed checks are saved for the record only: the next process checks again."""
    path = results_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps({**read_results(), key: result}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        message = f"{path}: cannot save the result of the self-check, so the next process repeats it: {error.strerror}"
        warnings.warn(message, stacklevel=2)


def _summary(error: Exception) -> str:
    """An error's type and message in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
