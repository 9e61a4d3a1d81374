"""Loads, stores, atomic additions and asynchronous copies: addresses of lanes to places in memory, checked there."""

from __future__ import annotations

import re

import numpy as np

from .machine import ALWAYS, Machine, opcode
from .memory import BASE, WINDOW, wide
from .moves import names_of
from .parser import Instruction, dtype_of, size_of
from .refusal import Unknown

_ADDRESS = re.compile(r"^\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_SPACES = ("global", "shared", "param", "const", "local")
# Modifiers that change nothing here: a cache's hints, and the scope of an order between blocks.
_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "weak", "gpu", "sys", "cta", "L1",
    "L2", "evict_last", "evict_first",
          "no_allocate", "128B", "64B", "256B", "L1::evict_last", "unified")  # fmt: skip


def _form(one: Instruction, *others: str) -> tuple[str, int, str]:
    """(space or "", numbers a lane, their type) of a load or store; refuses modifiers it does not know."""
    space = next((part for part in one.parts if part in _SPACES), "")
    count = next((int(part[1:]) for part in one.parts if re.fullmatch(r"v[248]", part)), 1)
    odd = [
        p
        for p in one.parts[1:-1]
        if p not in _HINTS and p not in _SPACES and p not in others and not re.fullmatch(r"v[248]", p)
    ]
    if odd or space in ("const", "local"):
        raise Unknown(f".{(odd or [space])[0]}")
    return space, count, one.parts[-1]


def address_of(machine: Machine, operand: str):
    """Function of nothing: the address of each lane, as int64 or uint64 (or one number for all)."""
    found = _ADDRESS.match(operand)
    if not found:
        raise Unknown(f"address {operand}")
    base, offset = found[1], int(found[2] or "0", 0)
    if not base.startswith("%"):
        fixed = np.full(machine.lanes, machine.registers.address(base) + offset, np.int64)
        return lambda: fixed
    row = machine.registers.raw(base)
    if row.dtype.itemsize == 4:
        return lambda: row.astype(np.int64) + offset & 0xFFFF_FFFF
    signed = row.view(np.int64)
    return (lambda: signed + offset) if offset else lambda: signed


def lanes_of(machine: Machine, mask) -> np.ndarray:
    return machine.every_lane if mask is ALWAYS else np.flatnonzero(mask)


def _space_by_address(addresses: np.ndarray) -> np.ndarray:
    """Whether generic addresses are of shared memory."""
    return (addresses >= WINDOW) & (addresses < WINDOW + 2**24)


@opcode("ld")
def _load(machine: Machine, one: Instruction):
    space, count, kind = _form(one, "acquire")
    kind = "u" + kind[1:] if kind[0] == "b" else kind
    names = names_of(one.operands[0]) if count > 1 or one.operands[0].startswith("{") else [one.operands[0]]
    rows = [None if name == "_" else machine.registers.raw(name) for name in names]
    # a narrower number fills a wider register, with its sign
    rows = [
        row
        if row is None or row.dtype == np.bool_
        else row.view(f"{'i' if kind[0] == 's' else 'u'}{row.dtype.itemsize}")
        for row in rows
    ]
    address, size, item = address_of(machine, one.operands[1]), count * size_of(kind), size_of(kind)
    signed = f"{'i' if kind[0] == 's' else 'u'}{item}"

    def put(lanes, values):
        for i, row in enumerate(rows):
            if row is not None:
                row[lanes] = values[:, i].view(signed)

    if space == "param":
        return _load_parameter(machine, one, address, size, item, put)

    def run(mask):
        lanes = lanes_of(machine, mask)
        addresses = address()[lanes]
        machine.now += 1
        if space == "shared":
            put(lanes, read_shared(machine, one, lanes, addresses, size, item))
        elif space == "global":
            put(lanes, _read_global(machine, one, lanes, addresses, size, item))
        else:
            near = _space_by_address(addresses)
            if near.any():
                put(lanes[near], read_shared(machine, one, lanes[near], addresses[near] - WINDOW, size, item))
            if not near.all():
                put(lanes[~near], _read_global(machine, one, lanes[~near], addresses[~near], size, item))

    return run


def _load_parameter(machine: Machine, one: Instruction, address, size: int, item: int, put):
    data = machine.parameters

    def run(mask):
        lanes = lanes_of(machine, mask)
        offsets = address()[lanes]
        if ((offsets < 0) | (offsets + size > len(data))).any():
            machine.refuse(one, lanes[0], f"reaches byte {offsets.max()} of {len(data)} bytes of parameters")
        bytes_ = data[offsets[:, None] + np.arange(size)]
        put(lanes, bytes_.view(f"u{item}"))

    return run


