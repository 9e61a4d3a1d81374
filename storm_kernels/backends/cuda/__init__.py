"""The CUDA C++ backend: `Backend` of contract.py on GPUs from compute capability 8.0 on. Kernels
are compiled at first use; no toolkit is needed.
"""

from __future__ import annotations

import torch

from ...tokens import TokenGrid, TokenReduction
from ..contract import ConvCall, ConvFilter, ScanCall, ScanInputs
from .conv import LARGEST_TAPS, conv, conv_backward
from .launcher import current
from .scan import LARGEST_STATE, checkpoint_shapes, geometry, scan
from .scan_backward import scan_backward, shared_bytes
from .tokens import FORMATS, reduce, reduce_backward

NAME = "cuda"

__all__ = [
    "NAME", "checkpoint_shapes", "conv", "conv_backward", "own_device", "reduce", "reduce_backward", "scan",
    "scan_backward", "why_not", "warmup",
]  # fmt: skip


def own_device() -> str:
    """`Backend.own_device`."""
    return current().device_type


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
    reason = launcher.why_not()
    if reason is None and op == "scan" and (needed := shared_bytes(geometry(d_state))) > launcher.shared_limit():
        return (
            f"the cuda backend's scan needs {needed} bytes of shared memory a block, "
            f"this GPU has {launcher.shared_limit()}: use triton's"
        )
    return reason


def warmup(
    dtype: torch.dtype, *, d_state: int = 16, d_conv: int = 4, device: str = "cuda", backward: bool = False
) -> None:
    """Compile what a bidirectional mixer of this activation ``dtype`` runs, by running it on a few
    tokens: gated scan and SiLU convolution.

    A reduction's variants and gradients with ``backward``. Do it before capturing a CUDA graph:
    nothing can be compiled or loaded during a capture.
    """
    grid, reduction, channels = TokenGrid(2, 2, 2), TokenReduction(2), 64
    x = torch.zeros(1, grid.tokens, channels, dtype=dtype, device=device)
    state = torch.zeros(1, grid.tokens, 1, d_state, dtype=dtype, device=device)
    row = torch.zeros(channels, dtype=torch.float32, device=device)
    filters = tuple(ConvFilter(row[:, None].expand(-1, d_conv).contiguous(), row, reverse) for reverse in (False, True))
    convolution = ConvCall(x, filters, silu=True, initial_state=None, cu_seqlens=None)
    conv(convolution)
    if backward:
        conv_backward((x, x), convolution, needs=frozenset({"x", "weight", "bias"}))
    A = torch.zeros(channels, d_state, dtype=torch.float32, device=device)
    directions = tuple(ScanInputs(x, x, A, state, state, row, row, reverse) for reverse in (False, True))
    for where, how in ((None, None), (grid, reduction)):
        options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None, "grid": where, "reduction": how}
        result = scan(ScanCall(directions, x, **options), save_checkpoints=backward)
        if backward:
            needs = frozenset({"u", "delta", "A", "B", "C", "D", "delta_bias", "z"})
            scan_backward(result.out, None, ScanCall(directions, x, **options), result.checkpoints, needs=needs)
