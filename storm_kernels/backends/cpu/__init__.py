"""The "cpu" backend: C++ kernels on vector extensions behind a plain C interface (src/api.h). See
`contract.Backend`.
"""

from __future__ import annotations

import ctypes
import time

from .conv import conv, conv_backward
from .loader import library, why_missing
from .reduce import reduce, reduce_backward
from .scan import checkpoint_shapes, scan, scan_backward
from .structs import DTYPES
from .threads import thread_count

__all__ = [
    "NAME", "checkpoint_shapes", "conv", "conv_backward", "own_device", "reduce", "reduce_backward", "scan",
    "scan_backward", "why_not", "exp2_fma_rate",
]  # fmt: skip

NAME = "cpu"


def own_device() -> str:
    """See `contract.Backend`."""
    return "cpu"


def why_not(op: str, *, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    """See `contract.Backend.why_not`. Any d_state and d_conv will do."""
    if device != "cpu":
        return f"the cpu backend runs on CPU tensors, not on {device!r}"
    if op not in ("scan", "conv", "reduce"):
        return f"the cpu backend has no {op}; the torch backend may have it"
    refused = sorted(str(dtype) for dtype in dtypes - set(DTYPES))
    if refused:
        return (
            f"the cpu backend takes float32, bfloat16 and float16 activations, not {', '.join(refused)}; "
            "the torch backend does"
        )
    return why_missing()


def exp2_fma_rate(repeats: int = 5) -> float:
    """Items per second of a loop that only does exp2 and the scan's two multiply-adds, in
    registers: the limit of the forward scan.

    The best of ``repeats`` runs on ``torch.get_num_threads()`` threads, with the variant in use.
    """
    probe = library().function("probe_rate", ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_float))
    steps, threads, sink = 500_000, thread_count(), ctypes.c_float()
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        items_per_step = probe(steps, threads, sink)
        best = max(best, steps * threads * items_per_step / (time.perf_counter() - start))
    return best
