"""Launches the C++ convolution over time: `storm_conv` and `storm_conv_backward` of src/api.h.
Arguments are those of `contract.Backend`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..contract import ConvCall, ConvGrads
from .loader import library
from .structs import CConv, CFilter, check, empty_like, floats, int64_offsets, rows, shape_struct, unit_innermost


def conv(call: ConvCall) -> tuple[Tensor, ...]:
    x, filters, silu, initial_state, cu_seqlens = call
    outs = tuple(empty_like(x) for _ in filters)
    if x.numel():
        offsets = int64_offsets(cu_seqlens)
        args = _conv_struct(x, filters, outs, silu, initial_state, offsets)
        check(library().function("conv", ctypes.POINTER(CConv))(args), "causal_conv1d", x, args)
    return outs


def conv_backward(grads: tuple[Tensor, ...], call: ConvCall, needs: frozenset[str]) -> ConvGrads:
    x, filters, silu, initial_state, cu_seqlens = call
    grad_x = empty_like(x) if "x" in needs else None
    parameters = tuple(
        (empty_like(f.weight) if "weight" in needs else None, empty_like(f.bias) if "bias" in needs else None)
        for f in filters
    )
    # zeros: the inputs before an empty sequence reach no output
    grad_initial = torch.zeros_like(initial_state) if "initial_state" in needs and initial_state is not None else None
    grads = tuple(unit_innermost(g) for g in grads)
    offsets = int64_offsets(cu_seqlens)
    args = _conv_struct(x, filters, grads, silu, initial_state, offsets)
    args.grad_x, args.grad_initial_state = rows(grad_x), floats(grad_initial)
    for i, (weight, bias) in enumerate(parameters):
        args.filter[i].grad_weight, args.filter[i].grad_bias = floats(weight), floats(bias)
    check(library().function("conv_backward", ctypes.POINTER(CConv))(args), "causal_conv1d backward", x, args)
    return grad_x, parameters, grad_initial


def _conv_struct(x, filters, outs, silu, initial_state, offsets) -> CConv:
    args = CConv(
        shape=shape_struct(x, offsets),
        x=rows(x),
        initial_state=floats(initial_state),
        filters=len(filters),
        taps=filters[0].weight.shape[1],
        silu=silu,
    )
    for i, (f, out) in enumerate(zip(filters, outs, strict=True)):
        args.filter[i] = CFilter(weight=floats(f.weight), bias=floats(f.bias), out=rows(out), reverse=f.reverse)
    return args
