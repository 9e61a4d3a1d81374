"""causal_conv1d and bidirectional_causal_conv1d: checks, schema, fake kernel and autograd (docs/spec.md, Mixer)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import dispatch
from ..backends import torch as torch_backend
from ..backends.contract import ConvCall, ConvFilter
from ..tokens import described
from . import checks
from .autograd import refuse_forward_mode, register
from .normalise import accumulator, parameter, unit_innermost
from .operands import BACKEND, NEEDS, Operand, Table, pick

_FILTER = (
    Operand("weight", "(E, K)", gradient=True),
    Operand("bias", "(E,)", "Tensor?", gradient=True),
)
_SECOND = tuple(operand.of_second() for operand in _FILTER)  # anti-causal
_OPERANDS = (
    Operand("x", "(batch, L, E)", gradient=True),
    *_FILTER,
    *_SECOND,
    Operand("initial_state", "(n, E, K-1)", "Tensor?", gradient=True),
    Operand("cu_seqlens", "(n + 1,)", "Tensor?"),
)
_OPTIONS = (Operand("silu", type="bool"), Operand("reverse", type="bool"))  # reverse: of a single filter
_INCOMING = (Operand("grad", "(batch, L, E)", "Tensor?"), Operand("grad_b", "(batch, L, E)", "Tensor?"))

CONV = Table(*_OPERANDS, *_OPTIONS, BACKEND, returns=2)
CONV_BACKWARD = Table(*_INCOMING, *_OPERANDS, *_OPTIONS, NEEDS, BACKEND, returns=len(CONV.differentiable))

_operands, _options = pick(_OPERANDS), pick(_OPTIONS)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution over time: a token meets itself and the K - 1 before it, or after it with ``reverse``.

    Args:
        x: (batch, L, E), float32, bfloat16, float16 or float64.
        weight: (E, K), the taps in tokens; tap K - 1 meets the token itself.
        bias: (E,); None for none.
        activation: None, "silu" or "swish", which is the same. Default: none.
        reverse: anti-causal; in scan order the sequence then begins at its last token. Nothing is copied.
            Default: causal.
        initial_state: (n, E, K - 1), the inputs before the first in scan order, oldest first; None for zeros.
        return_final_state: also return the last K - 1 inputs in scan order. Default: the result alone.
        cu_seqlens: (n + 1,) int32 or int64: bounds of sequences packed in a batch of 1; None for one a row.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice open.

    Returns:
        (batch, L, E) in x's dtype. With ``return_final_state`` also the final state (n, E, K - 1) in
        x's dtype.

    Raises:
        TypeError: an operand of the wrong type or dtype, named.
        ValueError: an operand of the wrong shape or device, or another activation, named with it.
        BackendError: the backend asked for cannot run this.
        MemoryError: the result would not fit the device.

    Source:
        The convolution before Mamba's scan, arXiv 2312.00752, figure 3; github.com/Dao-AILab/causal-conv1d.

    Example:
        >>> x = torch.ones(1, 4, 1)
        >>> causal_conv1d(x, weight=torch.tensor([[1.0, 1.0]])).flatten()
        tensor([1., 2., 2., 2.])
        >>> causal_conv1d(x, weight=torch.tensor([[1.0, 1.0]]), reverse=True).flatten()
        tensor([2., 2., 2., 1.])
    """
    _check(x, weight, bias, activation, "")
    sequences = checks.packed(cu_seqlens, x)
    channels, width = weight.shape
    checks.state("initial_state", initial_state, (sequences, channels, width - 1), "(sequences, E, K-1)", x)
    out = _run(x, weight, bias, None, None, initial_state, cu_seqlens, activation, reverse, backend)[0]
    return (out, _final_state(x, width, reverse, initial_state, cu_seqlens)) if return_final_state else out


