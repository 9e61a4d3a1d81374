"""Integer and logical instructions, and comparisons."""

from __future__ import annotations

import operator

import numpy as np

from .machine import Machine, opcode
from .parser import Instruction, dtype_of
from .refusal import Unknown


def is_float(kind: str) -> bool:
    return kind in ("f32", "f64")


def elementwise(machine: Machine, one: Instruction, function: np.ufunc, kind: str | None = None):
    """``d = function(a, ...)``, all of one type: that of the opcode's last part."""
    kind = kind or one.parts[-1]
    to = machine.registers.row(one.operands[0], kind)
    sources = [machine.registers.read(text, kind) for text in one.operands[1:]]
    if len(sources) == 1:
        (a,) = sources
        return lambda mask: _nothing(function(a, out=to, where=mask))
    a, b = sources

    def run(mask):
        function(a, b, out=to, where=mask)

    return run


def _nothing(_) -> None:
    return None


def assign(machine: Machine, name: str, kind: str, compute):
    """``d = compute()``, cast to ``kind``."""
    to = machine.registers.row(name, kind)

    def run(mask):
        np.copyto(to, compute(), casting="unsafe", where=mask)

    return run


def _plain(parts: tuple[str, ...], *allowed: str) -> None:
    """Refuse a form with modifiers that change what the instruction means."""
    odd = [part for part in parts[1:-1] if part not in allowed]
    if odd:
        raise Unknown(f"modifier .{odd[0]}")


INTEGER: dict[str, np.ufunc] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("and", "or", "xor")
def _logic(machine: Machine, one: Instruction):
    return elementwise(machine, one, INTEGER[one.parts[0]])


@opcode("not")
def _not(machine: Machine, one: Instruction):
    return elementwise(machine, one, np.logical_not if one.parts[-1] == "pred" else np.invert)


def integer_arithmetic(machine: Machine, one: Instruction):
    """add, sub, min, max of integers; floats.py asks for it."""
    _plain(one.parts)
    return elementwise(machine, one, INTEGER[one.parts[0]])


def integer_unary(machine: Machine, one: Instruction):
    _plain(one.parts)
    return elementwise(machine, one, {"neg": np.negative, "abs": np.absolute}[one.parts[0]])


@opcode("shl")
def _shift_left(machine: Machine, one: Instruction):
    return _shift(machine, one, np.left_shift, "u" + one.parts[-1][1:])


@opcode("shr")
def _shift_right(machine: Machine, one: Instruction):
    kind = one.parts[-1]
    return _shift(machine, one, np.right_shift, kind if kind[0] == "s" else "u" + kind[1:])


def _shift(machine: Machine, one: Instruction, function: np.ufunc, kind: str):
    dtype = dtype_of(kind)
    to, a = machine.registers.row(one.operands[0], kind), machine.registers.read(one.operands[1], kind)
    amount = machine.registers.read(one.operands[2], "u32")
    if np.ndim(amount) == 0:
        amount = dtype(min(int(amount), 8 * np.dtype(dtype).itemsize))
        return lambda mask: _nothing(function(a, amount, out=to, where=mask))
    most = np.uint32(8 * np.dtype(dtype).itemsize)
    return lambda mask: _nothing(function(a, np.minimum(amount, most).astype(dtype), out=to, where=mask))


def _wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _product(machine: Machine, one: Instruction, operands: tuple[str, ...]):
    """(type of the result, function of nothing that gives the product's part that .lo, .wide or .hi asks for)."""
    kind, part = one.parts[-1], one.parts[1]
    a, b = (machine.registers.read(text, kind) for text in operands)
    if part == "lo":
        return kind, lambda: np.multiply(a, b)
    wide = dtype_of(_wide(kind)) if int(kind[1:]) < 64 else None
    if wide is None:
        raise Unknown("64 bits wide")
    if part == "wide":
        return _wide(kind), lambda: np.multiply(a, b, dtype=wide)
    bits = wide(int(kind[1:]))
    return kind, lambda: np.multiply(a, b, dtype=wide) >> bits


