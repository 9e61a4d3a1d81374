"""residual_layer_norm: checks, schema, fake kernel and autograd (the projector's ``X +
Mixer(LayerNorm(X))``, STORM eq. 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import dispatch
from ..tokens import described
from . import checks
from .autograd import refuse_forward_mode, register, vjp
from .normalise import accumulator, parameter, unit_innermost
from .operands import BACKEND, Operand, Table


def residual_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of a residual sum, in one pass.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        residual: of the shape of x, added to it first; None for none.
        weight: (C,), the scale.
        bias: (C,), the shift; None for none.
        eps: added to the variance, 1e-5 by default.
        backend: "torch" or "triton"; None leaves the choice open.

    Returns:
        LayerNorm(x + residual) and x + residual, both (..., C) in x's dtype; the sum
        is rounded before it is normalised.

    Raises:
        TypeError: an operand of the wrong type or dtype, named.
        ValueError: an operand of the wrong shape or device, named with it.
        BackendError: the backend asked for cannot run this.

    Source:
        STORM, arXiv 2503.04130, eq. 5; LayerNorm: arXiv 1607.06450.

    Example:
        >>> normed, summed = residual_layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), torch.ones(2), None)
        >>> summed
        tensor([[2., 4.]])
        >>> normed.round(decimals=3)
        tensor([[-1.,  1.]])
    """
    checks.tensor("x", x, tuple(range(1, 9)))
    channels = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None or name == "weight":
            checks.tensor(name, value, 1, x)
            checks.shape(name, value, (channels,), "(C,)")  # type: ignore[arg-type]  # the line before has checked it
    if residual is not None:
        checks.tensor("residual", residual, x.dim(), x)
        checks.shape("residual", residual, tuple(x.shape), "x's")
        residual = residual.to(x.dtype).reshape(-1, channels)
    if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)):
        raise TypeError(f"eps must be a number, got {described(eps)}")
    acc = accumulator(x)
    weight = parameter(weight, acc)
    bias = torch.zeros_like(weight) if bias is None else parameter(bias, acc)
    normed, summed, _, _ = _call(x.reshape(-1, channels), residual, weight, bias, eps, dispatch.requested(backend))
    return normed.view(x.shape), summed.view(x.shape)


_EPS = Operand("eps", type="float")  # added to the variance
NORM = Table(
    Operand("x", "(rows, C)", gradient=True),
    Operand("residual", "(rows, C)", "Tensor?", gradient=True),
    Operand("weight", "(C,)", gradient=True),
    Operand("bias", "(C,)", gradient=True),
    _EPS,
    BACKEND,
    returns=4,  # normed, sum, mean and rstd of each row
)
NORM_BACKWARD = Table(
    Operand("grad_normed", "(rows, C)"),
    Operand("grad_sum", "(rows, C)", "Tensor?"),
    Operand("summed", "(rows, C)"),
    Operand("weight", "(C,)"),
    Operand("mean", "(rows,)"),
    Operand("rstd", "(rows,)"),
    _EPS,  # for derivatives of the gradients alone
    BACKEND,
    returns=3,  # gradients of the sum, of weight and of bias
)


@torch.library.custom_op("storm_kernels::norm", mutates_args=(), schema=NORM.schema)
def _norm(*args: Any) -> Any:
    refuse_forward_mode("norm", *args)
    a = NORM.read(args)
    module = dispatch.choose("norm", a.backend, a.x)
    dispatch.count("norm", module)
    return module.norm(unit_innermost(a.x), unit_innermost(a.residual), a.weight, a.bias, a.eps)


def _plain(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator in differentiable PyTorch, from elementary operations: torch.func's second
    derivative of F.layer_norm is wrong in torch 2.13.
    """
    x, residual, weight, bias, eps, _ = NORM.read(args)
    summed = x.clone() if residual is None else (x.to(weight.dtype) + residual.to(weight.dtype)).to(x.dtype)
    mean = summed.to(weight.dtype).mean(-1, keepdim=True)
    centred = summed.to(weight.dtype) - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight + bias).to(x.dtype), summed, mean.flatten(), rstd.flatten()


@_norm.register_fake
def _(*args: Any) -> Any:
    a = NORM.read(args)
    per_row = a.weight.new_empty(a.x.shape[0])
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape), per_row, torch.empty_like(per_row)


@torch.library.custom_op("storm_kernels::norm_backward", mutates_args=(), schema=NORM_BACKWARD.schema)
def _norm_backward(*args: Any) -> Any:
    refuse_forward_mode("norm_backward", *args)
    a = NORM_BACKWARD.read(args)
    module = dispatch.choose("norm", a.backend, a.summed)
    dispatch.count("norm_backward", module)
    return module.norm_backward(a.grad_normed, a.grad_sum, a.summed, a.weight, a.mean, a.rstd)


@_norm_backward.register_fake
def _(*args: Any) -> Any:
    a = NORM_BACKWARD.read(args)
    return a.summed.new_empty(a.summed.shape), torch.empty_like(a.weight), torch.empty_like(a.weight)


def _plain_backward(*args: Any) -> tuple[Tensor, ...]:
    """The gradients in PyTorch that can be differentiated again: those of the plain norm. mean and
    rstd follow from the sum.
    """
    a = NORM_BACKWARD.read(args)

    def plain(summed: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return _plain(summed, None, weight, bias, a.eps, a.backend)[:2]

    grads = (a.grad_normed, torch.zeros_like(a.summed) if a.grad_sum is None else a.grad_sum)
    return vjp(plain, (a.summed, a.weight, torch.zeros_like(a.weight)), [0, 1, 2], grads)


_call_backward = register(_norm_backward, kind="norm", plain=_plain_backward)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    a = NORM.read(inputs)
    _, *kept = output  # sum, mean, rstd
    ctx.save_for_backward(a.weight, *kept)
    ctx.has_residual, ctx.eps, ctx.backend = a.residual is not None, a.eps, a.backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None, *_: Any) -> Any:
    weight, summed, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(summed)
    grad, grad_weight, grad_bias = _call_backward(
        grad_normed, grad_sum, summed, weight, mean, rstd, ctx.eps, ctx.backend
    )
    found = {"x": grad, "residual": grad if ctx.has_residual else None, "weight": grad_weight, "bias": grad_bias}
    return NORM.for_arguments(found)


_call = register(_norm, kind="norm", plain=_plain, backward=_backward, setup_context=_setup_context)
