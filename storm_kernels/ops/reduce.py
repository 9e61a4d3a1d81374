"""reduce_tokens: checks, schema, fake kernel and autograd (STORM, arXiv 2503.04130, eqs. 6-8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends import torch as torch_backend
from ..tokens import TokenGrid, TokenReduction, placed
from . import checks
from .autograd import refuse_forward_mode, register, vjp
from .normalise import unit_innermost
from .operands import BACKEND, Operand, Table


def reduce_tokens(
    x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None, *, backend: str | None = None
) -> Tensor:
    """Average over blocks of frames and tokens, then keep every s-th pooled frame, in one pass.

    Args:
        x: (batch, T*H*W, C), float32, bfloat16, float16 or float64; averaged in float32 (float64).
        grid: T frames of H x W tokens; None only where nothing is reduced.
        reduction: k and s in frames, p in tokens. A last block that is not full averages what it has. None for all
            tokens.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice open.

    Returns:
        (batch, T'*H'*W', C) in x's dtype; x itself where nothing is reduced.

    Raises:
        TypeError: an argument of the wrong type or dtype, named.
        ValueError: a grid that does not hold the tokens of x, named with it.
        BackendError: the backend asked for cannot run this.

    Source:
        STORM, arXiv 2503.04130, eqs. 6-8 (docs/spec.md, Token reduction).

    Example:
        >>> x = torch.arange(8.0).view(1, 8, 1)  # 4 frames of 2 tokens
        >>> reduce_tokens(x, TokenGrid(4, 2, 1), TokenReduction(temporal_pool=2)).flatten()
        tensor([1., 2., 5., 6.])
    """
    checks.tensor("x", x, 3)
    grid, reduction = placed(x.shape[1], grid, reduction)
    if grid is None or reduction is None:
        return x
    where = [grid.frames, grid.height, grid.width]
    how = [reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride]
    return _call(x, where, how, dispatch.requested(backend))


_WHERE = (
    Operand("grid", type="SymInt[]"),  # frames, height, width
    Operand("reduction", type="SymInt[]"),  # temporal_pool, spatial_pool, temporal_stride
)
Sides = list[int]  # of a grid or a reduction
REDUCE = Table(Operand("x", "(batch, T*H*W, C)", gradient=True), *_WHERE, BACKEND, returns=1)
REDUCE_BACKWARD = Table(Operand("grad", "(batch, T'*H'*W', C)"), *_WHERE, BACKEND, returns=1)


@torch.library.custom_op("storm_kernels::reduce", mutates_args=(), schema=REDUCE.schema)
def _reduce(x: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    refuse_forward_mode("reduce", x)
    module = dispatch.choose("reduce", backend, x)
    dispatch.count("reduce", module)
    return module.reduce(unit_innermost(x), TokenGrid(*grid), TokenReduction(*reduction))


def _plain(x: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    """The operator in differentiable PyTorch."""
    return torch_backend.reduce(x, TokenGrid(*grid), TokenReduction(*reduction))


@_reduce.register_fake
def _(x: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    tokens = TokenReduction(*reduction).reduced(TokenGrid(*grid)).tokens
    return x.new_empty(x.shape[0], tokens, x.shape[2])


@torch.library.custom_op("storm_kernels::reduce_backward", mutates_args=(), schema=REDUCE_BACKWARD.schema)
def _reduce_backward(grad: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    refuse_forward_mode("reduce_backward", grad)
    module = dispatch.choose("reduce", backend, grad)
    dispatch.count("reduce_backward", module)
    return module.reduce_backward(grad, TokenGrid(*grid), TokenReduction(*reduction))


@_reduce_backward.register_fake
def _(grad: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], TokenGrid(*grid).tokens, grad.shape[2])


def _plain_backward(grad: Tensor, grid: Sides, reduction: Sides, backend: str) -> Tensor:
    """The gradient in PyTorch that can be differentiated again. The reduction is linear: that of x
    = 0 is that of any.
    """
    x = grad.new_zeros(grad.shape[0], TokenGrid(*grid).tokens, grad.shape[2])
    (found,) = vjp(_plain, (x, grid, reduction, backend), [0], grad)
    return found


_call_backward = register(_reduce_backward, kind="reduce", plain=_plain_backward)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, *ctx.where = inputs


def _backward(ctx: Any, grad: Tensor) -> Any:
    return REDUCE.for_arguments({"x": _call_backward(grad, *ctx.where)})


_call = register(_reduce, kind="reduce", plain=_plain, backward=_backward, setup_context=_setup_context)
