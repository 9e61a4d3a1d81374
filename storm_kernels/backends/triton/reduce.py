"""Token reduction: temporal and spatial pooling with sampling in one pass (docs/spec.md, Token
reduction), and the sums of the scan's partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from .configs import POOL, ROWS, Config
from .launch import launch
from .math import cast, sigmoid


def token_places(grid: TokenGrid, reduction: TokenReduction, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token, int64 (T*H*W,): its cell (the row of the output that averages it), and its
    place among the kept tokens; -1 and -1 if it is dropped.
    """
    small = reduction.reduced(grid)
    t, i, j = (torch.arange(side, dtype=torch.int64, device=device) for side in (grid.frames, grid.height, grid.width))
    pooled = t // reduction.temporal_pool
    kept = pooled % reduction.temporal_stride == 0
    within = i[:, None] // reduction.spatial_pool * small.width + j // reduction.spatial_pool
    cells = (pooled // reduction.temporal_stride * small.tokens_per_frame)[:, None, None] + within
    places = ((kept.cumsum(0) - 1) * grid.tokens_per_frame)[:, None, None] + (i[:, None] * grid.width + j)
    dropped = ~kept[:, None, None]
    return cells.masked_fill(dropped, -1).flatten(), places.masked_fill(dropped, -1).flatten()


def inverse_counts(grid: TokenGrid, reduction: TokenReduction, device: torch.device) -> Tensor:
    """For each cell: one over the number of tokens it averages, (T'*H'*W',) float32."""

    def counts(side: int, pool: int, stride: int = 1) -> Tensor:
        return (side - torch.arange(0, side, pool * stride, dtype=torch.int64, device=device)).clamp(max=pool).float()

    frames = counts(grid.frames, reduction.temporal_pool, reduction.temporal_stride)
    height, width = (counts(side, reduction.spatial_pool) for side in (grid.height, grid.width))
    return (1.0 / (frames[:, None, None] * height[:, None] * width)).flatten()


@triton.jit
def tile_of(program, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile of a (rows, channels) matrix that a program owns, channels fastest: row (BLOCK_R, 1)
    int64, channel (1, BLOCK_C), mask.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (program // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, channel, (row < rows) & (channel < channels)


@triton.jit(do_not_specialize=["rows", "out_tokens"])
def combine_kernel(
    parts, scale, z, z_strides, out, rows, out_tokens, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out = (first part + second part) * scale of the row, or * SiLU(z); parts and out (batch *
    out_tokens, channels), contiguous.
    """
    row, channel, mask = tile_of(tl.program_id(0), rows, channels, BLOCK_R, BLOCK_C)
    at = row * channels + channel
    total = tl.load(parts[0] + at, mask=mask, other=0.0)
    if len(parts) == 2:
        total += tl.load(parts[1] + at, mask=mask, other=0.0)
    if scale is not None:
        total *= tl.load(scale + row % out_tokens)
    if z is not None:
        gate = tl.load(
            z + row // out_tokens * z_strides[0] + row % out_tokens * z_strides[1] + channel, mask=mask, other=0.0
        ).to(tl.float32)
        total *= gate * sigmoid(gate)
    tl.store(out + at, cast(total, out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows", "frames", "height", "width", "out_tokens", "out_height", "out_width", "k", "p", "s"]
)
def reduce_kernel(
    x,
    strides,
    out,
    rows,
    channels,
    frames,
    height,
    width,
    out_tokens,
    out_height,
    out_width,
    k,
    p,
    s,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x (batch, frames*height*width, channels) -> out (batch * out_tokens, channels); k frames, p x
    p tokens, every s-th pooled frame.
    """
    row, channel, mask = tile_of(tl.program_id(0), rows, channels, BLOCK_R, BLOCK_C)
    token = row % out_tokens
    first_t = token // (out_height * out_width) * s * k
    first_i = token // out_width % out_height * p
    first_j = token % out_width * p
    x += row // out_tokens * strides[0] + channel
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for dt in range(0, tl.minimum(k, frames)):
        for di in range(0, tl.minimum(p, height)):
            for dj in range(0, tl.minimum(p, width)):
                t, i, j = first_t + dt, first_i + di, first_j + dj
                inside = (t < frames) & (i < height) & (j < width)
                total += tl.load(x + ((t * height + i) * width + j) * strides[1], mask=mask & inside, other=0.0).to(
                    tl.float32
                )
    count = tl.minimum(frames - first_t, k) * tl.minimum(height - first_i, p) * tl.minimum(width - first_j, p)
    tl.store(out + row * channels + channel, cast(total / count.to(tl.float32), out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens"])
def spread_kernel(
    grad, strides, cells, weights, out, rows, tokens, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Adjoint of `reduce_kernel`: out (batch * tokens, channels) = each token's weight times the
    gradient of its cell, zero if it has none.
    """
    row, channel, mask = tile_of(tl.program_id(0), rows, channels, BLOCK_R, BLOCK_C)
    source = tl.load(cells + row % tokens)
    cell = tl.maximum(source, 0)
    place = grad + row // tokens * strides[0] + cell * strides[1] + channel * strides[2]
    value = tl.load(place, mask=mask & (source >= 0), other=0.0).to(tl.float32) * tl.load(weights + cell)
    tl.store(out + row * channels + channel, cast(value, out.dtype.element_ty), mask=mask)


def tiles(rows: int, channels: int, config: Config = ROWS) -> int:
    """Programs that cover a (rows, channels) matrix."""
    return triton.cdiv(rows, config.constants["BLOCK_R"]) * triton.cdiv(channels, config.constants["BLOCK_C"])


def combine(parts: list[Tensor], dtype: torch.dtype, *, scale: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Sum of one or two float32 (batch, tokens, channels), in a fixed order, times ``scale``
    (tokens,) or SiLU(z), in ``dtype``.
    """
    batch, tokens, channels = parts[0].shape
    if len(parts) == 1 and scale is None and z is None:
        return parts[0].to(dtype)
    out = torch.empty(parts[0].shape, dtype=dtype, device=parts[0].device)
    rows = batch * tokens
    z_strides = (0, 0) if z is None else z.stride()[:2]
    operands = (tuple(parts), scale, z, z_strides, out, rows, tokens, channels)
    launch(combine_kernel, tiles(rows, channels), ROWS, out.device, *operands)
    return out


def reduce(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """`contract.Backend.reduce`."""
    batch, _, channels = x.shape
    small = reduction.reduced(grid)
    out = torch.empty(batch, small.tokens, channels, dtype=x.dtype, device=x.device)
    rows = batch * small.tokens
    sizes = (grid.frames, grid.height, grid.width, small.tokens, small.height, small.width)
    pools = (reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride)
    operands = (x, x.stride()[:2], out, rows, channels, *sizes, *pools)
    launch(reduce_kernel, tiles(rows, channels, POOL), POOL, x.device, *operands)
    return out


def reduce_backward(grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """`contract.Backend.reduce_backward`."""
    batch, _, channels = grad.shape
    out = torch.empty(batch, grid.tokens, channels, dtype=grad.dtype, device=grad.device)
    cells, _ = token_places(grid, reduction, grad.device)
    weights = inverse_counts(grid, reduction, grad.device)
    rows = batch * grid.tokens
    operands = (grad, grad.stride(), cells, weights, out, rows, grid.tokens, channels)
    launch(spread_kernel, tiles(rows, channels), ROWS, grad.device, *operands)
    return out
