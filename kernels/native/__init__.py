"""The ops in C++, for CPUs: compiled on first use by the C++ compiler at hand, and kept in the user's cache.

The library has a C interface and knows nothing of PyTorch or Python, so it takes seconds to compile and needs no
headers but the compiler's own. ``docs/cpu.md`` says more.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("ops.cpp", "pool.h", "product.h", "quantize.h", "sample.h", "simd.h")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-w")
COMPILERS = ("c++", "g++", "clang++")


class NativeUnavailableWarning(UserWarning):
    """The native ops could not be built: PyTorch's are used, which are slower."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled ops, built if need be. None, and a warning, where they cannot be."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or sys.platform == "win32":
        reason = "there is no C++ compiler (tried $CXX, c++, g++ and clang++): install g++"
    else:
        try:
            return ctypes.CDLL(str(build(compiler)))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed:\n{error.stderr}"
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            reason = str(error)
    message = f"CPU ops run in PyTorch, which is slower: {reason}. CSM_OPS=reference chooses that without a warning"
    warnings.warn(message, NativeUnavailableWarning, stacklevel=2)
    return None


def build(compiler: str) -> Path:
    """Compile the library unless the cache has it; its path. Raises CalledProcessError and OSError."""
    flags = [*FLAGS, *_target(), *os.environ.get("CSM_NATIVE_FLAGS", "").split()]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([compiler, version, *flags, _cpu()]).encode())
    for name in SOURCES:
        key.update((HERE / name).read_bytes())
    path = cache_folder() / f"native-{key.hexdigest()[:20]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several processes may build it at once
            built = Path(folder) / path.name
            command = [compiler, *flags, str(HERE / "ops.cpp"), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            built.replace(path)
    return path


def _target() -> list[str]:
    """Compile for this very CPU."""
    return ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native", "-pthread"]


def _cpu() -> str:
    """What tells this CPU from others that share the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def cache_folder() -> Path:
    """``$CSM_HOME``, by default ``~/.cache/csm``."""
    return Path(os.environ.get("CSM_HOME") or Path.home() / ".cache" / "csm")


__all__ = ["NativeUnavailableWarning", "build", "cache_folder", "library"]