def read_shared(machine: Machine, one: Instruction, lanes, addresses, size: int, item: int) -> np.ndarray:
    places = machine.shared.locate(one, lanes, addresses, size)
    machine.shared.read(one, lanes, places, size)
    return machine.shared.data.view(f"u{item}").reshape(-1, size // item)[places // size]


def write_shared(machine: Machine, one: Instruction, lanes, addresses, values: np.ndarray) -> None:
    item = values.dtype.itemsize
    size = item * values.shape[1]
    places = machine.shared.locate(one, lanes, addresses, size)
    data = machine.shared.data.view(values.dtype).reshape(-1, values.shape[1])
    machine.shared.write(one, lanes, places, size, (data[places // size] == values).all(1))
    data[places // size] = values
    _refuse_conflict(machine, one, lanes, data[places // size], values)


def _refuse_conflict(machine: Machine, one: Instruction, lanes, found: np.ndarray, values: np.ndarray) -> None:
    differ = (found != values).any(1)
    if differ.any():
        machine.refuse(
            one, lanes[int(np.flatnonzero(differ)[0])], "and another thread write different values to one address"
        )


def _offsets(addresses: np.ndarray) -> np.ndarray:
    return addresses.view(np.uint64) - np.uint64(BASE)


def _read_global(machine: Machine, one: Instruction, lanes, addresses, size: int, item: int) -> np.ndarray:
    offsets, memory = _offsets(addresses), machine.memory
    written = memory.check(one, lanes, offsets, size, write=False)
    if "acquire" in one.parts:
        memory.acquire(lanes, offsets)
    elif written and "relaxed" not in one.parts and "volatile" not in one.parts:
        memory.check_order(one, lanes, offsets, size, stale="nc" in one.parts or "ca" in one.parts)
    return memory.data.view(f"u{item}").reshape(-1, size // item)[offsets // np.uint64(size)]


def _write_global(machine: Machine, one: Instruction, lanes, addresses, values: np.ndarray) -> None:
    offsets, memory = _offsets(addresses), machine.memory
    size = values.dtype.itemsize * values.shape[1]
    written = memory.check(one, lanes, offsets, size, write=True)
    data, index = memory.data.view(values.dtype).reshape(-1, values.shape[1]), offsets // np.uint64(size)
    if "release" in one.parts:
        memory.release(lanes, offsets)
        memory.mark(offsets, size)
    else:
        if written:
            memory.check_order(one, lanes, offsets, size, stale=False, same=(data[index] == values).all(1))
        memory.note_write(lanes, offsets, size)
    data[index] = values
    _refuse_conflict(machine, one, lanes, data[index], values)


@opcode("st")
def _store(machine: Machine, one: Instruction):
    space, count, kind = _form(one, "release")
    dtype = dtype_of("u" + kind[1:])
    names = names_of(one.operands[1]) if count > 1 or one.operands[1].startswith("{") else [one.operands[1]]
    sources = [
        machine.registers.read(name, kind if name.startswith("%") or kind[0] == "f" else "u" + kind[1:])
        for name in names
    ]
    address = address_of(machine, one.operands[0])
    if space == "param":
        raise Unknown("st.param")

    def run(mask):
        lanes = lanes_of(machine, mask)
        addresses = address()[lanes]
        machine.now += 1
        values = np.empty((len(lanes), count), dtype)
        for i, source in enumerate(sources):
            values[:, i] = source[lanes].view(dtype) if np.ndim(source) else source.view(dtype)
        if space == "shared":
            write_shared(machine, one, lanes, addresses, values)
        elif space == "global":
            _write_global(machine, one, lanes, addresses, values)
        else:
            near = _space_by_address(addresses)
            if near.any():
                write_shared(machine, one, lanes[near], addresses[near] - WINDOW, values[near])
            if not near.all():
                _write_global(machine, one, lanes[~near], addresses[~near], values[~near])

    return run


@opcode("atom")
def _atomic(machine: Machine, one: Instruction):
    if set(one.parts[1:]) - {"relaxed", "gpu"} != {"global", "add", "u32"}:
        raise Unknown("what is not atom.global.add.u32")
    to, address = machine.registers.row(one.operands[0], "u32"), address_of(machine, one.operands[1])
    value = machine.registers.read(one.operands[2], "u32")

    def run(mask):
        lanes = lanes_of(machine, mask)
        offsets = _offsets(address()[lanes])
        machine.memory.check(one, lanes, offsets, 4, write=True)
        machine.memory.mark(offsets, 4)
        data = machine.memory.data.view(np.uint32)
        for lane, place in zip(lanes, offsets // np.uint64(4), strict=True):
            to[lane] = data[place]
            data[place] += value[lane] if np.ndim(value) else value

    return run


@opcode("cp")
def _copy(machine: Machine, one: Instruction):
    if one.parts[:2] != ("cp", "async"):
        raise Unknown(one.name)
    copies = machine.copies

    def whole(mask):
        return np.ones(machine.lanes, np.bool_) if mask is ALWAYS else mask

    if one.parts[2] == "commit_group":
        return lambda mask: copies.commit(whole(mask))
    if one.parts[2] in ("wait_group", "wait_all"):
        pending = int(one.operands[0]) if one.parts[2] == "wait_group" else 0

        def wait(mask):
            machine.now += 1
            copies.land(machine, whole(mask), pending)

        return wait
    if one.parts[2] not in ("ca", "cg") or one.parts[3:5] != ("shared", "global") or one.operands[2] != "16":
        raise Unknown("what is not 16 bytes from global to shared memory")
    to, source = address_of(machine, one.operands[0]), address_of(machine, one.operands[1])
    valid = machine.registers.read(one.operands[3], "u32") if len(one.operands) > 3 else np.uint32(16)

    def run(mask):
        lanes = lanes_of(machine, mask)
        machine.now += 1
        places = machine.shared.locate(one, lanes, to()[lanes], 16)
        wanted = np.broadcast_to(valid, machine.lanes)[lanes]
        if ((wanted != 0) & (wanted != 16)).any():
            raise Unknown(f"{machine.kernel.name}: a copy of {set(wanted.tolist())} of 16 bytes (PTX line {one.line})")
        values, real = np.zeros((len(lanes), 2), np.uint64), wanted == 16
        if real.any():
            offsets = _offsets(source()[lanes[real]])
            if machine.memory.check(one, lanes[real], offsets, 16, write=False):
                machine.memory.check_order(one, lanes[real], offsets, 16, stale=one.parts[2] == "ca")
            values[real] = wide(machine.memory.data, 16)[offsets // np.uint64(16)]
        machine.shared.write(one, lanes, places, 16)
        machine.shared.under_way(lanes, places, 16)
        copies.open.append((lanes, places, values))

    return run
