"""What a kernel compiles to: its machine code (SASS), read for GPUs that need not be here. ``make kernels`` prints it.

Triton compiles a kernel for any GPU architecture and its wheel brings ``nvdisasm`` and ``cuobjdump``. In SASS,
``griddepcontrol.launch_dependents``, the trigger that lets the next kernel start, is PREEXIT, and
``griddepcontrol.wait`` is ACQBULK (seen by compiling both for sm_90 and sm_120). Loads from global memory are LDG, or
LDGSTS into shared memory; LDL and STL are spills.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from csm.bench.launches import frame_launches
from csm.bench.report import table
from csm.config import CSMConfig
from csm.kernels.launch import Launch, triton

GPU_ARCHS = (80, 89, 90, 120)
FP8_ARCH = 89  # the first with fp8
TRIGGER, WAIT = "PREEXIT", "ACQBULK"
WARP = 32
# Multiply-adds that a quarter of a multiprocessor does in a cycle through mma.sync, for integers (IMMA) and for 16-bit
# floats with float32 sums (HMMA): from the dense rates of NVIDIA's data sheets. On Hopper mma.sync reaches about 60 %
# of them (https://arxiv.org/abs/2402.13499), and half is assumed.
MMA_PER_CYCLE = {80: (512, 256), 89: (256, 64), 90: (512, 256), 120: (256, 64)}
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, on every architecture here
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Instruction(NamedTuple):
    """One machine instruction: opcode with its modifiers, and the operands behind it."""

    opcode: str
    operands: tuple[str, ...]

    @property
    def is_load(self) -> bool:
        """From global memory, into registers or into shared memory."""
        return self.opcode.startswith(("LDG", "LDGSTS"))

    @property
    def bits(self) -> int:
        """What one thread loads or stores."""
        sizes = re.findall(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(sizes[-1]) if sizes else 32

    def issue_slots(self, gpu_arch: int) -> int:
        """1; of a product on tensor cores (mma.sync), the cycles for which a warp occupies those of its quarter."""
        shape = re.match(r"([IH])MMA\.(16)(8)(\d+)\b", self.opcode)
        if not shape:
            return 1
        integer, float_ = MMA_PER_CYCLE[gpu_arch]
        return math.prod(int(size) for size in shape.groups()[1:]) // (integer if shape[1] == "I" else float_)

    @property
    def loaded_registers(self) -> set[int]:
        """Registers that a load into registers writes."""
        if not self.opcode.startswith("LDG") or self.opcode.startswith("LDGSTS"):
            return set()
        first = _registers(self.operands[0])
        return {register + i for register in first for i in range(max(1, self.bits // 32))}

    @property
    def named_registers(self) -> set[int]:
        """Every register that an operand names: read, or overwritten, which waits for a load as well."""
        return set().union(*(_registers(operand) for operand in self.operands))


def _registers(operand: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", operand)}


class Compiled(NamedTuple):
    """One kernel for one GPU architecture.

    ``registers`` are of one thread, ``register_file_percent`` is the share of a multiprocessor's file that one program
    takes. ``spills`` counts loads from and stores to local memory. ``load_bits`` is the widest load, ``early_bytes``
    are what a program asks for before it waits for the previous kernel, ``late_bytes`` what it asks for afterwards.
    ``used_before_trigger`` counts loaded registers that an instruction before the trigger needs: the next kernel cannot
    start until they have arrived. ``instructions`` and ``after_wait`` are of one warp, loops counted once; without
    dependent launch (before sm_90) all are after the wait, and nothing is early. ``issue_slots`` are those of the
    instructions after the wait.
    """

    kernel: str
    constants: str
    gpu_arch: int
    programs: int
    num_warps: int
    registers: int
    register_file_percent: float
    shared_bytes: int
    spills: int
    load_bits: int
    early_bytes: int
    late_bytes: int
    used_before_trigger: int
    instructions: int
    after_wait: int
    issue_slots: int


def distinct(launches: list[Launch]) -> Iterator[Launch]:
    """One launch of every kind that is compiled on its own."""
    seen = set()
    for launch in launches:
        if kind(launch) not in seen:
            seen.add(kind(launch))
            yield launch


def kind(launch: Launch) -> tuple[Any, ...]:
    """What a kernel is compiled for: launches of the same kind share their machine code."""
    multiples = tuple(_sixteenfold(value) for value in launch.args)
    types = tuple(signature(launch).items())
    return launch.name, types, multiples, tuple(launch.constants.items()), launch.num_warps, launch.num_stages


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
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options |= {"launch_pdl": True} if pdl else {}
    return triton.compile(source, target=target, options=options)


def examine(launch: Launch, gpu_arch: int) -> Compiled:
    """Compile a launch's kernel for one GPU architecture, and read its machine code."""
    compiled = compile_for(launch, gpu_arch)
    cubin = compiled.asm["cubin"]
    registers = register_count(cubin)
    code = instructions(disassemble(cubin))
    wait = next((index for index, one in enumerate(code) if one.opcode == WAIT), 0)
    threads = WARP * launch.num_warps
    loads = [one.bits for one in code if one.is_load]
    early = [one.bits for one in code[:wait] if one.is_load]
    return Compiled(
        kernel=launch.name,
        constants=" ".join(f"{name}={value}" for name, value in launch.constants.items() if name != "EPS"),
        gpu_arch=gpu_arch,
        programs=torch.Size(launch.grid).numel(),
        num_warps=launch.num_warps,
        registers=registers,
        register_file_percent=100 * allocated_registers(registers, launch.num_warps) / REGISTER_FILE,
        shared_bytes=compiled.metadata.shared,
        spills=sum(one.opcode.startswith(("LDL", "STL")) for one in code),
        load_bits=max(loads, default=0),
        early_bytes=sum(early) // 8 * threads,
        late_bytes=(sum(loads) - sum(early)) // 8 * threads,
        used_before_trigger=used_before_trigger(code),
        instructions=len(code),
        after_wait=len(code) - wait,
        issue_slots=sum(one.issue_slots(gpu_arch) for one in code[wait:]),
    )


