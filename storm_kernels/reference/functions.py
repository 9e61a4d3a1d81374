"""The plain-PyTorch truth: every public function, to be read beside docs/spec.md. Slow,
differentiable, right in float64.

Symbols: batch; L tokens; E = d_inner channels; S = d_state; G groups of channels that share B and
C; K = d_conv; L' tokens after the reduction. States, decays and sums are float32, or float64 when
any operand is, whatever the activations' dtype. The scan is Mamba's (arXiv 2312.00752, algorithm
2), the token reduction STORM's (arXiv 2503.04130, eqs. 6-8).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from ..tokens import TokenGrid, TokenReduction


class Direction(NamedTuple):
    """The operands of one direction of a scan, in the sequence's own order.

    Args:
        u: (batch, L, E), what is scanned.
        delta: (batch, L, E), step sizes in tokens, before bias and softplus.
        A: (E, S), real, per token.
        B: (batch, L, S), or (batch, L, G, S) with groups of channels.
        C: (batch, L, S) or (batch, L, G, S).
        D: (E,); None, the default, for nothing.
        delta_bias: (E,); None, the default, for none.

    Example:
        >>> u, delta = torch.randn(2, 1, 8, 4).unbind()
        >>> Direction(u, delta, A=-torch.ones(4, 2), B=torch.ones(1, 8, 2), C=torch.ones(1, 8, 2)).D is None
        True
    """

    u: Tensor  # (batch, L, E)
    delta: Tensor  # (batch, L, E)
    A: Tensor  # (E, S)
    B: Tensor  # (batch, L, S) or (batch, L, G, S)
    C: Tensor  # (batch, L, S) or (batch, L, G, S)
    D: Tensor | None = None  # (E,)
    delta_bias: Tensor | None = None  # (E,)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    grid: TokenGrid | None = None,
    reduction: TokenReduction | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain twin of :func:`storm_kernels.selective_scan`; same arguments, less ``backend``.

    Example:
        >>> one = torch.ones(1, 3, 1)  # u = delta = B = C = 1 and A = 0: the running sum
        >>> selective_scan(one, one, torch.zeros(1, 1), one, one).flatten()
        tensor([1., 2., 3.])
    """
    direction = Direction(u, delta, A, B, C, D, delta_bias)
    y, final_state = _scan_sequences(direction, delta_softplus, reverse, initial_state, cu_seqlens)
    out = _gate_and_reduce(y, z, grid, reduction).to(u.dtype)
    return (out, final_state) if return_final_state else out


