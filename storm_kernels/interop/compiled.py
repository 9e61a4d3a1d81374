"""The compiled modules that public models import, ``selective_scan_cuda``, its two kinds in VMamba,
and ``causal_conv1d_cuda``, on our kernels.

Their functions take positions only, know no autograd, and write into buffers that the caller hands
over, which models (Vim, VideoMamba, BIMBA) rely on: they pass the two halves of one gradient.
Whatever device the tensors are on is served, a CPU included. Symbols: b batch, d channels, l
tokens, n states, g groups, w taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from .layout import channel_major, check_scan_layout, scan_operands, token_major

# Their kernel walks a sequence in chunks of so many tokens and returns the state after each.
_CHUNK = 2048


class ScanModule(NamedTuple):
    """``fwd`` and ``bwd`` of one compiled module."""

    fwd: Callable[..., list]
    bwd: Callable[..., list]


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """``selective_scan_cuda.fwd``: u, delta, z (b, d, l); A (d, n); B, C (d, n) or (b, g, n, l); D, delta_bias (d,).

    Returns [out, x] and, with ``z``, out * SiLU(z). out (b, d, l) is what ``z`` is not applied to;
    x (b, d, chunks, 2n) float32 holds for every 2,048 tokens the product of the decays so far and
    the state, one after the other: ``x[:, :, -1, 1::2]`` is the last state.
    """
    check_scan_layout(u, delta, A, B, C, z)
    # In float32, the gated result is rounded once, as theirs is.
    out, x = _scan_with_states(
        u if z is None else u.to(torch.promote_types(u.dtype, torch.float32)),
        delta,
        A,
        B,
        C,
        D,
        delta_bias,
        delta_softplus,
    )
    results = [channel_major(out, delta).to(u.dtype), x]
    return (
        results
        if z is None
        else [*results, channel_major(out * F.silu(token_major(z).to(out.dtype)), delta).to(u.dtype)]
    )


def selective_scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
    """``selective_scan_cuda.bwd``: the gradients [du, ddelta, dA, dB, dC, dD, ddelta_bias], with ``z`` also dz.

    With ``recompute_out_z`` the result comes last. dD and ddelta_bias are None where D and
    delta_bias are. ``dz`` (b, d, l), where given, is written to. ``x`` and ``out`` are not needed.
    """
    gated, grads = _scan_gradients((u, delta, A, B, C, D, delta_bias, z), dout, delta_softplus)
    results, dz_found = list(grads[:7]), grads[7]
    if z is not None:
        results.append(dz_found if dz is None else dz.copy_(dz_found))
    return [*results, gated] if recompute_out_z else results


def _core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1):
    """``selective_scan_cuda_core.fwd`` of VMamba: :func:`selective_scan_fwd` without z. ``nrows`` changes nothing."""
    return _oflex_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, False)


def _oflex_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows=1, out_float=True):
    """``selective_scan_cuda_oflex.fwd`` of VMamba: out in float32 with ``out_float``; delta and
    delta_bias may have a divisor of u's channels.
    """
    delta, delta_bias = _repeated(u, delta, delta_bias)
    check_scan_layout(u, delta, A, B, C, None)
    dtype = torch.promote_types(u.dtype, torch.float32) if out_float else u.dtype
    out, x = _scan_with_states(u.to(dtype), delta, A, B, C, D, delta_bias, delta_softplus)
    return [channel_major(out, delta), x]


def _core_bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows=1):
    """``bwd`` of both: the gradients [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return list(_scan_gradients((u, delta, A, B, C, D, delta_bias, None), dout, delta_softplus)[1][:7])


selective_scan_cuda = ScanModule(selective_scan_fwd, selective_scan_bwd)
selective_scan_cuda_core = ScanModule(_core_fwd, _core_bwd)
selective_scan_cuda_oflex = ScanModule(_oflex_fwd, _core_bwd)


def _repeated(u: Tensor, delta: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """delta and delta_bias for every channel of u, each repeated for its neighbours."""
    times = u.shape[1] // delta.shape[1]
    if times == 1:
        return delta, delta_bias
    return delta.repeat_interleave(times, 1), None if delta_bias is None else delta_bias.repeat_interleave(times, 0)


def _scan_with_states(u, delta, A, B, C, D, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """out (b, l, d), ungated, and x (b, d, chunks, 2n) of :func:`selective_scan_fwd`."""
    batch, channels, length = u.shape
    B, C = scan_operands(B, C, batch, channels, length)
    u, delta = token_major(u), token_major(delta)
    outs, pairs, state, total = [], [], None, 0
    for start in range(0, length, _CHUNK):
        now = slice(start, start + _CHUNK)
        out, state = ops.selective_scan(
            u[:, now], delta[:, now], A, B[:, now], C[:, now], D, delta_bias=delta_bias,
            delta_softplus=delta_softplus, initial_state=state,
            return_final_state=True,
        )  # fmt: skip
        step = (
            delta[:, now].to(state.dtype)
            if delta_bias is None
            else delta[:, now].to(state.dtype) + delta_bias.to(state.dtype)
        )
        total = total + (F.softplus(step) if delta_softplus else step).sum(1)
        decay = torch.exp(total.unsqueeze(-1) * A.to(state.dtype))
        outs.append(out)
        pairs.append(torch.stack([decay, state], -1).flatten(2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), torch.stack(pairs, 2)


def _scan_gradients(
    operands: tuple[Tensor | None, ...], dout: Tensor, delta_softplus: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The gated result (b, d, l), and the gradient of each of u, delta, A, B, C, D, delta_bias, z; None for None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    with torch.enable_grad():
        u, delta, A, B, C, D, delta_bias, z = leaves
        delta, delta_bias = _repeated(u, delta, delta_bias)
        check_scan_layout(u, delta, A, B, C, z)
        B, C = scan_operands(B, C, *u.shape)
        # In dout's dtype, for VMamba's result may be float32 where u is not.
        y = ops.selective_scan(
            token_major(u.to(dout.dtype)), token_major(delta), A, B, C, D, z=token_major(z), delta_bias=delta_bias,
            delta_softplus=delta_softplus
        )  # fmt: skip
    given = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, given, token_major(dout)))
    return channel_major(y.detach(), dout), [None if t is None else next(grads).contiguous() for t in leaves]


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    """``causal_conv1d.cpp_functions``: x (b, d, l), weight (d, w), bias (d,) -> (b, d, l);
    ``final_states_out`` (b, d, w - 1) is written to.
    """
    found = causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, final_states_out is not None, final_states_out,
        "silu" if silu_activation else None
    )  # fmt: skip
    return found if final_states_out is None else found[0]


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):  # fmt: skip
    """``causal_conv1d.cpp_functions``: the gradients (dx, dweight, dbias, dinitial_states); None
    where there is no bias or no wish for the last.

    ``dx``, where given, is written to.
    """
    wanted = (x, weight, bias, initial_states if return_dinitial_states else None)
    leaves = [None if t is None else t.detach().requires_grad_() for t in wanted]
    start = leaves[3] if return_dinitial_states else initial_states
    with torch.enable_grad():
        found = causal_conv1d_fn(
            *leaves[:3], seq_idx, start, dfinal_states is not None, activation="silu" if silu_activation else None
        )  # fmt: skip
    given = [t for t in leaves if t is not None]
    results, signals = ((found,), (dout,)) if dfinal_states is None else (found, (dout, dfinal_states))
    grads = iter(torch.autograd.grad(results, given, signals))
    grads = [None if t is None else next(grads) for t in leaves]
    if dx is not None:
        grads[0] = dx.copy_(grads[0])
    return tuple(grads)


def causal_conv1d_update_function(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices):
    """``causal_conv1d.cpp_functions``:
    :func:`storm_kernels.interop.causal_conv1d.causal_conv1d_update` with a switch for its
    activation.
    """
    return causal_conv1d_update(
        x, conv_state, weight, bias, "silu" if silu_activation else None, cache_seqlens, conv_state_indices
    )


def causal_conv1d_fwd(*args):
    """``causal_conv1d_cuda.causal_conv1d_fwd`` in each of its generations, told apart by the number of arguments.

    1.0: (x, weight, bias, silu); 1.1: (..., seq_idx, silu); 1.2: (..., seq_idx, initial_states,
    final_states_out, silu), all of which return the result (b, d, l); 1.5.1: (..., seq_idx,
    initial_states, out, final_states_out, silu), which writes it to ``out``.
    """
    if len(args) == 8:
        *first, out, final_states_out, silu = args
        out.copy_(causal_conv1d_fwd_function(*first, final_states_out, silu))
        return None
    missing = _missing("causal_conv1d_fwd", args, {4: 3, 5: 2, 7: 0}, " or 8")
    return causal_conv1d_fwd_function(*args[:-1], *missing, args[-1])


def causal_conv1d_bwd(*args):
    """``causal_conv1d_cuda.causal_conv1d_bwd`` in each of its generations, told apart by the number of arguments.

    1.0: (x, weight, bias, dout, dx, silu); 1.1: (..., dout, seq_idx, dx, silu), which return [dx,
    dweight, dbias]; 1.2: (..., dout, seq_idx, initial_states, dfinal_states, dx,
    return_dinitial_states, silu), which adds dinitial_states to them; 1.5.1: (..., dout, seq_idx,
    initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu), which writes dx and
    dinitial_states and adds to the others.
    """
    if len(args) == 12:
        *first, dx, dweight, dbias, dinitial_states, silu = args
        found = causal_conv1d_bwd_function(*first, dx, dinitial_states is not None, silu)
        dweight.add_(found[1])
        if dbias is not None:
            dbias.add_(found[2])
        if dinitial_states is not None:
            dinitial_states.copy_(found[3])
        return None
    if len(args) == 10:
        return list(causal_conv1d_bwd_function(*args))
    missing = _missing("causal_conv1d_bwd", args, {6: 3, 7: 2}, ", 10 or 12")
    *first, dx, silu = args
    return list(causal_conv1d_bwd_function(*first, *missing, dx, False, silu)[:3])


def causal_conv1d_update_compiled(*args):
    """``causal_conv1d_cuda.causal_conv1d_update`` in each of its generations, told apart by the number of arguments.

    1.0: (x, conv_state, weight, bias, silu); 1.4: (..., silu, cache_seqlens, conv_state_indices),
    both of which return the result in x's shape; 1.5.1: (..., bias, out, silu, cache_seqlens,
    conv_state_indices), which writes it to ``out``.
    """
    if len(args) == 8:
        *first, out, silu, cache_seqlens, conv_state_indices = args
        out.copy_(causal_conv1d_update_function(*first, silu, cache_seqlens, conv_state_indices))
        return None
    missing = _missing("causal_conv1d_update", args, {5: 2, 6: 1, 7: 0}, " or 8")
    return causal_conv1d_update_function(*args, *missing)


def _missing(name: str, args: tuple, absent: dict[int, int], newest: str) -> tuple[None, ...]:
    """So many None as this number of arguments leaves out."""
    if len(args) not in absent:
        raise TypeError(
            f"{name} takes {', '.join(map(str, absent))}{newest} arguments, "
            f"as one version of causal_conv1d has them, got {len(args)}"
        )
    return (None,) * absent[len(args)]