def integer_product(machine: Machine, one: Instruction):
    kind, product = _product(machine, one, one.operands[1:3])
    return assign(machine, one.operands[0], kind, product)


@opcode("mad")
def _multiply_add(machine: Machine, one: Instruction):
    if is_float(one.parts[-1]):
        raise Unknown("mad of floats")
    kind, product = _product(machine, one, one.operands[1:3])
    c = machine.registers.read(one.operands[3], kind)
    return assign(machine, one.operands[0], kind, lambda: product() + c)


def integer_quotient(machine: Machine, one: Instruction):
    """div and rem, cut off towards zero."""
    kind = one.parts[-1]
    a, b = (machine.registers.read(text, kind) for text in one.operands[1:])

    def rest():
        return np.fmod(
            a, np.where(b == 0, b + b.dtype.type(1), b)
        )  # by zero: any result; lanes that are not asked may hold anything

    def quotient():
        divisor = np.where(b == 0, b + b.dtype.type(1), b)
        return (a - np.fmod(a, divisor)) // divisor

    return assign(machine, one.operands[0], kind, rest if one.parts[0] == "rem" else quotient)


@opcode("rem")
def _remainder(machine: Machine, one: Instruction):
    return integer_quotient(machine, one)


@opcode("bfe")
def _extract(machine: Machine, one: Instruction):
    kind = one.parts[-1]
    start, length = (int(text, 0) for text in one.operands[2:])
    bits = int(kind[1:])
    if not 0 < length <= bits - start:
        raise Unknown(f"{length} bits from {start}")
    dtype = dtype_of(kind)
    a, left, right = machine.registers.read(one.operands[1], kind), dtype(bits - start - length), dtype(bits - length)
    return assign(machine, one.operands[0], kind, lambda: a << left >> right)


@opcode("bfi")
def _insert(machine: Machine, one: Instruction):
    kind = "u" + one.parts[-1][1:]
    dtype = dtype_of(kind)
    a, b = (machine.registers.read(text, kind) for text in one.operands[1:3])
    start, length = (int(text, 0) for text in one.operands[3:])
    field = dtype(((1 << length) - 1) << start & (1 << 8 * np.dtype(dtype).itemsize) - 1)
    return assign(machine, one.operands[0], kind, lambda: (b & ~field) | ((a << dtype(start)) & field))


_COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_OPPOSITE = {
    "equ": "ne",
    "neu": "eq",
    "ltu": "ge",
    "leu": "gt",
    "gtu": "le",
    "geu": "lt",
}  # true where numbers are not ordered, too
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp")
def _set_predicate(machine: Machine, one: Instruction):
    how, kind, between = one.parts[1], one.parts[-1], one.parts[2:-1]
    between = tuple(part for part in between if part != "ftz")
    kind = "u" + kind[1:] if kind[0] == "b" else kind
    a, b = (machine.registers.read(text, kind) for text in one.operands[1:3])
    names = one.operands[0].split("|")
    to = [machine.registers.row(name, "pred") if name != "_" else None for name in names]
    floating = is_float(kind)
    if how in _OPPOSITE and floating:
        opposite = _COMPARE[_OPPOSITE[how]] if how != "neu" else None

        def compare():
            return ~opposite(a, b) if opposite else (a != b)

        if how == "equ":  # equal or not ordered

            def compare():
                return ~((a < b) | (a > b))
    elif how == "num":

        def compare():
            return ~(np.isnan(a) | np.isnan(b))
    elif how == "nan":

        def compare():
            return np.isnan(a) | np.isnan(b)
    elif how == "ne" and floating:

        def compare():
            return (a < b) | (a > b)
    else:
        function = _COMPARE[how]

        def compare():
            return function(a, b)

    join = third = None
    if between:
        join = _JOIN[between[0]]
        text = one.operands[3]
        row = machine.registers.raw(text.lstrip("!"))
        third = (lambda: ~row) if text[0] == "!" else (lambda: row)

    def run(mask):
        found = compare()
        for i, one_to in enumerate(to):
            value = ~found if i else found
            if one_to is not None:
                np.copyto(one_to, value if join is None else join(value, third()), where=mask)

    return run
