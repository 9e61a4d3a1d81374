"""Selective scan, backward: launch code of src/scan_backward.cu.

The scan's kernel starts from dL/dy. Without a gate or a reduction that is the result's own
gradient; else src/gate.cu makes it first, once for two directions, and dz with it, from the y that
the forward pass saved. docs/kernels.md has the counts.

Bytes per token and channel that the gate and its gradient move, for two directions, bfloat16 and
all tokens kept (a reduction leaves next to nothing to read of grad_out):

    gated, forward           z 2, y 4 = 6
    gated, backward          grad_out 2, z 2, y 4, dz 2, dL/dy 4 + 2 x 4 = 22
    reduced too, forward     z 2 x 2, y 2 x 4 = 12
    reduced too, backward    z 2, y 2 x 4, dz 2, dL/dy 4 + 2 x 4 = 24

Between forward and backward a gate saves 4 bytes per token and channel, or 8 per kept token and
channel where two directions are reduced. During the backward pass dL/dy takes 4 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Checkpoints, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs
from .gate import gate_backward
from .launcher import THREADS, Launch, current
from .scan import PAIR, Geometry, Setting, channel_blocks, defines, direction_values, geometry, launch_together, setting
from .tokens import FORMATS, sum_terms

TWO_BLOCKS = 113 * 1024  # bytes a block may have if two are to fit on an H100's multiprocessor


class Plan(NamedTuple):
    """How the backward divides a block's work beside `Geometry`; src/backward.cuh says what each name means."""

    BC_TILE: int
    BATCH: int


