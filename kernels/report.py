"""What a kernel becomes on a GPU that need not be here: compiled, and read. ``make kernels`` shows a frame's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm.kernels.launch import Launch, triton

FAMILIES = (80, 89, 90, 120)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Compiled(NamedTuple):
    """One kernel for one family. ``load_bits`` is the widest load; ``early_bits`` the widest before the wait."""

    kernel: str
    constants: str
    family: int
    programs: int
    num_warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    load_bits: int
    early_bits: int


def distinct(launches: list[Launch]) -> Iterator[Launch]:
    """One launch of every kind that is compiled on its own."""
    seen = set()
    for launch in launches:
        kind = (launch.name, tuple(signature(launch).items()), tuple(launch.constants.items()), launch.num_warps)
        if kind not in seen:
            seen.add(kind)
            yield launch


def signature(launch: Launch) -> dict[str, str]:
    """Triton's types of the arguments; what it would make a constant is one."""
    types = {}
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "constexpr" if value == 1 else "i32"
    return types


def compile_for(launch: Launch, family: int) -> Any:
    """A launch's kernel for one family. Tensors lie at multiples of 16 bytes, as PyTorch's do."""
    types, pdl = signature(launch), family >= 90
    constants = {"PDL": pdl, **launch.constants}
    attributes = {}
    for index, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.args, strict=False)):
        if types[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name != "codebook"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(launch.kernel, types, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", family, 32)
    options = {"num_warps": launch.num_warps, **({"launch_pdl": True} if pdl else {})}
    return triton.compile(source, target=target, options=options)


def examine(launch: Launch, family: int) -> Compiled:
    """Compile, and read what came out."""
    compiled = compile_for(launch, family)
    ptx = compiled.asm["ptx"]
    early, _, _ = ptx.rpartition("griddepcontrol.wait")
    said = assembler_report(ptx, family)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    constants = " ".join(f"{name}={value}" for name, value in launch.constants.items() if name != "EPS")
    registers = re.search(r"Used (\d+) registers", said)
    assert registers and spills, said
    return Compiled(
        kernel=launch.name,
        constants=constants,
        family=family,
        programs=torch.Size(launch.grid).numel(),
        num_warps=launch.num_warps,
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=sum(spills),
        load_bits=widest_load(ptx),
        early_bits=widest_load(early),
    )


def assembler_report(ptx: str, family: int) -> str:
    """What ptxas says of a kernel's resources."""
    ptxas = triton.knobs.nvidia.ptxas.path
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch, ptx[:300]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch[1]}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def widest_load(ptx: str) -> int:
    """Bits of the widest load from memory, 0 without any."""
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)(\S*)(?: \[[^]]*\], \[[^]]*\], (\w+))?", ptx)
    widths = [0]
    for suffix, copied in loads:
        parts = re.search(r"(?:\.v(\d))?\.[bufs](\d+)$", suffix)
        if parts:
            widths.append(int(parts[1] or 1) * int(parts[2]))
        elif copied:
            widths.append(8 * int(copied, 0))
    return max(widths)
