"""reduce_tokens: checks, schema, fake kernel and autograd (STORM, arXiv 2503.04130, eqs. 6-8)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends import torch as torch_backend
from ..tokens import TokenGrid, TokenReduction, placed
from . import checks
from .autograd import refuse_forward_mode, register, vjp
from .normalise import unit_innermost
from .operands import BACKEND, Operand, Table


def reduce_tokens(x: Tensor, grid: TokenGrid, reduction: TokenReduction, *, backend: str | None = None) -> Tensor:
    """Average over blocks of frames and tokens, then keep every s-th pooled frame (docs/spec.md,
    Token reduction), in one pass.

    Args:
        x: (batch, T*H*W, C), float32, bfloat16, float16 or float64; averaged in float32 (float64).
        grid: T, H and W.
        reduction: k, p and s. A last block that is not full averages what it has.
        backend: as in :func:`selective_scan`.

    Returns:
        (batch, T'*H'*W', C) in x's dtype; x itself where nothing is reduced.

    Raises:
        TypeError, ValueError, BackendError: as :func:`selective_scan`.
    """
    checks.tensor("x", x, 3)
    grid, reduction = placed(x.shape[1], grid, reduction)
    if reduction is None:
        return x
    where = [grid.frames, grid.height, grid.width]
    how = [reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride]
    return _call(x, where, how, dispatch.requested(backend))


_WHERE = (
    Operand("grid", type="SymInt[]"),  # frames, height, width
    Operand("reduction", type="SymInt[]"),  # temporal_pool, spatial_pool, temporal_stride
)
REDUCE = Table(Operand("x", "(batch, T*H*W, C)", gradient=True), *_WHERE, BACKEND, returns=1)
REDUCE_BACKWARD = Table(Operand("grad", "(batch, T'*H'*W', C)"), *_WHERE, BACKEND, returns=1)


@torch.library.custom_op("storm_kernels::reduce", mutates_args=(), schema=REDUCE.schema)
def _reduce(x, grid, reduction, backend):
    refuse_forward_mode("reduce", x)
    module = dispatch.choose("reduce", backend, x)
    dispatch.count("reduce", module)
    return module.reduce(unit_innermost(x), TokenGrid(*grid), TokenReduction(*reduction))


def _plain(x, grid, reduction, backend):
    """The operator in differentiable PyTorch."""
    return torch_backend.reduce(x, TokenGrid(*grid), TokenReduction(*reduction))


@_reduce.register_fake
def _(x, grid, reduction, backend):
    tokens = TokenReduction(*reduction).reduced(TokenGrid(*grid)).tokens
    return x.new_empty(x.shape[0], tokens, x.shape[2])


@torch.library.custom_op("storm_kernels::reduce_backward", mutates_args=(), schema=REDUCE_BACKWARD.schema)
def _reduce_backward(grad, grid, reduction, backend):
    refuse_forward_mode("reduce_backward", grad)
    module = dispatch.choose("reduce", backend, grad)
    dispatch.count("reduce_backward", module)
    return module.reduce_backward(grad, TokenGrid(*grid), TokenReduction(*reduction))


@_reduce_backward.register_fake
def _(grad, grid, reduction, backend):
    return grad.new_empty(grad.shape[0], TokenGrid(*grid).tokens, grad.shape[2])


def _plain_backward(grad, grid, reduction, backend):
    """The gradient in PyTorch that can be differentiated again. The reduction is linear: that of x
    = 0 is that of any.
    """
    x = grad.new_zeros(grad.shape[0], TokenGrid(*grid).tokens, grad.shape[2])
    (found,) = vjp(_plain, (x, grid, reduction, backend), [0], grad)
    return found


_call_backward = register(_reduce_backward, kind="reduce", plain=_plain_backward)


def _setup_context(ctx, inputs, output):
    _, *ctx.where = inputs


def _backward(ctx, grad):
    return REDUCE.for_arguments({"x": _call_backward(grad, *ctx.where)})


_call = register(_reduce, kind="reduce", plain=_plain, backward=_backward, setup_context=_setup_context)
