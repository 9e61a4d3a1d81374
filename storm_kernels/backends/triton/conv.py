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

from ..contract import ConvCall
from .configs import CONV
from .launch import launch
from .math import cast, sigmoid


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


def owners_of(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
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
        owners_of(cu_seqlens, length),
        length,
        channels,
        K=filters[0].weight.shape[1],
        REVERSE=filters[0].reverse,
        SILU=silu,
    )
    return outs
