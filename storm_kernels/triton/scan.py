"""Selective scan, forward: sequential in time, one warp for a block of channels of one direction of one sequence (SPEC.md, Mixer).

Symbols: E channels, S states, Sp = S rounded up to a power of two, G groups; a *step* counts tokens in scan order: in reverse, the last is 0.
Tensors of states are kept states first, (..., Sp, E), so that lanes meet channels; B and C are packed in float32 to (batch, L, G, 2, Sp):
2 Sp floats a token beside 4 E activations, and their loads are then aligned, unmasked and free of conversions whatever S, dtypes and strides are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ScanInputs, ScanResult
from ..tokens import TokenGrid, TokenReduction
from .configs import SCAN_FORWARD
from .launch import launch
from .math import cast, sigmoid, softplus
from .reduce import combine, inverse_counts, token_places

LOG2E = 1.4426950408889634
# Tokens between two checkpoints (KERNELS.md, Backward scan).
INTERVAL = 256


@triton.jit
def load_drive(streams, t, lanes):
    """u and delta of token t."""
    u, delta, z, u_stride, delta_stride, z_stride, rows, gates = streams
    return tl.load(u + t * u_stride + lanes), tl.load(delta + t * delta_stride + lanes)


@triton.jit
def load_place(streams, t, lanes, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """z of token t, 0 without a gate, and the row of its output, -1 if the sampling drops it."""
    u, delta, z, u_stride, delta_stride, z_stride, rows, gates = streams
    z_t = 0
    if GATE == "all":
        z_t = tl.load(z + t * z_stride + lanes)
    elif GATE == "kept":
        z_t = tl.load(z + tl.maximum(tl.load(gates + t), 0) * z_stride + lanes)
    row = t
    if REDUCE:
        row = tl.load(rows + t)
    return z_t, row


@triton.jit
def load_token(streams, t, lanes, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """What token t reads of the large tensors."""
    u_t, delta_t = load_drive(streams, t, lanes)
    z_t, row = load_place(streams, t, lanes, GATE, REDUCE)
    return u_t, delta_t, z_t, row


@triton.jit
def load_group(streams, t, step, last, lanes, GROUP: tl.constexpr, CLAMP: tl.constexpr, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """`load_token` of GROUP steps from t on, none further than ``last`` if CLAMP."""
    group = ()
    for r in tl.static_range(GROUP):
        ahead = tl.minimum(r, last) if CLAMP else r
        group = group + (load_token(streams, t + ahead * step, lanes, GATE, REDUCE),)
    return group


@triton.jit
def advance(h, A, u, delta, b, delta_bias, SOFTPLUS: tl.constexpr):
    """One step of the recurrence; A holds log2(e) A. -> state (Sp, BLOCK_E), u in float32, delta after bias and softplus."""
    u = u.to(tl.float32)
    delta = delta.to(tl.float32) + delta_bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.exp2(delta[None, :] * A) * h + (delta * u)[None, :] * b[:, None], u, delta


@triton.jit
def output(h, c, D, u, z, GATE: tl.constexpr):
    """y of one token, gated: ``(h . C + D u) SiLU(z)``, (BLOCK_E,)."""
    y = tl.sum(h * c[:, None], 0) + D * u
    if GATE != "none":
        z = z.to(tl.float32)
        y *= z * sigmoid(z)
    return y


@triton.jit
def emit(out, h, c, D, u, z, row, channels, lanes, mask, GATE: tl.constexpr, REDUCE: tl.constexpr):
    """Write one token's `output` to its row; with a reduction, add it to the row's sum, which no other program touches, or skip a dropped token."""
    place = out + row * channels + lanes
    if REDUCE:
        if row >= 0:
            tl.store(place, tl.load(place, mask=mask, other=0.0) + output(h, c, D, u, z, GATE), mask=mask)
    else:
        tl.store(place, cast(output(h, c, D, u, z, GATE), out.dtype.element_ty), mask=mask)


@triton.jit
def locate(program, cu_seqlens, length, group_channels, groups, BLOCK_E: tl.constexpr):
    """-> sequence, batch, its first token, how many it has; block of channels within its group, group, the channels, and which of them are real."""
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
def first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL: tl.constexpr):
    """The row of `checkpoint_shape` that a sequence's checkpoints start at."""
    return sequence * tl.cdiv(length, INTERVAL) if cu_seqlens is None else start // INTERVAL + sequence


