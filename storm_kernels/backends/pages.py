"""Large results on a CPU lie in memory that was written before, or on huge pages: few page faults.

A fresh tensor has no memory behind it yet; the kernel brings it page by page, at the first write.
With pages of 4 KB that costs more than the arithmetic of a scan, and an allocator gives large pieces
back to the kernel when they are freed. So they are kept here for the next result, of at most a
quarter of the machine's memory together; where the kernel runs short, it takes them (MADV_FREE). What
is fresh comes 2 MB at a time where Linux was asked to ("madvise" in
/sys/kernel/mm/transparent_hugepage/enabled, as most systems have it, or "always").
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import weakref

import torch
from torch import Tensor

# Below this, allocators mostly hand out memory that was written before.
LEAST_BYTES = 2**22

# Sizes are whole huge pages. A piece serves a result that fills at least this part of it.
_HUGE_PAGE = 2**21
_FILLED = 0.75

_ON_LINUX = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")
_MOST_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if _ON_LINUX else 0


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty(shape, dtype=dtype, device=device)``; a large one on a CPU under Linux in memory of ours.

    The storage of such a one cannot be resized.

    Example:
        >>> empty((2, 3), torch.float32, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    if not _ON_LINUX or device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    if count * dtype.itemsize < LEAST_BYTES or torch._C._len_torch_dispatch_stack():
        return torch.empty(shape, dtype=dtype, device=device)
    pages = -(-count * dtype.itemsize // _HUGE_PAGE)
    try:
        piece = _kept.take(pages) or _fresh(pages)
    except OSError:  # no room for so much: PyTorch's own error says so
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = (ctypes.c_char * len(piece)).from_buffer(piece)
    weakref.finalize(buffer, _kept.give, piece).atexit = False
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Give back what is kept for further results."""
    _kept.clear()


def _fresh(pages: int) -> mmap.mmap:
    piece = mmap.mmap(-1, pages * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # What the kernel answers does not matter: without huge pages the memory is as good, and slower to write.
    with contextlib.suppress(OSError):
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


class _Kept:
    """Pieces of memory that nobody uses, by their number of huge pages; the sizes that were used last come last.

    A tensor may be freed at any moment, in any thread and in the middle of any of these methods: each line leaves
    what the next one can go on from, and no iteration makes objects, which might start the garbage collector.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, list[mmap.mmap]] = {}

    def take(self, pages: int) -> mmap.mmap | None:
        """The smallest piece of at least ``pages`` huge pages that is not much larger."""
        for size in sorted(self._pieces):
            if pages <= size <= pages / _FILLED:
                with contextlib.suppress(KeyError, IndexError):
                    return self._pieces[size].pop()
        return None

    def give(self, piece: mmap.mmap) -> None:
        """Keep a piece, and let the kernel have those of the sizes that were used least lately."""
        size = len(piece) // _HUGE_PAGE
        try:
            piece.madvise(mmap.MADV_FREE)
        except OSError:
            return
        pieces = self._pieces.pop(size, [])
        pieces.append(piece)
        self._pieces[size] = pieces
        while self.bytes() > _MOST_BYTES:
            for oldest in list(self._pieces)[:1]:
                try:
                    self._pieces[oldest].pop()
                except (KeyError, IndexError):
                    self._pieces.pop(oldest, None)

    def bytes(self) -> int:
        """What is kept."""
        return sum(size * len(self._pieces.get(size, ())) for size in list(self._pieces)) * _HUGE_PAGE

    def clear(self) -> None:
        self._pieces.clear()


_kept = _Kept()
