"""PTX text -> `Kernel`: parameters, registers, shared variables, and instructions cut into blocks
at every place where lanes may part or meet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .refusal import Refused

_COMMENT = re.compile(r"//.*")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)((?:\s+\.(?!b8)\w+(?:\s+\d+)?)*)\s+([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+\d+\s+(\d+))?")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_LABEL = re.compile(r"^([\w$]+):\s*")
_GUARD = re.compile(r"^@(!?)(%\w+)\s+")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+([\w$]+)")
_OPERANDS = re.compile(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+)\s*(?:,|$)")

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
SHARED_START = 1024  # as on an H100, where the system keeps the first kilobyte: an address of zero is nobody's
_BRANCHES = ("bra", "ret", "exit")
_MEETINGS = ("bar", "barrier", "shfl", "vote", "ldmatrix", "stmatrix")


def size_of(kind: str) -> int:
    """Bytes of a type such as "u32"."""
    return BYTES[re.sub(r"\D", "", kind)]


@dataclass
class Instruction:
    number: int
    text: str
    guard: str  # a predicate's name or ""
    negated: bool
    parts: tuple[str, ...]  # of the opcode
    operands: tuple[str, ...]
    line: int  # in the PTX text, from 1
    source: tuple[str, int, int] | None  # file, line, and the line that what stands there was put into, or 0

    @property
    def name(self) -> str:
        return ".".join(self.parts)


@dataclass
class Block:
    """Instructions that the same lanes run one after the other. One at which lanes wait for each
    other comes first or not at all.
    """

    first: int
    instructions: list[Instruction]

    @property
    def meets(self) -> bool:
        return self.instructions[0].parts[0] in _MEETINGS


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  # offset, bytes
    registers: dict[str, str]  # a name, or a prefix where they are numbered -> type
    shared: dict[str, int]  # addresses
    static_shared: int  # bytes
    threads: int  # 0 where the text does not say
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of a block

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)

    def instructions(self) -> list[Instruction]:
        return [one for block in self.blocks for one in block.instructions]

    def type_of(self, register: str) -> str:
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise Refused(f"register {register} is not declared")
        return found


def parse(text: str, name: str) -> Kernel:
    """Kernel ``name`` of a PTX module. Raises `Refused`, naming it, if the module has none."""
    for entry in _ENTRY.finditer(text):
        if entry[1] == name:
            break
    else:
        raise Refused(
            f"the PTX has no kernel {name}: it has {', '.join(m[1] for m in _ENTRY.finditer(text)) or 'none'}"
        )
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", entry[3])
    kernel = Kernel(name, _parameters(entry[2]), {}, {}, 0, int(threads[1]) if threads else 0)
    files = dict(_FILE.findall(text))
    for match in _SHARED.finditer(text):
        _place(kernel, match)
    _body(kernel, text, entry.end(), files)
    return kernel


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found, offset = {}, 0
    for align, kind, _, name, count in _PARAM.findall(text):
        size = size_of(kind) * int(count or 1)
        align = int(align or size_of(kind))
        offset = -(-offset // align) * align
        found[name] = (offset, size)
        offset += size
    return found


def _place(kernel: Kernel, match: re.Match) -> None:
    """Static arrays in order; the dynamic one, whose size the launch gives, after them."""
    dynamic, align, kind, name, count = match.groups()
    align = int(align or size_of(kind))
    start = -(-(SHARED_START + kernel.static_shared) // align) * align
    kernel.shared[name] = start
    if not dynamic:
        kernel.static_shared = start - SHARED_START + size_of(kind) * int(count or 1)


def _statements(text: str, begin: int):
    """(line number, statement) of a kernel's body; a label ends in ":"; directives that end with
    their line are whole lines.
    """
    depth, line, pending = 1, text.count("\n", 0, begin) + 1, ""
    for raw in text[begin:].split("\n"):
        rest = _COMMENT.sub("", raw).strip()
        if rest.startswith((".loc", ".file", ".pragma")):
            yield line, rest.rstrip(";")
            rest = ""
        while rest:
            if not pending and rest[0] in "{}":
                depth += 1 if rest[0] == "{" else -1
                rest = rest[1:].lstrip()
                if depth == 0:
                    return
            elif not pending and (label := _LABEL.match(rest)):
                yield line, label[1] + ":"
                rest = rest[label.end() :]
            else:
                statement, semicolon, rest = rest.partition(";")
                pending = f"{pending} {statement}".strip()
                rest = rest.strip()
                if semicolon:
                    yield line, pending
                    pending = ""
        line += 1


def _body(kernel: Kernel, text: str, begin: int, files: dict[str, str]) -> None:
    source, number, current = None, 0, None
    targets = set(_BRANCH.findall(text))  # other labels are for debuggers

    def start() -> None:
        nonlocal current
        if current is None or current.instructions:
            current = Block(number, [])
            kernel.blocks.append(current)

    start()
    for line, statement in _statements(text, begin):
        if statement.endswith(":"):
            if statement[:-1] not in targets:
                continue
            start()
            kernel.labels[statement[:-1]] = len(kernel.blocks) - 1
        elif location := _LOCATION.match(statement):
            source = (files.get(location[1], location[1]), int(location[2]), int(location[3] or 0))
        elif register := _REGISTER.match(statement):
            for one in register[2].split(","):
                kernel.registers[one.strip().partition("<")[0]] = register[1]
        elif statement and not statement.startswith("."):
            one = _instruction(number, statement, line, source)
            if one.parts[0] in _MEETINGS:
                start()
            current.instructions.append(one)
            number += 1
            if one.parts[0] in _BRANCHES:
                start()
    if not current.instructions:  # a label at the end, or what follows the last return
        current.instructions.append(_instruction(number, "ret", 0, source))


def _instruction(number: int, text: str, line: int, source: tuple[str, int, int] | None) -> Instruction:
    guard = _GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.partition(" ") if " " in rest else rest.partition("\t")
    opcode, _, more = opcode.partition("\t")
    operands = f"{more} {operands}".strip()
    parts = tuple(part for part in opcode.replace("::", ".").split(".") if part)
    return Instruction(
        number, " ".join(text.split()), guard[2] if guard else "", bool(guard and guard[1]), parts,
        tuple(m.strip() for m in _OPERANDS.findall(operands)), line, source,
    )  # fmt: skip


_DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64,
}  # fmt: skip


def dtype_of(kind: str) -> type:
    """NumPy's type of "u32", "pred" and the like."""
    if kind not in _DTYPES:
        raise Refused(f"type .{kind} is not known")
    return _DTYPES[kind]
