"""What a mixer computes between its in_proj and its scan, from tensors in the layout of mamba_ssm:
convolution, projections, RMS norms. Symbols as in :mod:`storm_kernels.interop.mamba_ssm`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..nn.linear import linear
from .layout import accumulate, scan_operands, token_major


def inner_operands(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    rms: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """From xz (b, 2d, l) all that the scan needs, token-major: u, z (b, l, d) and delta (b, l, d),
    B, C (b, l, g, n).
    """
    if A.is_complex():
        raise TypeError(f"A is {A.dtype}: complex state spaces are not supported; only real A is")
    if xz.dim() != 3 or xz.shape[1] != 2 * A.shape[0]:
        raise ValueError(
            f"xz must be (batch, 2 * channels, length) with the {A.shape[0]} channels of A, got shape {tuple(xz.shape)}"
        )
    batch, _, length = xz.shape
    channels, states = A.shape
    x, z = token_major(xz).chunk(2, dim=-1)
    taps = conv1d_weight.squeeze(1)
    u: Tensor = ops.causal_conv1d(x, taps, conv1d_bias, activation="silu")  # type: ignore[assignment]  # no final state
    dt_raw, own_B, own_C = _projected(u, x_proj_weight, delta_proj_weight.shape[1], states, B, C)
    dt_rms_weight, b_rms_weight, c_rms_weight = rms
    before = _norms_before(dt_rms_weight, channels, dt_raw.shape[-1])
    dt_raw = _rms(dt_raw, dt_rms_weight, eps) if before else dt_raw
    delta = linear(dt_raw, delta_proj_weight)
    delta = delta if before else _rms(delta, dt_rms_weight, eps)
    B = _given_or_projected(B, own_B, B_proj_bias)
    C = _given_or_projected(C, own_C, C_proj_bias)
    B, C = scan_operands(B, C, batch, channels, length)
    return u, z, (delta, _rms(B, b_rms_weight, eps), _rms(C, c_rms_weight, eps))


def _projected(
    u: Tensor, x_proj_weight: Tensor, rank: int, states: int, B: Tensor | None, C: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dt (b, l, r), and B and C (b, l, n) where they are not given. x_proj_weight has the rows of
    what is projected, or all r + 2n.
    """
    needed, rows = rank + states * ((B is None) + (C is None)), x_proj_weight.shape[0]
    if rows not in (needed, rank + 2 * states):
        raise ValueError(
            f"x_proj_weight must have {needed} rows, rank {rank} of delta_proj_weight and the {states} states of A "
            f"for each of B and C that is not given, got shape {tuple(x_proj_weight.shape)}"
        )
    projected = linear(u, x_proj_weight)
    return (
        projected[..., :rank],
        projected[..., rank : rank + states] if B is None else None,
        projected[..., rows - states :] if C is None else None,
    )


def _given_or_projected(given: Tensor | None, projected: Tensor | None, bias: Tensor | None) -> Tensor:
    """``given``, or the projected (b, l, n) with its bias as (b, n, l)."""
    if given is not None:
        return given
    assert projected is not None, "one of the two is there"
    return (projected if bias is None else projected + bias.to(projected.dtype)).transpose(1, 2)


def _norms_before(dt_rms_weight: Tensor | None, channels: int, rank: int) -> bool:
    """Whether delta's norm comes before delta_proj, read off the weight's length; (d,) means after
    it, as in mamba_ssm.
    """
    if dt_rms_weight is None or dt_rms_weight.shape == (channels,):
        return False
    if dt_rms_weight.shape != (rank,):
        raise ValueError(
            f"dt_rms_weight must be ({channels},) for a norm after delta_proj or ({rank},) for one before it, "
            f"got shape {tuple(dt_rms_weight.shape)}"
        )
    return True


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    acc = accumulate(x, weight)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)
