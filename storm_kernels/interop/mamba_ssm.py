"""The functions and the module of mamba_ssm (Mamba-1) on our kernels: signatures, layouts, dtypes
and parameter names are theirs.

Symbols: b batch, d channels (d_inner), l tokens, n states, g groups of channels that share B and C.
Every tensor argument gets a gradient, the RMS weights of ``mamba_inner_fn`` included. Contracts:
docs/compat.md, Call signatures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..backends import dispatch
from ..nn.linear import linear
from .layout import (
    accumulate,
    channel_major,
    check_scan_layout,
    read_slots,
    scan_operands,
    token_major,
    write_slots,
    zero_padding,
)
from .mixer import Mamba
from .norms import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = [
    "Mamba",
    "RMSNorm",
    "layer_norm_fn",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """Mamba's selective scan (arXiv 2312.00752, algorithm 2).

    u, delta, z (b, d, l); A (d, n) real; B, C (d, n), (b, n, l) or (b, g, n, l); D, delta_bias
    (d,). Returns (b, d, l) in u's dtype, contiguous where u's last axis is, and, with
    ``return_last_state``, the state after the last token (b, d, n) in float32, which gets
    gradients.
    """
    return _scan(ops.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """:func:`selective_scan_fn` in plain PyTorch, one token after the other, whatever backend is chosen."""
    return _scan(reference.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _scan(scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    check_scan_layout(u, delta, A, B, C, z)
    batch, channels, length = u.shape
    B, C = scan_operands(B, C, batch, channels, length)
    result = scan(
        token_major(u),
        token_major(delta),
        A,
        B,
        C,
        D,
        z=token_major(z),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_final_state=return_last_state,
    )
    if return_last_state:
        out, state = result
        return channel_major(out, u), state
    return channel_major(result, u)


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """A Mamba mixer after its in_proj: convolution, projections, scan, gate, out_proj. xz (b, 2d,
    l) -> (b, l, d_model).

    conv1d_weight (d, 1, w); x_proj_weight (r + 2n, d); delta_proj_weight (d, r); A (d, n). B or C,
    where given (as in :func:`selective_scan_fn`), replace the projected ones, and x_proj_weight
    need not have their n rows; otherwise ``B_proj_bias`` (n,) and ``C_proj_bias`` (n,) are added to
    those. ``b_rms_weight`` (n,), ``c_rms_weight`` (n,) and ``dt_rms_weight`` switch on RMS norms: of
    B, of C, and of delta after its projection, if that weight is (d,) as mamba_ssm has it, or
    before it, if it is (r,); where r = d it is after. ``checkpoint_lvl`` (0 or 1) is accepted and
    changes nothing: what is recomputed in the backward pass is the kernels' affair.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    u, z, operands = inner_operands(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias,
        rms=(dt_rms_weight, b_rms_weight, c_rms_weight), eps=b_c_dt_rms_eps,
    )  # fmt: skip
    delta, B, C = operands
    y = ops.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return linear(y, out_proj_weight, out_proj_bias)


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
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
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


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """:func:`mamba_inner_fn` in plain PyTorch, whatever backend is chosen."""
    with dispatch.use_backend("torch"):
        return mamba_inner_fn(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C,
            D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """One token of the recurrence: ``state`` (b, d, n) is updated in place, (b, d) in x's dtype is returned.

    x, dt, z (b, d); A (d, n); B, C (b, n) or (b, g, n); D, dt_bias (d,). With heads every d becomes
    (h, d), as in state (b, h, d, n). ``state_batch_indices`` (b,) names the rows of a larger
    ``state`` that belong to the batch; a negative one is padding: the result is zero there, and no
    row is touched. Gradients reach every argument of this step, the state before it included; the
    updated state carries none to the next step.
    """
    if A.is_complex():
        raise TypeError(f"A is {A.dtype}: complex state spaces are not supported; only real A is")
    if state.dim() not in (3, 4) or state.dim() != x.dim() + 1:
        raise ValueError(
            "state must be (batch, [heads,] channels, states) and x one axis less, "
            f"got {tuple(state.shape)} and {tuple(x.shape)}"
        )
    acc = accumulate(state, x, A)
    # A copy, for autograd needs the state as it was before the update in place.
    old = read_slots(state, state_batch_indices).to(acc)
    step = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
    step = F.softplus(step) if dt_softplus else step
    heads = state.shape[1] if state.dim() == 4 else x.shape[1]
    B, C = (_per_head(t.to(acc), heads, state.dim()) for t in (B, C))
    new = old * torch.exp(step.unsqueeze(-1) * A.to(acc)) + (step * x.to(acc)).unsqueeze(-1) * B
    write_slots(state, state_batch_indices, new)
    out = (new * C).sum(-1)
    out = out if D is None else out + D.to(acc) * x.to(acc)
    out = out if z is None else out * F.silu(z.to(acc))
    return zero_padding(out.to(x.dtype), state_batch_indices)


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """:func:`selective_state_update`, which is plain PyTorch itself, without ``state_batch_indices``."""
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _per_head(x: Tensor, heads: int, state_dims: int) -> Tensor:
    """B or C, (b, n) or (b, g, n), as it multiplies a state of ``state_dims`` axes whose second
    axis has ``heads`` entries.
    """
    x = x.unsqueeze(1) if x.dim() == 2 else x
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.unsqueeze(2) if state_dims == 4 else x