def plans(shape: Geometry) -> tuple[Plan, ...]:
    """From the fastest to the one that takes the least shared memory."""
    batch = min(4, shape.STATE_LANES, shape.SEGMENT)
    whole_interval = (Plan(shape.INTERVAL, batch),) if shape.INTERVAL * shape.states <= 2048 else ()
    return (*whole_interval, *(Plan(shape.SEGMENT, small) for small in (batch, batch // 2) if small))


def shared_bytes(shape: Geometry, plan: Plan | None = None) -> int:
    """Bytes of `Shared` in src/backward.cuh, which checks them, by default with the smallest plan."""
    plan = plan or plans(shape)[-1]
    run = min(4, shape.LANE_STATES)
    row = plan.BATCH * 2 * shape.LANE_STATES * shape.STATE_LANES + (4 if run == 4 else 1)
    arrays = (
        shape.INTERVAL // shape.SEGMENT * PAIR * shape.LANE_STATES * THREADS * 4,
        shape.INTERVAL * shape.block_channels * 8,
        *(2 * (plan.BC_TILE * shape.states * 4,)),
        plan.BATCH * THREADS * 16,
        *(THREADS // 32 * (32 // shape.STATE_LANES * row * 4, shape.SEGMENT * 2 * shape.states * 4)),
        plan.BATCH * shape.block_channels * 4,
        2 * shape.block_channels * 4,
        THREADS * 16,
        4 * THREADS * 8,
        2 * 8,
    )
    return sum(-(-size // 16) * 16 for size in arrays)


def plan_for(shape: Geometry, limit: int) -> Plan:
    """The fastest plan with which two blocks fit on an H100's multiprocessor, if a block may have
    ``limit`` bytes; else the fastest one that fits.
    """
    fits = [plan for plan in plans(shape) if shared_bytes(shape, plan) <= limit]
    return next(
        (plan for plan in fits if shared_bytes(shape, plan) <= TWO_BLOCKS), fits[0] if fits else plans(shape)[-1]
    )


def _paired(directions: tuple[ScanInputs, ...], gy: Tensor) -> bool:
    """Whether the channels of a block, and the states, come in aligned pairs that lie beside each other."""
    for u, delta, A, B, C, *_ in directions:
        (channels, states), groups = A.shape, B.shape[2]
        if states % 2 or states != geometry(states).states or channels // groups % PAIR:
            return False
        for t in (u, delta, B, C, gy):
            strides = [stride for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
            if t.stride(-1) != 1 or t.data_ptr() % (2 * t.element_size()) or any(n % 2 for n in strides):
                return False
    return True


class _Partials:
    """What the blocks of one direction write, and the gradients made of it."""

    def __init__(self, direction: ScanInputs, needs: frozenset[str], sequences: int):
        self.direction, self.needs = direction, needs
        batch, length, channels = direction.u.shape
        groups, states = direction.B.shape[2:]
        self.u = self._empty(batch, length, channels, dtype=direction.u.dtype)
        self.delta = self._empty(batch, length, channels, dtype=direction.delta.dtype)
        self.BC = self._empty(channel_blocks(direction)[0], batch * length * groups, 2 * states)
        self.A = self._empty(1, sequences, channels * states)
        self.D = self._empty(1, sequences, channels) if direction.D is not None else None
        self.delta_bias = self._empty(1, sequences, channels) if direction.delta_bias is not None else None

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.direction.u.device)

    def values(self) -> dict:
        return {
            "u": self.u,
            "delta": self.delta,
            "BC": self.BC,
            "A": self.A,
            "D": self.D,
            "delta_bias": self.delta_bias,
        }

    def gradients(self) -> ScanGrads:
        states = self.direction.B.shape[3]

        def of(name: str, partial: Tensor | None) -> Tensor | None:
            like = getattr(self.direction, name)
            return (
                None if partial is None or name not in self.needs else sum_terms(partial, like.dtype).view(like.shape)
            )

        BC = self.BC.transpose(0, 1)
        return ScanGrads(
            self.u if "u" in self.needs else None,
            self.delta if "delta" in self.needs else None,
            of("A", self.A),
            of("B", BC[..., :states]),
            of("C", BC[..., states:]),
            of("D", self.D),
            of("delta_bias", self.delta_bias),
        )


def scan_backward(
    grad_out: Tensor, grad_final_state: Tensor | None, call: ScanCall, checkpoints: Checkpoints, needs: frozenset[str]
) -> ScanBackwardResult:
    """`Backend.scan_backward`."""
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    common = setting(call._replace(z=None, grid=None, reduction=None))
    gy, dz = grad_out, None
    if z is not None or reduction is not None:
        y = None if z is None else checkpoints[-1]
        gy, dz = gate_backward(grad_out, directions[0].u.shape[1], z, y, grid, reduction)
    partials = [_Partials(direction, needs, common.sequences) for direction in directions]
    start = torch.empty_like(initial_state) if initial_state is not None and "initial_state" in needs else None
    outer = {
        "gy": gy,
        **dict(zip(("gy_batch", "gy_row", "gy_channel"), gy.stride(), strict=True)),
        "grad_final_state": None if grad_final_state is None else grad_final_state.contiguous(),
        "grad_initial_state": start,
    }
    for together in launch_together(directions):
        _launch(together, directions, checkpoints, common, partials, outer, delta_softplus)
    return tuple(partial.gradients() for partial in partials), dz if "z" in needs else None, start


def _strides(direction: ScanInputs, gy: Tensor, batch: int, segment: int) -> dict:
    """`Strides` of src/backward.cuh."""
    u, delta, _, B, C, *_ = direction
    channels, (groups, states) = u.shape[2], B.shape[2:]
    sign = -1 if direction.reverse else 1

    def row_bytes(t: Tensor) -> int:
        return t.stride(1) * t.element_size()

    return {
        **{name: sign * row_bytes(t) for name, t in (("B", B), ("C", C))},
        **{name: sign * batch * row_bytes(t) for name, t in (("u", u), ("delta", delta), ("gy", gy))},
        **{name: sign * batch * channels * t.element_size() for name, t in (("du", u), ("ddelta", delta))},
        "BC": sign * segment * groups * 2 * states * 4,
    }


def _launch(
    together: tuple[int, ...],
    directions: tuple[ScanInputs, ...],
    checkpoints: tuple[Tensor, ...],
    common: Setting,
    partials: list[_Partials],
    outer: dict,
    softplus: bool,
) -> None:
    """One launch over the directions whose indices are ``together``."""
    first = directions[together[0]]
    (channels, states), groups = first.A.shape, first.B.shape[2]
    shape = geometry(states)
    plan = plan_for(shape, current().shared_limit())
    group_blocks, blocks = channel_blocks(first)
    count = blocks * common.sequences * len(together)
    values = {
        "direction": [direction_values(directions[i], checkpoints[i]) for i in together],
        "gradients": [partials[i].values() for i in together],
        "p": common.values | {"group_channels": channels // groups, "group_blocks": group_blocks},
        "blocks": blocks,
        "groups": groups,
        "strides": [_strides(directions[i], outer["gy"], plan.BATCH, shape.SEGMENT) for i in together],
        "dA_sums": torch.empty(
            count * 2 * PAIR * shape.LANE_STATES * THREADS, dtype=torch.float32, device=first.u.device
        ),
        **outer,
    }
    flags = {"PAIRED": _paired(tuple(directions[i] for i in together), outer["gy"]), "SOFTPLUS": softplus}
    shared = shared_bytes(shape, plan)
    macros = defines(first, None) | plan._asdict() | {name: int(flag) for name, flag in flags.items()}
    macros |= {"GY_T": FORMATS[outer["gy"].dtype], "SHARED_BYTES": shared}
    current().launch(Launch("scan_backward.cu", "scan_backward", macros, "BackwardArgs", values, count, shared))
