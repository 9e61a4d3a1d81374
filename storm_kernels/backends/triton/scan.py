"""Selective scan, forward: sequential in time, one warp for a block of channels of one direction of
one sequence (docs/spec.md, Mixer).

Symbols as in `scan_layout`; a *step* counts tokens in scan order: in reverse, the last is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...tokens import TokenGrid, TokenReduction
from ..contract import ScanCall, ScanResult
from .configs import SCAN_FORWARD
from .launch import launch
from .math import cast, sigmoid
from .reduce import combine, inverse_counts, token_places
from .scan_layout import (
    INTERVAL,
    Shape,
    checkpoint_shapes,
    direction_operands,
    gate_mode,
    gate_operands,
    states_first,
    states_last,
)
from .scan_steps import (
    advance,
    first_checkpoint,
    load_drive,
    load_gate,
    load_parameters,
    locate,
    open_streams,
    states_place,
)


@triton.jit
def load_token(streams, out, rows, t, lanes, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """What token t reads of the large tensors: u, delta, z, the offset of its cell's sum and, if
    REDUCE is "apart", the sum that stands there.
    """
    u_t, delta_t = load_drive(streams, t, lanes)
    z_t = load_gate(streams, t, lanes, GATE)
    row, total = 0, 0
    if REDUCE != "none":
        row = tl.load(rows + t)
    if REDUCE == "apart":
        total = tl.load(out + row + lanes)
    return u_t, delta_t, z_t, row, total


@triton.jit
def load_segment(
    streams, out, rows, t, step, last, lanes,
    SEGMENT: tl.constexpr, CLAMP: tl.constexpr, GATE: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """`load_token` of SEGMENT steps from t on, none further than ``last`` if CLAMP."""
    segment = ()
    for r in tl.static_range(SEGMENT):
        ahead = tl.minimum(r, last) if CLAMP else r
        segment = segment + (load_token(streams, out, rows, t + ahead * step, lanes, GATE, REDUCE),)
    return segment


@triton.jit
def output(h, c, D, u, z, GATE: tl.constexpr):
    """y of one token, gated: ``(h . C + D u) SiLU(z)``, (BLOCK_E,)."""
    y = tl.sum(h * c[:, None], 0) + D * u
    if GATE != "none":
        z = z.to(tl.float32)
        y *= z * sigmoid(z)
    return y


@triton.jit
def emit(out, h, c, D, token, t, channels, lanes, mask, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """Write one token's `output`; with a reduction, add it to its cell's sum, which no other program
    touches, or skip a dropped token.
    """
    u, z, row, total = token
    if REDUCE == "none":
        tl.store(out + t * channels + lanes, cast(output(h, c, D, u, z, GATE), out.dtype.element_ty), mask=mask)
    elif REDUCE == "apart":
        tl.store(out + row + lanes, total + output(h, c, D, u, z, GATE), mask=mask)
    elif row >= 0:
        place = out + row + lanes
        # Clamped channels do not read what the real one's lane has just written.
        tl.store(place, tl.load(place, mask=mask, other=0.0) + output(h, c, D, u, z, GATE), mask=mask)


@triton.jit
def scan_direction(
    direction,
    shared,
    program,
    length,
    out_length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    REDUCE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    operands, out, checkpoints = direction
    gate, rows, initial, final, cu_seqlens = shared
    sequence, batch, start, count, _block, group, lanes, mask = locate(
        program, cu_seqlens, length, channels // groups, groups, BLOCK_E
    )
    # Clamped channels need no mask; that they are not known to be contiguous also keeps the
    # compiler from giving a lane four neighbouring channels and a quarter of the states, which
    # would cost shuffles at every token.
    lanes = tl.minimum(lanes, (group + 1) * (channels // groups) - 1)
    streams, bc, bc_stride = open_streams(operands, gate, batch, group, length, groups, STATES, GATE)
    A, D, delta_bias = load_parameters(operands, channels, lanes, STATES, BLOCK_E)
    out += batch * out_length * channels
    h = tl.zeros([STATES, BLOCK_E], tl.float32)
    if initial is not None:
        h = tl.load(states_place(initial, sequence, channels, lanes, STATES))
    checkpoint = first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL)

    step: tl.constexpr = -1 if REVERSE else 1
    t = tl.maximum(tl.minimum(start + (count - 1 if REVERSE else 0), length - 1), 0)
    states = tl.arange(0, STATES)
    b = tl.load(bc + t * bc_stride + states)
    c = tl.load(bc + t * bc_stride + STATES + states)
    segment_now = load_segment(
        streams, out, rows, t, step, tl.maximum(count - 1, 0), lanes, SEGMENT, True, GATE, REDUCE
    )
    # Whole segments with a whole segment after them: that one is loaded while this one is computed, B
    # and C one step ahead.
    ahead = tl.maximum((count - SEGMENT) // SEGMENT, 0) * SEGMENT
    span = count if checkpoints is None else INTERVAL
    for begin in range(0, count, span):
        end = tl.minimum(begin + span, count)
        if checkpoints is not None:
            tl.store(
                states_place(checkpoints, checkpoint + begin // INTERVAL, channels, lanes, STATES),
                h,
                mask=mask[None, :],
            )
        for _whole in range(begin, tl.minimum(ahead, end), SEGMENT):
            segment_next = load_segment(
                streams, out, rows, t + SEGMENT * step, step, 0, lanes, SEGMENT, False, GATE, REDUCE
            )
            for r in tl.static_range(SEGMENT):
                u_t, delta_t, z_t, row, total = segment_now[r]
                b_now, c_now, t_now = b, c, t
                t += step
                b = tl.load(bc + t * bc_stride + states)
                c = tl.load(bc + t * bc_stride + STATES + states)
                h, u_t, _ = advance(h, A, u_t, delta_t, b_now, delta_bias, SOFTPLUS)
                emit(out, h, c_now, D, (u_t, z_t, row, total), t_now, channels, lanes, mask, GATE, REDUCE)
            segment_now = segment_next
        for _single in range(tl.maximum(ahead, begin), end):
            u_t, delta_t, z_t, row, total = load_token(streams, out, rows, t, lanes, GATE, REDUCE)
            b = tl.load(bc + t * bc_stride + states)
            c = tl.load(bc + t * bc_stride + STATES + states)
            h, u_t, _ = advance(h, A, u_t, delta_t, b, delta_bias, SOFTPLUS)
            emit(out, h, c, D, (u_t, z_t, row, total), t, channels, lanes, mask, GATE, REDUCE)
            t += step
    if final is not None:
        tl.store(states_place(final, sequence, channels, lanes, STATES), h, mask=mask[None, :])


@triton.jit(do_not_specialize=["length", "out_length"])
def scan_kernel(
    directions,  # one or two of (`direction_operands`, output, checkpoints)
    # `gate_operands`; each token's offset in the output, or negative; initial and final states (n, Sp, E);
    # cu_seqlens
    shared,
    length,
    out_length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,  # of the first direction; a second one has the other order
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,  # "none", "all", or "kept": z holds the kept tokens only
    REDUCE: tl.constexpr,  # `reduce_mode`
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Program order: channel block, group, sequence, direction (the first fastest)."""
    pid = tl.program_id(0)
    share = tl.num_programs(0) // len(directions)
    if len(directions) == 1 or pid < share:
        scan_direction(directions[0], shared, pid, length, out_length, channels, groups,
                       STATES, REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, SEGMENT)  # fmt: skip
    else:
        scan_direction(directions[-1], shared, pid - share, length, out_length, channels, groups,
                       STATES, not REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, SEGMENT)  # fmt: skip


