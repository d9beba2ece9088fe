"""Whether an op uses its Triton kernels, and how they are launched and recorded.

An op's wrapper asks ``use_kernels``, then either launches its kernels or runs its PyTorch reference. A GPU uses kernels
unless ``csm.selfcheck`` has found that it cannot. ``CSM_OPS`` overrides the choice: ``reference`` means PyTorch
everywhere; ``triton`` means kernels on any device (a CPU needs ``TRITON_INTERPRET=1``; on the meta device launches are
recorded and nothing runs).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm.kernels.quantized import Weight


@cache
def driver_version() -> int:
    """The CUDA version of the installed driver, such as 12030 for 12.3. Raises OSError if there is no driver."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    version = ctypes.c_int()
    status = driver.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        raise OSError(f"cuDriverGetVersion failed with status {status}")
    return version.value


def needs_triton() -> bool:
    """Whether to import Triton, which takes 50 MB: with a driver of NVIDIA's, or where an environment variable says so.

    ``CSM_TRITON=1`` is for those who record or compile kernels without a GPU.
    """
    if os.environ.get("CSM_TRITON") == "1" or os.environ.get("CSM_OPS") == "triton":
        return True
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        return True
    try:
        return driver_version() > 0
    except OSError:
        return False


try:
    if not needs_triton():
        raise ImportError
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, num_warps
except ImportError:  # some builds of PyTorch come without Triton; every op then runs its reference
    triton = tl = gdc_launch_dependents = gdc_wait = num_warps = None

MAX_ROWS = 64  # above this the step is compute-bound rather than bound by reading weights, and cuBLAS is faster
DEFAULT_STAGES = 3  # blocks that a pipelined loop has in flight: Triton's own default
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PDL_CAPABILITY = (9, 0)  # programmatic dependent launch needs Hopper or later
PDL_DRIVER = 12030  # CUDA 12.3: the first driver whose graphs keep programmatic dependencies
# Raised by a launch configuration that exceeds the GPU's registers or shared memory.
COMPILE_ERRORS: tuple[type[Exception], ...] = ()
if triton is not None:
    COMPILE_ERRORS = (TritonError,)

# Triton's interpreter stores bfloat16 as integers and cannot multiply it: kernels cast to float32 there.
INTERPRETED = triton and tl.constexpr(bool(triton.knobs.runtime.interpret))


if INTERPRETED:

    def num_warps() -> int:
        """Of a program; the interpreter has one."""
        return 1


def constexpr(value: Any) -> Any:
    """A module's constant that kernels may use."""
    return value if triton is None else tl.constexpr(value)


def constexpr_function(function: Callable[..., Any]) -> Any:
    """A function of compile-time constants that kernels may call."""
    return function if triton is None else triton.constexpr_function(function)


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid, its arguments by name, and Triton's num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def args(self) -> tuple[Any, ...]:
        """The run-time arguments, in the kernel's order. They come before its compile-time constants."""
        constants = _constant_names(self.kernel)
        return tuple(self.arguments[name] for name in self.kernel.arg_names if name not in constants)

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time constants, without PDL, which depends on the GPU."""
        constants = _constant_names(self.kernel)
        return {name: value for name, value in self.arguments.items() if name in constants}


@cache
def _constant_names(kernel: Any) -> frozenset[str]:
    return frozenset(name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind))


_observers: list[list[Launch]] = []
_disabled: set[torch.device] = set()


def jit(*args: Any, **options: Any) -> Any:
    """``triton.jit``, or the plain function if Triton is missing."""
    if triton is not None:
        return triton.jit(*args, **options)
    return args[0] if args else lambda kernel: kernel


def use_kernels(x: Weight, num_rows: int) -> bool:
    """Whether an op on ``num_rows`` rows of ``x`` launches kernels. ValueError if ``CSM_OPS`` has no known value."""
    forced = os.environ.get("CSM_OPS", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"CSM_OPS must be 'reference' or 'triton', not {forced!r}")
    supported = triton is not None and torch.version.hip is None and x.dtype in DTYPES and num_rows <= MAX_ROWS
    return supported and forced != "reference" and (x.is_cuda or forced == "triton") and x.device not in _disabled


def enable_kernels(device: torch.device, enabled: bool) -> None:
    """Whether ops on ``device`` may launch kernels (the default). ``csm.selfcheck`` disables them where they fail."""
    (_disabled.discard if enabled else _disabled.add)(device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def gpu_arch(device: torch.device) -> str:
    """The architecture that launch configurations are tuned for, such as ``sm_90``; a CPU's is ``cpu``."""
    return "sm_{}{}".format(*_capability(device)) if device.type == "cuda" else device.type


@cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels on this device use programmatic dependent launch."""
    if device.type != "cuda" or _capability(device) < PDL_CAPABILITY:
        return False
    return driver_version() >= PDL_DRIVER


def launch(
    kernel: Any,
    grid: Sequence[int],
    *,
    num_warps: int = 4,
    num_stages: int = DEFAULT_STAGES,
    dependent: bool = True,
    **arguments: Any,
) -> None:
    """Launch a kernel on the device of its tensors. Every argument is passed by the name of its parameter.

    From Hopper on, with a driver of CUDA 12.3 or later, kernels use programmatic dependent launch: a kernel may start
    before its predecessor has ended, and waits (``gdc_wait``) before it reads anything that an earlier kernel writes.
    ``CSM_PDL=0`` turns this off. A kernel releases its successor before it waits itself, so several kernels may be in
    flight. Therefore a kernel must not read before its wait what such a kernel writes. A kernel that
    is not ``dependent`` starts when all earlier kernels have ended, as PyTorch's do, and releases no other early.
    """
    for recorded in _observers:
        recorded.append(Launch(kernel, tuple(grid), arguments, num_warps, num_stages))
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    pdl = dependent and supports_pdl(device) and os.environ.get("CSM_PDL") != "0"
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    options |= {"launch_pdl": True} if pdl else {}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton uses the current device
        kernel[tuple(grid)](**arguments, PDL=pdl, **options)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Record every launch in the block, in order. The record keeps the tensors alive."""
    recorded: list[Launch] = []
    _observers.append(recorded)
    try:
        yield recorded
    finally:
        _observers.pop()  # not remove(): lists with equal contents compare equal


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def row_stride(x_BTD: Tensor) -> int:
    """Elements between consecutive rows of ``x`` seen as (B * T, D). ValueError if the rows are unevenly spaced."""
    batch, rows, dim = x_BTD.shape
    stride = x_BTD.stride(1) if rows > 1 else x_BTD.stride(0)
    if x_BTD.stride(2) != 1 or (batch > 1 and rows > 1 and x_BTD.stride(0) != rows * stride):
        raise ValueError(f"rows of shape {tuple(x_BTD.shape)} are not evenly spaced: strides {x_BTD.stride()}")
    return stride if batch * rows > 1 else dim
