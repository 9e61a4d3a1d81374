"""The functions of causal_conv1d on our kernels; signatures and layouts are theirs.

Symbols: b batch, d channels, l tokens, w taps. Contracts: docs/compat.md, Call signatures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import dispatch
from .layout import channel_major, read_slots, token_major, write_slots, zero_padding

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_ref", "causal_conv1d_update_ref"]


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise causal convolution.

    Older callers pass the activation fourth: so may you.

    Args:
        x: (b, d, l).
        weight: (d, w), the taps in tokens; the last meets the token itself.
        bias: (d,); None for none.
        seq_idx: (b, l) integers: a token meets those of the w - 1 before it that have its index; a negative index
            marks padding, whose result is zero. None: all tokens are of one sequence.
        initial_states: (b, d, w - 1), the inputs before the first; None for zeros. Not with ``seq_idx``.
        return_final_states: also return the last w - 1 inputs; not by default. Not with ``seq_idx``.
        final_states_out: (b, d, w - 1), where they are written to; None for a new tensor.
        activation: None, "silu" or "swish", or any name of transformers' ACT2FN where that is imported. Default: none.

    Returns:
        (b, d, l) in x's dtype and memory layout. With ``return_final_states`` also (b, d, w - 1).

    Raises:
        ValueError: an operand of another shape, or ``seq_idx`` with states; named.
        NotImplementedError: another activation.

    Source:
        causal_conv1d.causal_conv1d_fn, github.com/Dao-AILab/causal-conv1d.

    Example:
        >>> causal_conv1d_fn(torch.ones(1, 1, 4), torch.tensor([[1.0, 1.0]])).flatten()
        tensor([1., 2., 2., 2.])
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    fused, after = _activation(activation)
    _check_input(x, weight)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError(
                "seq_idx cannot be combined with initial_states or return_final_states: "
                "a packed row has more than one state"
            )
        out = after(_packed(x, weight, bias, seq_idx, fused))
        return channel_major(out.masked_fill((seq_idx < 0).unsqueeze(-1), 0), x)
    result: Any = ops.causal_conv1d(
        token_major(x),
        weight,
        bias,
        activation=fused,
        initial_state=initial_states,
        return_final_state=return_final_states,
    )
    if not return_final_states:
        return channel_major(after(result), x)
    out, final_states = result
    final_states = final_states.to(x.dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return channel_major(after(out), x), final_states


def _activation(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The activation that the kernel applies, and the function for what it does not.

    The originals know SiLU only. transformers hands over whatever ``hidden_act`` its model has, and
    its own convolution applies any of ACT2FN.
    """
    if name in (None, "silu", "swish"):
        return name, _identity
    transformers = sys.modules.get("transformers.activations")
    if transformers is not None and name in transformers.ACT2FN:
        return None, transformers.ACT2FN[name]
    raise NotImplementedError(
        f"activation must be None, 'silu' or 'swish', got {name!r} (where transformers is imported, "
        "any name of its ACT2FN)"
    )


def _identity(x: Tensor) -> Tensor:
    return x


def _check_input(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"weight must be (channels, taps), got shape {tuple(weight.shape)}; "
            "squeeze the middle axis of a Conv1d's weight"
        )
    if x.dim() != 3 or x.shape[1] != weight.shape[0]:
        hint = (
            "; it looks token-major: transpose it, or call storm_kernels.causal_conv1d"
            if x.shape[-1] == weight.shape[0]
            else ""
        )
        raise ValueError(
            f"x must be (batch, channels, length) with the {weight.shape[0]} channels of weight, "
            f"got shape {tuple(x.shape)}{hint}"
        )


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None) -> Tensor:
    """x (b, d, l) -> (b, l, d): the rows of x as one packed row whose sequences are the runs of equal ``seq_idx``."""
    batch, channels, length = x.shape
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must be (batch, length) = ({batch}, {length}), got shape {tuple(seq_idx.shape)}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if _comes_back(seq_idx, starts, weight.shape[1]):
        return _by_tap(x, weight, bias, seq_idx, activation)
    bounds = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([bounds, bounds.new_tensor([batch * length])]).to(torch.int32)
    flat = token_major(x).reshape(1, batch * length, channels)
    out: Any = ops.causal_conv1d(flat, weight, bias, activation=activation, cu_seqlens=cu_seqlens)
    return out.view(batch, length, channels)


def _comes_back(seq_idx: Tensor, starts: Tensor, taps: int) -> bool:
    """Whether an index comes back within the taps after another one: then runs of equal indices are
    not what decides who meets whom.
    """
    run = starts.cumsum(1)
    apart = [
        (seq_idx[:, k:] == seq_idx[:, :-k]) & (run[:, k:] != run[:, :-k]) for k in range(2, min(taps, seq_idx.shape[1]))
    ]
    return bool(torch.cat(apart, 1).any()) if apart else False


