"""Launches the C++ token reduction: `storm_reduce` and `storm_reduce_backward` of src/api.h.
Arguments are those of `contract.Backend`.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from ..pages import empty
from .loader import library
from .structs import CReduce, check, reduction_struct, rows, unit_innermost
from .threads import thread_count


def reduce(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    out = empty((x.shape[0], reduction.reduced(grid).tokens, x.shape[2]), x.dtype, x.device)
    _launch("reduce", x, out, grid, reduction)
    return out


def reduce_backward(grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    grad_x = empty((grad.shape[0], grid.tokens, grad.shape[2]), grad.dtype, grad.device)
    _launch("reduce_backward", grad_x, unit_innermost(grad), grid, reduction)
    return grad_x


def _launch(name: str, x: Tensor, out: Tensor, grid: TokenGrid, reduction: TokenReduction) -> None:
    if not x.numel():
        return
    args = CReduce(reduction_struct(grid, reduction), rows(x), rows(out), x.shape[0], x.shape[2], thread_count())
    check(library().function(name, ctypes.POINTER(CReduce))(args), "reduce_tokens", x, args)
