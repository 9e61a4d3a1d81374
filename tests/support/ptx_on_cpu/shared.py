"""Shared memory of the blocks that run together, and who wrote and read each piece of it when: what
has to be ordered by a barrier.
"""

from __future__ import annotations

import numpy as np

from .parser import SHARED_START, Kernel
from .refusal import Refused

NOBODY, UNDER_WAY = (
    2**31 - 1,
    2**31 - 2,
)  # instead of a moment: nobody wrote it; an asynchronous copy is on its way to it
WARP = 32


class Shared:
    """``size`` bytes a block, static and dynamic. A piece is the smallest access that the kernel
    makes: two neighbours may be two threads'.
    """

    def __init__(self, kernel: Kernel, size: int):
        self.size = size
        self.stride = -(-max(size, 1) // 64) * 64
        self.piece = min((_narrowest(one) for one in kernel.instructions()), default=4)

    def attach(self, machine) -> None:
        self.machine = machine
        total, warps = machine.slots * self.stride, -(-machine.threads // WARP)
        self.data = np.zeros(total, np.uint8)
        count = total // self.piece
        self.written_at, self.writer = np.empty(count, np.int32), np.empty(count, np.int32)
        # of each warp (reads of several warps stand beside each other): when a lane of it last
        # read, and which, -1 for several
        self.read_at, self.reader = np.empty((warps, count), np.int32), np.empty((warps, count), np.int32)
        self.met_at, self.warp_met_at = np.zeros(machine.lanes, np.int32), np.zeros(machine.lanes, np.int32)
        self._start = (machine.slot_of * self.stride).astype(np.int64)

    def new_blocks(self) -> None:
        self.data[:] = 0xFF  # NaN
        self.written_at[:] = NOBODY
        self.read_at[:] = -1
        self.machine.now += 1
        self.met_at[:] = self.warp_met_at[:] = self.machine.now

    def meet(self, lanes: np.ndarray, block: bool) -> None:
        """``lanes`` have passed a barrier of their block or of their warps."""
        self.machine.now += 1
        now = self.machine.now
        if block:
            self.met_at[lanes] = now
        self.warp_met_at[lanes] = now
        self.machine.memory.join(lanes, self.machine.threads if block else WARP)

    def locate(self, one, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Places in `data`. Refuses what lies outside the launch's bytes or is not aligned."""
        offsets = addresses.astype(np.int64) - SHARED_START
        bad = (offsets < 0) | (offsets + size > self.size)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            self.machine.refuse(one, lanes[at], f"reaches byte {offsets[at]} of {self.size} bytes of shared memory")
        bad = offsets % size != 0
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            self.machine.refuse(
                one, lanes[at], f"is not aligned to its {size} bytes: byte {offsets[at]} of shared memory"
            )
        return offsets + self._start[lanes]

    def _pieces(self, places: np.ndarray, size: int) -> np.ndarray:
        count = size // self.piece
        first = places // self.piece
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def read(self, one, lanes: np.ndarray, places: np.ndarray, size: int) -> None:
        """Check and note a read."""
        pieces = self._pieces(places, size)
        when = self.written_at[pieces]
        late = when >= self.met_at[lanes][:, None]
        if late.any():
            self._check_written(one, lanes, places, pieces, when, late, "reads")
        warp = (self.machine.thread_of[lanes] // WARP).astype(np.int64)[:, None]
        lane = lanes[:, None]
        fresh = self.read_at[warp, pieces] < self.warp_met_at[lanes][:, None]
        alone = np.where(fresh | (self.reader[warp, pieces] == lane), lane, -1)
        self.reader[warp, pieces] = alone
        several = self.reader[warp, pieces] != alone  # lanes in this very instruction, of which the last one was noted
        if several.any():
            self.reader[np.broadcast_to(warp, pieces.shape)[several], pieces[several]] = -1
        self.read_at[warp, pieces] = self.machine.now

    def write(self, one, lanes: np.ndarray, places: np.ndarray, size: int, same: np.ndarray | None = None) -> None:
        """Check and note a write; those of ``same`` leave the value that is there."""
        pieces = self._pieces(places, size)
        when = self.written_at[pieces]
        late = (when >= self.met_at[lanes][:, None]) & (when != NOBODY)
        if same is not None:
            late &= ~same[:, None] | (when == UNDER_WAY)
        if late.any():
            self._check_written(one, lanes, places, pieces, when, late, "writes over")
        self._check_read(one, lanes, places, pieces, same)
        self.written_at[pieces] = self.machine.now
        self.writer[pieces] = lanes[:, None]

    def _check_written(self, one, lanes, places, pieces, when, late, does: str) -> None:
        writer = self.writer[pieces]
        ordered = (writer == lanes[:, None]) | (
            (writer // WARP == (lanes // WARP)[:, None]) & (when < self.warp_met_at[lanes][:, None])
        )
        bad = late & ~(ordered & (when < UNDER_WAY))
        if bad.any():
            at, part = (int(index[0]) for index in np.nonzero(bad))
            where = f"byte {places[at] - self._start[lanes[at]]} of shared memory"
            if when[at, part] == NOBODY:
                self.machine.refuse(one, lanes[at], f"{does} what nobody wrote: {where}")
            who = self.machine.thread_of[writer[at, part]]
            if when[at, part] == UNDER_WAY:
                self.machine.refuse(
                    one, lanes[at], f"{does} what thread {who}'s asynchronous copy is on its way to: {where}"
                )
            barrier = "warp barrier" if writer[at, part] // WARP == lanes[at] // WARP else "barrier"
            self.machine.refuse(one, lanes[at], f"{does} what thread {who} wrote, with no {barrier} between: {where}")

    def _check_read(self, one, lanes, places, pieces, same) -> None:
        """A write over what others may not have read yet."""
        latest = self.read_at.max(0)[pieces] if len(self.read_at) > 1 else self.read_at[0][pieces]
        late = latest >= self.met_at[lanes][:, None]
        if same is not None:
            late &= ~same[:, None]
        if not late.any():
            return
        own = (self.machine.thread_of[lanes] // WARP).astype(np.int64)[:, None]
        for warp in range(len(self.read_at)):
            when, reader = self.read_at[warp][pieces], self.reader[warp][pieces]
            met = np.where(own == warp, self.warp_met_at[lanes][:, None], self.met_at[lanes][:, None])
            bad = late & (when >= met) & ~((own == warp) & (reader == lanes[:, None]))
            if bad.any():
                at = int(np.nonzero(bad)[0][0])
                where = f"byte {places[at] - self._start[lanes[at]]} of shared memory"
                barrier = "warp barrier" if own[at, 0] == warp else "barrier"
                self.machine.refuse(
                    one, lanes[at], f"writes over what threads of warp {warp} read, with no {barrier} between: {where}"
                )

    def under_way(self, lanes: np.ndarray, places: np.ndarray, size: int) -> None:
        pieces = self._pieces(places, size)
        self.written_at[pieces] = UNDER_WAY
        self.writer[pieces] = lanes[:, None]

    def landed(self, lanes: np.ndarray, places: np.ndarray, size: int) -> None:
        pieces = self._pieces(places, size)
        self.written_at[pieces] = self.machine.now
        self.writer[pieces] = lanes[:, None]


def _narrowest(one) -> int:
    """Bytes of an instruction's smallest access to shared memory."""
    from .parser import size_of

    if one.parts[0] in ("ld", "st") and "param" not in one.parts and "global" not in one.parts:
        return min(4, size_of(one.parts[-1]))
    if one.parts[0] in ("atom", "red", "mbarrier") and "shared" in one.parts:
        raise Refused(f"{one.name} is not known on shared memory")
    return 4
