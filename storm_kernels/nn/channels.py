"""A mixer worked through block by block of its channels, so that a long video needs no more memory than a short one.

Channels of a mixer meet in two places only: in x_proj, whose few columns say how every channel is scanned,
and in out_proj. So there are two sweeps over blocks of channels, each over all tokens:

1. in_proj's x half and both convolutions; the block's part of x_proj is added to a sum.
2. backwards, so that the last block is still there: the same again, then dt_proj, the gate, both scans with the
   reduction; the block's part of out_proj is added to the result.

No scan runs twice. Gradients take the blocks in two sweeps too: the first gives those of the sums beside all
others, the second takes the sums' back through the convolutions, which are linear in what comes back: nothing
of a block is kept. What stays between the layers is their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import bidirectional_causal_conv1d, bidirectional_selective_scan, causal_conv1d, selective_scan
from ..plain import is_plain, is_plain_convolution
from ..reference import Direction, ReferenceMixer
from ..reference.mixer import decay
from ..tokens import TokenGrid, TokenReduction
from .linear import linear


class Call(NamedTuple):
    """What one call of a mixer is about, beside its input and its parameters."""

    states: int  # S
    block: int  # channels of a block
    halved: bool  # the directions' sum is divided by two
    grid: TokenGrid | None
    reduction: TokenReduction | None
    cu_seqlens: Tensor | None


class Part(NamedTuple):
    """The parameters of one direction, of all channels or of a block."""

    conv: Tensor  # (E, 1, K)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2S, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor | None  # (E,)
    A_log: Tensor  # (E, S)
    D: Tensor  # (E,)


class Block(NamedTuple):
    """The parameters of a mixer, of all channels or of a block."""

    in_x: Tensor  # (E, D)
    in_x_bias: Tensor | None  # (E,)
    in_z: Tensor  # (E, D)
    in_z_bias: Tensor | None  # (E,)
    out: Tensor  # (D, E)
    parts: tuple[Part, ...]

    def flat(self) -> list[Tensor | None]:
        """Its tensors in a fixed order."""
        return [*self[:5], *(t for part in self.parts for t in part)]

    @classmethod
    def of_flat(cls, tensors: list[Any]) -> Block:
        """The inverse of :meth:`flat`."""
        in_x, in_x_bias, in_z, in_z_bias, out, *rest = tensors
        size = len(Part._fields)
        parts = tuple(Part(*rest[i : i + size]) for i in range(0, len(rest), size))
        return cls(in_x, in_x_bias, in_z, in_z_bias, out, parts)


# Tokens whose part of out_proj is made at a time.
_PIECE = 1 << 16

# The axis of the channels, in the order of `Block.flat`; that of a direction's parameters follows.
_AXES, _PART_AXES = (0, 0, 0, 0, 1), (0, 0, 1, 0, 0, 0, 0)


def why_not(mixer: ReferenceMixer) -> str | None:
    """None where a mixer can be cut by channels; else the reason: a child that has to be called as a module."""
    for name, child in mixer.named_children():
        if not (is_plain_convolution(child) if name.startswith("conv1d") else is_plain(child)):
            return f"{name} is a {type(child).__name__} that is more than a plain layer, and has to see all channels"
    return None


# The mixer's further arguments, checked: grid, reduction, cu_seqlens.
Where = tuple[TokenGrid | None, TokenReduction | None, Tensor | None]


def mix_by_channels(mixer: ReferenceMixer, x: Tensor, block: int, where: Where = (None, None, None)) -> Tensor:
    """``mixer(x, *where)`` in blocks of ``block`` channels: (batch, L, D) -> (batch, L', D).

    The sums of x_proj and out_proj are kept in float32 (float64) and added block after block: results differ from
    the whole's by their rounding only. Gradients cannot be differentiated again.

    Args:
        mixer: whose children are plain (:func:`why_not`).
        x: (batch, L, D).
        block: channels, 1 to E.
        where: grid, reduction and cu_seqlens, as the mixer takes them, checked.
    """
    call = Call(mixer.d_state, block, mixer.bidirectional and mixer.if_divide_out, *where)
    parameters = _parameters(mixer).flat()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        out = _ByChannels.apply(call, x, *parameters)
    else:
        out = _forward(call, x, Block.of_flat(parameters))[0]
    bias = mixer.out_proj.bias
    return out if bias is None else out + bias.to(out.dtype)


def _parameters(mixer: ReferenceMixer) -> Block:
    weight, bias, half = mixer.in_proj.weight, mixer.in_proj.bias, mixer.d_inner
    parts = []
    for suffix in mixer.suffixes:
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log = mixer.A_b_log if suffix else mixer.A_log
        D = getattr(mixer, f"D{suffix}")
        parts.append(Part(conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D))
    in_x, in_z = weight[:half], weight[half:]
    biases = (None, None) if bias is None else (bias[:half], bias[half:])
    return Block(in_x, biases[0], in_z, biases[1], mixer.out_proj.weight, tuple(parts))


def _blocks(call: Call, channels: int, tensors: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """Each block's views of tensors in the order of `Block.flat`."""
    axes = _AXES + _PART_AXES * ((len(tensors) - len(_AXES)) // len(_PART_AXES))
    for begin in range(0, channels, call.block):
        size = min(call.block, channels - begin)
        yield [None if t is None else t.narrow(axis, begin, size) for t, axis in zip(tensors, axes, strict=True)]


def _convolved(call: Call, x: Tensor, block: Block) -> tuple[Tensor, ...]:
    """The scans' inputs of a block, one a direction: (batch, L, block)."""
    inner = linear(x, block.in_x, block.in_x_bias)
    options: dict[str, Any] = {"activation": "silu", "cu_seqlens": call.cu_seqlens}
    filters = [(part.conv.squeeze(1), part.conv_bias) for part in block.parts]
    if len(filters) == 1:
        return (causal_conv1d(inner, *filters[0], **options),)  # type: ignore[return-value]  # no state
    return bidirectional_causal_conv1d(inner, *filters[0], *filters[1], **options)


def _scanned(call: Call, us: tuple[Tensor, ...], kept: Tensor, projected: list[Tensor], block: Block) -> Tensor:
    """The block's part of what out_proj takes, from what `_convolved` gives: (batch, L', block) in x's dtype."""
    directions = []
    for u, part, columns in zip(us, block.parts, projected, strict=True):
        dt_raw, B, C = columns.split([columns.shape[-1] - 2 * call.states, call.states, call.states], dim=-1)
        delta = linear(dt_raw, part.dt_proj)
        directions.append(Direction(u, delta, decay(part.A_log), B, C, part.D, part.dt_bias))
    z = linear(kept, block.in_z, block.in_z_bias)
    options: dict[str, Any] = {"cu_seqlens": call.cu_seqlens, "grid": call.grid, "reduction": call.reduction}
    one = directions[0]
    if len(directions) == 1:
        y: Any = selective_scan(*one[:6], z=z, delta_bias=one.delta_bias, delta_softplus=True, **options)
    else:
        y = bidirectional_selective_scan(one, directions[1], z, delta_softplus=True, **options)
    return y / 2 if call.halved else y


def _forward(call: Call, x: Tensor, parameters: Block) -> tuple[Tensor, list[Tensor]]:
    """The result without out_proj's bias, and the sums of x_proj of each direction in x's dtype."""
    tensors, acc = parameters.flat(), torch.promote_types(x.dtype, torch.float32)
    channels = len(parameters.in_x)
    sums = [x.new_zeros(*x.shape[:2], part.x_proj.shape[0], dtype=acc) for part in parameters.parts]
    blocks = [Block.of_flat(views) for views in _blocks(call, channels, tensors)]
    us: tuple[Tensor, ...] = ()
    for block in blocks:
        us = ()  # the last block's go before the next one's come
        us = _convolved(call, x, block)
        for total, u, part in zip(sums, us, block.parts, strict=True):
            total += linear(u, part.x_proj)
    del u
    projected = [sums.pop(0).to(x.dtype) for _ in parameters.parts]
    kept, out = _kept(call, x), None
    for block in reversed(blocks):  # the last one's are still there
        y = _scanned(call, us or _convolved(call, x, block), kept, projected, block)
        us = ()
        if out is None:
            out, dtype = x.new_zeros(*y.shape[:2], len(block.out), dtype=acc), y.dtype
        for total, piece in zip(out.split(_PIECE, 1), y.split(_PIECE, 1), strict=True):
            total += linear(piece, block.out)
        del y, piece
    assert out is not None
    return out.to(dtype), projected


def _kept(call: Call, x: Tensor) -> Tensor:
    """The tokens that need a gate."""
    if call.grid is None or call.reduction is None or not call.reduction.leaves_out(call.grid):
        return x
    frames = x.unflatten(1, (call.grid.frames, call.grid.tokens_per_frame))
    return frames.index_select(1, call.reduction.kept_index(call.grid, x.device)).flatten(1, 2)


class _ByChannels(torch.autograd.Function):
    """:func:`_forward` with gradients; arguments are the call, x and ``Block.flat`` of all channels."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor | None) -> Tensor:
        out, projected = _forward(call, x, Block.of_flat(list(parameters)))
        ctx.call, ctx.directions = call, len(projected)
        ctx.autocast = _autocast(x.device.type)
        ctx.save_for_backward(x, *projected, *parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        projected, parameters = rest[: ctx.directions], rest[ctx.directions :]
        wanted = [t is not None and needed for t, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True)]
        with torch.enable_grad(), ctx.autocast:
            sweeps = _Gradients(ctx.call, x, projected, parameters, ctx.needs_input_grad[1], wanted)
            sweeps.through_scans(grad)
            sweeps.through_x_proj()
        return None, sweeps.of_x(), *sweeps.of_parameters


class _Gradients:
    """The two sweeps of the gradients; see the head of this file."""

    def __init__(
        self,
        call: Call,
        x: Tensor,
        projected: list[Tensor],
        parameters: list[Tensor | None],
        of_x: bool,
        wanted: list[bool],
    ) -> None:
        self._call, self._x, self._parameters, self._wanted = call, x, parameters, wanted
        acc = torch.promote_types(x.dtype, torch.float32)
        self._of_x = torch.zeros_like(x, dtype=acc) if of_x else None
        self._projected = [t.detach().requires_grad_() for t in projected]
        self._of_projected = [torch.zeros_like(t, dtype=acc) for t in projected]
        self.of_parameters = [
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip(parameters, wanted, strict=True)
        ]

    def of_x(self) -> Tensor | None:
        """The gradient of the mixer's input."""
        return None if self._of_x is None else self._of_x.to(self._x.dtype)

    def through_scans(self, grad: Tensor) -> None:
        """Out_proj, scans, gate, dt_proj, convolutions and in_proj, block by block; and the sums' gradients."""
        for x, leaves, totals in self._leaves():
            kept = _kept(self._call, x)
            block = Block.of_flat(leaves)
            us = _convolved(self._call, x, block)
            out = linear(_scanned(self._call, us, kept, self._projected, block), block.out)
            self._add([out], [grad], x, leaves, totals, self._projected, self._of_projected)

    def through_x_proj(self) -> None:
        """The sums' gradients through x_proj, convolutions and in_proj, block by block."""
        for x, leaves, totals in self._leaves():
            block = Block.of_flat(leaves)
            us = _convolved(self._call, x, block)
            columns = [linear(u, part.x_proj) for u, part in zip(us, block.parts, strict=True)]
            grads = [total.to(c.dtype) for total, c in zip(self._of_projected, columns, strict=True)]
            self._add(columns, grads, x, leaves, totals, [], [])

    def _leaves(self) -> Iterator[tuple[Tensor, list[Tensor | None], list[Tensor | None]]]:
        """Of each block: x and its parameters as the leaves of a graph, and where its gradients go."""
        channels = len(self._parameters[0])  # type: ignore[arg-type]  # in_proj's weight is there
        blocks = (_blocks(self._call, channels, tensors) for tensors in (self._parameters, self.of_parameters))
        for views, totals in zip(*blocks, strict=True):
            x = self._x.detach().requires_grad_(self._of_x is not None)
            leaves = [
                None if t is None else t.detach().requires_grad_(w) for t, w in zip(views, self._wanted, strict=True)
            ]
            yield x, leaves, totals

    def _add(
        self,
        outs: list[Tensor],
        grads: list[Tensor],
        x: Tensor,
        leaves: list[Tensor | None],
        totals: list[Tensor | None],
        more: list[Tensor],
        more_totals: list[Tensor],
    ) -> None:
        places = [(x, self._of_x), *zip(leaves, totals, strict=True), *zip(more, more_totals, strict=True)]
        pairs = [(leaf, total) for leaf, total in places if leaf is not None and total is not None]
        reached = [(out, gradient) for out, gradient in zip(outs, grads, strict=True) if out.requires_grad]
        if not reached or not pairs:
            return
        outs, grads = (list(column) for column in zip(*reached, strict=True))
        found = torch.autograd.grad(outs, [leaf for leaf, _ in pairs], grads, allow_unused=True)
        for (_, total), gradient in zip(pairs, found, strict=True):
            if gradient is not None:
                total += gradient


def _autocast(device: str) -> AbstractContextManager[Any]:
    """The autocast that is on now, to be entered again."""
    if device == "meta":
        return torch.autocast("cpu", enabled=False)
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=enabled)