def allocated_registers(registers: int, num_warps: int) -> int:
    """Registers that a program occupies: a warp gets them in units of 256 (CUDA occupancy calculator)."""
    return num_warps * -(-registers * WARP // 256) * 256


def register_count(cubin: bytes) -> int:
    """Registers of one thread of the kernel in a cubin."""
    usage = _run_on(cubin, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"\bREG:(\d+)", usage)
    assert found, usage
    return int(found[1])


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as nvdisasm prints it."""
    return _run_on(cubin, triton.knobs.nvidia.nvdisasm.path, "-c")


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel in the order of their addresses, without the padding behind its end."""
    found = []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*)", sass):
        text = re.sub(r"^@!?U?P\w+\s+", "", re.split(r"\s[&?]|;", line.strip())[0].strip())
        opcode, _, operands = text.partition(" ")
        found.append(Instruction(opcode, tuple(part.strip() for part in operands.split(",") if part.strip())))
    while found and found[-1].opcode in ("NOP", "BRA"):  # a branch to itself, then padding
        found.pop()
    return found


def used_before_trigger(code: Sequence[Instruction]) -> int:
    """Loaded registers that are read or overwritten before the trigger; 0 without a trigger.

    A wait for copies into shared memory (DEPBAR) before the trigger counts as one.
    """
    trigger = next((index for index, one in enumerate(code) if one.opcode == TRIGGER), 0)
    in_flight: set[int] = set()
    used: set[int] = set()
    copies = waited = False
    for one in code[:trigger]:
        used |= in_flight & one.named_registers
        in_flight -= used
        in_flight |= one.loaded_registers
        copies |= one.opcode.startswith("LDGSTS")
        waited |= copies and one.opcode.startswith("DEPBAR")
    return len(used) + waited


def compiled_kernels(
    config: CSMConfig,
    batches: Sequence[int],
    dtype: torch.dtype,
    quiet: bool,
    gpu_archs: Sequence[int] = GPU_ARCHS,
    scheme: str | None = None,
) -> list[Compiled]:
    """Every kernel of a frame at these batch sizes, compiled for every GPU architecture that has its instructions."""
    seen = [launch for batch in batches for launch in frame_launches(config, batch, dtype, scheme)]
    jobs = [(launch, gpu_arch) for launch in distinct(seen) for gpu_arch in gpu_archs]
    return examine_all([job for job in jobs if job[0].constants.get("KIND") != "fp8" or job[1] >= FP8_ARCH], quiet)


def examine_all(jobs: Sequence[tuple[Launch, int]], quiet: bool) -> list[Compiled]:
    """``examine`` each launch and architecture, in threads, with a progress bar."""
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda job: examine(*job), jobs)
        return list(tqdm(done, total=len(jobs), unit="kernel", disable=quiet, leave=False))


def kernels_report(
    config: CSMConfig, batches: Sequence[int], dtype: torch.dtype, quiet: bool, scheme: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The table of compiled kernels: Markdown, and the same for JSON."""
    rows = [kernel._asdict() for kernel in compiled_kernels(config, batches, dtype, quiet, scheme=scheme)]
    return table(rows), {"kernels": rows, "spilled": [row for row in rows if row["spills"]]}
