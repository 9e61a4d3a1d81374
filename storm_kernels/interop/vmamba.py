"""VMamba's selective scan (arXiv 2401.10166) on our kernels."""

from __future__ import annotations

import torch

from .. import ops
from .layout import channel_major, check_scan_layout, scan_operands, token_major

# Names of VMamba's own CUDA extensions: what they chose among is chosen here by storm_kernels.
_THEIR_BACKENDS = ("oflex", "core", "mamba")


def selective_scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
    """K scans over C channels each: u, delta (B, K*C, L); A (K*C, N); B, C (B, K, N, L); D,
    delta_bias (K*C,) -> (B, K*C, L).

    The result is float32 with ``oflex``, else in u's dtype, and contiguous where u's last axis is.
    ``backend`` is one of ours, or one of VMamba's ("oflex", "core", "mamba"), which means the best
    there is here.
    """
    if B.dim() != 4 or C.shape != B.shape:
        raise ValueError(
            "B and C must both be (batch, directions, states, length), "
            f"got shapes {tuple(B.shape)} and {tuple(C.shape)}"
        )
    check_scan_layout(u, delta, A, B, C, None)
    batch, channels, length = u.shape
    B, C = scan_operands(B, C, batch, channels, length)
    u = u.float() if oflex and u.dtype in (torch.float16, torch.bfloat16) else u
    backend = None if backend in _THEIR_BACKENDS else backend
    out = ops.selective_scan(
        token_major(u),
        token_major(delta),
        A,
        B,
        C,
        D,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        backend=backend,
    )
    return channel_major(out, u)
