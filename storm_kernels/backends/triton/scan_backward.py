"""Selective scan, backward: the adjoint of the recurrence in `scan`, from its checkpoints, in the
same mapping and without atomics.

With h' the gradient that reaches a state from the step after it, one step is
    dy = dout SiLU(z)          g = h' + C dy              q = g . B
    du = delta q + D dy        w = exp(delta A) g h_before        ddelta = u q + w . A
    dB = sum_e g delta u       dC = sum_e dy h            dA += delta w       h' = exp(delta A) g
A program owns its channels through the whole sequence: it sums dA, dD, d(delta_bias) in registers
over FLUSH segments and adds that to memory that no other program touches. Only dB and dC need other
channels: each program writes its own partial, summed later in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from ..contract import Checkpoints, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs
from .configs import SCAN_BACKWARD
from .launch import launch
from .reduce import combine, inverse_counts, token_places
from .scan_adjoint import add_sums, adjoint_segment, scratch_place
from .scan_layout import INTERVAL, Shape, direction_operands, gate_mode, states_first, states_last
from .scan_steps import advance, first_checkpoint, load_drive, load_parameters, locate, open_streams, states_place


@triton.jit
def keep_states(
    h, t, scratch, segments_before, inputs, lanes,
    STATES: tl.constexpr, STEP: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_E: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """From state h before token t on: writes it and the states after each of ``segments_before``
    segments to ``scratch``.
    """
    streams, bc, bc_stride, _, parameters = inputs
    A, _, delta_bias = parameters
    tl.store(scratch_place(scratch, STATES, BLOCK_E), h)
    for k in range(segments_before):
        for r in tl.static_range(SEGMENT):
            at = t + (k * SEGMENT + r) * STEP
            b = tl.load(bc + at * bc_stride + tl.arange(0, STATES))
            u_t, delta_t = load_drive(streams, at, lanes)
            h, _, _ = advance(h, A, u_t, delta_t, b, delta_bias, SOFTPLUS)
        tl.store(scratch_place(scratch + (k + 1) * (STATES * BLOCK_E), STATES, BLOCK_E), h)


@triton.jit
def backward_direction(
    direction,
    shared,
    program,
    length,
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
    FLUSH: tl.constexpr,
):
    tl.static_assert(SEGMENT == 2, "the last step of an odd count is a segment of its own")
    operands, checkpoints, outputs = direction
    du, ddelta, dz, dbc, totals = outputs
    gate, grad, grad_strides, grad_rows, grad_final, grad_initial, cu_seqlens, scratch = shared
    sequence, batch, start, count, block, group, channel, mask = locate(
        program, cu_seqlens, length, channels // groups, groups, BLOCK_E
    )
    # Clamped channels need no mask in loads: a channel that is not real gets no gradient, so it
    # adds nothing to dB and dC.
    lanes = tl.minimum(channel, (group + 1) * (channels // groups) - 1)
    streams, bc, bc_stride = open_streams(operands, gate, batch, group, length, groups, STATES, GATE)
    if dbc is not None:
        dbc += ((batch * tl.cdiv(channels // groups, BLOCK_E) + block) * length * groups + group) * (2 * STATES)
    source = (grad + batch * grad_strides[0], grad_strides[1], grad_strides[2], grad_rows)
    inputs = (streams, bc, bc_stride, source, load_parameters(operands, channels, lanes, STATES, BLOCK_E))
    per_token = (du, ddelta, dz, dbc)
    # One offset for du, ddelta and dz, whose pointers then stay out of registers.
    spot = (channels, channel, mask, batch * length * channels + channel)
    g = tl.zeros([STATES, BLOCK_E], tl.float32)
    if grad_final is not None:
        g = tl.load(states_place(grad_final, sequence, channels, lanes, STATES), mask=mask[None, :], other=0.0)
    checkpoint = first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL)
    scratch += tl.program_id(0).to(tl.int64) * (INTERVAL // SEGMENT * STATES * BLOCK_E)

    step: tl.constexpr = -1 if REVERSE else 1
    sequence32 = sequence.to(tl.int32)
    first = tl.maximum(start + (count - 1 if REVERSE else 0), 0)
    nothing = (
        tl.zeros([STATES, BLOCK_E], tl.float32),
        tl.zeros([BLOCK_E], tl.float32),
        tl.zeros([BLOCK_E], tl.float32),
    )
    # Registers are short: intervals, and steps within one, are counted in 32 bits, and checkpoints
    # are read at the places that `add_sums` writes at.
    intervals = tl.cdiv(count, INTERVAL).to(tl.int32)
    steps = (count - tl.full([], INTERVAL, tl.int64) * (intervals - 1)).to(tl.int32)
    for interval in range(intervals - 1, -1, -1):
        done = tl.full([], INTERVAL, tl.int64) * interval
        whole = steps // SEGMENT
        origin = first + done * step
        h = tl.load(
            states_place(checkpoints, checkpoint + interval, channels, channel, STATES), mask=mask[None, :], other=0.0
        )
        keep_states(
            h, origin, scratch, tl.cdiv(steps, SEGMENT) - 1, inputs, lanes, STATES, step, SOFTPLUS, BLOCK_E, SEGMENT
        )
        tl.debug_barrier()  # a lane may read below what another one wrote

        sums = nothing
        if whole * SEGMENT < steps:
            tile = scratch_place(scratch + whole * (STATES * BLOCK_E), STATES, BLOCK_E)
            t = origin + whole * (SEGMENT * step)
            g, sums = adjoint_segment(
                g, sums, tile, t, inputs, per_token, lanes, spot, STATES, step, SOFTPLUS, GATE, REDUCE, 1
            )
        for part in range(tl.maximum(tl.cdiv(whole, FLUSH), 1) - 1, -1, -1):
            for k in range(tl.minimum((part + 1) * FLUSH, whole) - 1, part * FLUSH - 1, -1):
                tile = scratch_place(scratch + k * (STATES * BLOCK_E), STATES, BLOCK_E)
                t = origin + k * (SEGMENT * step)
                g, sums = adjoint_segment(
                    g, sums, tile, t, inputs, per_token, lanes, spot, STATES, step, SOFTPLUS, GATE, REDUCE, SEGMENT
                )
            add_sums(totals, sums, sequence32, channels, channel, mask, STATES)
            sums = nothing
        tl.debug_barrier()  # nor may the next interval's states overtake the reads of this one's
        steps = tl.full([], INTERVAL, tl.int32)  # every interval but the last is whole
    if grad_initial is not None:
        tl.store(states_place(grad_initial, sequence, channels, channel, STATES), g, mask=mask[None, :])


@triton.jit(do_not_specialize=["length"])
def backward_kernel(
    directions,  # one or two of (`scan_layout.direction_operands`, checkpoints, `Outputs`)
    shared,  # `_sources`; grad_final, grad_initial, cu_seqlens, scratch
    length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,  # of the first direction; a second one has the other order
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    REDUCE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
    FLUSH: tl.constexpr,  # segments between two additions of dA, dD and d(delta_bias) to memory
):
    """Program order as in `scan.scan_kernel`."""
    pid = tl.program_id(0)
    share = tl.num_programs(0) // len(directions)
    if len(directions) == 1 or pid < share:
        backward_direction(directions[0], shared, pid, length, channels, groups,
                           STATES, REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, SEGMENT, FLUSH)  # fmt: skip
    else:
        backward_direction(directions[-1], shared, pid - share, length, channels, groups,
                           STATES, not REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, SEGMENT, FLUSH)  # fmt: skip


def scan_backward(
    grad_out: Tensor, grad_final_state: Tensor | None, call: ScanCall, checkpoints: Checkpoints, needs: frozenset[str]
) -> ScanBackwardResult:
    """`contract.Backend.scan_backward`."""
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    first, constants = directions[0], SCAN_BACKWARD.constants
    shape, device = Shape.of(first, cu_seqlens), first.u.device
    programs = len(directions) * shape.programs(constants["BLOCK_E"])
    outputs = tuple(_outputs(one, z, shape, len(directions) == 1, needs) for one in directions)
    floats = {"dtype": torch.float32, "device": device}
    grad_initial = None
    if initial_state is not None and "initial_state" in needs:
        grad_initial = torch.empty(shape.sequences, shape.padded, shape.channels, **floats)
    scratch = torch.empty(programs, INTERVAL // constants["SEGMENT"], shape.padded, constants["BLOCK_E"], **floats)
    grad_final = None if grad_final_state is None else states_first(grad_final_state)
    launch(
        backward_kernel,
        programs,
        SCAN_BACKWARD,
        device,
        tuple(
            (direction_operands(one), saved, out)
            for one, saved, out in zip(directions, checkpoints, outputs, strict=True)
        ),
        (*_sources(grad_out, z, grid, reduction), grad_final, grad_initial, cu_seqlens, scratch),
        shape.length,
        shape.channels,
        shape.groups,
        STATES=shape.padded,
        REVERSE=first.reverse,
        SOFTPLUS=delta_softplus,
        GATE=gate_mode(z, shape.length),
        REDUCE=reduction is not None,
        INTERVAL=INTERVAL,
    )
    grads = tuple(_finish(one, out, needs) for one, out in zip(directions, outputs, strict=True))
    dz = combine([out.dz for out in outputs], z.dtype) if outputs[0].dz is not None else None
    if dz is not None and z.shape[1] != shape.length:
        dz = dz.unflatten(1, (grid.frames, -1))[:, reduction.kept_frames(grid)].flatten(1, 2)
    return grads, dz, None if grad_initial is None else states_last(grad_initial, shape.states)


def _sources(grad_out: Tensor, z: Tensor | None, grid: TokenGrid | None, reduction: TokenReduction | None) -> tuple:
    """(z, its strides, None), the gradient, its strides, and a table. With a reduction, the
    gradient is that of one token's share of each cell, and a row of zeros for the dropped ones; the
    table is (L, 2) int32: the row of each token's z and of its gradient (offsets would cost
    registers)."""
    strides = (0, 0) if z is None else z.stride()[:2]
    if reduction is None:
        return (z, strides, None), grad_out, grad_out.stride(), None
    cells, kept = token_places(grid, reduction, grad_out.device)
    batch, count, channels = grad_out.shape
    share = torch.zeros(batch, count + 1, channels, dtype=torch.float32, device=grad_out.device)
    torch.mul(grad_out, inverse_counts(grid, reduction, grad_out.device)[:, None], out=share[:, :count])
    table = torch.stack((kept.clamp(min=0), cells.masked_fill(cells < 0, count)), 1).to(torch.int32)
    return (z, strides, None), share, share.stride(), table


class Outputs(NamedTuple):
    """What the kernel writes for one direction."""

    du: Tensor | None  # (batch, L, E)
    ddelta: Tensor | None  # (batch, L, E)
    # (batch, L, E), also where z holds the kept tokens only: offsets would cost registers; float32 if
    # there is another direction.
    dz: Tensor | None
    dbc: Tensor | None  # (batch, channel blocks of a group, L, G, 2, Sp) float32
    # (n, 2, Sp + 2, E) float32 from zero: the sums of dA, dD and d(delta_bias), and what rounding took
    # from them.
    totals: Tensor


def _outputs(one: ScanInputs, z: Tensor | None, shape: Shape, alone: bool, needs: frozenset[str]) -> Outputs:
    blocks = shape.blocks(SCAN_BACKWARD.constants["BLOCK_E"])
    floats = {"dtype": torch.float32, "device": one.u.device}
    return Outputs(
        torch.empty(one.u.shape, dtype=one.u.dtype, device=one.u.device) if "u" in needs else None,
        torch.empty(one.delta.shape, dtype=one.delta.dtype, device=one.u.device) if "delta" in needs else None,
        torch.empty(one.u.shape, dtype=z.dtype if alone else torch.float32, device=z.device)
        if z is not None and "z" in needs
        else None,
        torch.empty(shape.batch, blocks, shape.length, shape.groups, 2, shape.padded, **floats)
        if needs & {"B", "C"}
        else None,
        torch.zeros(shape.sequences, 2, shape.padded + 2, shape.channels, **floats),
    )


def _finish(one: ScanInputs, out: Outputs, needs: frozenset[str]) -> ScanGrads:
    """Sum the partials; torch sums in an order that only the shape decides."""
    states = one.A.shape[1]
    totals = out.totals.sum((0, 1))
    return ScanGrads(
        u=out.du,
        delta=out.ddelta,
        A=states_last(totals[:-2], states) if "A" in needs else None,
        B=out.dbc[..., 0, :states].sum(1).to(one.B.dtype) if "B" in needs else None,
        C=out.dbc[..., 1, :states].sum(1).to(one.C.dtype) if "C" in needs else None,
        D=totals[-2].clone() if one.D is not None and "D" in needs else None,
        delta_bias=totals[-1].clone() if one.delta_bias is not None and "delta_bias" in needs else None,
    )
