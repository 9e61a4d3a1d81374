"""The launches of every operation for given shapes, without running them: to compile ahead of the
first use, or for another GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from ..contract import ConvCall, ConvFilter, ScanCall, ScanInputs
from .conv import conv
from .conv_backward import conv_backward
from .launch import Launch, recorded
from .reduce import reduce, reduce_backward
from .scan import scan
from .scan_backward import scan_backward
from .scan_layout import checkpoint_shapes

SCAN_NEEDS = frozenset(("u", "delta", "A", "B", "C", "D", "delta_bias", "z"))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def model_launches(
    *,
    d_model: int,
    d_inner: int,
    d_state: int,
    d_conv: int,
    grid: TokenGrid,
    reduction: TokenReduction | None,
    dtype: torch.dtype,
    bidirectional: bool = True,
    backward: bool = False,
) -> list[Launch]:
    """What a projector's layers launch on a video of ``grid``: with softplus, gate, D and biases,
    as `BiMambaMixer` calls the operations.
    """
    length = grid.tokens
    activation = _meta(1, length, d_inner, dtype=dtype)
    # x and dt come out of projections as column slices; B and C follow dt in the same rows,
    # whatever the kernels make of that
    x = _meta(1, length, 2 * d_inner, dtype=dtype)[..., :d_inner]
    filters = tuple(
        ConvFilter(_meta(d_inner, d_conv), _meta(d_inner), reverse) for reverse in (False, True)[: 1 + bidirectional]
    )
    channel, state = _meta(d_inner), _meta(1, length, 1, d_state, dtype=dtype)
    one = ScanInputs(activation, activation, _meta(d_inner, d_state), state, state, channel, channel, False)
    directions = (one, one._replace(reverse=True))[: 1 + bidirectional]
    convolution = ConvCall(x, filters, silu=True, initial_state=None, cu_seqlens=None)
    with recorded() as launches:
        conv(convolution)
        if backward:
            conv_backward((activation,) * len(filters), convolution, needs=frozenset(("x", "weight", "bias")))
        for r in (None, reduction) if reduction is not None else (None,):
            _scan_launches(directions, grid, r, backward)
        if reduction is not None:
            pooled = reduce(_meta(1, length, d_model, dtype=dtype), grid, reduction)
            if backward:
                reduce_backward(pooled, grid, reduction)
    return launches


def _scan_launches(
    directions: tuple[ScanInputs, ...], grid: TokenGrid, reduction: TokenReduction | None, backward: bool
) -> None:
    u, A = directions[0].u, directions[0].A
    options = {
        "delta_softplus": True,
        "initial_state": None,
        "cu_seqlens": None,
        "grid": grid if reduction else None,
        "reduction": reduction,
    }
    kept = reduction.kept(grid).tokens if reduction else grid.tokens
    z = u.new_empty(1, kept, u.shape[2])
    call = ScanCall(directions, z, **options)
    out = scan(call, save_checkpoints=backward).out
    if backward:
        shapes = checkpoint_shapes(1, grid.tokens, *A.shape, directions=len(directions), sequences=0)
        scan_backward(out, None, call, tuple(_meta(*shape) for shape in shapes), needs=SCAN_NEEDS)


def conv_state_launch(channels: int, width: int, dtype: torch.dtype) -> Launch:
    """The gradient of a convolution's initial state, which no projector has."""
    x, state = _meta(1, 64, channels, dtype=dtype), _meta(1, channels, width - 1)
    filters = (ConvFilter(_meta(channels, width), _meta(channels), False),)
    with recorded() as launches:
        conv_backward(
            (x,),
            ConvCall(x, filters, silu=True, initial_state=state, cu_seqlens=None),
            needs=frozenset(("initial_state",)),
        )
    return launches[-1]


def warmup(**model) -> list[str]:
    """Compile, for the current GPU, what `model_launches` with these arguments lists; returns the
    kernels' names, one for each compilation.
    """
    launches = model_launches(**model)
    for one in launches:
        one.kernel.warmup(*one.args, grid=(1,), **one.options)
    return [one.kernel.__name__ for one in launches]
