"""Instructions where lanes meet: barriers, shuffles, votes, and matrices of 8 x 8 halves moved by a
whole warp. The machine has joined the lanes.
"""

from __future__ import annotations

import numpy as np

from .accesses import address_of, lanes_of, read_shared, write_shared
from .machine import ALWAYS, WARP, Machine, opcode
from .moves import names_of
from .parser import Instruction
from .refusal import Unknown


@opcode("bar", "barrier")
def _barrier(machine: Machine, one: Instruction):
    if one.parts[1:] == ("warp", "sync"):
        return lambda mask: machine.shared.meet(lanes_of(machine, mask), False)
    if one.parts[1] != "sync" or len(one.operands) != 1:
        raise Unknown("what is not bar.sync of a whole block")
    return lambda mask: machine.shared.meet(lanes_of(machine, mask), True)


@opcode("shfl")
def _shuffle(machine: Machine, one: Instruction):
    if one.parts[1] != "sync" or one.parts[-1] != "b32":
        raise Unknown(one.name)
    how, names = one.parts[2], one.operands[0].split("|")
    to = machine.registers.row(names[0], "u32")
    inside = machine.registers.row(names[1], "pred") if len(names) > 1 else None
    a, b, c = (machine.registers.read(text, "u32") for text in one.operands[1:4])
    lane = machine.registers.read("%laneid", "u32").astype(np.int64)
    first = machine.every_lane - lane

    def run(mask):
        delta, clamp, segment = (np.asarray(x).astype(np.int64) for x in (b & 31, c & 31, c >> 8 & 31))
        least, most = lane & segment, lane & segment | clamp & ~segment
        source = {"bfly": lane ^ delta, "up": lane - delta, "down": lane + delta, "idx": least | delta & ~segment}[how]
        fine = source >= most if how == "up" else source <= most
        source = first + np.where(fine, source, lane)
        if mask is not ALWAYS:
            lost = mask & ~mask[source]
            if lost.any():
                machine.refuse(one, lost, "takes the value of a lane that does not take part")
        values = np.broadcast_to(a, machine.lanes)[source]
        np.copyto(to, values, where=mask)
        if inside is not None:
            np.copyto(inside, fine, where=mask)

    return run


@opcode("vote")
def _vote(machine: Machine, one: Instruction):
    how = one.parts[2]
    source = one.operands[1]
    row, negated = machine.registers.raw(source.lstrip("!")), source[0] == "!"
    to = machine.registers.row(one.operands[0], "u32" if how == "ballot" else "pred")
    weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def run(mask):
        here = np.ones(machine.lanes, np.bool_) if mask is ALWAYS else mask
        said = (~row if negated else row).reshape(-1, WARP)
        here = here.reshape(-1, WARP)
        if how == "ballot":
            found = ((said & here) * weights).sum(1, dtype=np.uint32)
        elif how == "any":
            found = (said & here).any(1)
        elif how == "all":
            found = (said | ~here).all(1)
        else:
            raise Unknown(f"{one.name} (PTX line {one.line})")
        np.copyto(to, np.repeat(found, WARP), where=mask)

    return run


@opcode("ldmatrix", "stmatrix")
def _matrix(machine: Machine, one: Instruction):
    """Lane t holds two halves of row t / 4 of each matrix; matrix m's rows begin at the addresses
    of lanes 8 m to 8 m + 7.
    """
    if one.parts[1:4] != ("sync", "aligned", "m8n8") or "trans" in one.parts or one.parts[-1] != "b16":
        raise Unknown(one.name)
    loads = one.parts[0] == "ldmatrix"
    vector, place = one.operands if loads else one.operands[::-1]
    rows, address = [machine.registers.row(name, "u32") for name in names_of(vector)], address_of(machine, place)
    lane = machine.every_lane % WARP

    def run(mask):
        lanes = lanes_of(machine, mask)
        if len(lanes) % WARP:
            machine.refuse(one, lanes[0], "is not run by whole warps")
        machine.now += 1
        addresses = address()
        for m, row in enumerate(rows):
            own = (addresses[machine.every_lane - lane + 8 * m + lane // 4] + lane % 4 * 4)[lanes]
            if loads:
                row[lanes] = read_shared(machine, one, lanes, own, 4, 4)[:, 0]
            else:
                write_shared(machine, one, lanes, own, row[lanes][:, None])

    return run
