"""Selective scan, backward: the adjoint of the recurrence in `scan`, from its checkpoints, in the same mapping and without atomics.

With h' the gradient that reaches a state from the step after it, one step is
    dy = dout SiLU(z)          g = h' + C dy              q = g . B
    du = delta q + D dy        w = exp(delta A) g h_before        ddelta = u q + w . A
    dB = sum_e g delta u       dC = sum_e dy h            dA += delta w       h' = exp(delta A) g
A program owns its channels through the whole sequence: it sums dA, dD, d(delta_bias) in registers over a checkpoint interval and adds that to
memory that no other program touches. Only dB and dC need other channels: each program writes its own partial, summed later in a fixed order.
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
    load_token,
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
    z_start = z
    if GATE != "none":
        z_start += batch * z_strides[0]
    streams = (u + batch * u_strides[0], delta + batch * delta_strides[0], z_start, u_strides[1], delta_strides[1], z_strides[1], rows, gates)
    out_base = batch * length * channels

    A = tl.load(states_place(A_ptr, 0, channels, lanes, STATES))
    D = tl.load(D_ptr + lanes) if D_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    delta_bias = tl.load(bias_ptr + lanes) if bias_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    g = tl.zeros([STATES, BLOCK_E], tl.float32)
    if grad_final is not None:
        g = tl.load(states_place(grad_final, sequence, channels, lanes, STATES), mask=mask[None, :], other=0.0)
    dA += sequence * STATES * channels + tl.arange(0, STATES)[:, None] * channels + channel[None, :]
    dD += sequence * channels + channel
    dbias += sequence * channels + channel
    checkpoint = first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL)
    scratch += tl.program_id(0).to(tl.int64) * (INTERVAL // GROUP * STATES * BLOCK_E)

    chunks = tl.cdiv(count, INTERVAL)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        begin = chunk * INTERVAL
        n_groups = tl.cdiv(tl.minimum(count - begin, INTERVAL), GROUP)
        h = tl.load(states_place(checkpoints, checkpoint + chunk, channels, lanes, STATES))
        tl.store(load_states(scratch, STATES, BLOCK_E), h)
        for k in range(1, n_groups):
            for r in tl.static_range(GROUP):
                t = first + (begin + (k - 1) * GROUP + r) * step
                b = tl.load(bc + t * groups * bc_row + states)
                u_t, delta_t, _, _ = load_token(streams, t, lanes, "none", False)
                h, _, _ = advance(h, A, u_t, delta_t, b, delta_bias, SOFTPLUS)
            tl.store(load_states(scratch + k * (STATES * BLOCK_E), STATES, BLOCK_E), h)
        tl.debug_barrier()  # a lane may read below what another one wrote

        dA_chunk = tl.zeros([STATES, BLOCK_E], tl.float32)
        dD_chunk = tl.zeros([BLOCK_E], tl.float32)
        dbias_chunk = tl.zeros([BLOCK_E], tl.float32)
        for k_back in range(0, n_groups):
            k = n_groups - 1 - k_back
            h = tl.load(load_states(scratch + k * (STATES * BLOCK_E), STATES, BLOCK_E))
            history = (h,)
            tokens = ()
            for r in tl.static_range(GROUP):
                # Steps past the end, in the last group: delta of zero leaves the state as it is.
                i = begin + k * GROUP + r
                live = (i < count).to(tl.float32)
                t = first + tl.minimum(i, count - 1) * step
                u_t, raw, z_t, row = load_token(streams, t, lanes, GATE, REDUCE)
                b = tl.load(bc + t * groups * bc_row + states)
                c = tl.load(bc + t * groups * bc_row + STATES + states)
                dout = load_gradient(grad, grad_strides, weights, row, lanes, mask, REDUCE) * live
                v = raw.to(tl.float32) + delta_bias
                u_t = u_t.to(tl.float32)
                delta_t = (softplus(v) if SOFTPLUS else v) * live
                a = tl.exp2(delta_t[None, :] * A)
                h = a * h + (delta_t * u_t)[None, :] * b[:, None]
                history = history + (h,)
                tokens = tokens + ((i, t, row, u_t, v, delta_t, z_t, b, c, dout, a),)
            for r_back in tl.static_range(GROUP):
                i, t, row, u_t, v, delta_t, z_t, b, c, dout, a = tokens[GROUP - 1 - r_back]
                h = history[GROUP - r_back]
                dy = dout
                if GATE != "none":
                    z_t = z_t.to(tl.float32)
                    gate = sigmoid(z_t)
                    dy = dout * (z_t * gate)
                    if dz is not None:
                        y = tl.sum(h * c[:, None], 0) + D * u_t
                        dz_t = dout * y * gate * (1.0 + z_t * (1.0 - gate))
                        place = t
                        if GATE == "kept":
                            place = tl.load(gates + t)
                        if (i < count) & (place >= 0):
                            tl.store(dz + (batch * z_length + place) * channels + channel, cast(dz_t, dz.dtype.element_ty), mask=mask)
                g += c[:, None] * dy[None, :]
                q = tl.sum(g * b[:, None], 0)
                # nested: the first is known when compiling, and without dbc there is nothing to compile
                if dbc is not None:  # noqa: SIM102
                    if i < count:
                        tl.store(dbc + t * groups * bc_row + states, tl.sum(g * (delta_t * u_t)[None, :], 1))
                        tl.store(dbc + t * groups * bc_row + STATES + states, tl.sum(h * dy[None, :], 1))
                g *= a
                w = g * history[GROUP - 1 - r_back]
                dA_chunk += w * delta_t[None, :]
                dD_chunk += dy * u_t
                dv = u_t * q + tl.sum(w * A, 0) * 0.6931471805599453
                if SOFTPLUS:
                    dv *= sigmoid(v)
                dv = dv * (i < count).to(tl.float32)
                dbias_chunk += dv
                if i < count:
                    at = out_base + t * channels + channel
                    if du is not None:
                        tl.store(du + at, cast(delta_t * q + D * dy, du.dtype.element_ty), mask=mask)
                    if ddelta is not None:
                        tl.store(ddelta + at, cast(dv, ddelta.dtype.element_ty), mask=mask)
        tl.store(dA, tl.load(dA, mask=mask[None, :]) + dA_chunk, mask=mask[None, :])
        tl.store(dD, tl.load(dD, mask=mask) + dD_chunk, mask=mask)
        tl.store(dbias, tl.load(dbias, mask=mask) + dbias_chunk, mask=mask)
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
):
    """Program order as in `scan.scan_kernel`."""
    pid = tl.program_id(0)
    share = tl.num_programs(0) // len(directions)
    if len(directions) == 1 or pid < share:
        backward_direction(directions[0], outputs[0], shared, pid, length, z_length, channels, groups,
                           STATES, REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP)  # fmt: skip
    else:
        backward_direction(directions[-1], outputs[-1], shared, pid - share, length, z_length, channels, groups,
                           STATES, not REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP)  # fmt: skip


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
    dz = combine([out.dz for out in outputs], None, z.dtype) if outputs[0].dz is not None else None
    return grads, dz, None if grad_initial is None else states_last(grad_initial, states)


class Outputs(NamedTuple):
    """What the kernel writes for one direction."""

    du: Tensor | None  # (batch, L, E)
    ddelta: Tensor | None  # (batch, L, E)
    dz: Tensor | None  # as z; this direction's share, float32 if there is another
    dbc: Tensor | None  # (batch, channel blocks of a group, L, G, 2, Sp) float32
    dA: Tensor  # (n, Sp, E) float32, from zero, as the next two
    dD: Tensor  # (n, E) float32
    dbias: Tensor  # (n, E) float32


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
        torch.zeros(sequences, padded, channels, **floats),
        torch.zeros(sequences, channels, **floats),
        torch.zeros(sequences, channels, **floats),
    )


def _finish(one: ScanInputs, out: Outputs, needs: frozenset[str]) -> ScanGrads:
    """Sum the partials; torch sums in an order that only the shape decides."""
    states = one.A.shape[1]
    return ScanGrads(
        u=out.du,
        delta=out.ddelta,
        A=states_last(out.dA.sum(0), states) if "A" in needs else None,
        B=out.dbc[..., 0, :states].sum(1).to(one.B.dtype) if "B" in needs else None,
        C=out.dbc[..., 1, :states].sum(1).to(one.C.dtype) if "C" in needs else None,
        D=out.dD.sum(0) if one.D is not None and "D" in needs else None,
        delta_bias=out.dbias.sum(0) if one.delta_bias is not None and "delta_bias" in needs else None,
    )
