"""Global memory of one launch: the bytes of the tensors it was given, and what is known of each byte.

Every storage is copied to an arena, and back where the kernel may write. Addresses are the arena's,
far beyond 32 bits. A byte can be read or written only if it belongs to an element of a view that
was given: what lies between the rows of a slice does not.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

BASE = 0x7F00_0000_0000  # of the arena
WINDOW = 0x7E00_0000_0000  # of shared memory among generic addresses
_GAP = 256  # bytes between storages, and their alignment

READABLE, WRITABLE, WRITTEN, FILLED = 1, 2, 4, 8  # WRITTEN: in this launch; FILLED: somebody has written it
# torch's pattern of memory that nobody wrote, under
# torch.utils.deterministic.fill_uninitialized_memory
_POISON = {
    torch.float32: 0x7FC00000,
    torch.bfloat16: 0x7FC0,
    torch.float16: 0x7E00,
    torch.int32: 2**31 - 1,
    torch.int64: 2**63 - 1,
}


class Global:
    """Tensors are put in with `put`; then a `Machine` runs; then `take_back` copies what it wrote to them."""

    def __init__(self):
        self._storages: dict[int, tuple[int, int]] = {}  # address -> offset, bytes
        self._views: list[tuple[str, Tensor, bool]] = []
        self._end = _GAP
        self.data = self.flags = None

    def put(self, name: str, tensor: Tensor, writable: bool) -> int:
        """The address of ``tensor`` for the kernel."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = (self._end, storage.nbytes())
            self._end += -(-storage.nbytes() // _GAP) * _GAP + _GAP
        self._views.append((name, tensor, writable))
        return BASE + self._offset(tensor)

    def _offset(self, tensor: Tensor) -> int:
        return self._storages[tensor.untyped_storage().data_ptr()][0] + tensor.storage_offset() * tensor.element_size()

    def fill(self) -> None:
        """Copy the storages in, after the last `put`."""
        self.data, self.flags = np.zeros(self._end, np.uint8), np.zeros(self._end, np.uint8)
        for address, (offset, size) in self._storages.items():
            if size:
                self.data[offset : offset + size] = _bytes_at(address, size)
        for _, tensor, writable in self._views:
            self._bytes(self.flags, tensor)[...] |= READABLE | (WRITABLE if writable else 0) | FILLED
        for _, tensor, _ in self._views:
            pattern = _POISON.get(tensor.dtype)
            if pattern is not None and tensor.numel():
                size = tensor.element_size()
                values = np.ascontiguousarray(self._bytes(self.data, tensor)).view(f"u{size}")
                unwritten = self._bytes(self.flags, tensor)
                unwritten[np.broadcast_to(values == pattern, unwritten.shape)] &= np.uint8(~FILLED & 0xFF)

    def _bytes(self, array: np.ndarray, tensor: Tensor) -> np.ndarray:
        """The bytes of the tensor's elements in ``array``: (*shape, element size)."""
        size = tensor.element_size()
        strides = (*(stride * size for stride in tensor.stride()), 1)
        return np.lib.stride_tricks.as_strided(array[self._offset(tensor) :], (*tensor.shape, size), strides)

    def take_back(self) -> None:
        for _, tensor, writable in self._views:
            if writable and tensor.numel():
                address = tensor.untyped_storage().data_ptr()
                offset, size = self._storages[address]
                changed = np.flatnonzero(self.flags[offset : offset + size] & WRITTEN)
                _bytes_at(address, size)[changed] = self.data[offset + changed]

    def name_of(self, offset: int) -> str:
        """What lies at an offset of the arena, in words."""
        for name, tensor, _ in self._views:
            start, size = self._storages[tensor.untyped_storage().data_ptr()]
            if start - _GAP // 2 <= offset < start + size + _GAP // 2:
                inside = offset - self._offset(tensor)
                return (
                    f"byte {inside} of {name} {tuple(tensor.shape)}, strides {tensor.stride()}, "
                    f"{str(tensor.dtype).removeprefix('torch.')}"
                )
        return "what belongs to no tensor of the launch"

    def attach(self, machine) -> None:
        self.machine = machine
        half = self._end // 2
        self.writer, self.written_at = (
            np.full(half, -1, np.int32),
            np.zeros(half, np.int32),
        )  # of each two bytes: lane of all lanes, and when
        self._known: np.ndarray | None = None  # (lanes, blocks): what other blocks wrote before that moment can be read
        self._released: dict[int, np.ndarray] = {}

    def new_blocks(self) -> None:
        machine = self.machine
        self.lane_of = (machine.block_of * machine.threads + machine.thread_of).astype(np.int32)
        if self._known is not None:
            self._known[:] = 0

    def known(self) -> np.ndarray:
        if self._known is None:
            self._known = np.zeros((self.machine.lanes, self.machine.blocks), np.int32)
        return self._known

    def join(self, lanes: np.ndarray, size: int) -> None:
        """Lanes that have met, ``size`` side by side: what one knows they all know."""
        if self._known is not None:
            groups = self._known.reshape(-1, size, self.machine.blocks)
            for group in np.unique(lanes // size):
                groups[group] = groups[group].max(0)

    def release(self, lanes: np.ndarray, offsets: np.ndarray) -> None:
        """It tells of what the block's threads wrote before their last barrier: not of the
        releasing thread's own writes since then.
        """
        known, shared = self.known(), self.machine.shared
        for lane, offset in zip(lanes, offsets, strict=True):
            told = known[lane].copy()
            told[self.machine.block_of[lane]] = shared.met_at[lane]
            self._released[int(offset)] = told

    def acquire(self, lanes: np.ndarray, offsets: np.ndarray) -> None:
        """The acquiring threads know what the release told; their block does after its next barrier (`join`)."""
        known = self.known()
        for lane, offset in zip(lanes, offsets, strict=True):
            if int(offset) in self._released:
                np.maximum(known[lane], self._released[int(offset)], out=known[lane])

    def check(self, one, lanes: np.ndarray, offsets: np.ndarray, size: int, *, write: bool) -> bool:
        """Refuse an access of ``size`` bytes outside the views, to a constant, misaligned or of
        what nobody wrote; was any written in this launch?
        """
        if (offsets >= np.uint64(self._end - size)).any() or (offsets & np.uint64(size - 1)).any():
            self._refuse_address(one, lanes, offsets, size)
        flags = wide(self.flags, size)[offsets >> np.uint64(size.bit_length() - 1)]
        wanted = _pattern(WRITABLE if write else READABLE | FILLED, size)
        bad = (flags & wanted) != wanted
        if bad.any():
            self._refuse_bytes(one, lanes, offsets, size, bad if size < 16 else bad.any(1), write)
        return bool((flags & _pattern(WRITTEN, size)).any())

    def _refuse_address(self, one, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        bad = offsets >= np.uint64(self._end - size)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            address = int(offsets[at]) + BASE & 0xFFFF_FFFF_FFFF_FFFF
            self.machine.refuse(one, lanes[at], f"reaches address {address:#x}, which is no tensor's of the launch")
        at = int(np.flatnonzero(offsets & np.uint64(size - 1))[0])
        self.machine.refuse(one, lanes[at], f"is not aligned to its {size} bytes: {self.name_of(int(offsets[at]))}")

    def _refuse_bytes(
        self, one, lanes: np.ndarray, offsets: np.ndarray, size: int, bad: np.ndarray, write: bool
    ) -> None:
        at = int(np.flatnonzero(bad)[0])
        offset = int(offsets[at])
        where, there = self.name_of(offset), self.flags[offset : offset + size]
        if not (there & READABLE).all():
            self.machine.refuse(one, lanes[at], f"reaches {size} bytes that are not all of a tensor: {where}")
        self.machine.refuse(
            one, lanes[at], f"writes to a constant: {where}" if write else f"reads what nobody wrote: {where}"
        )

    def check_order(self, one, lanes: np.ndarray, offsets: np.ndarray, size: int, *, stale: bool, same=None) -> None:
        """Refuse to read (or, unless it leaves the ``same`` value, to write over) what another
        thread wrote and no barrier or release has told of.
        """
        machine, shared = self.machine, self.machine.shared
        shape = (len(lanes), max(1, size // 2))
        halves = (offsets >> np.uint64(1)).astype(np.int64)[:, None] + np.arange(shape[1])
        writer, when = self.writer[halves], self.written_at[halves]
        block = writer // machine.threads
        own = machine.block_of[lanes][:, None]
        other = (writer >= 0) & (block != own)
        known = self._known[lanes[:, None], np.maximum(block, 0)] if self._known is not None else 0
        near = (writer >= 0) & (block == own) & (writer != self.lane_of[lanes][:, None])
        warp = writer % machine.threads // 32 == (machine.thread_of[lanes] // 32)[:, None]
        bad = (other & ((when >= known) | stale)) | (
            near & (when >= shared.met_at[lanes][:, None]) & ~(warp & (when < shared.warp_met_at[lanes][:, None]))
        )
        if same is not None:
            bad &= ~same[:, None]
        if bad.any():
            at, part = (int(index[0]) for index in np.nonzero(bad))
            what = (
                f"{self.name_of(int(offsets[at]))}, written by thread {writer[at, part] % machine.threads} of block "
                f"{block[at, part]}"
            )
            if other[at, part]:
                how = (
                    "through a cache that may hold what was there before"
                    if stale and when[at, part] < np.max(known)
                    else "unordered by release and acquire"
                )
                machine.refuse(one, lanes[at], f"meets another block's write {how}: {what}")
            machine.refuse(one, lanes[at], f"meets another thread's write with no barrier between: {what}")

    def note_write(self, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        self.mark(offsets, size)
        halves = (offsets >> np.uint64(1)).astype(np.int64)[:, None] + np.arange(max(1, size // 2))
        self.writer[halves] = self.lane_of[lanes][:, None]
        self.written_at[halves] = self.machine.now

    def mark(self, offsets: np.ndarray, size: int) -> None:
        wide(self.flags, size)[offsets >> np.uint64(size.bit_length() - 1)] |= _pattern(WRITTEN | FILLED, size)


def _pattern(flags: int, size: int):
    """``flags`` for each of an item's bytes."""
    return wide(np.full(16, flags, np.uint8), size)[0]


def wide(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` of bytes as items of ``size`` bytes: rows of two where there is no such number."""
    return array.view(np.uint64).reshape(-1, 2) if size == 16 else array.view(f"u{size}")


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) if size else np.empty(0, np.uint8)
