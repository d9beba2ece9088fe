"""What a kernel becomes on a GPU that need not be here: compiled, and read. ``make kernels`` shows a frame's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from csm.bench.launches import frame_launches
from csm.bench.report import table
from csm.config import CSMConfig
from csm.kernels.launch import Launch, triton

GPU_ARCHS = (80, 89, 90, 120)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Compiled(NamedTuple):
    """One kernel for one GPU architecture.

    ``load_bits`` is the widest load; ``early_bytes`` are the bytes of 128-bit loads that a program issues before it
    waits for the previous kernel.
    """

    kernel: str
    constants: str
    gpu_arch: int
    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    load_bits: int
    early_bytes: int


def distinct(launches: list[Launch]) -> Iterator[Launch]:
    """One launch of every kind that is compiled on its own."""
    seen = set()
    for launch in launches:
        multiples = tuple(_sixteenfold(value) for value in launch.args)
        types = tuple(signature(launch).items())
        kind = (launch.name, types, multiples, tuple(launch.constants.items()), launch.num_warps)
        if kind not in seen:
            seen.add(kind)
            yield launch


def signature(launch: Launch) -> dict[str, str]:
    """Triton's types of the arguments; what it would make a constant is one."""
    types = {}
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "constexpr" if value == 1 and name not in fixed_types(launch) else "i32"
    return types


def fixed_types(launch: Launch) -> set[str]:
    """Arguments whose values Triton is told not to look at."""
    return {
        name if isinstance(name, str) else launch.kernel.arg_names[name] for name in launch.kernel.do_not_specialize
    }


def _sixteenfold(value: Any) -> bool:
    """Whether Triton would know that an address or a number is a multiple of 16."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile_for(launch: Launch, gpu_arch: int) -> Any:
    """A launch's kernel for one GPU architecture. Storages begin at multiples of 16 bytes, as PyTorch's do."""
    types, pdl = signature(launch), gpu_arch >= 90
    constants = {"PDL": pdl, **launch.constants}
    attributes = {}
    for index, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if types[name] == "constexpr":
            constants[name] = value
        elif name not in fixed_types(launch) and _sixteenfold(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(launch.kernel, types, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", gpu_arch, 32)
    options = {"num_warps": launch.num_warps, **({"launch_pdl": True} if pdl else {})}
    return triton.compile(source, target=target, options=options)


def examine(launch: Launch, gpu_arch: int) -> Compiled:
    """Compile, and read what came out."""
    compiled = compile_for(launch, gpu_arch)
    ptx = compiled.asm["ptx"]
    early, _, _ = ptx.rpartition("griddepcontrol.wait")
    said = assembler_report(ptx, gpu_arch)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items() if name != "EPS")
    registers = re.search(r"Used (\d+) registers", said)
    assert registers and spills, said
    return Compiled(
        kernel=launch.name,
        constants=constants,
        gpu_arch=gpu_arch,
        programs=torch.Size(launch.grid).numel(),
        num_warps=launch.num_warps,
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=sum(spills),
        load_bits=max(load_widths(ptx), default=0),
        early_bytes=16 * 32 * launch.num_warps * load_widths(early).count(128),
    )


def assembler_report(ptx: str, gpu_arch: int) -> str:
    """What ptxas says of a kernel's resources."""
    ptxas = triton.knobs.nvidia.ptxas.path
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch, ptx[:300]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch[1]}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def load_widths(ptx: str) -> list[int]:
    """Bits of every load from memory that stands in the code."""
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)(\S*)(?: \[[^]]*\], \[[^]]*\], (\w+))?", ptx)
    widths = []
    for suffix, copied in loads:
        parts = re.search(r"(?:\.v(\d))?\.[bufs](\d+)$", suffix)
        if parts:
            widths.append(int(parts[1] or 1) * int(parts[2]))
        elif copied:
            widths.append(8 * int(copied, 0))
    return widths


def compiled_kernels(
    config: CSMConfig,
    batches: Sequence[int],
    dtype: torch.dtype,
    quiet: bool,
    gpu_archs: Sequence[int] = GPU_ARCHS,
) -> list[Compiled]:
    """Every kernel of a frame at these batch sizes, compiled for every GPU architecture."""
    seen = [launch for batch in batches for launch in frame_launches(config, batch, dtype)]
    jobs = [(launch, gpu_arch) for launch in distinct(seen) for gpu_arch in gpu_archs]
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda job: examine(*job), jobs)
        return list(tqdm(done, total=len(jobs), unit="kernel", disable=quiet, leave=False))


def kernels_report(
    config: CSMConfig, batches: Sequence[int], dtype: torch.dtype, quiet: bool
) -> tuple[str, dict[str, Any]]:
    """The table of compiled kernels: Markdown, and the same for JSON."""
    rows = [kernel._asdict() for kernel in compiled_kernels(config, batches, dtype, quiet)]
    return table(rows), {"kernels": rows, "spilled": [row for row in rows if row["spilled_bytes"]]}