def _by_tap(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None) -> Tensor:
    """One tap after the other, in plain PyTorch, in float32 or better: x (b, d, l) -> (b, l, d) in x's dtype."""
    dtype, acc = x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    x, weight, taps, length = x.to(acc), weight.to(acc), weight.shape[1], x.shape[2]
    out = x * weight[:, -1:]
    for k in range(1, min(taps, length)):
        meets = (seq_idx[:, k:] == seq_idx[:, :-k]).unsqueeze(1)
        met = x[..., :-k] * weight[:, taps - 1 - k, None]
        out = torch.cat([out[..., :k], out[..., k:] + torch.where(meets, met, 0)], -1)
    out = out if bias is None else out + bias.to(acc)[:, None]
    out = out if activation is None else torch.nn.functional.silu(out)
    return out.to(dtype).transpose(1, 2)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The next token or tokens of a running convolution; its state is updated in place.

    Args:
        x: (b, d) or (b, d, l).
        conv_state: (b, d, m), m >= w - 1: the inputs so far, oldest first.
        weight: (d, w), the taps in tokens; the last meets the token itself.
        bias: (d,); None for none.
        activation: as :func:`causal_conv1d_fn` takes it; none by default.
        cache_seqlens: (b,) integers: ``conv_state`` is a ring buffer whose next entry is ``cache_seqlens % m``. None:
            it is moved along.
        conv_state_indices: (b,) integers, the rows of a larger ``conv_state`` that belong to the batch; a negative one
            is padding: the result is zero there, and no row is touched. None: row i to element i.

    Returns:
        The shape of x, in its dtype.

    Raises:
        ValueError: an operand of another shape, named.
        NotImplementedError: another activation.

    Source:
        causal_conv1d.causal_conv1d_update, github.com/Dao-AILab/causal-conv1d.

    Example:
        >>> state, taps = torch.zeros(1, 1, 1), torch.tensor([[1.0, 1.0]])
        >>> [causal_conv1d_update(torch.ones(1, 1), state, taps).item() for _ in range(3)]
        [1.0, 2.0, 2.0]
    """
    fused, after = _activation(activation)
    squeeze = x.dim() == 2
    x = x.unsqueeze(-1) if squeeze else x
    _check_input(x, weight)
    taps, capacity = weight.shape[1], conv_state.shape[-1]
    if capacity < taps - 1:
        raise ValueError(
            f"conv_state must hold at least taps - 1 = {taps - 1} inputs, got shape {tuple(conv_state.shape)}"
        )
    rows = read_slots(conv_state, conv_state_indices)
    if cache_seqlens is None:
        history = rows[..., capacity - (taps - 1) :]
        rows = torch.cat([rows, x.to(rows.dtype)], -1)[..., -capacity:]
    else:
        history, rows = _ring(rows, x, cache_seqlens, taps)
    write_slots(conv_state, conv_state_indices, rows)
    out: Any = ops.causal_conv1d(token_major(x), weight, bias, activation=fused, initial_state=history)
    out = channel_major(zero_padding(after(out), conv_state_indices), x)
    return out.squeeze(-1) if squeeze else out


def _ring(rows: Tensor, x: Tensor, cache_seqlens: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """The w - 1 inputs before position ``cache_seqlens`` of the ring buffers ``rows`` (b, d, m),
    and the buffers with x written.
    """
    capacity, length = rows.shape[-1], x.shape[-1]
    position = cache_seqlens.long().view(-1, 1, 1)
    before = (position + torch.arange(-(taps - 1), 0, dtype=torch.int64, device=x.device)) % capacity
    history = rows.gather(2, before.expand(-1, rows.shape[1], -1))
    # Only the last `capacity` tokens fit; older ones would be overwritten in an order that scatter
    # does not promise.
    first = max(0, length - capacity)
    after = (position + torch.arange(first, length, dtype=torch.int64, device=x.device)) % capacity
    return history, rows.scatter(2, after.expand(-1, rows.shape[1], -1), x[..., first:].to(rows.dtype))


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_states: Tensor | str | None = None,
    return_final_states: bool = False, final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Plain twin of :func:`storm_kernels.interop.causal_conv1d.causal_conv1d_fn`, whatever backend is chosen.

    It has no ``seq_idx``; older callers pass the activation fourth.

    Example:
        >>> causal_conv1d_ref(torch.ones(1, 1, 4), torch.tensor([[1.0, 1.0]])).flatten()
        tensor([1., 2., 2., 2.])
    """
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    with dispatch.use_backend("torch"):
        return causal_conv1d_fn(
            x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
        )


def causal_conv1d_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain twin of :func:`storm_kernels.interop.causal_conv1d.causal_conv1d_update`, whatever backend is chosen.

    It has no ``conv_state_indices``.

    Example:
        >>> state = torch.zeros(1, 1, 1)
        >>> causal_conv1d_update_ref(torch.ones(1, 1), state, torch.tensor([[1.0, 1.0]])), state.item()
        (tensor([[1.]]), 1.0)
    """
    with dispatch.use_backend("torch"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each packed sequence: x (tokens, d), cu_seqlens (n + 1,) -> (n, d, state_len).

    A sequence shorter than that has zeros before its first input.
    """
    back = torch.arange(-state_len, 0, dtype=torch.int64, device=x.device)
    tokens = cu_seqlens[1:, None].long() + back
    inside = tokens >= cu_seqlens[:-1, None]
    states = x[tokens.clamp(min=0)].masked_fill(~inside.unsqueeze(-1), 0)
    return states.transpose(1, 2)
