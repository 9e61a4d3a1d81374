"""Arithmetic on floating-point numbers. Approximate functions are rounded once; with noise they err
as far as the PTX manual allows.

A fused multiply-add goes through float64: its sum is rounded there and then to float32, which
differs from one rounding once in about 2^29.
"""

from __future__ import annotations

import numpy as np

from .integers import (
    INTEGER,
    assign,
    elementwise,
    integer_arithmetic,
    integer_product,
    integer_quotient,
    integer_unary,
    is_float,
)
from .machine import ALWAYS, Machine, opcode
from .parser import Instruction
from .refusal import Unknown

_F32, _F64 = np.float32, np.float64
_TINY = np.finfo(np.float32).tiny


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(_F32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; any NaN becomes 0x7FFF, as the hardware's conversion makes it."""
    bits = np.asarray(x, _F32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _flush(x):
    """.ftz: numbers too small to be normal become zeros of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(_F32(0), x), x)


def _modifiers(one: Instruction, *allowed: str) -> set[str]:
    found = set(one.parts[1:-1])
    odd = found - set(allowed)
    if odd:
        raise Unknown(f"modifier .{sorted(odd)[0]}")
    return found


_NARROW = ("bf16", "f16", "bf16x2", "f16x2")


def _narrow(machine: Machine, one: Instruction, function):
    """One number of 16 bits, or two in 32: through float64, and rounded once more than hardware would."""
    _modifiers(one, "rn")
    half, kind = one.parts[-1].startswith("f16"), "u32" if one.parts[-1].endswith("x2") else "u16"
    to = machine.registers.row(one.operands[0], kind)
    sources = [machine.registers.read(text, kind) for text in one.operands[1:]]

    def run(mask):
        values = []
        for source in sources:
            bits = np.broadcast_to(source, machine.lanes).copy().view(np.uint16)
            values.append((bits.view(np.float16) if half else bf16_to_f32(bits)).astype(_F64))
        result = function(*values)
        bits = result.astype(np.float16).view(np.uint16) if half else f32_to_bf16(result.astype(_F32))
        np.copyto(to, bits.view(to.dtype), where=mask)

    return run


_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@opcode("add", "sub", "mul")
def _arithmetic(machine: Machine, one: Instruction):
    kind, name = one.parts[-1], one.parts[0]
    if kind in _NARROW:
        return _narrow(machine, one, _FLOAT[name])
    if not is_float(kind):
        return integer_product(machine, one) if name == "mul" else integer_arithmetic(machine, one)
    found = _modifiers(one, "rn", "ftz")
    if "ftz" in found:
        a, b = (machine.registers.read(text, kind) for text in one.operands[1:])
        return assign(machine, one.operands[0], kind, lambda: _flush(_FLOAT[name](_flush(a), _flush(b))))
    return elementwise(machine, one, _FLOAT[name])


@opcode("min", "max")
def _extreme(machine: Machine, one: Instruction):
    if not is_float(one.parts[-1]):
        return integer_arithmetic(machine, one)
    found = _modifiers(one, "NaN", "ftz")
    if "NaN" in found:
        return elementwise(machine, one, INTEGER[one.parts[0]])
    return elementwise(machine, one, {"min": np.fmin, "max": np.fmax}[one.parts[0]])


@opcode("neg", "abs")
def _unary(machine: Machine, one: Instruction):
    if not is_float(one.parts[-1]):
        return integer_unary(machine, one)
    _modifiers(one, "ftz")
    return elementwise(machine, one, {"neg": np.negative, "abs": np.absolute}[one.parts[0]])


@opcode("fma")
def _fused(machine: Machine, one: Instruction):
    kind = one.parts[-1]
    if kind in _NARROW:
        return _narrow(machine, one, lambda a, b, c: a * b + c)
    if kind != "f32":
        raise Unknown(f"fma of {kind}")
    _modifiers(one, "rn")
    to = machine.registers.row(one.operands[0], kind)
    a, b, c = (machine.registers.read(text, kind) for text in one.operands[1:])
    wide = np.empty(machine.lanes, _F64)

    def run(mask):
        np.multiply(a, b, out=wide, dtype=_F64)
        np.add(wide, c, out=wide)
        if mask is ALWAYS:
            to[:] = wide
        else:
            np.copyto(to, wide, casting="unsafe", where=mask)

    return run


def approximate(machine: Machine, one: Instruction, function, error: float, *, flush: bool):
    """``function`` in float64 of the operands, rounded; with noise off by up to ``error`` of itself."""
    sources = [machine.registers.read(text, "f32") for text in one.operands[1:]]

    def compute():
        values = [(_flush(x) if flush else x).astype(_F64) for x in sources]
        found = function(*values)
        if machine.noise is not None:
            found = found * (1 + error * machine.noise.uniform(-1, 1, np.shape(found)))
        found = np.asarray(found).astype(_F32)
        return _flush(found) if flush else found

    return assign(machine, one.operands[0], "f32", compute)


# Largest errors of themselves that the PTX manual states: ex2.approx 2^-22.5, rcp.approx,
# rsqrt.approx 2^-22.9; sqrt.approx 2^-23; div.full 2 ulp.
_APPROXIMATE = {
    "ex2": (np.exp2, 2**-22.5),
    "rcp": (np.reciprocal, 2**-23),
    "sqrt": (np.sqrt, 2**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2**-22.9),
}


@opcode("ex2", "rcp", "sqrt", "rsqrt")
def _function(machine: Machine, one: Instruction):
    if one.parts[-1] != "f32":
        raise Unknown(f".{one.parts[-1]}")
    found = _modifiers(one, "approx", "ftz", "rn")
    function, error = _APPROXIMATE[one.parts[0]]
    return approximate(machine, one, function, 0.0 if "rn" in found else error, flush="ftz" in found)


@opcode("div")
def _quotient(machine: Machine, one: Instruction):
    if not is_float(one.parts[-1]):
        return integer_quotient(machine, one)
    found = _modifiers(one, "rn", "full", "approx", "ftz")
    return approximate(machine, one, np.divide, 0.0 if "rn" in found else 2**-22, flush="ftz" in found)


def _saturated(x: np.ndarray, dtype: type) -> np.ndarray:
    """Cut to the integers of ``dtype``; NaN becomes zero."""
    limits = np.iinfo(dtype)
    x = np.nan_to_num(x.astype(_F64), nan=0.0, posinf=2.0**65, neginf=-(2.0**65))
    above, below = x >= limits.max, x <= limits.min
    middle = np.where(above | below, 0, x).astype(dtype)
    return np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), middle))


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def _convert(machine: Machine, one: Instruction):
    to, source = one.parts[-2:]
    modifiers = set(one.parts[1:-2])
    read = machine.registers.read
    name = one.operands[0]
    if to in ("bf16x2", "f16x2"):
        if modifiers != {"rn"}:
            raise Unknown(f"modifiers {sorted(modifiers)}")
        high, low = (read(text, "f32") for text in one.operands[1:])
        narrow = f32_to_bf16 if to == "bf16x2" else lambda x: np.asarray(x).astype(np.float16).view(np.uint16)
        return assign(
            machine,
            name,
            "u32",
            lambda: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low).astype(np.uint32),
        )
    if source == "bf16":
        bits = read(one.operands[1], "u16")
        return assign(machine, name, "f32", lambda: bf16_to_f32(bits))
    if to == "bf16":
        if modifiers != {"rn"}:
            raise Unknown(f"modifiers {sorted(modifiers)}")
        value = read(one.operands[1], "f32")
        return assign(machine, name, "u16", lambda: f32_to_bf16(value))
    floating = {"f16", "f32", "f64"}
    value = read(one.operands[1], source)
    if source in floating and to not in floating:
        from .parser import dtype_of

        (how,) = modifiers - {"ftz", "sat"}
        return assign(machine, name, to, lambda: _saturated(_ROUND[how](value), dtype_of(to)))
    if source in floating and to in floating and modifiers - {"rn"}:
        raise Unknown(f"modifiers {sorted(modifiers)}")
    return _assign_wide(machine, name, to, lambda: value)


def _assign_wide(machine: Machine, name: str, kind: str, compute):
    """As `assign`; the register may be wider than ``kind``, whose sign then goes on into it."""
    row = machine.registers.raw(name)
    bits = 8 * row.dtype.itemsize
    if kind[0] in "us" and int(kind[1:]) < bits:
        from .parser import dtype_of

        return assign(machine, name, f"{kind[0]}{bits}", lambda: np.asarray(compute()).astype(dtype_of(kind)))
    return assign(machine, name, kind, compute)
