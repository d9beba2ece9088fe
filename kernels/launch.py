"""Where Triton kernels run, how they are launched, and how many were.

An op's wrapper asks ``kernels_run`` and either launches its kernels or falls back on its reference. ``CSM_OPS`` forces
the choice: ``reference`` for PyTorch everywhere, ``triton`` for kernels on any device (on a CPU they need
``TRITON_INTERPRET=1``; on the meta device nothing runs, and launches are only counted).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # not every build of PyTorch has it: then no kernel is ever launched
    triton = tl = gdc_launch_dependents = gdc_wait = None

MAX_ROWS = 64  # beyond, a step is no longer bound by its weights, and PyTorch's own products win
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PDL_CAPABILITY = (9, 0)  # programmatic dependent launch: Hopper and later
# What a launch shape that does not fit a GPU raises.
COMPILE_ERRORS: tuple[type[Exception], ...] = ()
if triton is not None:
    COMPILE_ERRORS = (TritonError,)

# Triton's interpreter keeps bfloat16 as integers, which it cannot multiply: there a kernel's products are float32.
INTERPRETED = triton and tl.constexpr(bool(triton.knobs.runtime.interpret))


class Launch(NamedTuple):
    """One launch: the kernel, how many programs, its arguments by position, and the constants of its compilation."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


_observers: list[list[Launch]] = []


def jit(*args: Any, **options: Any) -> Any:
    """``triton.jit``, or nothing where there is no Triton."""
    if triton is not None:
        return triton.jit(*args, **options)
    return args[0] if args else lambda kernel: kernel


def kernels_run(x: Tensor, num_rows: int) -> bool:
    """Whether ops on so many rows of ``x`` launch kernels."""
    forced = os.environ.get("CSM_OPS", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"CSM_OPS must be 'reference' or 'triton', not {forced!r}")
    fit = triton is not None and torch.version.hip is None and x.dtype in DTYPES and num_rows <= MAX_ROWS
    return fit and forced != "reference" and (x.is_cuda or forced == "triton")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def gpu_arch(device: torch.device) -> str:
    """The GPU architecture that a launch configuration is tuned for: ``sm_90``, say."""
    return "sm_{}{}".format(*_capability(device)) if device.type == "cuda" else device.type


def launch(kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor.

    On GPUs that can, it may start before the kernel ahead of it has ended (programmatic dependent launch): ``PDL``
    tells the kernel to wait before it reads what others write. ``CSM_PDL=0`` leaves that out. Since every kernel lets
    the next one start before it waits, several may be under way: what one reads before its wait, no kernel launched
    here may write. (The frame counter is advanced by a plain PyTorch op, which begins when all is done.)
    """
    for seen in _observers:
        seen.append(Launch(kernel, tuple(grid), args, constants, num_warps))
    device = args[0].device
    if device.type == "meta":
        return
    pdl = device.type == "cuda" and _capability(device) >= PDL_CAPABILITY and os.environ.get("CSM_PDL") != "0"
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
        kernel[tuple(grid)](*args, PDL=pdl, num_warps=num_warps, **options, **constants)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched meanwhile, in order. Keeps its tensors alive."""
    seen: list[Launch] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.pop()  # by place: lists that hold the same are equal


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def row_stride(x_BTD: Tensor) -> int:
    """Elements from one row to the next, where the rows (B * T, D) of ``x`` lie evenly; raises where they don't."""
    batch, rows, dim = x_BTD.shape
    stride = x_BTD.stride(1) if rows > 1 else x_BTD.stride(0)
    if x_BTD.stride(2) != 1 or (batch > 1 and rows > 1 and x_BTD.stride(0) != rows * stride):
        raise ValueError(f"rows of shape {tuple(x_BTD.shape)} do not lie evenly: strides {x_BTD.stride()}")
    return stride if batch * rows > 1 else dim
