"""Backward pass of the causal convolution, one filter or both in one read of x: gradients of x, the
taps and the biases, and, in a kernel of its own, of the initial state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ConvCall, ConvGrads
from .configs import CONV_BACKWARD, CONV_STATE
from .conv import correlate, load_filter, load_shifted, owners_of, token_tile
from .launch import launch
from .math import cast, product, sigmoid


@triton.jit
def output_gradient(
    grad,
    strides,
    window,
    taps,
    shift,
    spot,
    distance: tl.constexpr,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
):
    """The gradient before the activation of the output ``distance`` steps after each token; zero
    outside the token's sequence.
    """
    batch, token, channel, start, end, mask = spot
    offset: tl.constexpr = -distance if REVERSE else distance
    place = token + offset
    pointer = grad + batch * strides[0] + place * strides[1] + channel * strides[2]
    dpre = tl.load(pointer, mask=mask & (place >= start) & (place < end), other=0.0).to(tl.float32)
    if SILU:
        pre = correlate(window, taps, shift, K - 1 + offset, K, REVERSE)
        gate = sigmoid(pre)
        dpre = product(dpre, gate * (1.0 + pre * (1.0 - gate)))
    return dpre


@triton.jit
def store_partials(row, dpre, window, channel, channels, K: tl.constexpr, REVERSE: tl.constexpr):
    """A tile's sums for the taps and the bias."""
    for j in tl.static_range(K):
        tl.store(
            row + j * channels + channel,
            tl.sum(product(dpre, window[2 * (K - 1) - j if REVERSE else j]), 0)[None, :],
            mask=channel < channels,
        )
    tl.store(row + K * channels + channel, tl.sum(dpre, 0)[None, :], mask=channel < channels)