def bidirectional_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A causal convolution and an anti-causal one, from one read of x.

    Args:
        x: (batch, L, E), float32, bfloat16, float16 or float64.
        weight: (E, K), the taps of the causal one; tap K - 1 meets the token itself.
        bias: (E,), of the causal one; None for none.
        weight_b: (E, K), the taps of the anti-causal one.
        bias_b: (E,), of the anti-causal one; None for none.
        activation: None, "silu" or "swish", which is the same. Default: none.
        cu_seqlens: (n + 1,) int32 or int64: bounds of sequences packed in a batch of 1; None for one a row.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice open.

    Returns:
        Two tensors (batch, L, E) in x's dtype, the causal result first.

    Raises:
        TypeError: an operand of the wrong type or dtype, named.
        ValueError: an operand of the wrong shape or device, or another activation, named with it.
        BackendError: the backend asked for cannot run this.
        MemoryError: the results would not fit the device.

    Source:
        Both directions of Vim's bimamba v2, arXiv 2401.09417, algorithm 1.

    Example:
        >>> taps = torch.tensor([[1.0, 1.0]])
        >>> forward, backward = bidirectional_causal_conv1d(torch.ones(1, 3, 1), taps, None, taps, None)
        >>> forward.flatten(), backward.flatten()
        (tensor([1., 2., 2.]), tensor([2., 2., 1.]))
    """
    _check(x, weight, bias, activation, "")
    _check(x, weight_b, bias_b, activation, "_b")
    checks.shape("weight_b", weight_b, tuple(weight.shape), "weight's")
    checks.packed(cu_seqlens, x)
    return _run(x, weight, bias, weight_b, bias_b, None, cu_seqlens, activation, False, backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: object, suffix: str) -> None:
    checks.tensor("x", x, 3)
    checks.tensor(f"weight{suffix}", weight, 2, x)
    channels, width = x.shape[2], weight.shape[1]
    if channels == 0 or width == 0:
        raise ValueError(f"weight{suffix} must have at least one channel and one tap, got shape {tuple(weight.shape)}")
    hint = checks.channel_major("x", weight.shape[0], x, "causal_conv1d") if weight.shape[0] != channels else ""
    checks.shape(f"weight{suffix}", weight, (channels, width), "(E, K)", hint)
    if bias is not None:
        checks.tensor(f"bias{suffix}", bias, 1, x)
        checks.shape(f"bias{suffix}", bias, (channels,), "(E,)")
    if activation is not None and not (isinstance(activation, str) and activation in ("silu", "swish")):
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {described(activation)}")


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor | None,
    bias_b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x)
    parameters = (parameter(t, acc) for t in (weight, bias, weight_b, bias_b, initial_state))
    return _call(x, *parameters, cu_seqlens, activation is not None, reverse, dispatch.requested(backend))


def _final_state(
    x: Tensor, width: int, reverse: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The last K - 1 inputs in scan order, (n, E, K - 1): a slice, or a gather where sequences are packed."""
    tail = width - 1
    if cu_seqlens is None:
        recent = x[:, :tail].flip(1) if reverse else x[:, max(x.shape[1] - tail, 0) :]
        recent = recent.transpose(1, 2)
        missing = tail - recent.shape[-1]
        if missing == 0:
            return recent.contiguous()
        if initial_state is None:
            return F.pad(recent, (missing, 0))
        return torch.cat([initial_state[..., recent.shape[-1] :].to(x.dtype), recent], -1)
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    age = torch.arange(tail - 1, -1, -1, dtype=torch.int64, device=x.device)  # 0 is the newest
    index = start + age if reverse else end - 1 - age
    inside = ((index >= start) & (index < end)).unsqueeze(1)
    recent = (
        x[0].index_select(0, index.clamp(0, max(x.shape[1] - 1, 0)).flatten()).unflatten(0, index.shape).transpose(1, 2)
    )
    if initial_state is None:
        return recent.masked_fill(~inside, 0)
    # An older input moves up by the sequence's length.
    shifted = (torch.arange(tail, dtype=torch.int64, device=x.device) + (end - start)).clamp(max=max(tail - 1, 0))
    older = initial_state.to(x.dtype).gather(2, shifted.unsqueeze(1).expand(-1, x.shape[2], -1))
    return torch.where(inside, recent, older)


