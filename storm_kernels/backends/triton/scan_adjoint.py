"""The steps of the backward scan on the device; equations and symbols at the head of `scan_backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import cast, sigmoid, softplus
from .scan_steps import load_drive, rate_of, states_place


@triton.jit
def scratch_place(tile, STATES: tl.constexpr, BLOCK_E: tl.constexpr):
    """Where (STATES, BLOCK_E) states lie in the scratch memory of one program."""
    return tile + tl.arange(0, STATES)[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]


@triton.jit
def add_to(total, tail, value, mask):
    """Add to a sum in memory that keeps its rounding errors apart (Knuth's two-sum), so that a long
    video costs no accuracy.
    """
    before = tl.load(total, mask=mask, other=0.0)
    after = before + value
    took = after - before
    tl.store(tail, tl.load(tail, mask=mask, other=0.0) + ((before - (after - took)) + (value - took)), mask=mask)
    tl.store(total, after, mask=mask)


@triton.jit
def add_sums(totals, sums, sequence, channels, channel, mask, STATES: tl.constexpr):
    """`add_to` of dA (STATES, BLOCK_E), dD and d(delta_bias) (BLOCK_E,), the rows of ``totals`` (n,
    2, STATES + 2, E).
    """
    total = totals + sequence.to(tl.int64) * (2 * (STATES + 2)) * channels
    tail = total + (STATES + 2) * channels
    add_to(
        states_place(total, 0, channels, channel, STATES),
        states_place(tail, 0, channels, channel, STATES),
        sums[0],
        mask[None, :],
    )
    dD, dbias = STATES * channels + channel, (STATES + 1) * channels + channel
    add_to(total + dD, tail + dD, sums[1], mask)
    add_to(total + dbias, tail + dbias, sums[2], mask)


@triton.jit
def load_gate_by_table(streams, places, t, lanes, GATE: tl.constexpr):
    """z of token t; of a dropped token, where z holds the kept ones only, that of the first one."""
    row = tl.load(places + 2 * t).to(tl.int64) if GATE == "kept" else t
    return tl.load(streams[2] + row * streams[5] + lanes)


@triton.jit
def load_gradient(source, t, lanes, mask, REDUCE: tl.constexpr):
    """The gradient of one token's output, or of its share of its cell."""
    grad, stride, channel_stride, places = source
    row = tl.load(places + 2 * t + 1).to(tl.int64) if REDUCE else t
    return tl.load(grad + row * stride + lanes * channel_stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def replay_token(
    h,
    t,
    inputs,
    outputs,
    lanes,
    spot,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """One step forward again; writes dz and dC. -> state, (u, delta before and after softplus, decay, dy)."""
    streams, bc, bc_stride, source, parameters = inputs
    A, D, delta_bias = parameters  # a line of its own: Triton 3.7 takes no nested target
    _, _, dz, dbc = outputs
    channels, channel, mask, rows = spot
    states = tl.arange(0, STATES)
    u_t, raw = load_drive(streams, t, lanes)
    b = tl.load(bc + t * bc_stride + states)
    v = raw.to(tl.float32) + delta_bias
    u_t = u_t.to(tl.float32)
    delta_t = softplus(v) if SOFTPLUS else v
    a = tl.exp2(rate_of(delta_t)[None, :] * A)
    h = a * h + (delta_t * u_t)[None, :] * b[:, None]

    dy = load_gradient(source, t, lanes, mask, REDUCE)
    if GATE != "none":
        z_t = load_gate_by_table(streams, source[3], t, lanes, GATE).to(tl.float32)
        gate = sigmoid(z_t)
        if dz is not None:
            y = tl.sum(h * tl.load(bc + t * bc_stride + STATES + states)[:, None], 0) + D * u_t
            dz_t = cast(dy * y * gate * (1.0 + z_t * (1.0 - gate)), dz.dtype.element_ty)
            tl.store(dz + (rows + t * channels), dz_t, mask=mask)
        dy *= z_t * gate
    if dbc is not None:
        tl.store(dbc + t * bc_stride + STATES + states, tl.sum(h * dy[None, :], 1))
    return h, (u_t, v, delta_t, a, dy)


@triton.jit
def adjoint_token(g, sums, before, token, t, inputs, outputs, spot, STATES: tl.constexpr, SOFTPLUS: tl.constexpr):
    """One step of the adjoint from the gradient g that reaches its state; writes du, ddelta, dB. ->
    g of the step before, sums with its own added.
    """
    _, bc, bc_stride, _, parameters = inputs
    A, D, _ = parameters
    du, ddelta, _, dbc = outputs
    channels, channel, mask, rows = spot
    dA, dD, dbias = sums
    u_t, v, delta_t, a, dy = token
    states = tl.arange(0, STATES)
    b = tl.load(bc + t * bc_stride + states)
    c = tl.load(bc + t * bc_stride + STATES + states)
    g += c[:, None] * dy[None, :]
    q = tl.sum(g * b[:, None], 0)
    if dbc is not None:
        tl.store(dbc + t * bc_stride + states, tl.sum(g * (delta_t * u_t)[None, :], 1))
    g *= a
    w = g * before
    dv = u_t * q + tl.sum(w * A, 0)
    if SOFTPLUS:
        dv *= sigmoid(v)
    if du is not None:
        tl.store(du + (rows + t * channels), cast(delta_t * q + D * dy, du.dtype.element_ty), mask=mask)
    if ddelta is not None:
        tl.store(ddelta + (rows + t * channels), cast(dv, ddelta.dtype.element_ty), mask=mask)
    return g, (dA + w * delta_t[None, :], dD + dy * u_t, dbias + dv)


@triton.jit
def adjoint_segment(
    g, sums, tile, t, inputs, outputs, lanes, spot,
    STATES: tl.constexpr, STEP: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
    REDUCE: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The adjoint of SEGMENT steps from token t on, whose first state lies at ``tile``: forward to
    keep what each needs, then back.
    """
    h = tl.load(tile)
    before = ()
    tokens = ()
    for r in tl.static_range(SEGMENT):
        before = before + (h,)
        h, token = replay_token(h, t + r * STEP, inputs, outputs, lanes, spot, STATES, SOFTPLUS, GATE, REDUCE)
        tokens = tokens + (token,)
    for r in tl.static_range(SEGMENT - 1, -1, -1):
        g, sums = adjoint_token(g, sums, before[r], tokens[r], t + r * STEP, inputs, outputs, spot, STATES, SOFTPLUS)
    return g, sums
