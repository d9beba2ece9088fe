"""GPU, driver and Triton."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from csm.doctor.finding import ERROR, OK, WARNING, Finding
from csm.selfcheck import MIN_CAPABILITY, default_dtype, launch_failure, missing_build_tools

INSTALL = "install a build of PyTorch for {} (https://pytorch.org/get-started/locally)"


@dataclass(frozen=True)
class Device:
    """A GPU. ``architectures`` of the probe say whether PyTorch has code for its compute capability."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class CudaProbe:
    """What PyTorch and the driver say. CUDA versions are (major, minor); None means there is none."""

    built_for: tuple[int, int] | None = None
    rocm: bool = False
    driver: bool = False
    driver_supports: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    architectures: tuple[str, ...] = ()  # of PyTorch's build: "sm_90", or "compute_90" for PTX
    failure: str = ""  # CUDA's message where it cannot be initialised


def probe_cuda() -> CudaProbe:
    """Ask PyTorch and the driver. Initialises CUDA where there is a driver."""
    built_for = _version(torch.version.cuda) if torch.version.cuda else None
    driver = Path("/proc/driver/nvidia/version").is_file() or Path("/dev/nvidiactl").exists()
    supports = driver_version()
    devices: tuple[Device, ...] = ()
    failure = ""
    if built_for and (driver or supports):
        try:
            torch.cuda.init()
            properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            devices = tuple(Device(item.name, (item.major, item.minor), item.total_memory) for item in properties)
        except (RuntimeError, AssertionError) as error:  # PyTorch raises AssertionError for a missing driver
            failure = " ".join(str(error).split())[:200]
    architectures = tuple(torch.cuda.get_arch_list())
    rocm = torch.version.hip is not None
    return CudaProbe(built_for, rocm, driver or bool(supports), supports, devices, architectures, failure)


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver supports, from the driver itself; None without a driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))  # 12080 is 12.8
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def check_gpu(probe: CudaProbe) -> list[Finding]:
    """The driver and each GPU, or why there is none."""
    if probe.rocm:
        message = "this build of PyTorch is for AMD GPUs, where CSM runs in PyTorch ops and is not tested"
        return [Finding("gpu", WARNING, message, "use an NVIDIA GPU, or --device cpu")]
    if not probe.driver:
        return [Finding("gpu", OK, "no NVIDIA driver: frames are generated on the CPU")]
    if probe.built_for is None:
        message = "there is an NVIDIA driver, but this build of PyTorch is for CPUs only"
        return [Finding("gpu", WARNING, message, INSTALL.format("CUDA"))]
    if not probe.devices:
        return [_no_device(probe)]
    return [_check_device(index, device, probe) for index, device in enumerate(probe.devices)]


def _no_device(probe: CudaProbe) -> Finding:
    """Why PyTorch finds no GPU although there is a driver."""
    assert probe.built_for is not None
    supports = probe.driver_supports
    if supports is not None and supports[0] < probe.built_for[0]:
        message = f"the driver supports CUDA {_dotted(supports)}, PyTorch is built for {_dotted(probe.built_for)}"
        return Finding("gpu", WARNING, message, "update the driver, or " + INSTALL.format(f"CUDA {supports[0]}"))
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("gpu", WARNING, "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    message = f"PyTorch finds no GPU, although there is a driver: {probe.failure or 'no device'}"
    return Finding("gpu", WARNING, message, "see whether nvidia-smi lists it; a container needs --gpus all")


def _check_device(index: int, device: Device, probe: CudaProbe) -> Finding:
    major, minor = device.capability
    what = f"cuda:{index}: {device.name}, {device.memory_bytes / 1e9:.0f} GB, {generation(device.capability)}"
    if not has_code(device.capability, probe.architectures):
        newer = f"CUDA {'12.8' if major >= 10 else '12'} or later"
        message = f"{what}; this build of PyTorch has no code for sm_{major}{minor}"
        return Finding("gpu", ERROR, message, INSTALL.format(newer) + ", or use --device cpu")
    if device.capability < MIN_CAPABILITY:
        message = f"{what}; the kernels need {_dotted(MIN_CAPABILITY)}, so PyTorch ops in float16 are used"
        return Finding("gpu", WARNING, message, "nothing to install; a GPU of the Ampere generation or later is faster")
    return Finding("gpu", OK, what)


def generation(capability: tuple[int, int]) -> str:
    """The name of a compute capability's generation: (8, 9) -> "Ada (8.9)"."""
    names = {12: "Blackwell", 11: "Blackwell", 10: "Blackwell", 9: "Hopper", 8: "Ampere"}
    name = (
        "Ada"
        if capability == (8, 9)
        else names.get(capability[0], "older than Ampere" if capability[0] < 8 else "newer")
    )
    return f"{name} ({_dotted(capability)})"


def has_code(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether PyTorch's build runs on a GPU: machine code of its major version, not newer, or PTX of any older one."""
    for name in architectures:
        kind, _, digits = name.rstrip("af").partition("_")
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def check_triton(probe: CudaProbe) -> Finding:
    """Whether kernels can be compiled and launched on the first GPU."""
    if not probe.devices:
        return Finding("triton", OK, "not needed: kernels run on NVIDIA GPUs only")
    if find_spec("triton") is None:
        return Finding(
            "triton", WARNING, "Triton is not installed: PyTorch ops are used, which are slower", "pip install triton"
        )
    missing = missing_build_tools()
    if missing:
        message = f"kernels cannot be compiled{missing}; PyTorch ops are used, which are slower"
        return Finding("triton", WARNING, message, missing.strip(" ()").partition(": ")[2])
    device = torch.device("cuda:0")
    failure = launch_failure(device, default_dtype(device))
    if failure is not None:
        return Finding("triton", WARNING, f"{failure}; PyTorch ops are used", "update the driver, PyTorch and Triton")
    return Finding("triton", OK, "a kernel was compiled and launched")
