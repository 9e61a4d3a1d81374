"""The two functions of causal_conv1d on our kernels; signatures and layouts are theirs.

Symbols: b batch, d channels, l tokens, w taps. Contracts: FIELD.md, Call signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None):
    """Depthwise causal convolution: x (b, d, l), weight (d, w), bias (d,) -> (b, d, l) in x's dtype.

    ``seq_idx`` (b, l) integer: tokens of different index do not meet, and a negative index marks padding, whose result is zero.
    ``initial_states`` (b, d, w - 1): the inputs before the first. With ``return_final_states`` the last w - 1 inputs (b, d, w - 1) come second,
    written to ``final_states_out`` where that is given. ``activation`` None, "silu" or "swish"; older callers pass it fourth: so may you.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    _check_input(x, weight)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx cannot be combined with initial_states or return_final_states: a packed row has more than one state")
        return _packed(x, weight, bias, seq_idx, activation)
    out = ops.causal_conv1d(
        x.transpose(1, 2), weight, bias, activation=activation, initial_state=initial_states, return_final_state=return_final_states
    )
    if not return_final_states:
        return out.transpose(1, 2)
    out, final_states = out
    final_states = final_states.to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out.transpose(1, 2), final_states


def _check_input(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be (channels, taps), got shape {tuple(weight.shape)}; squeeze the middle axis of a Conv1d's weight")
    if x.dim() != 3 or x.shape[1] != weight.shape[0]:
        hint = "; it looks token-major: transpose it, or call storm_kernels.causal_conv1d" if x.shape[-1] == weight.shape[0] else ""
        raise ValueError(f"x must be (batch, channels, length) with the {weight.shape[0]} channels of weight, got shape {tuple(x.shape)}{hint}")


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None) -> Tensor:
    """The rows of x as one packed row whose sequences are the runs of equal ``seq_idx``."""
    batch, channels, length = x.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must be (batch, length) = ({batch}, {length}), got shape {tuple(seq_idx.shape)}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    bounds = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([bounds, bounds.new_tensor([batch * length])]).to(torch.int32)
    flat = x.transpose(1, 2).reshape(1, batch * length, channels)
    out = ops.causal_conv1d(flat, weight, bias, activation=activation, cu_seqlens=cu_seqlens).view(batch, length, channels)
    return out.masked_fill((seq_idx < 0).unsqueeze(-1), 0).transpose(1, 2)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """The next token or tokens of a running convolution: x (b, d) or (b, d, l) -> the same shape; ``conv_state`` is updated in place.

    conv_state (b, d, m), m >= w - 1: the inputs so far, oldest first. With ``cache_seqlens`` (b,) integer it is a ring buffer whose next
    entry is ``cache_seqlens % m``. ``conv_state_indices`` (b,) names the rows of a larger ``conv_state`` that belong to the batch.
    """
    squeeze = x.dim() == 2
    x = x.unsqueeze(-1) if squeeze else x
    _check_input(x, weight)
    taps, capacity = weight.shape[1], conv_state.shape[-1]
    if capacity < taps - 1:
        raise ValueError(f"conv_state must hold at least taps - 1 = {taps - 1} inputs, got shape {tuple(conv_state.shape)}")
    rows = conv_state.clone() if conv_state_indices is None else conv_state[conv_state_indices]
    if cache_seqlens is None:
        history = rows[..., capacity - (taps - 1) :]
        rows = torch.cat([rows, x.to(rows.dtype)], -1)[..., -capacity:]
    else:
        history, rows = _ring(rows, x, cache_seqlens, taps)
    with torch.no_grad():
        if conv_state_indices is None:
            conv_state.copy_(rows)
        else:
            conv_state[conv_state_indices] = rows
    out = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, initial_state=history).transpose(1, 2)
    return out.squeeze(-1) if squeeze else out


def _ring(rows: Tensor, x: Tensor, cache_seqlens: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """The w - 1 inputs before position ``cache_seqlens`` of the ring buffers ``rows`` (b, d, m), and the buffers with x written."""
    capacity, length = rows.shape[-1], x.shape[-1]
    position = cache_seqlens.long().view(-1, 1, 1)
    before = (position + torch.arange(-(taps - 1), 0, dtype=torch.int64, device=x.device)) % capacity
    history = rows.gather(2, before.expand(-1, rows.shape[1], -1))
    # Only the last `capacity` tokens fit; older ones would be overwritten in an order that scatter does not promise.
    first = max(0, length - capacity)
    after = (position + torch.arange(first, length, dtype=torch.int64, device=x.device)) % capacity
    return history, rows.scatter(2, after.expand(-1, rows.shape[1], -1), x[..., first:].to(rows.dtype))
