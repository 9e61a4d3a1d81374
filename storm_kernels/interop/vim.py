"""Vim's two fused functions (arXiv 2401.09417) on our kernels; VideoMamba calls the second one too.
Symbols as in mamba_ssm.py.
"""

from __future__ import annotations

from .. import ops
from ..backends import dispatch
from ..nn.linear import linear
from ..reference import Direction
from .inner import inner_operands
from .layout import channel_major


def bimamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b,
    B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    """Vim's bimamba v1: one convolution and one set of projections, scanned in both directions with
    A and with A_b, both (d, n).

    xz (b, 2d, l) -> (b, l, d_model). Each direction is gated by z and skips with D; the two are
    added before out_proj.
    """
    if A_b.is_complex():
        raise TypeError(f"A_b is {A_b.dtype}: complex state spaces are not supported; only real A_b is")
    u, z, (delta, B, C) = inner_operands(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )  # fmt: skip
    forward = Direction(u, delta, A, B, C, D, delta_bias)
    y = ops.bidirectional_selective_scan(forward, forward._replace(A=A_b), z=z, delta_softplus=delta_softplus)
    return linear(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b,
    B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    """:func:`bimamba_inner_fn` in plain PyTorch, whatever backend is chosen."""
    with dispatch.use_backend("torch"):
        return bimamba_inner_fn(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b,
            B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


def mamba_inner_fn_no_out_proj(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B=None, C=None, D=None,
    delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):  # fmt: skip
    """:func:`storm_kernels.interop.mamba_ssm.mamba_inner_fn` without its last projection: xz (b,
    2d, l) -> gated y (b, d, l).

    The result is contiguous where the last axis of xz is.
    """
    u, z, (delta, B, C) = inner_operands(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )  # fmt: skip
    y = ops.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return channel_major(y, xz)