def bidirectional_selective_scan(
    forward: Direction,
    backward: Direction,
    z: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    grid: TokenGrid | None = None,
    reduction: TokenReduction | None = None,
) -> Tensor:
    """Plain twin of :func:`storm_kernels.bidirectional_selective_scan`; same arguments, less ``backend``.

    Example:
        >>> one = torch.ones(1, 3, 1)  # the running sums from either end, added
        >>> sums = Direction(one, one, torch.zeros(1, 1), one, one)
        >>> bidirectional_selective_scan(sums, sums).flatten()
        tensor([4., 4., 4.])
    """
    y_forward, _ = _scan_sequences(forward, delta_softplus, False, None, cu_seqlens)
    y_backward, _ = _scan_sequences(backward, delta_softplus, True, None, cu_seqlens)
    return _gate_and_reduce(y_forward + y_backward, z, grid, reduction).to(forward.u.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain twin of :func:`storm_kernels.causal_conv1d`; same arguments, less ``backend``.

    Example:
        >>> causal_conv1d(torch.ones(1, 4, 1), torch.tensor([[1.0, 1.0]])).flatten()
        tensor([1., 2., 2., 2.])
    """
    out, states = _conv_sequences(x, weight, bias, activation, reverse, initial_state, cu_seqlens)
    return (out, states) if return_final_state else out


def bidirectional_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain twin of :func:`storm_kernels.bidirectional_causal_conv1d`; same arguments, less ``backend``.

    Example:
        >>> taps = torch.tensor([[1.0, 1.0]])
        >>> bidirectional_causal_conv1d(torch.ones(1, 3, 1), taps, None, taps, None)[1].flatten()
        tensor([2., 2., 1.])
    """
    forward, _ = _conv_sequences(x, weight, bias, activation, False, None, cu_seqlens)
    backward, _ = _conv_sequences(x, weight_b, bias_b, activation, True, None, cu_seqlens)
    return forward, backward


def reduce_tokens(x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None) -> Tensor:
    """Plain twin of :func:`storm_kernels.reduce_tokens`; same arguments, less ``backend``.

    Example:
        >>> x = torch.arange(8.0).view(1, 8, 1)  # 4 frames of 2 tokens
        >>> reduce_tokens(x, TokenGrid(4, 2, 1), TokenReduction(temporal_pool=2)).flatten()
        tensor([1., 2., 5., 6.])
    """
    if reduction is None or reduction.is_identity:
        return x
    assert grid is not None, "grid must be given with a reduction"
    batch, _, channels = x.shape
    video = x.to(_accumulate(x)).reshape(batch, grid.frames, grid.height, grid.width, channels).movedim(-1, 1)
    # A block larger than the side averages the whole side.
    block = [
        min(pool, side)
        for pool, side in (
            (reduction.temporal_pool, grid.frames),
            (reduction.spatial_pool, grid.height),
            (reduction.spatial_pool, grid.width),
        )
    ]
    pooled = F.avg_pool3d(video, block, block, ceil_mode=True, count_include_pad=False)
    # By index: the size of a slice with a step is one that torch.export cannot prove for every
    # number of frames.
    kept = pooled.index_select(
        2, torch.arange(reduction.reduced(grid).frames, dtype=torch.int64, device=x.device) * reduction.temporal_stride
    )
    return kept.movedim(1, -1).reshape(batch, -1, channels).to(x.dtype)


def _accumulate(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and sums: float64 if any operand is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The packed sequences of x (1, L, ...), or x itself."""
    if cu_seqlens is None:
        return [x]
    bounds = cu_seqlens.tolist()
    return [x[:, start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def _scan_sequences(
    direction: Direction, delta_softplus: bool, reverse: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (batch, L, E) before gate and rounding, and the final states (n, E, S)."""
    parts = zip(
        *(_sequences(t, cu_seqlens) for t in (direction.u, direction.delta, direction.B, direction.C)), strict=True
    )
    ys, states = [], []
    for i, (u, delta, B, C) in enumerate(parts):
        h = None if initial_state is None else initial_state if cu_seqlens is None else initial_state[i : i + 1]
        y, h = _scan_sequence(direction._replace(u=u, delta=delta, B=B, C=C), delta_softplus, reverse, h)
        ys.append(y)
        states.append(h)
    return torch.cat(ys, 1), torch.cat(states)


def _scan_sequence(
    direction: Direction, delta_softplus: bool, reverse: bool, h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence of docs/spec.md, Mixer, one token after the other."""
    acc = _accumulate(*direction, h)
    u, delta, A, B, C = (t.to(acc) for t in direction[:5])
    D, delta_bias = (None if t is None else t.to(acc) for t in direction[5:])
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)  # the identity above 20, as in docs/spec.md
    batch, length, channels = u.shape
    states = A.shape[1]
    groups = B.shape[2] if B.dim() == 4 else 1
    in_groups = (groups, channels // groups)
    A = A.unflatten(0, in_groups)  # (G, E/G, S)
    B, C = (t.reshape(batch, length, groups, states) for t in (B, C))
    h = u.new_zeros(batch, channels, states) if h is None else h.to(acc).clone()
    h = h.unflatten(1, in_groups)  # (batch, G, E/G, S)
    step, drive = (t.unflatten(2, in_groups) for t in (delta, delta * u))  # (batch, L, G, E/G)

    read, h = _recurrence(A, h, step, drive, B, C, reverse)
    y = torch.zeros_like(u) if read is None else read.flatten(2)
    return (y if D is None else y + D * u), h.flatten(1, 2)


def _recurrence(
    A: Tensor, h: Tensor, step: Tensor, drive: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor | None, Tensor]:
    """A (G, E/G, S), h (batch, G, E/G, S); step, drive (batch, L, G, E/G); B, C (batch, L, G, S) ->
    y (batch, L, G, E/G), None without tokens; h.
    """

    def advance(h: Tensor, step: Tensor, drive: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.exp(step * A) * h + drive * B
        return h, (h * C).sum(-1)

    if torch.compiler.is_exporting():  # one operator that holds the loop, in place of a graph as long as the sequence
        h, y = scan(
            lambda h, token: advance(
                h, token[0].unsqueeze(-1), token[1].unsqueeze(-1), token[2].unsqueeze(2), token[3].unsqueeze(2)
            ),
            h,
            tuple(t.movedim(1, 0) for t in (step, drive, B, C)),
            reverse=reverse,
        )
        return y.movedim(0, 1), h
    step, drive, B, C = step.unsqueeze(-1), drive.unsqueeze(-1), B.unsqueeze(3), C.unsqueeze(3)
    ys = [h] * step.shape[1]  # each is written
    for t in reversed(range(len(ys))) if reverse else range(len(ys)):
        h, ys[t] = advance(h, step[:, t], drive[:, t], B[:, t], C[:, t])
    return (torch.stack(ys, 1) if ys else None), h


def _gate_and_reduce(y: Tensor, z: Tensor | None, grid: TokenGrid | None, reduction: TokenReduction | None) -> Tensor:
    """reduce(y * SiLU(z)); z may hold only the tokens of ``reduction.kept(grid)``."""
    reducing = reduction is not None and not reduction.is_identity
    if z is not None and z.shape[1] != y.shape[1]:
        assert reduction is not None and grid is not None, "z must hold all tokens without a reduction"
        kept = reduction.kept_index(grid, y.device)
        y = y.unflatten(1, (grid.frames, grid.tokens_per_frame)).index_select(1, kept).flatten(1, 2)
        grid = reduction.kept(grid)
        reduction = TokenReduction(reduction.temporal_pool, reduction.spatial_pool)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return reduce_tokens(y, grid, reduction) if reducing else y


def _conv_sequences(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reverse: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The convolution (batch, L, E), and the last K-1 inputs of each sequence in scan order (n, E, K-1)."""
    outs, states = [], []
    for i, part in enumerate(_sequences(x, cu_seqlens)):
        history = None if initial_state is None else initial_state if cu_seqlens is None else initial_state[i : i + 1]
        out, state = _conv_sequence(part, weight, bias, activation, reverse, history)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states)


def _conv_sequence(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence's convolution (batch, L, E) and its last K-1 inputs in scan order (batch, E,
    K-1); in reverse nothing but the weight turns.
    """
    acc = _accumulate(x, weight, bias, history)
    channels, width = weight.shape
    inputs = x.transpose(1, 2)  # (batch, E, L)
    history = inputs.new_zeros(x.shape[0], channels, width - 1) if history is None else history
    in_scan_order = torch.cat([history.to(x.dtype), inputs.flip(-1) if reverse else inputs], -1)
    state = in_scan_order[..., in_scan_order.shape[-1] - (width - 1) :]
    if reverse:
        inputs, kernel = torch.cat([inputs.to(acc), history.to(acc).flip(-1)], -1), weight.flip(-1)
    else:
        inputs, kernel = torch.cat([history.to(acc), inputs.to(acc)], -1), weight
    if x.shape[1] == 0:
        return torch.empty_like(x), state
    out = F.conv1d(inputs, kernel.to(acc).unsqueeze(1), None if bias is None else bias.to(acc), groups=channels)
    out = F.silu(out) if activation is not None else out
    return out.transpose(1, 2).to(x.dtype), state
