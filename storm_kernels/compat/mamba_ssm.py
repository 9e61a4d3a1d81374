"""The functions and the module of mamba_ssm (Mamba-1) on our kernels: signatures, layouts, dtypes and parameter names are theirs.

Symbols: b batch, d channels (d_inner), l tokens, n states, g groups of channels that share B and C. Every tensor argument gets a gradient,
the RMS weights of ``mamba_inner_fn`` included. Contracts: FIELD.md, Call signatures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..linear import linear
from .layout import accumulate, check_scan_layout, scan_operands, token_major
from .mixer import Mamba
from .norms import RMSNorm, layer_norm_fn, rms_norm_fn

__all__ = [
    "Mamba",
    "RMSNorm",
    "layer_norm_fn",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
]


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """Mamba's selective scan (arXiv 2312.00752, algorithm 2).

    u, delta, z (b, d, l); A (d, n) real; B, C (d, n), (b, n, l) or (b, g, n, l); D, delta_bias (d,).
    Returns (b, d, l) in u's dtype and, with ``return_last_state``, the state after the last token (b, d, n) in float32, which gets gradients.
    """
    return _scan(ops.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
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
        return out.transpose(1, 2), state
    return result.transpose(1, 2)


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
    """A Mamba mixer after its in_proj: convolution, projections, scan, gate, out_proj. xz (b, 2d, l) -> (b, l, d_model).

    conv1d_weight (d, 1, w); x_proj_weight (r + 2n, d); delta_proj_weight (d, r); A (d, n). B or C, where given, replace the projected ones;
    otherwise ``B_proj_bias`` (n,) and ``C_proj_bias`` (n,) are added to those. ``b_rms_weight`` (n,), ``c_rms_weight`` (n,) and
    ``dt_rms_weight`` (d,) switch on RMS norms of B, of C and of delta after its projection. ``checkpoint_lvl`` (0 or 1) is accepted and changes
    nothing: what is recomputed in the backward pass is the kernels' affair.
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
    """From xz (b, 2d, l) all that the scan needs, token-major: u, z (b, l, d) and delta (b, l, d), B, C (b, l, g, n)."""
    if A.is_complex():
        raise TypeError(f"A is {A.dtype}: complex state spaces are not supported; only real A is")
    if xz.dim() != 3 or xz.shape[1] != 2 * A.shape[0]:
        raise ValueError(f"xz must be (batch, 2 * channels, length) with the {A.shape[0]} channels of A, got shape {tuple(xz.shape)}")
    batch, _, length = xz.shape
    channels, states = A.shape
    rank = delta_proj_weight.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = linear(u, x_proj_weight)
    dt_raw, own_B, own_C = projected.split([rank, states, states], dim=-1)
    delta = linear(dt_raw, delta_proj_weight)
    B = _given_or_projected(B, own_B, B_proj_bias)
    C = _given_or_projected(C, own_C, C_proj_bias)
    B, C = scan_operands(B, C, batch, channels, length)
    return u, z, tuple(_rms(t, w, eps) for t, w in zip((delta, B, C), rms, strict=True))


def _given_or_projected(given: Tensor | None, projected: Tensor, bias: Tensor | None) -> Tensor:
    """``given``, or the projected (b, l, n) with its bias as (b, n, l)."""
    if given is not None:
        return given
    return (projected if bias is None else projected + bias.to(projected.dtype)).transpose(1, 2)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    acc = accumulate(x, weight)
    return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), eps).to(x.dtype)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """One token of the recurrence: ``state`` (b, d, n) is updated in place, (b, d) in x's dtype is returned.

    x, dt, z (b, d); A (d, n); B, C (b, n) or (b, g, n); D, dt_bias (d,). With heads every d becomes (h, d), as in state (b, h, d, n).
    ``state_batch_indices`` (b,) names the rows of a larger ``state`` that belong to the batch.
    Gradients reach every argument of this step, the state before it included; the updated state carries none to the next step.
    """
    if A.is_complex():
        raise TypeError(f"A is {A.dtype}: complex state spaces are not supported; only real A is")
    if state.dim() not in (3, 4) or state.dim() != x.dim() + 1:
        raise ValueError(f"state must be (batch, [heads,] channels, states) and x one axis less, got {tuple(state.shape)} and {tuple(x.shape)}")
    acc = accumulate(state, x, A)
    # A copy, for autograd needs the state as it was before the update in place.
    old = (state.clone() if state_batch_indices is None else state[state_batch_indices]).to(acc)
    step = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias.to(acc)
    step = F.softplus(step) if dt_softplus else step
    heads = state.shape[1] if state.dim() == 4 else x.shape[1]
    B, C = (_per_head(t.to(acc), heads, state.dim()) for t in (B, C))
    new = old * torch.exp(step.unsqueeze(-1) * A.to(acc)) + (step * x.to(acc)).unsqueeze(-1) * B
    with torch.no_grad():
        if state_batch_indices is None:
            state.copy_(new)
        else:
            state[state_batch_indices] = new.to(state.dtype)
    out = (new * C).sum(-1)
    out = out if D is None else out + D.to(acc) * x.to(acc)
    out = out if z is None else out * F.silu(z.to(acc))
    return out.to(x.dtype)


def _per_head(x: Tensor, heads: int, state_dims: int) -> Tensor:
    """B or C, (b, n) or (b, g, n), as it multiplies a state of ``state_dims`` axes whose second axis has ``heads`` entries."""
    x = x.unsqueeze(1) if x.dim() == 2 else x
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.unsqueeze(2) if state_dims == 4 else x
