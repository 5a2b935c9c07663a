"""What a compiled CUDA kernel consists of, read from its cubin by the tools that Triton ships. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

from dit_rope.rotation.backends.cuda_plan import WARP, Plan

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

REGISTER_FILE = 65_536
# Registers of a warp are given out in steps of this many, warps to four partitions of an SM that share none.
REGISTER_STEP, PARTITIONS = 256, 4
# Threads and blocks that an SM holds: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM_THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "sm_120": 1536}
SM_BLOCKS = {"sm_80": 32, "sm_89": 24, "sm_90": 32, "sm_100": 32, "sm_120": 24}
# Shared bytes of every block that the system keeps for itself and that the tools count.
RESERVED_SHARED = {"sm_80": 0, "sm_89": 0, "sm_90": 1024, "sm_100": 1024, "sm_120": 1024}

_CODE = re.compile(r"\.section\s+\.text\.(\w+)(.*?)(?=\.section\s|\Z)", re.DOTALL)
# For some architectures the tool adds what an instruction waits for, from "&" or "?" on.
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;&?]*?)\s*(?:[&?][^;]*)?;", re.MULTILINE
)
_PARAMETERS = re.compile(r"EIATTR_CBANK_PARAM_SIZE.*?\.short\s+(0x[0-9a-f]+)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its predicate or "", its name with modifiers, its operands as text."""

    predicate: str
    name: str
    operands: str

    @property
    def modifiers(self) -> set[str]:
        """The parts of the name after the first: ``{"E", "EF", "128"}`` of ``LDG.E.EF.128``."""
        return set(self.name.split(".")[1:])

    @property
    def bytes(self) -> int:
        """Bytes that a thread moves by it, of a load or store."""
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[word] for word in self.name.split(".") if word in widths), 4)


@dataclass(frozen=True)
class Resources:
    """What the driver sets aside for a kernel, per thread and, in shared memory, per block."""

    registers: int
    stack: int
    local: int
    shared: int


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel in program order, and the bytes of its parameters."""

    kernel: str
    instructions: tuple[Instruction, ...]
    parameter_bytes: int

    def count(self, holds: Callable[[Instruction], bool]) -> int:
        """How many instructions are of a kind."""
        return sum(map(holds, self.instructions))

    def places(self, holds: Callable[[Instruction], bool]) -> list[int]:
        """Where the instructions of a kind stand."""
        return [place for place, instruction in enumerate(self.instructions) if holds(instruction)]


def is_data_load(instruction: Instruction) -> bool:
    """Whether it reads q or k, which alone are read to be first to leave the caches."""
    return instruction.name.startswith("LDG") and "EF" in instruction.modifiers


def is_store(instruction: Instruction) -> bool:
    """Whether it writes global memory."""
    return instruction.name.startswith(("STG", "ST.", "RED", "ATOM"))


def is_barrier(instruction: Instruction) -> bool:
    """Whether a block meets at it."""
    return instruction.name.startswith("BAR")


def is_local(instruction: Instruction) -> bool:
    """Whether it reads or writes local memory, as spilled registers do."""
    return instruction.name.startswith(("LDL", "STL"))


def resources(cubin: bytes) -> dict[str, Resources]:
    """The resources of every kernel of a cubin, by name."""
    text = _run([triton.knobs.nvidia.cuobjdump.path, "-res-usage"], cubin)
    matches = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: Resources(int(registers), int(stack), int(local), int(shared))
        for name, registers, stack, shared, local in matches
    }


def disassemble(cubin: bytes) -> Code:
    """The code of the one kernel of a cubin.

    Raises:
        ValueError: it holds none or several.
    """
    text = _run([triton.knobs.nvidia.nvdisasm.path, "-ndf"], cubin)
    sections = _CODE.findall(text)
    if len(sections) != 1:
        raise ValueError(f"a cubin must hold one kernel, got {[name for name, _ in sections]}")
    name, section = sections[0]
    instructions = [Instruction(*parts) for parts in _INSTRUCTION.findall(section)]
    parameters = _PARAMETERS.search(text)
    return Code(name, tuple(_without_padding(instructions)), int(parameters[1], 16) if parameters else 0)


def resident_threads(registers: int, threads: int, arch: str) -> int:
    """Threads of whole blocks that an SM holds at once by registers, threads and blocks."""
    of_warp = -(-registers * WARP // REGISTER_STEP) * REGISTER_STEP
    warps = REGISTER_FILE // PARTITIONS // of_warp * PARTITIONS
    warps = min(warps, SM_THREADS[arch] // WARP)
    return min(warps // (threads // WARP), SM_BLOCKS[arch]) * threads


def data_accesses(plan: Plan) -> int:
    """Loads of q and k that a thread makes, and stores, as the plan has it."""
    rows = sum(-(-heads // plan.rows) for heads in plan.heads)
    return rows * (2 if plan.half else 1) * (plan.chunk * plan.data.itemsize // plan.access)


def _without_padding(instructions: list[Instruction]) -> Iterable[Instruction]:
    """What stands before the endless branch and the NOPs that fill up a kernel's last cache line."""
    end = len(instructions)
    while end and instructions[end - 1].name == "NOP":
        end -= 1
    return instructions[: end - 1] if end and instructions[end - 1].name == "BRA" else instructions[:end]


def _run(command: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stdout
