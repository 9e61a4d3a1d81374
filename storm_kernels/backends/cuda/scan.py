"""Selective scan, forward: launch code of src/scan.cu, and what its backward shares.

A chain is a sequence, a direction and a run of channels, sequential in time: at batch 1 and 7168
channels both directions are 224 chains. Each has a block of 4 warps to itself, from its first token
to its last, where that is about as good as balance; else blocks take steps of chains by tickets
(tickets.py has the arithmetic of when).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from ..contract import ScanCall, ScanInputs, ScanResult
from . import tickets
from .gate import merge_directions
from .launcher import THREADS, Launch, current
from .tokens import FORMATS, sum_terms, token_map

LARGEST_STATE = 512
PAIR = 2  # channels a thread: what it reads of them is one float2 or float4
_SAVED_BYTES = 32 * 1024  # of states the backward keeps in shared memory, twice as much with more than 128 states


class Geometry(NamedTuple):
    """How a block's 128 threads share channels and states; src/scan.cuh says what each name means."""

    D_STATE: int
    STATE_LANES: int
    LANE_STATES: int
    SCAN_TILE: int
    INTERVAL: int
    SEGMENT: int

    @property
    def block_channels(self) -> int:
        return PAIR * THREADS // self.STATE_LANES

    @property
    def states(self) -> int:
        return self.STATE_LANES * self.LANE_STATES


def _power(n: int) -> int:
    """The smallest power of two not below n."""
    return 1 << (n - 1).bit_length()