def reduce_mode(grid: TokenGrid | None, reduction: TokenReduction | None) -> str:
    """How a token meets the sum of its cell: "none"; "apart" where all tokens are kept and those of
    two segments in a row have different cells, so that sums can be read ahead; else "any"."""
    if reduction is None:
        return "none"
    alone = (
        reduction.spatial_pool == reduction.temporal_stride == 1
        and grid.tokens_per_frame >= 2 * SCAN_FORWARD.constants["SEGMENT"]
    )
    return "apart" if alone else "any"


def scan(call: ScanCall, save_checkpoints: bool) -> ScanResult:
    """`contract.Backend.scan`."""
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    first, two = directions[0], len(directions) == 2
    shape, dtype, device = Shape.of(first, cu_seqlens), first.u.dtype, first.u.device
    out_length = reduction.reduced(grid).tokens if reduction else shape.length
    cells, kept = token_places(grid, reduction, device) if reduction else (None, None)
    # Both directions, whole: z is read once, where their sum is formed. Reduced, each direction
    # gates what it adds up.
    gate = None if two and not reduction else z
    floats = {"dtype": torch.float32, "device": device}
    form = floats if two or reduction else {"dtype": dtype, "device": device}
    new = torch.zeros if reduction else torch.empty
    outs = [new(shape.batch, out_length, shape.channels, **form) for _ in directions]
    sequences = 0 if cu_seqlens is None else shape.sequences
    shapes = checkpoint_shapes(*shape[:4], directions=len(directions), sequences=sequences)
    checkpoints = tuple(torch.empty(saved, **floats) for saved in shapes) if save_checkpoints else ()
    final = None if two else torch.empty(shape.sequences, shape.padded, shape.channels, **floats)
    initial = None if initial_state is None else states_first(initial_state)
    rows = None if cells is None else cells * shape.channels
    launch(
        scan_kernel,
        len(directions) * shape.programs(SCAN_FORWARD.constants["BLOCK_E"]),
        SCAN_FORWARD,
        device,
        tuple(zip(map(direction_operands, directions), outs, checkpoints or (None, None), strict=False)),
        (gate_operands(gate, kept), rows, initial, final, cu_seqlens),
        shape.length, out_length, shape.channels, shape.groups,
        STATES=shape.padded, REVERSE=first.reverse, SOFTPLUS=delta_softplus, GATE=gate_mode(gate, shape.length),
        REDUCE=reduce_mode(grid, reduction), INTERVAL=INTERVAL,
    )  # fmt: skip
    scale = inverse_counts(grid, reduction, device) if reduction else None
    out = combine(outs, dtype, z=None if reduction else z, scale=scale) if two or reduction else outs[0]
    return ScanResult(out, None if final is None else states_last(final, shape.states), checkpoints)