@triton.jit(do_not_specialize=["length"])
def conv_backward_kernel(
    x,
    x_strides,
    filters,
    grads,  # for each filter (batch, L, E)
    grad_strides,
    dx,  # (batch, L, E)
    partials,  # for each filter (batch * tiles, K + 1, E) float32: taps, bias
    state,
    cu_seqlens,
    owners,
    length,
    channels,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A token reaches K outputs of each filter: recompute those, here, from a window of 2 K - 1 tokens."""
    pid = tl.program_id(0)
    batch, token, channel, sequence, start, end, mask = token_tile(
        pid, length, channels, cu_seqlens, owners, BLOCK_T, BLOCK_E
    )
    window = ()
    for offset in tl.static_range(1 - K, K):
        window = window + (
            load_shifted(
                x, x_strides, state, offset, batch, token, channel, sequence, start, end, mask, channels, K, REVERSE
            ),
        )
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    spot = (batch, token, channel, start, end, mask)
    tile = (pid // tl.cdiv(channels, BLOCK_E)).to(tl.int64)
    for i in tl.static_range(len(filters)):
        taps, shift = load_filter(filters[i], channel, channels, K)
        for k in tl.static_range(K):
            dpre = output_gradient(
                grads[i], grad_strides[i], window, taps, shift, spot, k, K, (i == 0) == REVERSE, SILU
            )
            total += dpre * taps[K - 1 - k]
            if k == 0:
                store_partials(
                    partials[i] + tile * (K + 1) * channels, dpre, window, channel, channels, K, (i == 0) == REVERSE
                )
    if dx is not None:
        tl.store(dx + (batch * length + token) * channels + channel, cast(total, dx.dtype.element_ty), mask=mask)


@triton.jit
def load_step(
    x, strides, state, spot, step: tl.constexpr, channel, mask, channels, K: tl.constexpr, REVERSE: tl.constexpr
):
    """x of one step of a sequence, in scan order, or the initial state before it; zero past the end."""
    sequence, batch, start, count, length = spot
    if step < 0:
        return tl.load(state + (sequence * channels + channel) * (K - 1) + (K - 1 + step), mask=mask, other=0.0)
    near = tl.minimum(step, count - 1)
    token = tl.minimum(tl.maximum(start + (count - 1 - near if REVERSE else near), 0), length - 1)
    value = tl.load(x + batch * strides[0] + token * strides[1] + channel * strides[2], mask=mask, other=0.0).to(
        tl.float32
    )
    return tl.where(step < count, value, 0.0)


@triton.jit(do_not_specialize=["length"])
def conv_state_kernel(
    x, x_strides, filter, grad, grad_strides, state, dstate, cu_seqlens, length, channels,
    K: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial state (n, E, K-1): only the first K-1 steps of a sequence reach it."""
    blocks = tl.cdiv(channels, BLOCK_E)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = channel < channels
    batch, start, count = sequence, sequence * 0, length.to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        count = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        batch = sequence * 0
    taps, shift = load_filter(filter, channel, channels, K)
    spot = (sequence, batch, start, count, length)
    steps = ()
    dpres = ()
    for step in tl.static_range(1 - K, K - 1):
        steps = steps + (load_step(x, x_strides, state, spot, step, channel, mask, channels, K, REVERSE),)
        if step >= 0:
            dpre = load_step(grad, grad_strides, state, spot, step, channel, mask, channels, K, REVERSE)
            if SILU:
                pre = correlate(steps, taps, shift, step + K - 1, K, False)
                gate = sigmoid(pre)
                dpre *= gate * (1.0 + pre * (1.0 - gate))
            dpres = dpres + (dpre,)
    for s in tl.static_range(K - 1):
        total = dpres[0] * taps[s]
        for i in tl.static_range(1, s + 1):
            total += dpres[i] * taps[s - i]
        tl.store(dstate + (sequence * channels + channel) * (K - 1) + s, total, mask=mask)


def conv_backward(grads: tuple[Tensor, ...], call: ConvCall, needs: frozenset[str]) -> ConvGrads:
    """`contract.Backend.conv_backward`."""
    x, filters, silu, initial_state, cu_seqlens = call
    batch, length, channels = x.shape
    width = filters[0].weight.shape[1]
    tiles = batch * triton.cdiv(length, CONV_BACKWARD.constants["BLOCK_T"])
    floats = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if "x" in needs else None
    partials = tuple(torch.empty(tiles, width + 1, channels, **floats) for _ in filters)
    operands = tuple((one.weight, one.bias) for one in filters)
    strides, owners = tuple(grad.stride() for grad in grads), owners_of(cu_seqlens, length)
    sources = (x, x.stride()[:2], operands, grads, strides, dx, partials, initial_state, cu_seqlens, owners)
    programs = tiles * triton.cdiv(channels, CONV_BACKWARD.constants["BLOCK_E"])
    constants = {"K": width, "REVERSE": filters[0].reverse, "SILU": silu}
    launch(conv_backward_kernel, programs, CONV_BACKWARD, x.device, *sources, length, channels, **constants)
    parameters = tuple(
        (
            partial[:, :width].sum(0).t().contiguous() if "weight" in needs else None,
            partial[:, width].sum(0) if "bias" in needs and one.bias is not None else None,
        )
        for one, partial in zip(filters, partials, strict=True)
    )
    wanted = initial_state is not None and "initial_state" in needs
    return dx, parameters, _state_gradient(grads[0], call, constants) if wanted else None


def _state_gradient(grad: Tensor, call: ConvCall, constants: dict) -> Tensor:
    """The gradient of ``call.initial_state``, which goes with a single filter."""
    x, (one,), _, initial_state, cu_seqlens = call
    _, length, channels = x.shape
    dstate = torch.empty_like(initial_state)
    if one.weight.shape[1] > 1:
        programs = initial_state.shape[0] * triton.cdiv(channels, CONV_STATE.constants["BLOCK_E"])
        sources = (x, x.stride(), (one.weight, one.bias), grad, grad.stride(), initial_state, dstate, cu_seqlens)
        launch(conv_state_kernel, programs, CONV_STATE, x.device, *sources, length, channels, **constants)
    return dstate