@triton.jit
def states_place(pointer, index, channels, lanes, STATES: tl.constexpr):
    """Where the states (STATES, BLOCK_E) of ``index`` lie in a (..., STATES, E) tensor."""
    return pointer + (index * STATES + tl.arange(0, STATES))[:, None] * channels + lanes[None, :]


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
    GROUP: tl.constexpr,
):
    u, delta, bc, A_ptr, D_ptr, bias_ptr, u_strides, delta_strides, out, checkpoints = direction
    z, z_strides, rows, gates, initial, final, cu_seqlens = shared
    sequence, batch, start, count, _, group, lanes, mask = locate(program, cu_seqlens, length, channels // groups, groups, BLOCK_E)
    # Clamped channels need no mask; that they are not known to be contiguous also keeps the compiler from giving a lane four neighbouring
    # channels and a quarter of the states, which would cost shuffles at every token.
    lanes = tl.minimum(lanes, (group + 1) * (channels // groups) - 1)
    step: tl.constexpr = -1 if REVERSE else 1
    t = tl.minimum(start + (count - 1 if REVERSE else 0), length - 1)
    t = tl.maximum(t, 0)
    states = tl.arange(0, STATES)
    bc += (batch * length * groups + group) * (2 * STATES)
    bc_stride = groups * (2 * STATES)
    out += batch * out_length * channels
    z_start = u  # not read
    if GATE != "none":
        z_start = z + batch * z_strides[0]
    streams = (u + batch * u_strides[0], delta + batch * delta_strides[0], z_start, u_strides[1], delta_strides[1], z_strides[1], rows, gates)

    A = tl.load(states_place(A_ptr, 0, channels, lanes, STATES))
    D = tl.load(D_ptr + lanes) if D_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    delta_bias = tl.load(bias_ptr + lanes) if bias_ptr is not None else tl.zeros([BLOCK_E], tl.float32)
    h = tl.zeros([STATES, BLOCK_E], tl.float32)
    if initial is not None:
        h = tl.load(states_place(initial, sequence, channels, lanes, STATES))
    checkpoint = first_checkpoint(cu_seqlens, sequence, start, length, INTERVAL)

    b = tl.load(bc + t * bc_stride + states)
    c = tl.load(bc + t * bc_stride + STATES + states)
    group_now = load_group(streams, t, step, tl.maximum(count - 1, 0), lanes, GROUP, True, GATE, REDUCE)
    # Whole groups with a whole group after them: that one is loaded while this one is computed, B and C one step ahead.
    ahead = tl.maximum((count - GROUP) // GROUP, 0) * GROUP
    span = count if checkpoints is None else INTERVAL
    for begin in range(0, count, span):
        end = tl.minimum(begin + span, count)
        if checkpoints is not None:
            tl.store(states_place(checkpoints, checkpoint + begin // INTERVAL, channels, lanes, STATES), h, mask=mask[None, :])
        for _whole in range(begin, tl.minimum(ahead, end), GROUP):
            group_next = load_group(streams, t + GROUP * step, step, 0, lanes, GROUP, False, GATE, REDUCE)
            for r in tl.static_range(GROUP):
                u_t, delta_t, z_t, row = group_now[r]
                b_now, c_now = b, c
                t += step
                b = tl.load(bc + t * bc_stride + states)
                c = tl.load(bc + t * bc_stride + STATES + states)
                h, u_t, delta_t = advance(h, A, u_t, delta_t, b_now, delta_bias, SOFTPLUS)
                emit(out, h, c_now, D, u_t, z_t, row, channels, lanes, mask, GATE, REDUCE)
            group_now = group_next
        for _single in range(tl.maximum(ahead, begin), end):
            u_t, delta_t, z_t, row = load_token(streams, t, lanes, GATE, REDUCE)
            b = tl.load(bc + t * bc_stride + states)
            c = tl.load(bc + t * bc_stride + STATES + states)
            h, u_t, delta_t = advance(h, A, u_t, delta_t, b, delta_bias, SOFTPLUS)
            emit(out, h, c, D, u_t, z_t, row, channels, lanes, mask, GATE, REDUCE)
            t += step
    if final is not None:
        tl.store(states_place(final, sequence, channels, lanes, STATES), h, mask=mask[None, :])


@triton.jit(do_not_specialize=["length", "out_length"])
def scan_kernel(
    directions,  # one or two of `direction_operands`, each with its output and its checkpoints
    shared,  # z; its strides; rows and gates of `token_places`; initial and final states (n, Sp, E); cu_seqlens
    length,
    out_length,
    channels,
    groups,
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,  # of the first direction; a second one has the other order
    SOFTPLUS: tl.constexpr,
    GATE: tl.constexpr,  # "none", "all", or "kept": z holds the kept tokens only
    REDUCE: tl.constexpr,
    INTERVAL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program order: channel block, group, sequence, direction (the first fastest)."""
    pid = tl.program_id(0)
    share = tl.num_programs(0) // len(directions)
    if len(directions) == 1 or pid < share:
        scan_direction(directions[0], shared, pid, length, out_length, channels, groups,
                       STATES, REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP)  # fmt: skip
    else:
        scan_direction(directions[-1], shared, pid - share, length, out_length, channels, groups,
                       STATES, not REVERSE, SOFTPLUS, GATE, REDUCE, INTERVAL, BLOCK_E, GROUP)  # fmt: skip


def checkpoint_shape(batch: int, length: int, channels: int, states: int, sequences: int) -> tuple[int, ...]:
    """The state before every `INTERVAL`-th step of each sequence; packed sequence i starts at row ``cu_seqlens[i] // INTERVAL + i``."""
    rows = length // INTERVAL + sequences if sequences else batch * -(-length // INTERVAL)
    return (rows, triton.next_power_of_2(states), channels)


def states_first(states: Tensor, scale: float = 1.0) -> Tensor:
    """(..., E, S) -> contiguous (..., Sp, E), zero beyond S."""
    *lead, channels, count = states.shape
    out = states.new_zeros(*lead, triton.next_power_of_2(count), channels, dtype=torch.float32)
    out[..., :count, :] = states.transpose(-1, -2) * scale
    return out


def states_last(states: Tensor, count: int) -> Tensor:
    """(..., Sp, E) -> contiguous (..., E, S)."""
    return states[..., :count, :].transpose(-1, -2).contiguous()


def pack_bc(B: Tensor, C: Tensor) -> Tensor:
    """(batch, L, G, S) twice -> (batch, L, G, 2, Sp) float32, zero beyond S."""
    out = B.new_zeros(*B.shape[:3], 2, triton.next_power_of_2(B.shape[3]), dtype=torch.float32)
    out[..., 0, : B.shape[3]] = B
    out[..., 1, : C.shape[3]] = C
    return out


def direction_operands(one: ScanInputs) -> tuple:
    """What both kernels read of one direction."""
    return (
        one.u,
        one.delta,
        pack_bc(one.B, one.C),
        states_first(one.A, LOG2E),
        one.D,
        one.delta_bias,
        one.u.stride()[:2],
        one.delta.stride()[:2],
    )


def gate_mode(z: Tensor | None, length: int) -> str:
    return "none" if z is None else "all" if z.shape[1] == length else "kept"


def program_count(sequences: int, channels: int, groups: int, block: int) -> int:
    """Programs of one direction: a block of channels never straddles two groups."""
    return sequences * groups * triton.cdiv(channels // groups, block)


def scan(
    directions: tuple[ScanInputs, ...],
    z: Tensor | None,
    *,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
    save_checkpoints: bool,
) -> ScanResult:
    """`contract.Backend.scan`."""
    first = directions[0]
    batch, length, channels = first.u.shape
    states, groups = first.A.shape[1], first.B.shape[2]
    device = first.u.device
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out_length = reduction.reduced(grid).tokens if reduction else length
    rows, gates = token_places(grid, reduction, device) if reduction else (None, None)
    # Both directions, whole: z is read once, where their sum is formed. Reduced, each direction gates what it adds up.
    gate = None if len(directions) == 2 and not reduction else z
    in_parts = len(directions) == 2 or reduction is not None
    new = torch.zeros if reduction else torch.empty
    outs = [new(batch, out_length, channels, dtype=torch.float32 if in_parts else first.u.dtype, device=device) for _ in directions]
    shape = checkpoint_shape(batch, length, channels, states, 0 if cu_seqlens is None else sequences)
    checkpoints = tuple(torch.empty(shape, dtype=torch.float32, device=device) for _ in directions) if save_checkpoints else ()
    final = None
    if len(directions) == 1:
        final = torch.empty(sequences, triton.next_power_of_2(states), channels, dtype=torch.float32, device=device)
    launch(
        scan_kernel,
        len(directions) * program_count(sequences, channels, groups, SCAN_FORWARD.constants["BLOCK_E"]),
        SCAN_FORWARD,
        device,
        tuple((*direction_operands(one), outs[i], checkpoints[i] if save_checkpoints else None) for i, one in enumerate(directions)),
        (
            gate,
            (0, 0) if gate is None else gate.stride()[:2],
            rows,
            gates,
            None if initial_state is None else states_first(initial_state),
            final,
            cu_seqlens,
        ),
        length,
        out_length,
        channels,
        groups,
        STATES=triton.next_power_of_2(states),
        REVERSE=first.reverse,
        SOFTPLUS=delta_softplus,
        GATE=gate_mode(gate, length),
        REDUCE=reduction is not None,
        INTERVAL=INTERVAL,
    )
    if reduction:
        out = combine(outs, first.u.dtype, scale=inverse_counts(grid, reduction, device))
    else:
        out = combine(outs, first.u.dtype, z=z) if len(directions) == 2 else outs[0]
    return ScanResult(out, None if final is None else states_last(final, states), checkpoints)
