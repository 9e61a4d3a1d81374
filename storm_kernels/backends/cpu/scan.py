"""Launches the C++ selective scan: `storm_scan` and `storm_scan_backward` of src/api.h. Arguments
are those of `contract.Backend`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..contract import Checkpoints, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs, ScanResult
from ..pages import empty
from .loader import library
from .structs import (
    CDirection,
    CDirectionGrads,
    CScan,
    CScanGrads,
    check,
    empty_like,
    floats,
    int64_offsets,
    reduction_struct,
    rows,
    sequence_count,
    shape_struct,
    unit_innermost,
)


def checkpoint_shapes(
    batch: int, length: int, channels: int, states: int, *, directions: int, sequences: int, **gate
) -> tuple[tuple[int, ...], ...]:
    """(intervals of all sequences, S, E) a direction: the state before each interval's first token."""
    interval = library().checkpoint_interval
    intervals = length // interval + sequences if sequences else batch * -(-length // interval)
    return ((intervals, states, channels),) * directions


def scan(call: ScanCall, save_checkpoints: bool) -> ScanResult:
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    u, states = directions[0].u, directions[0].A.shape[1]
    batch, length, channels = u.shape
    length_out = length if reduction is None else reduction.reduced(grid).tokens
    out = empty((batch, length_out, channels), u.dtype, u.device)
    states_of = {"dtype": torch.float32, "device": u.device}
    final_state = (
        empty((sequence_count(u, cu_seqlens), channels, states), **states_of) if len(directions) == 1 else None
    )
    checkpoints = ()
    if save_checkpoints:
        packed = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        # Packed sequences have room for more intervals than they need: what is left stays defined.
        new = empty if cu_seqlens is None else torch.zeros
        shapes = checkpoint_shapes(batch, length, channels, states, directions=len(directions), sequences=packed)
        checkpoints = tuple(new(shape, **states_of) for shape in shapes)
    if out.numel() or (final_state is not None and final_state.numel()):
        offsets = int64_offsets(cu_seqlens)
        args = _scan_struct(directions, z, out, checkpoints, delta_softplus, initial_state, offsets, grid, reduction)
        args.final_state = floats(final_state)
        check(library().function("scan", ctypes.POINTER(CScan))(args), "selective_scan", u, args)
    return ScanResult(out, final_state, checkpoints)


def _scan_struct(directions, z, out, checkpoints, delta_softplus, initial_state, offsets, grid, reduction) -> CScan:
    first = directions[0]
    args = CScan(
        shape=shape_struct(first.u, offsets),
        reduction=reduction_struct(grid, reduction),
        z=rows(z),
        out=rows(out),
        initial_state=floats(initial_state),
        states=first.A.shape[1],
        groups=first.B.shape[2],
        directions=len(directions),
        softplus=delta_softplus,
        z_is_kept=z is not None and z.shape[1] != first.u.shape[1],
    )
    for i, d in enumerate(directions):
        args.direction[i] = CDirection(
            *map(rows, (d.u, d.delta, d.B, d.C)),
            *map(floats, (d.A, d.D, d.delta_bias, checkpoints[i] if checkpoints else None)),
            d.reverse,
        )
    return args


def scan_backward(
    grad_out: Tensor, grad_final_state: Tensor | None, call: ScanCall, checkpoints: Checkpoints, needs: frozenset[str]
) -> ScanBackwardResult:
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    grads = tuple(_empty_grads(d, needs) for d in directions)
    grad_z = empty_like(z) if "z" in needs else None
    grad_initial = empty_like(initial_state) if "initial_state" in needs else None
    grad_out = unit_innermost(grad_out)
    if grad_final_state is not None:
        grad_final_state = grad_final_state.contiguous()
    offsets = int64_offsets(cu_seqlens)
    args = _scan_struct(directions, z, grad_out, checkpoints, delta_softplus, initial_state, offsets, grid, reduction)
    c_grads = CScanGrads(z=rows(grad_z), final_state=floats(grad_final_state), initial_state=floats(grad_initial))
    for i, g in enumerate(grads):
        c_grads.direction[i] = CDirectionGrads(
            *map(rows, (g.u, g.delta, g.B, g.C)), *map(floats, (g.A, g.D, g.delta_bias))
        )
    backward = library().function("scan_backward", ctypes.POINTER(CScan), ctypes.POINTER(CScanGrads))
    check(backward(args, c_grads), "selective_scan backward", directions[0].u, args)
    return grads, grad_z, grad_initial


def _empty_grads(d: ScanInputs, needs: frozenset[str]) -> ScanGrads:
    return ScanGrads(*(empty_like(getattr(d, name)) if name in needs else None for name in ScanGrads._fields))
