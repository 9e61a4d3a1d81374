"""What the forward and the backward scan share on the device: where a program works, what it reads,
and one step of the recurrence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import softplus


@triton.jit
def locate(program, cu_seqlens, length, group_channels, groups, BLOCK_E: tl.constexpr):
    """-> sequence, batch, its first token, how many it has; block of channels within its group,
    group, the channels, and which of them are real.
    """
    blocks = tl.cdiv(group_channels, BLOCK_E)
    block = program % blocks
    group = (program // blocks) % groups
    sequence = (program // (blocks * groups)).to(tl.int64)
    lanes = block * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = lanes < group_channels
    lanes += group * group_channels
    start, batch, count = sequence * 0, sequence, length.to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        count = tl.load(cu_seqlens + sequence + 1) - start
        batch = sequence * 0
    return sequence, batch, start, count, block, group, lanes, mask


@triton.jit
def open_streams(operands, gate, batch, group, length, groups, STATES: tl.constexpr, GATE: tl.constexpr):
    """`scan_layout.direction_operands`, `gate_operands` -> (u, delta, z, their strides in time,
    offsets) of a batch; its B and C, their stride.
    """
    u, delta, bc, _, _, _, u_strides, delta_strides = operands
    z, z_strides, offsets = gate
    start = u  # not read
    if GATE != "none":
        start = z + batch * z_strides[0]
    streams = (
        u + batch * u_strides[0],
        delta + batch * delta_strides[0],
        start,
        u_strides[1],
        delta_strides[1],
        z_strides[1],
        offsets,
    )
    bc_stride = groups * (2 * STATES)
    return streams, bc + (batch * length * groups + group) * (2 * STATES), bc_stride


@triton.jit
def load_parameters(operands, channels, lanes, STATES: tl.constexpr, BLOCK_E: tl.constexpr):
    """-> A (STATES, BLOCK_E); D and delta_bias (BLOCK_E,), zero where there is none."""
    _, _, _, A, D, delta_bias, _, _ = operands
    zero = tl.zeros([BLOCK_E], tl.float32)
    return (
        tl.load(states_place(A, 0, channels, lanes, STATES)),
        tl.load(D + lanes) if D is not None else zero,
        tl.load(delta_bias + lanes) if delta_bias is not None else zero,
    )


@triton.jit
def load_drive(streams, t, lanes):
    """u and delta of token t."""
    u, delta, _, u_stride, delta_stride, _, _ = streams
    return tl.load(u + t * u_stride + lanes), tl.load(delta + t * delta_stride + lanes)


@triton.jit
def load_gate(streams, t, lanes, GATE: tl.constexpr):
    """z of token t, 0 without a gate; of a dropped token, where z holds the kept ones only, that of the first one."""
    _, _, z, _, _, z_stride, offsets = streams
    z_t = 0
    if GATE == "all":
        z_t = tl.load(z + t * z_stride + lanes)
    elif GATE == "kept":
        z_t = tl.load(z + tl.load(offsets + t) + lanes)
    return z_t


@triton.jit
def rate_of(delta):
    """log2(e) delta, for 2^(rate A) is exp(delta A). It is not A that takes log2(e): log2(e) A is
    infinite where |A| is above 2.36e38.
    """
    return delta * 1.4426950408889634


@triton.jit
def advance(h, A, u, delta, b, delta_bias, SOFTPLUS: tl.constexpr):
    """One step of the recurrence. -> state (Sp, BLOCK_E), u in float32, delta after bias and softplus."""
    u = u.to(tl.float32)
    delta = delta.to(tl.float32) + delta_bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.exp2(rate_of(delta)[None, :] * A) * h + (delta * u)[None, :] * b[:, None], u, delta


@triton.jit
def first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL: tl.constexpr):
    """The row of `scan_layout.checkpoint_shapes` that a sequence's checkpoints start at."""
    return sequence * tl.cdiv(length, INTERVAL) if cu_seqlens is None else start // INTERVAL + sequence


@triton.jit
def states_place(pointer, index, channels, lanes, STATES: tl.constexpr):
    """Where the states (STATES, BLOCK_E) of ``index`` lie in a (..., STATES, E) tensor."""
    return pointer + (index * STATES + tl.arange(0, STATES))[:, None] * channels + lanes[None, :]