@torch.library.custom_op("storm_kernels::conv", mutates_args=(), schema=CONV.schema)
def _conv(*args: Any) -> Any:
    """-> one output for each filter; without a second one an empty tensor."""
    refuse_forward_mode("conv", *args)
    a = CONV.read(args)
    checks.bounds(a.cu_seqlens, a.x.shape[1])
    call = _call_of(a)
    checks.memory("the convolution's result", a.x.device, a.x.numel() * len(call.filters), a.x.element_size())
    module = dispatch.choose("conv", a.backend, a.x, d_conv=a.weight.shape[1])
    dispatch.count("conv", module)
    return _results(module.conv(call), a.x)


def _results(outs: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    return outs[0], outs[1] if len(outs) == 2 else x.new_empty(0)


def _plain(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator in differentiable PyTorch."""
    a = CONV.read(args)
    checks.bounds(a.cu_seqlens, a.x.shape[1])
    return _results(torch_backend.conv(_call_of(a)), a.x)


@_conv.register_fake
def _(*args: Any) -> Any:
    a = CONV.read(args)
    return a.x.new_empty(a.x.shape), a.x.new_empty(0 if a.weight_b is None else a.x.shape)


@torch.library.custom_op("storm_kernels::conv_backward", mutates_args=(), schema=CONV_BACKWARD.schema)
def _conv_backward(*args: Any) -> Any:
    """-> the gradient of each operand that ``needs`` names; empty tensors for the others."""
    refuse_forward_mode("conv_backward", *args)
    a = CONV_BACKWARD.read(args)
    module = dispatch.choose("conv", a.backend, a.x, d_conv=a.weight.shape[1])
    dispatch.count("conv_backward", module)
    wanted = frozenset(name.removesuffix("_b") for name in a.needs.split())
    grad_x, per_filter, grad_state = module.conv_backward(_incoming(a), _call_of(a), wanted)
    found = {"x": grad_x, "initial_state": grad_state}
    for operands, grads in zip((_FILTER, _SECOND), per_filter, strict=False):
        found |= {operand.name: grad for operand, grad in zip(operands, grads, strict=True)}
    return CONV.results(found, a.needs, a.weight)


@_conv_backward.register_fake
def _(*args: Any) -> Any:
    a = CONV_BACKWARD.read(args)
    return CONV.fake_results(a, a.weight)


def _plain_backward(*args: Any) -> tuple[Tensor, ...]:
    """The gradients in PyTorch that can be differentiated again: those of the plain convolution."""
    a = CONV_BACKWARD.read(args)
    return CONV.plain_results(_plain, a, _incoming(a), a.weight)


_call_backward = register(_conv_backward, kind="conv", plain=_plain_backward)


def _incoming(a: Any) -> tuple[Tensor, ...]:
    """The incoming gradient of each filter's result; zeros where nothing depends on it."""
    grads = (a.grad,) if a.weight_b is None else (a.grad, a.grad_b)
    return tuple(torch.zeros_like(a.x) if grad is None else grad for grad in grads)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    a = CONV.read(inputs)
    ctx.save_for_backward(*_operands(a))
    ctx.options, ctx.backend = _options(a), a.backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_b: Tensor | None) -> Any:
    needs = CONV.needed(ctx.needs_input_grad)
    found = _call_backward(grad, grad_b, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return CONV.for_arguments(CONV.named(found, needs))


_call = register(_conv, kind="conv", plain=_plain, backward=_backward, setup_context=_setup_context)


def _call_of(a: Any) -> ConvCall:
    """The contract's form of the arguments of either operator."""
    filters = [ConvFilter(a.weight, a.bias, a.reverse if a.weight_b is None else False)]
    if a.weight_b is not None:
        filters.append(ConvFilter(a.weight_b, a.bias_b, True))
    return ConvCall(unit_innermost(a.x), tuple(filters), a.silu, a.initial_state, a.cu_seqlens)
