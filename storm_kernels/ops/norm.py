"""residual_layer_norm: checks, schema, fake kernel and autograd (the projector's ``X +
Mixer(LayerNorm(X))``, STORM eq. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from . import checks
from .autograd import refuse_forward_mode, register, vjp
from .normalise import accumulator, parameter, unit_innermost


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
        residual: like x, or None for none.
        weight, bias: (C,); the bias may be None.
        eps: added to the variance.
        backend: as in :func:`selective_scan`.

    Returns:
        LayerNorm(x + residual) and x + residual, both (..., C) in x's dtype; the sum
        is rounded before it is normalised.

    Raises:
        TypeError, ValueError, BackendError: as :func:`selective_scan`.
    """
    checks.tensor("x", x, tuple(range(1, 9)))
    channels = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None or name == "weight":
            checks.tensor(name, value, 1, x)
            checks.shape(name, value, (channels,), "(C,)")
    if residual is not None:
        checks.tensor("residual", residual, x.dim(), x)
        checks.shape("residual", residual, tuple(x.shape), "x's")
        residual = residual.to(x.dtype).reshape(-1, channels)
    acc = accumulator(x)
    weight = parameter(weight, acc)
    bias = torch.zeros_like(weight) if bias is None else parameter(bias, acc)
    normed, summed, _, _ = _call(x.reshape(-1, channels), residual, weight, bias, eps, dispatch.requested(backend))
    return normed.view(x.shape), summed.view(x.shape)


@torch.library.custom_op("storm_kernels::norm", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_forward_mode("norm", x, residual, weight, bias)
    module = dispatch.choose("norm", backend, x)
    dispatch.count("norm", module)
    return module.norm(unit_innermost(x), unit_innermost(residual), weight, bias, eps)


def _plain(x, residual, weight, bias, eps, backend):
    """The operator in differentiable PyTorch, from elementary operations: torch.func's second
    derivative of F.layer_norm is wrong in torch 2.13.
    """
    summed = x.clone() if residual is None else (x.to(weight.dtype) + residual.to(weight.dtype)).to(x.dtype)
    mean = summed.to(weight.dtype).mean(-1, keepdim=True)
    centred = summed.to(weight.dtype) - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * rstd * weight + bias).to(x.dtype), summed, mean.flatten(), rstd.flatten()


@_norm.register_fake
def _(x, residual, weight, bias, eps, backend):
    per_row = weight.new_empty(x.shape[0])
    return x.new_empty(x.shape), x.new_empty(x.shape), per_row, torch.empty_like(per_row)


@torch.library.custom_op("storm_kernels::norm_backward", mutates_args=())
def _norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of the sum, of weight and of bias; ``eps`` is for derivatives of these alone."""
    refuse_forward_mode("norm_backward", grad_normed, grad_sum, summed, weight)
    module = dispatch.choose("norm", backend, summed)
    dispatch.count("norm_backward", module)
    return module.norm_backward(grad_normed, grad_sum, summed, weight, mean, rstd)


@_norm_backward.register_fake
def _(grad_normed, grad_sum, summed, weight, mean, rstd, eps, backend):
    return summed.new_empty(summed.shape), torch.empty_like(weight), torch.empty_like(weight)


def _plain_backward(grad_normed, grad_sum, summed, weight, mean, rstd, eps, backend):
    """The gradients in PyTorch that can be differentiated again: those of the plain norm. mean and
    rstd follow from the sum.
    """
    grads = (grad_normed, torch.zeros_like(summed) if grad_sum is None else grad_sum)
    return vjp(
        lambda *values: _plain(*values, eps, backend)[:2],
        (summed, None, weight, torch.zeros_like(weight)),
        [0, 2, 3],
        grads,
    )


_call_backward = register(_norm_backward, kind="norm", plain=_plain_backward)


def _setup_context(ctx, inputs, output):
    _, residual, weight, _, eps, backend = inputs
    _, summed, mean, rstd = output
    ctx.save_for_backward(summed, weight, mean, rstd)
    ctx.has_residual, ctx.eps, ctx.backend = residual is not None, eps, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_normed, grad_sum, *_):
    summed, weight, mean, rstd = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(summed)
    grad, grad_weight, grad_bias = _call_backward(
        grad_normed, grad_sum, summed, weight, mean, rstd, ctx.eps, ctx.backend
    )
    return grad, grad if ctx.has_residual else None, grad_weight, grad_bias, None, None


_call = register(_norm, kind="norm", plain=_plain, backward=_backward, setup_context=_setup_context)
