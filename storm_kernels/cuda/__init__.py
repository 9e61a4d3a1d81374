"""The CUDA C++ backend: `Backend` of contract.py on GPUs from compute capability 8.0 on. Kernels are compiled at first use; no toolkit is needed."""

from __future__ import annotations

from .conv import LARGEST_TAPS, conv, conv_backward
from .launcher import current
from .scan import LARGEST_STATE, checkpoint_shape, scan
from .scan_backward import scan_backward
from .tokens import FORMATS, reduce, reduce_backward

NAME = "cuda"

__all__ = ["NAME", "checkpoint_shape", "conv", "conv_backward", "reduce", "reduce_backward", "scan", "scan_backward", "why_not"]


def why_not(op: str, *, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    """`Backend.why_not`."""
    launcher = current()
    if device != launcher.device_type:
        return f"the cuda backend runs on {launcher.device_type} tensors, these are on {device}"
    if op not in ("scan", "conv", "reduce"):
        return f"the cuda backend has no {op}: use the triton backend's"
    unknown = sorted(str(t) for t in dtypes - FORMATS.keys())
    if unknown:
        return f"the cuda backend takes {', '.join(str(t) for t in FORMATS)}, not {', '.join(unknown)}"
    if op == "scan" and d_state > LARGEST_STATE:
        return f"the cuda backend takes d_state up to {LARGEST_STATE}, got {d_state}"
    if op == "conv" and d_conv > LARGEST_TAPS:
        return f"the cuda backend takes d_conv up to {LARGEST_TAPS}, got {d_conv}"
    return launcher.why_not()
