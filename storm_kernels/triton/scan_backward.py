"""Selective scan, backward: the adjoint of the recurrence in `scan`, from its checkpoints, in the same mapping and without atomics.

With h' the gradient that reaches a state from the step after it, one step is
    dy = dout SiLU(z)          g = h' + C dy              q = g . B
    du = delta q + D dy        w = exp(delta A) g h_before        ddelta = u q + w . A
    dB = sum_e g delta u       dC = sum_e dy h            dA += delta w       h' = exp(delta A) g
A program owns its channels through the whole sequence: it sums dA, dD, d(delta_bias) in registers over FLUSH groups and adds that to memory that
no other program touches. Only dB and dC need other channels: each program writes its own partial, summed later in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ScanGrads, ScanInputs
from ..tokens import TokenGrid, TokenReduction
from .configs import SCAN_BACKWARD
from .launch import launch
from .math import cast, sigmoid, softplus
from .reduce import combine, inverse_counts, token_places
from .scan import (
    INTERVAL,
    advance,
    direction_operands,
    first_checkpoint,
    gate_mode,
    load_drive,
    load_place,
    locate,
    program_count,
    states_first,
    states_last,
    states_place,
)


@triton.jit
def load_states(tile, STATES: tl.constexpr, BLOCK_E: tl.constexpr):
    """A place of (STATES, BLOCK_E) in the scratch memory of one program."""
    return tile + tl.arange(0, STATES)[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]


@triton.jit
def add_to(total, tail, value, mask):
    """Add to a sum in memory that keeps its rounding errors apart (Knuth's two-sum), so that a long video costs no accuracy."""
    before = tl.load(total, mask=mask, other=0.0)
    after = before + value
    took = after - before
    tl.store(tail, tl.load(tail, mask=mask, other=0.0) + ((before - (after - took)) + (value - took)), mask=mask)
    tl.store(total, after, mask=mask)


@triton.jit
def load_gradient(grad, grad_strides, weights, row, lanes, mask, REDUCE: tl.constexpr):
    """The gradient of one token's share of its output row; zero for a dropped token."""
    place = grad + row * grad_strides[1] + lanes * grad_strides[2]
    if REDUCE:
        kept = tl.maximum(row, 0)
        weight = tl.load(weights + kept) * (row >= 0).to(tl.float32)
        place = grad + kept * grad_strides[1] + lanes * grad_strides[2]
        return tl.load(place, mask=mask, other=0.0).to(tl.float32) * weight
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def backward_direction(
    direction,
    outputs,
    shared,
    program,
    length,
    z_length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    REDUCE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    FLUSH: tl.constexpr,
):
    u, delta, bc, A_ptr, D_ptr, bias_ptr, u_strides, delta_strides, checkpoints = direction
    du, ddelta, dz, dbc, dA, dD, dbias = outputs
    z, z_strides, rows, gates, weights, grad, grad_strides, grad_final, grad_initial, cu_seqlens, scratch = shared
    sequence, batch, start, count, block, group, channel, mask = locate(program, cu_seqlens, length, channels // groups, groups, BLOCK_E)
    # Clamped channels need no mask in loads: a channel that is not real gets no gradient, so it adds nothing to dB and dC.
    lanes = tl.minimum(channel, (group + 1) * (channels // groups) - 1)
    step: tl.constexpr = -1 if REVERSE else 1
    first = tl.maximum(start + (count - 1 if REVERSE else 0), 0)
    states = tl.arange(0, STATES)
    bc_row: tl.constexpr = 2 * STATES
    bc += (batch * length * groups + group) * bc_row
    if dbc is not None:
        dbc += ((batch * tl.cdiv(channels // groups, BLOCK_E) + block) * length * groups + group) * bc_row
    grad += batch * grad_strides[0]
    z_start = u  # not read
    if GATE != "none":
        z_start = z + batch * z_strides[0]
    streams = (u + batch * u_strides[0], delta + batch * delta_strides[0], z_start, u_strides[1], delta_strides[1], z_strides[1], rows, gates)

    A = tl.load(states_place(A_ptr, 0, channels, lanes, STATES))
    D = tl.load(D_ptr + lanes) if D_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    delta_bias = tl.load(bias_ptr + lanes) if bias_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    g = tl.zeros([STATES, BLOCK_E], tl.float32)
    if grad_final is not None:
        g = tl.load(states_place(grad_final, sequence, channels, lanes, STATES), mask=mask[None, :], other=0.0)
    checkpoint = first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL)
    scratch += tl.program_id(0).to(tl.int64) * (INTERVAL // GROUP * STATES * BLOCK_E)

    chunks = tl.cdiv(count, INTERVAL)
    for chunk in range(chunks - 1, -1, -1):
        # within an interval steps are counted in 32 bits
        steps = tl.minimum(count - chunk * INTERVAL, INTERVAL).to(tl.int32)
        n_groups = tl.cdiv(steps, GROUP)
        origin = first + chunk * INTERVAL * step
        h = tl.load(states_place(checkpoints, checkpoint + chunk, channels, lanes, STATES))
        tl.store(load_states(scratch, STATES, BLOCK_E), h)
        for k in range(1, n_groups):
            for r in tl.static_range(GROUP):
                t = origin + ((k - 1) * GROUP + r) * step
                b = tl.load(bc + t * groups * bc_row + states)
                u_t, delta_t = load_drive(streams, t, lanes)
                h, _, _ = advance(h, A, u_t, delta_t, b, delta_bias, SOFTPLUS)
            tl.store(load_states(scratch + k * (STATES * BLOCK_E), STATES, BLOCK_E), h)
        tl.debug_barrier()  # a lane may read below what another one wrote

        for part in range(tl.cdiv(n_groups, FLUSH) - 1, -1, -1):
            dA_part = tl.zeros([STATES, BLOCK_E], tl.float32)
            dD_part = tl.zeros([BLOCK_E], tl.float32)
            dbias_part = tl.zeros([BLOCK_E], tl.float32)
            for k in range(tl.minimum((part + 1) * FLUSH, n_groups) - 1, part * FLUSH - 1, -1):
                h = tl.load(load_states(scratch + k * (STATES * BLOCK_E), STATES, BLOCK_E))
                before = ()
                tokens = ()
                for r in tl.static_range(GROUP):
                    # Steps past the end, in the last group: delta of zero leaves the state as it is.
                    i = k * GROUP + r
                    live = (i < steps).to(tl.float32)
                    t = origin + tl.minimum(i, steps - 1) * step
                    u_t, raw = load_drive(streams, t, lanes)
                    b = tl.load(bc + t * groups * bc_row + states)
                    v = raw.to(tl.float32) + delta_bias
                    u_t = u_t.to(tl.float32)
                    delta_t = (softplus(v) if SOFTPLUS else v) * live
                    a = tl.exp2(delta_t[None, :] * A)
                    before = before + (h,)
                    h = a * h + (delta_t * u_t)[None, :] * b[:, None]

                    z_t, row = load_place(streams, t, lanes, GATE, REDUCE)
                    dy = load_gradient(grad, grad_strides, weights, row, lanes, mask, REDUCE) * live
                    if GATE != "none":
                        z_t = z_t.to(tl.float32)
                        gate = sigmoid(z_t)
                        if dz is not None:
                            c = tl.load(bc + t * groups * bc_row + STATES + states)
                            y = tl.sum(h * c[:, None], 0) + D * u_t
                            dz_t = dy * y * gate * (1.0 + z_t * (1.0 - gate))
                            place = t
                            if GATE == "kept":
                                place = tl.load(gates + t)
                            if (i < steps) & (place >= 0):
                                tl.store(dz + (batch * z_length + place) * channels + channel, cast(dz_t, dz.dtype.element_ty), mask=mask)
                        dy *= z_t * gate
                    # nested: the first is known when compiling, and without dbc there is nothing to compile
                    if dbc is not None:  # noqa: SIM102
                        if i < steps:
                            tl.store(dbc + t * groups * bc_row + STATES + states, tl.sum(h * dy[None, :], 1))
                    tokens = tokens + ((u_t, v, delta_t, a, dy),)
                for r in tl.static_range(GROUP - 1, -1, -1):
                    u_t, v, delta_t, a, dy = tokens[r]
                    i = k * GROUP + r
                    t = origin + tl.minimum(i, steps - 1) * step
                    b = tl.load(bc + t * groups * bc_row + states)
                    c = tl.load(bc + t * groups * bc_row + STATES + states)
                    g += c[:, None] * dy[None, :]
                    q = tl.sum(g * b[:, None], 0)
                    if dbc is not None:  # noqa: SIM102
                        if i < steps:
                            tl.store(dbc + t * groups * bc_row + states, tl.sum(g * (delta_t * u_t)[None, :], 1))
                    g *= a
                    w = g * before[r]
                    dA_part += w * delta_t[None, :]
                    dD_part += dy * u_t
                    dv = u_t * q + tl.sum(w * A, 0) * 0.6931471805599453
                    if SOFTPLUS:
                        dv *= sigmoid(v)
                    dv *= (i < steps).to(tl.float32)
                    dbias_part += dv
                    if i < steps:
                        at = (batch * length + t) * channels + channel
                        if du is not None:
                            tl.store(du + at, cast(delta_t * q + D * dy, du.dtype.element_ty), mask=mask)
                        if ddelta is not None:
                            tl.store(ddelta + at, cast(dv, ddelta.dtype.element_ty), mask=mask)
            total, tail = sequence * 2, sequence * 2 + 1
            add_to(states_place(dA, total, channels, channel, STATES), states_place(dA, tail, channels, channel, STATES), dA_part, mask[None, :])
            add_to(dD + total * channels + channel, dD + tail * channels + channel, dD_part, mask)
            add_to(dbias + total * channels + channel, dbias + tail * channels + channel, dbias_part, mask)
        tl.debug_barrier()  # nor may the next interval's states overtake the reads of this one's
    if grad_initial is not None:
        tl.store(states_place(grad_initial, sequence, channels, channel, STATES), g, mask=mask[None, :])


@triton.jit(do_not_specialize=["length", "z_length"])
def backward_kernel(
    directions,  # one or two of `scan.direction_operands`, less the output
    outputs,  # for each: du, ddelta, dz, dbc, dA, dD, d(delta_bias); the first four None where not needed
    shared,  # z, its strides, rows, gates, weights, grad, its strides, grad_final, grad_initial, cu_seqlens, scratch
    length,
    z_length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,  # of the first direction; a second one has the other order
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,
    REDUCE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    FLUSH: tl.constexpr,  # groups between two additions of dA, dD and d(delta_bias) to memory
):
    """Program order as in `scan.scan_kernel`."""
    pid = tl.program_id(0)
    share = tl.num_programs(0) // len(directions)
    if len(directions) == 1 or pid < share:
        backward_direction(directions[0], outputs[0], shared, pid, length, z_length, channels, groups,
                           STATES, REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP, FLUSH)  # fmt: skip
    else:
        backward_direction(directions[-1], outputs[-1], shared, pid - share, length, z_length, channels, groups,
                           STATES, not REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP, FLUSH)  # fmt: skip


def scan_backward(
    grad_out: Tensor,
    grad_final_state: Tensor | None,
    directions: tuple[ScanInputs, ...],
    z: Tensor | None,
    checkpoints: tuple[Tensor, ...],
    *,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
    needs: frozenset[str],
) -> tuple[tuple[ScanGrads, ...], Tensor | None, Tensor | None]:
    """`contract.Backend.scan_backward`."""
    first = directions[0]
    batch, length, channels = first.u.shape
    states, groups, device = first.A.shape[1], first.B.shape[2], first.u.device
    padded = triton.next_power_of_2(states)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constants = SCAN_BACKWARD.constants
    programs = len(directions) * program_count(sequences, channels, groups, constants["BLOCK_E"])
    rows, gates = token_places(grid, reduction, device) if reduction else (None, None)
    outputs = tuple(_outputs(one, z, sequences, padded, len(directions) == 1, needs) for one in directions)
    grad_initial = None
    if initial_state is not None and "initial_state" in needs:
        grad_initial = torch.empty(sequences, padded, channels, dtype=torch.float32, device=device)
    scratch = torch.empty(programs, INTERVAL // constants["GROUP"], padded, constants["BLOCK_E"], dtype=torch.float32, device=device)
    launch(
        backward_kernel,
        programs,
        SCAN_BACKWARD,
        device,
        tuple((*direction_operands(one), checkpoint) for one, checkpoint in zip(directions, checkpoints, strict=True)),
        outputs,
        (
            z,
            (0, 0) if z is None else z.stride()[:2],
            rows,
            gates,
            inverse_counts(grid, reduction, device) if reduction else None,
            grad_out,
            grad_out.stride(),
            None if grad_final_state is None else states_first(grad_final_state),
            grad_initial,
            cu_seqlens,
            scratch,
        ),
        length,
        length if z is None else z.shape[1],
        channels,
        groups,
        STATES=padded,
        REVERSE=first.reverse,
        SOFTPLUS=delta_softplus,
        GATE=gate_mode(z, length),
        REDUCE=reduction is not None,
        INTERVAL=INTERVAL,
    )
    grads = tuple(_finish(one, out, needs) for one, out in zip(directions, outputs, strict=True))
    dz = combine([out.dz for out in outputs], z.dtype) if outputs[0].dz is not None else None
    return grads, dz, None if grad_initial is None else states_last(grad_initial, states)


class Outputs(NamedTuple):
    """What the kernel writes for one direction."""

    du: Tensor | None  # (batch, L, E)
    ddelta: Tensor | None  # (batch, L, E)
    dz: Tensor | None  # as z; this direction's share, float32 if there is another
    dbc: Tensor | None  # (batch, channel blocks of a group, L, G, 2, Sp) float32
    dA: Tensor  # (n, 2, Sp, E) float32 from zero: the sums and what rounding took from them; so are the next two
    dD: Tensor  # (n, 2, E) float32
    dbias: Tensor  # (n, 2, E) float32


def _outputs(one: ScanInputs, z: Tensor | None, sequences: int, padded: int, alone: bool, needs: frozenset[str]) -> Outputs:
    batch, length, channels = one.u.shape
    groups = one.B.shape[2]
    blocks = triton.cdiv(channels // groups, SCAN_BACKWARD.constants["BLOCK_E"])
    floats = {"dtype": torch.float32, "device": one.u.device}
    return Outputs(
        torch.empty(one.u.shape, dtype=one.u.dtype, device=one.u.device) if "u" in needs else None,
        torch.empty(one.delta.shape, dtype=one.delta.dtype, device=one.u.device) if "delta" in needs else None,
        torch.empty(z.shape, dtype=z.dtype if alone else torch.float32, device=z.device) if z is not None and "z" in needs else None,
        torch.empty(batch, blocks, length, groups, 2, padded, **floats) if needs & {"B", "C"} else None,
        torch.zeros(sequences, 2, padded, channels, **floats),
        torch.zeros(sequences, 2, channels, **floats),
        torch.zeros(sequences, 2, channels, **floats),
    )


def _finish(one: ScanInputs, out: Outputs, needs: frozenset[str]) -> ScanGrads:
    """Sum the partials; torch sums in an order that only the shape decides."""
    states = one.A.shape[1]
    return ScanGrads(
        u=out.du,
        delta=out.ddelta,
        A=states_last(out.dA.sum((0, 1)), states) if "A" in needs else None,
        B=out.dbc[..., 0, :states].sum(1).to(one.B.dtype) if "B" in needs else None,
        C=out.dbc[..., 1, :states].sum(1).to(one.C.dtype) if "C" in needs else None,
        D=out.dD.sum((0, 1)) if one.D is not None and "D" in needs else None,
        delta_bias=out.dbias.sum((0, 1)) if one.delta_bias is not None and "delta_bias" in needs else None,
    )
