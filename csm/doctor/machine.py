"""Python, PyTorch, compilers, cores, memory, disk, and the result of the self-check."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants

from csm.doctor.finding import ERROR, OK, WARNING, Finding, short
from csm.doctor.gpu import CudaProbe
from csm.kernels.native import NativeUnavailableWarning
from csm.kernels.native.ops import is_available, isa
from csm.selfcheck import MIN_CAPABILITY, read_results, results_path
from csm.threads import quota
from csm.weights.hub import MIMI_BYTES, free_bytes, size_in_words

PYTHONS = ((3, 10), (3, 13))  # the oldest and newest supported
OLDEST_TORCH = (2, 9)
# Bytes that a process with CSM-1B takes while it generates on a CPU (docs/log.md, commit 7978761 and before).
NEEDED_BYTES = {"float32": 7.4e9, "bfloat16": 4.2e9}
# Bytes on a GPU with one request, computed: docs/scale.md's memory table (5.5 GB) and the table of q, k and v (189 MB).
GPU_BYTES = 5_700_000_000
DOWNLOAD_BYTES = 6_211_186_784 + MIMI_BYTES  # CSM-1B in Sesame's layout, and Kyutai's codec


def check_python(version: tuple[int, int], executable_is_venv: bool) -> Finding:
    """The interpreter's version."""
    text = f"Python {version[0]}.{version[1]}" + (" in a virtual environment" if executable_is_venv else "")
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Finding("python", OK, text)
    supported = f"Python {PYTHONS[0][0]}.{PYTHONS[0][1]} to {PYTHONS[1][0]}.{PYTHONS[1][1]}"
    status = ERROR if version < PYTHONS[0] else WARNING
    return Finding("python", status, f"{text} is not supported", f"use {supported}")


