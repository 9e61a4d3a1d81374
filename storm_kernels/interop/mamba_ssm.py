"""The functions and the module of mamba_ssm (Mamba-1) on our kernels: signatures, layouts, dtypes
and parameter names are theirs.

Symbols: b batch, d channels (d_inner), l tokens, n states, g groups of channels that share B and C.
Every tensor argument gets a gradient, the RMS weights of ``mamba_inner_fn`` included. Contracts:
docs/compat.md, Call signatures. The length of the file is that of the originals' argument lists, each
argument explained; the work is done in inner.py and the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..backends import dispatch
from ..nn.linear import linear
from .inner import inner_operands
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
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's selective scan.

    Args:
        u: (b, d, l), what is scanned.
        delta: (b, d, l), step sizes in tokens, before bias and softplus.
        A: (d, n), real, per token.
        B: (d, n), (b, n, l) or (b, g, n, l).
        C: (d, n), (b, n, l) or (b, g, n, l).
        D: (d,); None for nothing.
        z: (b, d, l), the gate; None for none.
        delta_bias: (d,); None for none.
        delta_softplus: whether delta is softplus(delta + delta_bias); not by default.
        return_last_state: also return the state after the last token; not by default.

    Returns:
        (b, d, l) in u's dtype, contiguous where u's last axis is. With ``return_last_state`` also the
        state (b, d, n) in float32, which gets gradients.

    Raises:
        TypeError: a complex operand, named.
        ValueError: an operand of another shape, named.

    Source:
        mamba_ssm.ops.selective_scan_interface; arXiv 2312.00752, algorithm 2.

    Example:
        >>> one = torch.ones(1, 1, 3)  # u = delta = B = C = 1 and A = 0: the running sum
        >>> selective_scan_fn(one, one, torch.zeros(1, 1), one, one).flatten()
        tensor([1., 2., 3.])
    """
    return _scan(ops.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Plain twin of :func:`storm_kernels.interop.mamba_ssm.selective_scan_fn`, whatever backend is chosen.

    Example:
        >>> one = torch.ones(1, 1, 3)
        >>> selective_scan_ref(one, one, torch.zeros(1, 1), one, one).flatten()
        tensor([1., 2., 3.])
    """
    return _scan(reference.selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _scan(
    scan: Callable[..., Any], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
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
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None, delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
    checkpoint_lvl: int = 1, b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """A Mamba mixer after its in_proj: convolution, projections, scan, gate, out_proj.

    Args:
        xz: (b, 2d, l), what in_proj gives: the scan's channels, then the gate's.
        conv1d_weight: (d, 1, w).
        conv1d_bias: (d,), or None.
        x_proj_weight: (r + 2n, d); without the n rows of a B or C that is given.
        delta_proj_weight: (d, r).
        out_proj_weight: (d_model, d).
        out_proj_bias: (d_model,), or None.
        A: (d, n), real, per token.
        B: in place of the projected one, as :func:`selective_scan_fn` takes it; None, the default, projects.
        C: the same.
        D: (d,); None for nothing.
        delta_bias: (d,); None for none.
        B_proj_bias: (n,), added to a projected B; None for none.
        C_proj_bias: (n,), added to a projected C; None for none.
        delta_softplus: whether delta is softplus(delta + delta_bias); it is by default.
        checkpoint_lvl: 0 or 1; changes nothing: what is recomputed in the backward pass is the kernels' affair.
        b_rms_weight: (n,), switches on an RMS norm of B; None for none.
        c_rms_weight: (n,), of C; None for none.
        dt_rms_weight: of delta: after its projection if it is (d,) as mamba_ssm has it, before it if it is (r,), after
            it where r = d; None for none.
        b_c_dt_rms_eps: of these norms, 1e-6 by default.

    Returns:
        (b, l, d_model).

    Raises:
        TypeError: a complex A.
        ValueError: an operand of another shape, another ``checkpoint_lvl``; named.

    Source:
        mamba_ssm.ops.selective_scan_interface.

    Example:
        >>> b, d, l, n, r, w = 1, 2, 3, 2, 1, 2
        >>> weights = torch.ones(d, 1, w), None, torch.ones(r + 2 * n, d), torch.ones(d, r), torch.ones(4, d), None
        >>> mamba_inner_fn(torch.ones(b, 2 * d, l), *weights, A=-torch.ones(d, n)).shape
        torch.Size([1, 3, 4])
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    u, z, operands = inner_operands(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias,
        rms=(dt_rms_weight, b_rms_weight, c_rms_weight), eps=b_c_dt_rms_eps,
    )  # fmt: skip
    delta, B, C = operands
    y = ops.selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return linear(y, out_proj_weight, out_proj_bias)  # type: ignore[arg-type]  # y alone, without a final state


def mamba_inner_ref(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None, delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None, C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
) -> Tensor:  # fmt: skip
    """Plain twin of :func:`storm_kernels.interop.mamba_ssm.mamba_inner_fn`, whatever backend is chosen.

    Example:
        >>> weights = torch.ones(2, 1, 2), None, torch.ones(5, 2), torch.ones(2, 1), torch.ones(4, 2), None
        >>> mamba_inner_ref(torch.ones(1, 4, 3), *weights, A=-torch.ones(2, 2)).shape
        torch.Size([1, 3, 4])
    """
    with dispatch.use_backend("torch"):
        return mamba_inner_fn(
            xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C,
            D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        )  # fmt: skip


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token of the recurrence; the state is updated in place.

    With heads every d becomes (h, d), as in state (b, h, d, n). Gradients reach every argument of
    this step, the state before it included; the updated state carries none to the next step.

    Args:
        state: (b, d, n), the state before the token; after it when this returns.
        x: (b, d), the token.
        dt: (b, d), its step size, before bias and softplus.
        A: (d, n), real, per token.
        B: (b, n) or (b, g, n).
        C: (b, n) or (b, g, n).
        D: (d,); None for nothing.
        z: (b, d), the gate; None for none.
        dt_bias: (d,); None for none.
        dt_softplus: whether dt is softplus(dt + dt_bias); not by default.
        state_batch_indices: (b,) integers, the rows of a larger ``state`` that belong to the batch; a negative one is
            padding: the result is zero there, and no row is touched. None: row i to element i.

    Returns:
        (b, d) in x's dtype.

    Raises:
        TypeError: a complex A.
        ValueError: a state whose axes are not one more than those of x.

    Source:
        mamba_ssm.ops.triton.selective_state_update.

    Example:
        >>> state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
        >>> [selective_state_update(state, one, one, torch.zeros(1, 1), one, one).item() for _ in range(3)]
        [1.0, 2.0, 3.0]
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


def selective_state_update_ref(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """Plain twin of :func:`storm_kernels.interop.mamba_ssm.selective_state_update`, which is plain PyTorch itself.

    It has no ``state_batch_indices``.

    Example:
        >>> state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
        >>> selective_state_update_ref(state, one, one, torch.zeros(1, 1), one, one)
        tensor([[1.]])
    """
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _per_head(x: Tensor, heads: int, state_dims: int) -> Tensor:
    """B or C, (b, n) or (b, g, n), as it multiplies a state of ``state_dims`` axes whose second
    axis has ``heads`` entries.
    """
    x = x.unsqueeze(1) if x.dim() == 2 else x
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.unsqueeze(2) if state_dims == 4 else x
