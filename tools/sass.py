"""Reads NVIDIA machine code: resources, instructions and loops of the kernels in a cubin. Needs no
GPU: the tools come with the triton wheel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # "MUFU.EX2"
    text: str  # the whole line, predicate and operands included
    target: int | None  # of a branch


@dataclass
class Loop:
    """Instructions from a branch's target to the branch back to it."""

    first: int
    last: int
    own: list[Instruction] = field(default_factory=list)  # those of no loop inside
    inner: list[Loop] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        """Own instructions whose opcode begins with ``opcode``."""
        return sum(i.opcode.startswith(opcode) for i in self.own)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes a thread: spilled registers and arrays with computed indices
    local: int


@cache
def find(tool: str) -> str:
    """Path of "cuobjdump" or "nvdisasm": the triton wheel's, else PATH's. Raises FileNotFoundError,
    saying what to install.
    """
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / tool
        if path.exists():
            return str(path)
    path = shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} is neither in the triton wheel nor on PATH: pip install triton")
    return path


def listing(cubin: bytes) -> str:
    """nvdisasm's text with the source line of each instruction, where ``cubin`` was compiled with
    -lineinfo, and what it was put into.
    """
    return _run("nvdisasm", "-gi", cubin, "-c")


def _run(tool: str, option: str, cubin: bytes, *more: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([find(tool), option, *more, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of ``cubin`` takes, by its name."""
    found = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _run("cuobjdump", "-res-usage", cubin)
    )
    return {name: Resources(int(registers), int(stack), int(local)) for name, registers, stack, local in found}


_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(\S+?)(?:\s.*)?;")


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in ``cubin``, in order."""
    lines: dict[str, list[tuple[int, str, str]]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    kernel = ""
    for line in _run("nvdisasm", "-c", cubin).splitlines():
        if section := _SECTION.match(line):
            kernel = section[1]
            lines[kernel] = []
        elif label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            lines[kernel].append((address, found[2], line.strip()))
    return {
        name: [Instruction(a, op, text, _target(op, text, labels)) for a, op, text in found]
        for name, found in lines.items()
    }


def _target(opcode: str, text: str, labels: dict[str, int]) -> int | None:
    label = re.search(r"`\((\.L_\w+)\)", text)
    return labels.get(label[1]) if opcode.startswith("BRA") and label else None


def atomics(instructions: list[Instruction]) -> list[str]:
    """Opcodes of atomic operations, with and without a result, in order: "ATOMG.E.ADD.STRONG.GPU"
    adds 32-bit integers, of floats it is ADD.F32.
    """
    return [i.opcode for i in instructions if i.opcode.startswith(("RED.", "REDG.", "REDS.", "ATOM"))]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """The outermost loops of one kernel, those inside within them. The branch to itself that ends a kernel is none."""
    spans: dict[int, int] = {}
    for i in instructions:
        if i.target is not None and i.target < i.address:
            spans[i.target] = max(spans.get(i.target, 0), i.address)
    outermost: list[Loop] = []
    stack: list[Loop] = []
    for i in instructions:
        while stack and i.address > stack[-1].last:
            stack.pop()
        if i.address in spans:
            loop = Loop(i.address, spans[i.address])
            (stack[-1].inner if stack else outermost).append(loop)
            stack.append(loop)
        if stack:
            stack[-1].own.append(i)
    return outermost
