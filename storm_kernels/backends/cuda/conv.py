"""Causal depthwise convolution with SiLU: launch code of src/conv.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import ConvCall, ConvFilter, ConvGrads
from .launcher import THREADS, Launch, current
from .tokens import FORMATS, sum_terms

LARGEST_TAPS = 16  # the window of inputs lies in registers
TILE = 64  # tokens of a block: a halo of 3 on each side costs a tenth more reads
TILE_BACKWARD = 256  # longer: each block writes a partial result of weight and bias


def _defines(x: Tensor, filters: tuple[ConvFilter, ...], cu_seqlens: Tensor | None, tile: int) -> dict[str, object]:
    reverse = [f.reverse for f in filters]
    return {
        "X_T": FORMATS[x.dtype],
        "TAPS": filters[0].weight.shape[1],
        "FORWARD": int(False in reverse),
        "REVERSE": int(True in reverse),
        "PACKED": int(cu_seqlens is not None),
        "CONV_TILE": tile,
    }


def _filter_values(filters: tuple[ConvFilter, ...], outs, grads, partials) -> list[dict]:
    """The forward filter's values, then the reverse one's; one that is missing repeats the other
    and is never looked at.
    """
    values: dict[bool, dict] = {}
    for conv_filter, out, grad, partial in zip(filters, outs, grads, partials, strict=True):
        strides = (0, 0, 0) if grad is None else grad.stride()
        values[conv_filter.reverse] = {
            "weight": conv_filter.weight,
            "bias": conv_filter.bias,
            "out": out,
            "grad": grad,
            **dict(zip(("grad_batch", "grad_row", "grad_channel"), strides, strict=True)),
            "partial": partial,
        }
    only = next(iter(values.values()))
    return [values.get(False, only), values.get(True, only)]


def _values(
    x: Tensor,
    filters: list[dict],
    *,
    silu: bool,
    initial_state,
    cu_seqlens,
    tile: int,
    grad_x=None,
    grad_initial_state=None,
) -> dict:
    batch, length, channels = x.shape
    return {
        "filter": filters,
        "x": x,
        "x_batch": x.stride(0),
        "x_row": x.stride(1),
        "batch": batch,
        "length": length,
        "channels": channels,
        "channel_blocks": -(-channels // THREADS),
        "tiles": -(-length // tile),
        "silu": silu,
        "sequences": batch if cu_seqlens is None else len(cu_seqlens) - 1,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        "initial_state": initial_state,
        "grad_x": grad_x,
        "grad_initial_state": grad_initial_state,
    }


def _blocks(values: dict) -> int:
    return values["batch"] * values["tiles"] * values["channel_blocks"]


def conv(call: ConvCall) -> tuple[Tensor, ...]:
    """`Backend.conv`."""
    x, filters, silu, initial_state, cu_seqlens = call
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in filters)
    none = [None] * len(filters)
    values = _values(
        x,
        _filter_values(filters, outs, none, none),
        silu=silu,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        tile=TILE,
    )
    defines = _defines(x, filters, cu_seqlens, TILE)
    current().launch(Launch("conv.cu", "conv", defines, "ConvArgs", values, _blocks(values)))
    return outs


def conv_backward(grads: tuple[Tensor, ...], call: ConvCall, needs: frozenset[str]) -> ConvGrads:
    """`Backend.conv_backward`."""
    x, filters, silu, initial_state, cu_seqlens = call
    batch, length, channels = x.shape
    taps = filters[0].weight.shape[1]
    empty = {"dtype": torch.float32, "device": x.device}
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if "x" in needs else None
    shape = (1, batch * -(-length // TILE_BACKWARD), (taps + 1) * channels)
    partials = [torch.empty(shape, **empty) if needs & {"weight", "bias"} else None for _ in filters]
    start = (
        torch.empty(initial_state.shape, **empty) if initial_state is not None and "initial_state" in needs else None
    )
    filter_values = _filter_values(filters, [None] * len(filters), grads, partials)
    options = {"silu": silu, "initial_state": initial_state, "cu_seqlens": cu_seqlens, "tile": TILE_BACKWARD}
    values = _values(x, filter_values, **options, grad_x=grad_x, grad_initial_state=start)
    defines = _defines(x, filters, cu_seqlens, TILE_BACKWARD)
    if grad_x is not None or partials[0] is not None:
        current().launch(Launch("conv.cu", "conv_backward", defines, "ConvArgs", values, _blocks(values)))
    if start is not None and taps > 1:
        blocks = -(-values["sequences"] * channels // THREADS)
        current().launch(Launch("conv.cu", "conv_state_backward", defines, "ConvArgs", values, blocks))
    return (
        grad_x,
        tuple(_filter_gradients(f, partial, needs) for f, partial in zip(filters, partials, strict=True)),
        start,
    )


def _filter_gradients(
    conv_filter: ConvFilter, partial: Tensor | None, needs: frozenset[str]
) -> tuple[Tensor | None, Tensor | None]:
    if partial is None:
        return None, None
    channels, taps = conv_filter.weight.shape
    summed = sum_terms(partial, torch.float32).view(taps + 1, channels)
    weight = summed[:taps].t().clone(memory_format=torch.contiguous_format) if "weight" in needs else None
    return weight, summed[taps].clone() if conv_filter.bias is not None and "bias" in needs else None
