"""The token reduction: the reference's, and its gradient by recomputing it. See `contract.Backend`."""

from __future__ import annotations

from torch import Tensor

from ... import reference
from ...tokens import TokenGrid, TokenReduction
from .leaves import Leaves


def reduce(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    return reference.reduce_tokens(x, grid, reduction).contiguous()


def reduce_backward(grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    leaves = Leaves(frozenset("x"))
    x = leaves.add("x", grad.new_zeros(grad.shape[0], grid.tokens, grad.shape[2]))
    return leaves.gradients(lambda: (reference.reduce_tokens(x, grid, reduction),), (grad,))(x)
