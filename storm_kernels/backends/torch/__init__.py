"""The backend that is always there: the reference, and its gradients by recomputing it under autograd."""

from __future__ import annotations

from .conv import conv, conv_backward
from .reduce import reduce, reduce_backward
from .scan import checkpoint_shapes, scan, scan_backward

__all__ = [
    "NAME", "checkpoint_shapes", "conv", "conv_backward", "own_device", "reduce", "reduce_backward", "scan",
    "scan_backward", "why_not",
]  # fmt: skip

NAME = "torch"


def own_device() -> str:
    """The one that every machine has."""
    return "cpu"


def why_not(op: str, *, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    """It runs everywhere."""
    return None
