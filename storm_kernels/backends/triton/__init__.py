"""The Triton backend: kernels for NVIDIA and AMD GPUs that need no compiler on the user's machine;
the interpreter runs them on CPU tensors.

Implements `storm_kernels.backends.contract.Backend`. Importing this package imports
Triton; `storm_kernels` does so only when the backend is asked about.
"""

from __future__ import annotations

import functools

import torch
import triton

from .conv import conv
from .conv_backward import conv_backward
from .reduce import reduce, reduce_backward
from .scan import scan
from .scan_backward import scan_backward
from .scan_layout import checkpoint_shapes
from .warm import warmup

__all__ = [
    "NAME", "checkpoint_shapes", "conv", "conv_backward", "own_device", "reduce", "reduce_backward", "scan",
    "scan_backward", "why_not", "warmup",
]  # fmt: skip

NAME = "triton"
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def own_device() -> str:
    """`contract.Backend.own_device`."""
    return "cpu" if INTERPRETED else "cuda"


def why_not(op: str, *, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    """`contract.Backend.why_not`."""
    if op not in ("scan", "conv", "reduce"):
        return f"it has no {op}; use backend='torch'"
    refused = dtypes - DTYPES
    if refused:
        return f"it computes in float32, not {', '.join(sorted(map(str, refused)))}; use backend='torch'"
    if d_state > 256:
        return f"d_state {d_state} is above 256, the states of a channel that fit in registers; use backend='torch'"
    if INTERPRETED:
        return (
            None
            if device == "cpu"
            else "TRITON_INTERPRET=1 is set: kernels run in the interpreter, on CPU tensors; unset it to use the GPU"
        )
    if device != "cuda":
        return (
            f"it needs CUDA or ROCm tensors, got {device}; set TRITON_INTERPRET=1 before the first use to run its "
            "interpreter on CPU tensors"
        )
    return _no_gpu()


@functools.cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return (
            f"the GPU has compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, "
            "Triton's kernels need 8.0"
        )
    return None
