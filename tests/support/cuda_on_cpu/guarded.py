"""Copies of tensors that end where a page begins that nobody may touch: what reaches past them faults."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping

from torch import Tensor

LARGEST = 64 * 2**20  # bytes of a storage; larger ones, most of whose pages nobody touches, are left where they are
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Storages by their address; `take_back` copies what a kernel made of them to the tensors."""

    def __init__(self):
        self._copies: dict[int, tuple[mmap.mmap, int, int]] = {}  # pages, address in them, bytes

    def replace(self, value):
        """``value``, a structure's fields, with the address of a copy in place of each tensor."""
        if isinstance(value, Mapping):
            return {key: self.replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.replace(item) for item in value]
        if not isinstance(value, Tensor) or not 0 < value.untyped_storage().nbytes() <= LARGEST:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._copies:
            self._copies[storage.data_ptr()] = self._copy(storage.data_ptr(), storage.nbytes())
        return self._copies[storage.data_ptr()][1] + value.data_ptr() - storage.data_ptr()

    @staticmethod
    def _copy(address: int, size: int) -> tuple[mmap.mmap, int, int]:
        page = mmap.PAGESIZE
        room = -(-size // page) * page
        pages = mmap.mmap(-1, room + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        if _libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        copy = start + (room - size) // 16 * 16
        ctypes.memmove(copy, address, size)
        return pages, copy, size

    def take_back(self) -> None:
        for address, (_, copy, size) in self._copies.items():
            ctypes.memmove(address, copy, size)
