"""The convolution: the reference's, and its gradients by recomputing it. See `contract.Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ..contract import ConvCall, ConvFilter, ConvGrads
from .leaves import Leaves


def conv(call: ConvCall) -> tuple[Tensor, ...]:
    x, filters, silu, initial_state, cu_seqlens = call
    options = {"activation": "silu" if silu else None, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    with torch.autocast(x.device.type, enabled=False):  # which would round a convolution's operands
        return tuple(
            reference.causal_conv1d(x, one.weight, one.bias, reverse=one.reverse, **options).contiguous()
            for one in filters
        )


def conv_backward(grads: tuple[Tensor, ...], call: ConvCall, needs: frozenset[str]) -> ConvGrads:
    x, filters, silu, initial_state, cu_seqlens = call
    leaves = Leaves(needs)
    inputs, start = leaves.add("x", x), leaves.add("initial_state", initial_state)
    copies = tuple(
        ConvFilter(leaves.add("weight", one.weight), leaves.add("bias", one.bias), one.reverse) for one in filters
    )
    found = leaves.gradients(lambda: conv(ConvCall(inputs, copies, silu, start, cu_seqlens)), grads)
    return found(inputs), tuple((found(one.weight), found(one.bias)) for one in copies), found(start)
