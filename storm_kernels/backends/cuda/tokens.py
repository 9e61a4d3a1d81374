"""Token reduction, its map, and fixed-order sums: launch code of src/tokens.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from .launcher import THREADS, Launch, current

FORMATS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
SOURCE = "tokens.cu"


def _blocks(elements: int) -> int:
    return -(-elements // THREADS)


def _launch(kernel: str, formats: tuple[torch.dtype, torch.dtype], struct: str, values: dict, elements: int) -> None:
    defines = {"IN_T": FORMATS[formats[0]], "OUT_T": FORMATS[formats[1]]}
    current().launch(Launch(SOURCE, kernel, defines, struct, values, _blocks(elements)))


def _reduction(grid: TokenGrid, reduction: TokenReduction) -> dict:
    return {
        "frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
        "temporal_pool": reduction.temporal_pool,
        "spatial_pool": reduction.spatial_pool,
        "temporal_stride": reduction.temporal_stride,
    }


def token_map(grid: TokenGrid, reduction: TokenReduction, device: torch.device) -> Tensor:
    """(L, 4) int32: the `TokenEntry` of each token. Raises ValueError for a grid of more than 2^31 - 1 tokens."""
    if grid.tokens >= 2**31:
        raise ValueError(f"grid must have fewer than 2^31 tokens, got {grid}")
    entries = torch.empty(grid.tokens, 4, dtype=torch.int32, device=device)
    _launch(
        "token_map",
        (torch.float32, torch.float32),
        "MapArgs",
        {"r": _reduction(grid, reduction), "map": entries},
        grid.tokens,
    )
    return entries


def _reduce(
    kernel: str, x: Tensor, cells: int, out_rows: int, grid: TokenGrid, reduction: TokenReduction, places: Tensor | None
) -> Tensor:
    out = torch.empty(x.shape[0], out_rows, x.shape[2], dtype=x.dtype, device=x.device)
    values = {
        "r": _reduction(grid, reduction),
        "batch": x.shape[0],
        "channels": x.shape[2],
        "cells": cells,
        "in": x,
        "out": out,
    }
    strides = dict(zip(("in_batch", "in_row", "in_channel"), x.stride(), strict=True))
    _launch(kernel, (x.dtype, x.dtype), "ReduceArgs", {**values, **strides, "map": places}, out.numel())
    return out


def reduce(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """`Backend.reduce`."""
    cells = reduction.reduced(grid).tokens
    return _reduce("reduce_tokens", x, cells, cells, grid, reduction, None)


def reduce_backward(grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """`Backend.reduce_backward`."""
    places = token_map(grid, reduction, grad.device)
    return _reduce("reduce_tokens_backward", grad, grad.shape[1], grid.tokens, grid, reduction, places)


def sum_terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(outer, terms, inner), any strides -> (outer, inner) in ``dtype``: summed in float32 from the
    first term to the last.
    """
    outer, terms, inner = x.shape
    out = torch.empty(outer, inner, dtype=dtype, device=x.device)
    strides = dict(zip(("in_outer", "in_term", "in_inner"), x.stride(), strict=True))
    _launch(
        "sum_terms",
        (x.dtype, dtype),
        "SumArgs",
        {"in": x, "out": out, "outer": outer, "inner": inner, "terms": terms, **strides},
        out.numel(),
    )
    return out
