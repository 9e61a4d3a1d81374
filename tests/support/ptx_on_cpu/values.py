"""Registers: a NumPy row over the lanes each, and operands as rows or numbers of the type that an
instruction asks for.
"""

from __future__ import annotations

import struct

import numpy as np

from .parser import Instruction, dtype_of
from .refusal import Unknown


class Registers:
    def __init__(self, machine):
        self.machine = machine
        self._rows: dict[str, np.ndarray] = {}
        threads = machine.thread_of
        self._special = {
            "%tid.x": threads,
            "%ntid.x": np.full_like(threads, machine.threads),
            "%nctaid.x": np.full_like(threads, machine.blocks),
            "%laneid": threads % np.uint32(32),
            "%warpid": threads // np.uint32(32),
            "%ctaid.x": np.zeros_like(threads),
        }
        zero, one = np.zeros_like(threads), np.ones_like(threads)
        for axis in "yz":
            self._special |= {
                f"%tid.{axis}": zero,
                f"%ctaid.{axis}": zero,
                f"%ntid.{axis}": one,
                f"%nctaid.{axis}": one,
            }

    def new_blocks(self) -> None:
        """The number of each lane's block; nothing of what ran before is left in the registers."""
        self._special["%ctaid.x"][:] = self.machine.block_of
        for row in self._rows.values():
            row.view(np.uint8).fill(1 if row.dtype == np.bool_ else 0xFF)

    def raw(self, name: str) -> np.ndarray:
        row = self._rows.get(name)
        if row is None:
            kind = dtype_of(self.machine.kernel.type_of(name))
            row = np.zeros(self.machine.lanes, kind)
            row.view(np.uint8).fill(1 if kind is np.bool_ else 0xFF)
            self._rows[name] = row
        return row

    def row(self, name: str, kind: str) -> np.ndarray:
        """The register ``name`` as numbers of ``kind``, to be written or read; a wider register's
        low part cannot be written so.
        """
        row = self.raw(name)
        dtype = dtype_of(kind)
        if row.dtype.itemsize != np.dtype(dtype).itemsize:
            raise Unknown(f"{name} of {row.dtype} as .{kind}")
        return row.view(dtype)

    def read(self, text: str, kind: str):
        """An operand as a row of ``kind``, or a number of it."""
        dtype = dtype_of(kind)
        if text.startswith("%"):
            special = self._special.get(text)
            if special is not None:
                return (
                    special
                    if special.dtype == dtype
                    else special.view(dtype)
                    if np.dtype(dtype).itemsize == 4
                    else special.astype(dtype)
                )
            row = self.raw(text)
            if row.dtype.itemsize > np.dtype(dtype).itemsize and dtype is not np.bool_:
                # The low part, of a little-endian number.
                return row.view(dtype)[:: row.dtype.itemsize // np.dtype(dtype).itemsize]
            return self.row(text, kind)
        return number(self.address(text) if text[0].isalpha() or text[0] in "_$" else text, dtype)

    def address(self, symbol: str) -> int:
        kernel = self.machine.kernel
        if symbol in kernel.shared:
            return kernel.shared[symbol]
        if symbol in kernel.parameters:
            return kernel.parameters[symbol][0]
        raise Unknown(f"symbol {symbol}")

    def guard(self, one: Instruction) -> np.ndarray:
        row = self.raw(one.guard)
        return ~row if one.negated else row

    def members(self, one: Instruction, mask) -> np.ndarray:
        """The lanes that have to come to an instruction where lanes meet: those its member mask names, or all."""
        lanes = self._special["%laneid"]
        if one.parts[0] in ("shfl", "vote") or one.parts[:2] == ("bar", "warp"):
            bits = self.read(one.operands[-1], "u32")
            return (bits >> lanes) & np.uint32(1) != 0
        return np.ones(self.machine.lanes, np.bool_)


def number(text: str | int, dtype: type):
    """An immediate operand: 12, -1, 0x1F, 0f3F800000 (bits of a float32), 0d... (of a float64)."""
    if isinstance(text, str) and text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return (
            np.uint32(bits).view(np.float32)
            if np.dtype(dtype).itemsize == 4 and dtype is np.float32
            else np.uint32(bits).view(dtype)
        )
    if isinstance(text, str) and text[:2] in ("0d", "0D"):
        return np.float64(struct.unpack(">d", bytes.fromhex(text[2:]))[0]).astype(dtype)
    value = int(text, 0) if isinstance(text, str) else text
    if dtype is np.bool_:
        return np.bool_(value != 0)
    size = np.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{size}").type(value & ((1 << 8 * size) - 1))
    return unsigned.view(dtype)