def check_torch(torch_version: str, torchaudio_version: str | None) -> Finding:
    """PyTorch's version, and torchaudio's, which must be built for the same one."""
    text = f"torch {torch_version}, torchaudio {torchaudio_version or 'missing'}"
    install = f'pip install "torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}" torchaudio, both of the same version'
    if _minor(torch_version) < OLDEST_TORCH:
        return Finding("torch", ERROR, f"{text}: PyTorch is too old", install)
    if torchaudio_version is None or _minor(torch_version) != _minor(torchaudio_version):
        return Finding("torch", ERROR, f"{text}: the two versions differ", install)
    return Finding("torch", OK, text)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_native() -> Finding:
    """Whether the C++ ops can be built. Builds them unless the cache has them."""
    if os.environ.get("CSM_OPS"):
        return Finding("cpu ops", OK, f"PyTorch's, since CSM_OPS={os.environ['CSM_OPS']}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NativeUnavailableWarning)
        available = is_available()
    if available:
        return Finding("cpu ops", OK, f"native C++ ops, compiled for this CPU ({isa()})")
    reason = " ".join(str(caught[0].message).split())[:300] if caught else "the native ops could not be built"
    return Finding("cpu ops", WARNING, reason, "install g++ (Debian, Ubuntu: apt install g++), or set CXX")


@dataclass(frozen=True)
class Cores:
    """Cores of the machine, those that this process may use, PyTorch's threads, and the load of the last minute."""

    total: int
    usable: float
    threads: int
    load: float


def probe_cores() -> Cores:
    """Ask the system. A container's quota counts as fewer usable cores."""
    total = os.cpu_count() or 1
    usable: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    usable = min(usable, quota())
    return Cores(total, usable, torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)


def check_cores(cores: Cores) -> list[Finding]:
    """Threads beside cores, and the load beside both."""
    text = f"{platform.machine()}, {cores.usable:g} of {cores.total} cores usable, {cores.threads} threads"
    threads = Finding("threads", OK, text)
    if cores.threads > cores.usable:
        advice = f"set OMP_NUM_THREADS={max(1, int(cores.usable))}"
        threads = Finding("threads", WARNING, f"{text}: threads wait for each other", advice)
    text = f"{cores.load:.1f} processes were running or waiting in the last minute"
    load = Finding("load", OK, text)
    if cores.load > 0.5 * cores.usable:
        advice = "stop other programs (top lists them), above all before measuring"
        load = Finding("load", WARNING, f"{text}, on {cores.usable:g} cores: generation is slower", advice)
    return [threads, load]


@dataclass(frozen=True)
class Memory:
    """Bytes that a new process can use without swapping; None where the system does not say."""

    available: int | None


def probe_memory() -> Memory:
    """Ask Linux: what is available, at most what is left of a container's limit."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return Memory(None)
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return Memory(available)


def check_memory(memory: Memory) -> Finding:
    """The system's memory beside what CSM-1B needs on a CPU."""
    needs = ", ".join(f"{size_in_words(int(size))} in {dtype}" for dtype, size in NEEDED_BYTES.items())
    if memory.available is None:
        return Finding("memory", OK, f"the system does not say; on a CPU, CSM-1B needs {needs}")
    text = f"{size_in_words(memory.available)} available; on a CPU, CSM-1B needs {needs}"
    if memory.available < NEEDED_BYTES["bfloat16"]:
        return Finding("memory", ERROR, text, "close programs, or use a machine with more memory, or --model tiny")
    if memory.available < NEEDED_BYTES["float32"]:
        return Finding("memory", WARNING, text, "pass --dtype bfloat16: float32 is the default on a CPU")
    return Finding("memory", OK, text)


def check_gpu_memory(probe: CudaProbe) -> list[Finding]:
    """Each GPU's memory beside what CSM-1B needs in its default dtype."""
    findings = []
    for index, device in enumerate(probe.devices):
        dtype = "bfloat16" if device.capability >= MIN_CAPABILITY else "float16"
        needed = GPU_BYTES
        text = (
            f"cuda:{index}: {size_in_words(device.memory_bytes)}; CSM-1B needs about {size_in_words(needed)} in {dtype}"
        )
        if device.memory_bytes < needed:
            findings.append(Finding("gpu memory", WARNING, text, "use --device cpu, or a GPU with more memory"))
        else:
            findings.append(Finding("gpu memory", OK, text))
    return findings


def check_disk(free: int, cached: bool) -> Finding:
    """Free disk for the download, where the hub's cache is."""
    text = f"{size_in_words(free)} free for {short(Path(constants.HF_HUB_CACHE))}"
    if cached:
        return Finding("disk", OK, f"{text}; CSM-1B is already there")
    text = f"{text}; CSM-1B is a download of {size_in_words(DOWNLOAD_BYTES)}"
    if free < DOWNLOAD_BYTES:
        return Finding("disk", ERROR, text, "free some, or set HF_HOME to a folder on a larger disk")
    return Finding("disk", OK, text)


def free_for_download() -> int:
    """Free bytes on the disk of the hub's cache."""
    return free_bytes(Path(constants.HF_HUB_CACHE))


def check_selfcheck() -> Finding:
    """The saved results of the self-check of kernels and graphs, which runs when a GPU is first used."""
    results = read_results()
    if not results:
        return Finding("self-check", OK, "no result yet: kernels and graphs are checked when a GPU is first used")
    failures = [failure for result in results.values() for failure in result.get("failures", [])]
    text = f"{len(results)} results in {short(results_path())}"
    if failures:
        advice = "report it with this file; until then a slower path generates the same codes"
        return Finding("self-check", WARNING, f"{text}; a fast path failed: {failures[-1]}", advice)
    return Finding("self-check", OK, f"{text}; every fast path passed")


def running_python() -> tuple[tuple[int, int], bool]:
    """The interpreter's version, and whether it is a virtual environment's."""
    return sys.version_info[:2], sys.prefix != sys.base_prefix
