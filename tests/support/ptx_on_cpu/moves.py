"""Moves: of registers, of parts of registers, of bytes, by a predicate, and of addresses between spaces."""

from __future__ import annotations

import numpy as np

from .integers import assign, is_float
from .machine import Machine, opcode
from .parser import Instruction, dtype_of
from .refusal import Unknown


@opcode("selp")
def _select(machine: Machine, one: Instruction):
    kind = one.parts[-1]
    a, b = (machine.registers.read(text, kind) for text in one.operands[1:3])
    which = machine.registers.raw(one.operands[3])
    return assign(machine, one.operands[0], kind, lambda: np.where(which, a, b))


@opcode("mov")
def _move(machine: Machine, one: Instruction):
    to, source, kind = one.operands[0], one.operands[1], one.parts[-1]
    if to.startswith("{"):
        return _unpack(machine, to, source, kind)
    if source.startswith("{"):
        return _pack(machine, to, source, kind)
    if kind != "pred" and not is_float(kind):
        kind = "u" + kind[1:]
    row, value = machine.registers.row(to, kind), machine.registers.read(source, kind)

    def run(mask):
        np.copyto(row, value, where=mask)

    return run


def names_of(vector: str) -> list[str]:
    """ "{%r1, %r2}" -> its registers."""
    return [name.strip() for name in vector.strip("{}").split(",")]


def _unpack(machine: Machine, to: str, source: str, kind: str):
    names = names_of(to)
    part = f"u{int(kind[1:]) // len(names)}"
    whole = machine.registers.read(source, "u" + kind[1:])
    rows = [None if name == "_" else machine.registers.row(name, part) for name in names]

    def run(mask):
        parts = np.ascontiguousarray(whole).view(dtype_of(part))
        for i, row in enumerate(rows):
            if row is not None:
                np.copyto(row, parts[i :: len(rows)], where=mask)

    return run


def _pack(machine: Machine, to: str, source: str, kind: str):
    names = names_of(source)
    part = f"u{int(kind[1:]) // len(names)}"
    parts = [machine.registers.read(name, part) for name in names]
    row = machine.registers.row(to, "u" + kind[1:])

    def run(mask):
        whole = np.empty((machine.lanes, len(parts)), dtype_of(part))
        for i, value in enumerate(parts):
            whole[:, i] = value
        np.copyto(row, whole.view(row.dtype)[:, 0], where=mask)

    return run


@opcode("cvta")
def _generic_address(machine: Machine, one: Instruction):
    """Generic addresses of global memory are global ones; of shared memory they lie in a window of
    their own (memory.WINDOW).
    """
    from .memory import WINDOW

    kind, space = one.parts[-1], next(part for part in one.parts[1:] if part != "to" and part != one.parts[-1])
    a = machine.registers.read(one.operands[1], kind)
    if space == "global":
        return assign(machine, one.operands[0], kind, lambda: a)
    if space != "shared":
        raise Unknown(f".{space}")
    offset = np.uint64(WINDOW)
    return assign(machine, one.operands[0], kind, (lambda: a - offset) if "to" in one.parts else (lambda: a + offset))


@opcode("prmt")
def _permute(machine: Machine, one: Instruction):
    """Bytes of b:a chosen by the selector's nibbles; a nibble's high bit spreads the byte's sign instead."""
    if one.parts[1:] != ("b32",):
        raise Unknown(one.name)
    a, b, selector = (machine.registers.read(text, "u32") for text in one.operands[1:])

    def compute():
        whole = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        found = np.zeros(machine.lanes, np.uint32)
        for i in range(4):
            choice = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)
            byte = whole >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            byte = np.where(
                choice & np.uint64(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte
            )
            found |= byte.astype(np.uint32) << np.uint32(8 * i)
        return found

    return assign(machine, one.operands[0], "u32", compute)
