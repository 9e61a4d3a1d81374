"""Causal depthwise convolution over time with SiLU, one direction or both in one read of x (docs/spec.md, Mixer).

A tap of a tile is a load at shifted tokens, which the first-level cache serves; memory is read
once. `offset` is a distance in tokens, negative towards the past; in reverse, taps look ahead. A
program owns BLOCK_T tokens x BLOCK_E channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ConvCall, ConvGrads
from .configs import CONV, CONV_BACKWARD, CONV_STATE
from .launch import launch
from .math import cast, product, sigmoid


@triton.jit
def token_tile(program, length, channels, cu_seqlens, owners, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """-> batch; token (BLOCK_T, 1) int64, channel (1, BLOCK_E); sequence, first token and end of
    each token's sequence; mask of real elements.
    """
    blocks = tl.cdiv(channels, BLOCK_E)
    tile = program // blocks
    tiles = tl.cdiv(length, BLOCK_T)
    batch = (tile // tiles).to(tl.int64)
    token = (tile % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = (program % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    inside = token < length
    sequence, start, end = batch, token * 0, token * 0 + length
    if cu_seqlens is not None:
        sequence = tl.load(owners + token, mask=inside, other=0)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    return batch, token, channel, sequence, start, end, inside & (channel < channels)


@triton.jit
def load_shifted(
    x,
    x_strides,
    state,
    offset: tl.constexpr,
    batch,
    token,
    channel,
    sequence,
    start,
    end,
    mask,
    channels,
    K: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """x at ``token + offset`` in float32; outside the token's sequence the initial state (n, E,
    K-1) where it reaches, else zero.
    """
    place = token + offset
    pointer = x + batch * x_strides[0] + place * x_strides[1] + channel
    value = tl.load(pointer, mask=mask & (place >= start) & (place < end), other=0.0).to(tl.float32)
    if state is not None:
        step = end - 1 - place if REVERSE else place - start
        history = state + (sequence * channels + channel) * (K - 1) + (K - 1) + step
        value += tl.load(history, mask=mask & (step < 0) & (step > -K), other=0.0)
    return value


@triton.jit
def load_filter(filter, channel, channels, K: tl.constexpr):
    """-> K taps and the bias, each (1, BLOCK_E)."""
    weight, bias = filter
    mask = channel < channels
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + channel * K + j, mask=mask, other=0.0),)
    shift = tl.load(bias + channel, mask=mask, other=0.0) if bias is not None else channel.to(tl.float32) * 0.0
    return taps, shift


@triton.jit
def correlate(window, taps, shift, center: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr):
    """The convolution before its activation, at ``window[center]``."""
    total = window[center] * taps[K - 1] + shift
    for k in tl.static_range(1, K):
        total += window[center + k if REVERSE else center - k] * taps[K - 1 - k]
    return total


@triton.jit(do_not_specialize=["length"])
def conv_kernel(
    x,
    x_strides,
    filters,  # one or two of (weight, bias)
    outs,  # for each filter (batch, L, E)
    state,
    cu_seqlens,
    owners,  # (L,) the sequence of each token, with cu_seqlens
    length,
    channels,
    K: tl.constexpr,
    REVERSE: tl.constexpr,  # of the first filter; a second one has the other order
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    batch, token, channel, sequence, start, end, mask = token_tile(
        tl.program_id(0), length, channels, cu_seqlens, owners, BLOCK_T, BLOCK_E
    )
    window = ()
    for offset in tl.static_range(1 - K, K):
        if len(filters) == 2 or (offset >= 0 if REVERSE else offset <= 0):
            value = load_shifted(
                x, x_strides, state, offset, batch, token, channel, sequence, start, end, mask, channels, K, REVERSE
            )
            window = window + (value,)
    for i in tl.static_range(len(filters)):
        taps, shift = load_filter(filters[i], channel, channels, K)
        y = correlate(window, taps, shift, 0 if len(filters) == 1 and REVERSE else K - 1, K, (i == 0) == REVERSE)
        if SILU:
            y *= sigmoid(y)
        tl.store(outs[i] + (batch * length + token) * channels + channel, cast(y, outs[i].dtype.element_ty), mask=mask)


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


def _owners(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """The sequence of each token, (L,) int64; empty sequences own none."""
    if cu_seqlens is None:
        return None
    return (
        torch.searchsorted(
            cu_seqlens, torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype), right=True
        )
        - 1
    )


def conv(call: ConvCall) -> tuple[Tensor, ...]:
    """`contract.Backend.conv`."""
    x, filters, silu, initial_state, cu_seqlens = call
    batch, length, channels = x.shape
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in filters)
    launch(
        conv_kernel,
        batch * triton.cdiv(length, CONV.constants["BLOCK_T"]) * triton.cdiv(channels, CONV.constants["BLOCK_E"]),
        CONV,
        x.device,
        x,
        x.stride()[:2],
        tuple((one.weight, one.bias) for one in filters),
        outs,
        initial_state,
        cu_seqlens,
        _owners(cu_seqlens, length),
        length,
        channels,
        K=filters[0].weight.shape[1],
        REVERSE=filters[0].reverse,
        SILU=silu,
    )
    return outs


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
    constants = {"K": width, "REVERSE": filters[0].reverse, "SILU": silu}
    launch(
        conv_backward_kernel,
        tiles * triton.cdiv(channels, CONV_BACKWARD.constants["BLOCK_E"]),
        CONV_BACKWARD,
        x.device,
        x,
        x.stride()[:2],
        operands,
        grads,
        tuple(grad.stride() for grad in grads),
        dx,
        partials,
        initial_state,
        cu_seqlens,
        _owners(cu_seqlens, length),
        length,
        channels,
        **constants,
    )
    parameters = tuple(
        (
            partial[:, :width].sum(0).t().contiguous() if "weight" in needs else None,
            partial[:, width].sum(0) if "bias" in needs and one.bias is not None else None,
        )
        for one, partial in zip(filters, partials, strict=True)
    )
    if initial_state is None or "initial_state" not in needs:
        return dx, parameters, None
    dstate = torch.empty_like(initial_state)
    if width > 1:
        programs = initial_state.shape[0] * triton.cdiv(channels, CONV_STATE.constants["BLOCK_E"])
        sources = (
            x,
            x.stride(),
            operands[0],
            grads[0],
            grads[0].stride(),
            initial_state,
            dstate,
            cu_seqlens,
            length,
            channels,
        )
        launch(conv_state_kernel, programs, CONV_STATE, x.device, *sources, **constants)
    return dx, parameters, dstate