@cache
def geometry(d_state: int) -> Geometry:
    lanes = min(32, _power(-(-d_state // 4)))
    run = _power(-(-d_state // lanes))
    # The backward holds SEGMENT tokens' states and decays in registers: more than this, and one of
    # the architectures spills.
    segment = min(8, 32 // run) if lanes == 4 else max(1, min(4, 16 // run))
    interval = min(64, 16 * lanes, _SAVED_BYTES * min(2, max(1, run // 4)) // (THREADS * PAIR * run * 4) * segment)
    # 16 tokens of 64 channels and 16 states: with the 64 KB of sums of a 16 x 16 grid two blocks
    # still fit on an H100's multiprocessor.
    tile = max(1, min(16, interval, 4 * lanes, 2048 // (lanes * run)))
    return Geometry(d_state, lanes, run, tile, interval, min(segment, tile))


class Setting(NamedTuple):
    """What a launch needs beside the tensors of a direction."""

    sequences: int
    out_rows: int
    pool_tokens: int  # of a whole pool; 0 without a reduction
    values: dict  # of `Problem`


def _checkpoint_rows(length: int, states: int, sequences: int) -> int:
    """Checkpoints of a batch row; ``sequences`` is 0 unless packed."""
    interval = geometry(states).INTERVAL
    return length // interval + sequences if sequences else -(-length // interval)


def checkpoint_shapes(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    directions: int,
    sequences: int,
    gated: bool,
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
) -> tuple[tuple[int, ...], ...]:
    """`Backend.checkpoint_shapes`: the state before every INTERVAL-th token in scan order, a
    direction; with a gate, y before it of the kept tokens.

    Of two directions under a reduction each has a y; else theirs are added up.
    """
    shapes = ((batch, _checkpoint_rows(length, states, sequences), channels, states),) * directions
    if not gated:
        return shapes
    return (
        *shapes,
        (1, batch, length, channels)
        if reduction is None
        else (directions, batch, reduction.kept(grid).tokens, channels),
    )


def defines(direction: ScanInputs, z: Tensor | None) -> dict[str, object]:
    """Macros of a launch; a missing z takes u's format."""
    u, delta, A, B, C = direction[:5]
    formats = {"U_T": u, "DELTA_T": delta, "B_T": B, "C_T": C, "Z_T": u if z is None else z}
    return {"PAIR": PAIR, **geometry(A.shape[1])._asdict(), **{name: FORMATS[t.dtype] for name, t in formats.items()}}


def channel_blocks(direction: ScanInputs) -> tuple[int, int]:
    """Blocks of channels a group, and in all."""
    (channels, states), groups = direction.A.shape, direction.B.shape[2]
    group_blocks = -(-(channels // groups) // geometry(states).block_channels)
    return group_blocks, group_blocks * groups


def setting(call: ScanCall) -> Setting:
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    first = directions[0]
    batch, length, channels = first.u.shape
    places = None if reduction is None else token_map(grid, reduction, first.u.device)
    out_rows = length if reduction is None else reduction.reduced(grid).tokens
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    rows = _checkpoint_rows(length, first.A.shape[1], 0 if cu_seqlens is None else sequences)
    values = {
        "length": length,
        "channels": channels,
        "group_channels": channels // first.B.shape[2],
        "group_blocks": channel_blocks(first)[0],
        "sequences": sequences,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        "checkpoint_rows": rows,
        "softplus": delta_softplus,
        "initial_state": initial_state,
        "z": z,
        "z_batch": 0 if z is None else z.stride(0),
        "z_row": 0 if z is None else z.stride(1),
        "z_kept": places is not None and z is not None and z.shape[1] != length,
        "map": places,
        "out_rows": out_rows,
    }
    pool_tokens = 0 if reduction is None else grid.height * grid.width * reduction.temporal_pool
    return Setting(sequences, out_rows, pool_tokens, values)


def direction_values(direction: ScanInputs, checkpoints: Tensor | None) -> dict:
    """`Direction` of src/scan.cuh."""
    values = {name: getattr(direction, name) for name in ("A", "D", "delta_bias", "reverse")}
    values["checkpoints"] = checkpoints
    for name in ("u", "delta", "B", "C"):
        t = getattr(direction, name)
        values |= {name: t, f"{name}_batch": t.stride(0), f"{name}_row": t.stride(1)}
    return values | {"B_group": direction.B.stride(2), "C_group": direction.C.stride(2)}


def _asynchronous(directions: tuple[ScanInputs, ...], z: Tensor | None) -> bool:
    """Whether every row that a block reads begins on 16 bytes, as asynchronous copies want."""
    for u, delta, _, B, C, *_ in directions:
        groups, states = B.shape[2:]
        rows = [(t, t.shape[2] // groups, t.stride()[:2]) for t in (u, delta, z) if t is not None]
        rows += [(t, states, t.stride()[:3]) for t in (B, C)]
        # With states to spare the tile's rows are longer than memory's.
        if states != geometry(states).states:
            return False
        for t, width, strides in rows:
            if t.data_ptr() % 16 or any(n * t.element_size() % 16 for n in (width, *strides)):
                return False
    return True


def shared_bytes(shape: Geometry, directions: tuple[ScanInputs, ...], z: Tensor | None) -> int:
    """Bytes of `Shared` in src/scan.cu, which checks them."""
    u, delta, _, B, C, *_ = directions[0]

    def rows(width: int, *formats: Tensor | None) -> int:
        return sum(-(-shape.SCAN_TILE * width * (u if t is None else t).element_size() // 16) * 16 for t in formats)

    stage = rows(shape.block_channels, u, delta, z) + rows(shape.states, B, C)
    prepared = shape.SCAN_TILE * (shape.block_channels * 8 + 2 * shape.states * 4)
    pairs = shape.block_channels // PAIR
    padding = 0 if 32 // shape.STATE_LANES >= 8 else 2 if 32 // shape.STATE_LANES == 4 else 1
    y = shape.SCAN_TILE // 2 * shape.STATE_LANES * (pairs + padding) * 16
    return 2 * stage + prepared + y


def _cells_apart(grid: TokenGrid, reduction: TokenReduction, tile: int) -> bool:
    """Whether no two threads of src/cells.cuh, each with two neighbouring tokens of a tile, ever meet in one cell."""
    pairs_apart = reduction.spatial_pool == 2 and grid.width % 2 == 0 and grid.width >= tile
    return pairs_apart or (reduction.spatial_pool == 1 and grid.height * grid.width >= tile)


def launch_together(directions: tuple[ScanInputs, ...]) -> tuple[tuple[int, ...], ...]:
    """Which directions each launch serves: one launch all, unless their formats or groups differ."""
    if len(directions) == 1:
        return ((0,),)
    alike = {
        (channel_blocks(direction), *(getattr(direction, name).dtype for name in ("u", "delta", "B", "C")))
        for direction in directions
    }
    return ((0, 1),) if len(alike) == 1 else ((0,), (1,))


def scan(call: ScanCall, save_checkpoints: bool) -> ScanResult:
    """`Backend.scan`. Two directions without a reduction leave their gate to the kernel that adds them up."""
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    u, states, count = directions[0].u, directions[0].A.shape[1], len(directions)
    merged = count == 2 and reduction is None
    z, z_of_sum = (None, z) if merged else (z, None)
    common = setting(call._replace(z=z))
    empty = {"dtype": torch.float32, "device": u.device}
    packed, kept = (
        0 if cu_seqlens is None else common.sequences,
        {"gated": z is not None, "grid": grid, "reduction": reduction},
    )
    shapes = checkpoint_shapes(*u.shape, states, directions=count, sequences=packed, **kept) if save_checkpoints else ()
    checkpoints = tuple(torch.empty(shape, **empty) for shape in shapes)
    y = checkpoints[-1] if len(shapes) > count else None
    final_state = torch.empty(common.sequences, u.shape[2], states, **empty) if count == 1 else None
    shape = (u.shape[0], common.out_rows, u.shape[2])
    if count == 1 and reduction is None:
        out, partials = torch.empty(shape, dtype=u.dtype, device=u.device), (None,)
    else:
        out, partials = (
            None,
            tuple(torch.empty(shape, **empty) for _ in directions) if merged else torch.empty(count, *shape, **empty),
        )
    for together in launch_together(directions):
        values = {
            "direction": [direction_values(directions[i], checkpoints[i] if checkpoints else None) for i in together],
            "out": out,
            "partial": [partials[i] for i in together],
            "y": [None if y is None else y[i] for i in together],
            "kept_rows": 0 if y is None else y.shape[2],
            "states": final_state,
        }
        flags = {"GATED": z is not None, "PARTIAL": out is None, "SAVE_Y": y is not None, "SOFTPLUS": delta_softplus}
        _launch(tuple(directions[i] for i in together), z, common, values, flags, grid, reduction)
    if merged:
        save_y = save_checkpoints and z_of_sum is not None
        out = merge_directions(*partials, z_of_sum, u.dtype, save_y=save_y)
        checkpoints = (*checkpoints, partials[0][None]) if save_y else checkpoints
    elif out is None:
        out = sum_terms(partials.view(1, count, -1), u.dtype).view(shape)
    return ScanResult(out, final_state, checkpoints)


def _launch(
    directions: tuple[ScanInputs, ...],
    z: Tensor | None,
    common: Setting,
    values: dict,
    flags: dict[str, bool],
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
) -> None:
    """One launch over ``directions``: what follows from their shapes is added to ``values`` and ``flags``."""
    first = directions[0]
    shape = geometry(first.A.shape[1])
    shared = shared_bytes(shape, directions, z)
    cells = 0 if reduction is None else common.out_rows // reduction.reduced(grid).frames
    flags |= {"ASYNC": _asynchronous(directions, z), "REDUCED": cells > 0}
    cell_bytes = cells * shape.block_channels * 4
    if cells and shared + cell_bytes > current().shared_limit():
        for partial in values["partial"]:
            partial.zero_()
        cells = cell_bytes = 0
    group_blocks, blocks = channel_blocks(first)
    _, length, channels = first.u.shape
    values |= {
        "p": common.values | {"group_channels": channels // first.B.shape[2], "group_blocks": group_blocks},
        "blocks": blocks,
    }
    values |= {
        "cells": cells,
        "pool_tokens": common.pool_tokens if cells and _cells_apart(grid, reduction, shape.SCAN_TILE) else 0,
    }
    macros = defines(first, z) | {name: int(flag) for name, flag in flags.items()} | {"SHARED_BYTES": shared}
    average = length if common.values["cu_seqlens"] is None else length // max(1, common.sequences)
    work = tickets.Work(
        blocks * common.sequences * len(directions),
        average,
        length,
        tickets.step_tokens(average, shape.INTERVAL, common.pool_tokens),
    )
    name, kernel, shared = "scan.cu", "scan", shared + cell_bytes
    ticketed = tickets.ticketed_blocks(
        work, current().multiprocessors(), lambda: current().resident(name, kernel, macros, shared)
    )
    values["tickets"] = tickets.arguments(work, first.u.device if ticketed else None)
    if ticketed and values["states"] is None:
        values["states"] = torch.empty(
            len(directions), common.sequences, channels, shape.D_STATE, dtype=torch.float32, device=first.u.device
        )
    current().launch(Launch(name, kernel, macros, "ScanArgs", values, ticketed or work.chains, shared))
