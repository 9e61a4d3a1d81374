"""causal_conv1d and bidirectional_causal_conv1d: checks, schema, fake kernel and autograd (docs/spec.md, Mixer)."""

from __future__ import annotations

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

_first, _second, _operands, _options = map(pick, (_FILTER, _SECOND, _OPERANDS, _OPTIONS))


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
    """Depthwise convolution over time in which a token meets itself and the K - 1 before it (after
    it with ``reverse``), then SiLU.

    Args:
        x: (batch, L, E), float32, bfloat16, float16 or float64.
        weight: (E, K); tap K - 1 meets the token itself.
        bias: (E,).
        activation: None, "silu" or "swish", which is the same.
        reverse: anti-causal; in scan order the sequence then begins at its last token. Nothing is copied.
        initial_state: (n, E, K - 1), the inputs before the first in scan order, oldest first; zeros where None.
        return_final_state: also return the last K - 1 inputs in scan order, (n, E, K - 1) in x's dtype.
        cu_seqlens: (n + 1,) integers: bounds of sequences packed in a batch of 1.
        backend: as in :func:`selective_scan`.

    Returns:
        (batch, L, E) in x's dtype; and the final state where asked for.

    Raises:
        TypeError, ValueError, BackendError: as :func:`selective_scan`.
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
    """The causal convolution with (weight, bias) and the anti-causal one with (weight_b, bias_b), from one read of x.

    Shapes, dtypes and errors as in :func:`causal_conv1d`; the two weights have one shape. Returns
    two tensors (batch, L, E).
    """
    _check(x, weight, bias, activation, "")
    _check(x, weight_b, bias_b, activation, "_b")
    checks.shape("weight_b", weight_b, tuple(weight.shape), "weight's")
    checks.packed(cu_seqlens, x)
    return _run(x, weight, bias, weight_b, bias_b, None, cu_seqlens, activation, False, backend)


def _check(x, weight, bias, activation, suffix: str) -> None:
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
    x, weight, bias, weight_b, bias_b, initial_state, cu_seqlens, activation, reverse, backend
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
        before = F.pad(recent, (missing, 0)) if initial_state is None else None
        return (
            before
            if before is not None
            else torch.cat([initial_state[..., recent.shape[-1] :].to(x.dtype), recent], -1)
        )
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
def _conv(*args):
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


def _plain(*args) -> tuple[Tensor, Tensor]:
    """The operator in differentiable PyTorch."""
    a = CONV.read(args)
    checks.bounds(a.cu_seqlens, a.x.shape[1])
    return _results(torch_backend.conv(_call_of(a)), a.x)


@_conv.register_fake
def _(*args):
    a = CONV.read(args)
    return a.x.new_empty(a.x.shape), a.x.new_empty(0 if a.weight_b is None else a.x.shape)


@torch.library.custom_op("storm_kernels::conv_backward", mutates_args=(), schema=CONV_BACKWARD.schema)
def _conv_backward(*args):
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
def _(*args):
    a = CONV_BACKWARD.read(args)
    return CONV.fake_results(a, a.weight)


def _plain_backward(*args) -> tuple[Tensor, ...]:
    """The gradients in PyTorch that can be differentiated again: those of the plain convolution."""
    a = CONV_BACKWARD.read(args)
    return CONV.plain_results(_plain, a, _incoming(a), a.weight)


_call_backward = register(_conv_backward, kind="conv", plain=_plain_backward)


def _incoming(a) -> tuple[Tensor, ...]:
    """The incoming gradient of each filter's result; zeros where nothing depends on it."""
    grads = (a.grad,) if a.weight_b is None else (a.grad, a.grad_b)
    return tuple(torch.zeros_like(a.x) if grad is None else grad for grad in grads)


def _setup_context(ctx, inputs, output):
    a = CONV.read(inputs)
    ctx.save_for_backward(*_operands(a))
    ctx.options, ctx.backend = _options(a), a.backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_b):
    needs = CONV.needed(ctx.needs_input_grad)
    found = _call_backward(grad, grad_b, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return CONV.for_arguments(CONV.named(found, needs))


_call = register(_conv, kind="conv", plain=_plain, backward=_backward, setup_context=_setup_context)


def _call_of(a) -> ConvCall:
    """The contract's form of the arguments of either operator."""
    filters = (ConvFilter(*_first(a), a.reverse if a.weight_b is None else False),)
    if a.weight_b is not None:
        filters = (*filters, ConvFilter(*_second(a), True))
    return ConvCall(unit_innermost(a.x), filters, a.silu, a.initial_state, a.cu_seqlens)
