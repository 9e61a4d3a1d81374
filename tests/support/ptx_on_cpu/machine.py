"""Control flow: lanes of several blocks at once, those with the lowest place in the program first;
barriers, and everything where lanes meet.

A mask says which lanes run an instruction: a bool array over all lanes, or True for all of them.
Lanes that part at a branch wait in `Team.waiting` by the block of instructions that they go to and
are joined there. A `Team` is a set of lanes that only its own instructions wait for: all lanes of
the machine, or one block each where blocks wait for each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .copies import Copies
from .parser import Block, Instruction, Kernel
from .refusal import Refused, Unknown
from .values import Registers

WARP = 32
ALWAYS = True  # the mask of all lanes
PATIENCE = 300_000  # blocks of instructions that a team runs before it counts as an endless loop

Run = Callable[[object], object]
OPCODES: dict[str, Callable[[Machine, Instruction], Run]] = {}


def opcode(*names: str):
    """Registers what builds the function of an instruction whose opcode begins with one of ``names``."""

    def register(build):
        OPCODES.update(dict.fromkeys(names, build))
        return build

    return register


@dataclass
class Team:
    lanes: np.ndarray  # a mask
    waiting: dict[int, np.ndarray | bool] = field(
        default_factory=dict
    )  # block of instructions -> lanes that run it next
    parked: dict[int, np.ndarray | bool] = field(default_factory=dict)  # -> lanes that wait there for others
    steps: int = 0
    yielded: bool = False

    @property
    def done(self) -> bool:
        return not self.waiting and not self.parked


@dataclass(frozen=True)
class Options:
    """How kernels run. ``seed`` orders the blocks; ``noise`` draws the errors that approximate
    functions are allowed, from a seed.
    """

    at_once: int = 8  # blocks
    seed: int = 0
    noise: int | None = None
    patience: int = PATIENCE


class Machine:
    """One launch. ``memory`` and ``shared`` are `memory.Global` and `shared.Shared`; ``parameters``
    are the kernel's, byte by byte.
    """

    def __init__(
        self,
        kernel: Kernel,
        threads: int,
        blocks: int,
        parameters: np.ndarray,
        memory,
        shared,
        options: Options | None = None,
    ):
        options = options or Options()
        self.kernel, self.threads, self.blocks, self.parameters, self.options = (
            kernel,
            threads,
            blocks,
            parameters,
            options,
        )
        self.slots = min(blocks, options.at_once)
        self.lanes = self.slots * threads
        lane = np.arange(self.lanes)
        self.slot_of, self.thread_of = lane // threads, (lane % threads).astype(np.uint32)
        self.warp_of = lane // WARP
        self.block_of = np.zeros(self.lanes, np.int64)
        self.alive = np.zeros(self.lanes, np.bool_)
        self.now = 1  # counts what memory has to tell apart
        self.noise = None if options.noise is None else np.random.default_rng(options.noise)
        self.registers = Registers(self)
        self.memory, self.shared = memory, shared
        self.every_lane = lane
        self.code: list[list[Run] | None] = [None] * len(kernel.blocks)
        self.trace: Callable[[Machine, Instruction, object], None] | None = None
        self.one_by_one = any(
            one.parts[0] in ("atom", "red") or "acquire" in one.parts for one in kernel.instructions()
        )
        self.copies = Copies(self)
        memory.attach(self)
        shared.attach(self)

    def run(self) -> None:
        order = random.Random(self.options.seed)
        blocks = list(range(self.blocks))
        order.shuffle(blocks)
        with np.errstate(all="ignore"):
            while blocks:
                wave, blocks = blocks[: self.slots], blocks[self.slots :]
                self._run_wave(wave, order)

    def _run_wave(self, wave: list[int], order: random.Random) -> None:
        for slot, block in enumerate(wave):
            self.block_of[slot * self.threads : (slot + 1) * self.threads] = block
        self.alive[:] = self.slot_of < len(wave)
        self.registers.new_blocks()
        self.copies.clear()
        self.memory.new_blocks()
        self.shared.new_blocks()
        groups = [self.slot_of == slot for slot in range(len(wave))] if self.one_by_one else [self.alive.copy()]
        teams = [Team(lanes, {0: ALWAYS if lanes.all() else lanes}) for lanes in groups]
        while teams:
            team = order.choice(teams)
            for _ in range(order.randint(1, 60) if len(teams) > 1 else self.options.patience + 1):
                self._step(team)
                if team.done or team.yielded:
                    break
            team.yielded = False
            teams = [one for one in teams if not one.done]

    def _step(self, team: Team) -> None:
        team.steps += 1
        if not team.waiting:
            self._wake(team)
        index = min(team.waiting)
        mask = team.waiting.pop(index)
        block = self.kernel.blocks[index]
        if team.steps > self.options.patience:
            self.refuse(
                block.instructions[0], mask, f"is part of a loop that has not ended after {team.steps - 1:,} steps"
            )
        if block.meets:
            mask = self._meet(team, index, block, mask)
            if mask is None:
                return
        code = self.code[index]
        if code is None:
            code = self.code[index] = [self._build(one) for one in block.instructions]
        target = None
        if self.trace is None:
            for run in code:
                target = run(mask)
        else:
            for one, run in zip(block.instructions, code, strict=True):
                target = run(mask)
                self.trace(self, one, mask)
        if target is None:
            self._send(team, index + 1, mask)
        elif target is YIELD:
            team.yielded = True
            self._send(team, index + 1, mask)
        else:
            for where, lanes in target:
                self._send(team, where, lanes)

    def _send(self, team: Team, index: int, mask) -> None:
        if mask is not ALWAYS:
            if index in team.waiting:
                mask = mask | team.waiting[index]
            if mask.all():
                mask = ALWAYS
            elif not mask.any():
                return
        team.waiting[index] = mask

    def _meet(self, team: Team, index: int, block: Block, mask):
        """The lanes that go on from an instruction where lanes wait for each other; None if all of them wait."""
        one = block.instructions[0]
        if one.guard:
            inside = self.registers.guard(one) & mask
            self._send(team, index + 1, mask & ~inside)
            if not inside.any():
                return None
            mask = inside
        if index in team.parked:
            mask = mask | team.parked.pop(index)
        if mask is ALWAYS:
            return mask
        members = self.alive & self.registers.members(one, mask)
        size = self.threads if one.parts[0] in ("bar", "barrier") and "warp" not in one.parts else WARP
        here = mask.reshape(-1, size)
        complete = (here | ~members.reshape(-1, size)).all(1) & here.any(1)
        ready = (here & complete[:, None]).reshape(-1)
        if not ready.any():
            team.parked[index] = mask
            return None
        rest = mask & ~ready
        if rest.any():
            team.parked[index] = rest
        return ready

    def _wake(self, team: Team) -> None:
        """Lanes that have ended no longer keep the parked ones waiting; if that helps nobody, nothing will."""
        for index, mask in list(team.parked.items()):
            del team.parked[index]
            block = self.kernel.blocks[index]
            found = self._meet(team, index, block, mask)
            if found is not None:
                team.waiting[index] = found  # complete: it meets again and goes on
                return
        index, mask = next(iter(team.parked.items()))
        elsewhere = sum(int(np.count_nonzero(m)) for i, m in team.parked.items() if i != index)
        what = f"is waited at by {np.count_nonzero(mask)} lanes for others that never come"
        self.refuse(
            self.kernel.blocks[index].instructions[0],
            mask,
            what + (f"; {elsewhere} wait elsewhere" if elsewhere else ""),
        )

    def _build(self, one: Instruction) -> Run:
        build = OPCODES.get(one.parts[0])
        if build is None:
            raise Unknown(f"{self.kernel.name}: the interpreter has no {one.name} (PTX line {one.line}: {one.text})")
        try:
            run = build(self, one)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            raise Unknown(
                f"{self.kernel.name}: the interpreter has no such form of {one.name} ({error}) (PTX line "
                f"{one.line}: {one.text})"
            ) from error
        if not one.guard or one.parts[0] in ("bra", "ret", "exit") or self._waits(one):
            return run
        guard, negated = self.registers.raw(one.guard), one.negated

        def guarded(mask):
            inside = ~guard if negated else guard
            if mask is not ALWAYS:
                inside = inside & mask
            if inside.any():
                run(ALWAYS if inside.all() else inside.copy())

        return guarded

    @staticmethod
    def _waits(one: Instruction) -> bool:
        return Block(0, [one]).meets  # its guard was applied where its lanes met

    def refuse(self, one: Instruction, mask, what: str) -> None:
        """Raise `Refused` for the first lane of ``mask`` (an index, a mask or True)."""
        lane = 0 if mask is ALWAYS else int(np.flatnonzero(mask)[0]) if np.ndim(mask) else int(mask)
        where = f", {one.source[0].rsplit('/', 1)[-1]}:{one.source[1]}" if one.source else ""
        raise Refused(
            f"{self.kernel.name}, block {self.block_of[lane]}, thread {self.thread_of[lane]}: "
            f"`{one.text}` {what} (PTX line {one.line}{where})"
        )


YIELD = object()


@opcode("bra")
def _branch(machine: Machine, one: Instruction) -> Run:
    target = machine.kernel.labels[one.operands[0]]
    if not one.guard:
        return lambda mask: [(target, mask)]
    after = next(i for i, block in enumerate(machine.kernel.blocks) if block.instructions[-1] is one) + 1
    guard, negated = machine.registers.raw(one.guard), one.negated

    def run(mask):
        taken = ~guard if negated else guard
        if mask is not ALWAYS:
            taken = taken & mask
        count = np.count_nonzero(taken)
        if count == 0:
            return [(after, mask)]
        if count == (machine.lanes if mask is ALWAYS else np.count_nonzero(mask)):
            return [(target, mask)]
        taken = taken.copy()
        return [(target, taken), (after, ~taken if mask is ALWAYS else mask & ~taken)]

    return run


@opcode("ret", "exit")
def _end(machine: Machine, one: Instruction) -> Run:
    after = next(i for i, block in enumerate(machine.kernel.blocks) if block.instructions[-1] is one) + 1

    def run(mask):
        ending = mask
        if one.guard:
            ending = machine.registers.guard(one) & mask
        machine.alive[np.array(ending) if ending is not ALWAYS else slice(None)] = False
        return [(after, mask & ~ending)] if one.guard and (mask & ~ending).any() else []

    return run


@opcode("nanosleep")
def _sleep(machine: Machine, one: Instruction) -> Run:
    return lambda mask: YIELD
