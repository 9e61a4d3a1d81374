"""Large results on a CPU lie on huge pages: fewer page faults when they are first written.

A fresh tensor has no memory behind it yet; the kernel brings it page by page, at the first write.
With pages of 4 KB that costs more than the arithmetic of a scan; Linux brings 2 MB at a time where
it was asked to ("madvise" in /sys/kernel/mm/transparent_hugepage/enabled, as most systems have it,
or "always"). Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

# Below this, allocators mostly hand out memory that was written before.
LEAST_BYTES = 2**22
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty(shape, dtype=dtype, device=device)``; a large one on a CPU on huge pages.

    Example:
        >>> empty((2, 3), torch.float32, torch.device("cpu")).shape
        torch.Size([2, 3])
    """
    t = torch.empty(shape, dtype=dtype, device=device)
    if torch.compiler.is_compiling() or _madvise is None or _ADVICE is None:
        return t
    if t.nbytes >= LEAST_BYTES and t.device.type == "cpu":
        first = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # What the kernel answers does not matter: without huge pages the tensor is as good, and
        # slower to write.
        _madvise(first, (t.data_ptr() + t.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE, _ADVICE)
    return t
