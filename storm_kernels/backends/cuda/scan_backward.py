"""Selective scan, backward: launch code of src/scan_backward.cu.

The scan's kernel starts from dL/dy. Without a gate or a reduction that is the result's own
gradient; else src/gate.cu makes it first, once for both directions, and dz with it, from the y that
the forward pass saved. The scan itself used to expand the gradient, to recompute y for dz, and to
leave a float32 dz of each direction to be added up. Arithmetic, no measurement, for both
directions, 16 states, bfloat16, all tokens kept:

    slots per item, sm_80 / sm_90 / sm_100    now, scan + gate.cu                          before
    gated                                     23.3 + 0.5 / 23.3 + 0.5 / 23.2 + 0.5         26.2 / 26.1 / 26.1
    gated and reduced                         23.3 + 0.7 / 23.3 + 0.7 / 23.2 + 0.7         28.4 / 28.3 / 28.4

One direction alone bears the gate alone: 23.3 + 1.0.

Bytes per token and channel that the gate and its gradient move (of grad_out a reduction leaves next
to nothing to read):

                             now, scan + gate.cu                                before
    gated, forward           z 2, y 4 = 6                                       z 2 x 2 = 4
    gated, backward          grad_out 2, z 2, y 4, dz 2, dL/dy 4 + 2 x 4 = 22   grad_out, z 2 x 2 each,
                                                                                dz 2 x (4 + 4) + 2 = 26
    reduced too, forward     z 2 x 2, y 2 x 4 = 12                              z 2 x 2 = 4
    reduced too, backward    z 2, y 2 x 4, dz 2, dL/dy 4 + 2 x 4 = 24           z 2 x 2, dz 2 x (4 + 4) + 2 = 22

What is saved between forward and backward grows by 4 bytes per token and channel with a gate, by 8
per kept token and channel if both directions are reduced as well. During the backward pass dL/dy
takes 4 bytes where both directions' dz took 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Checkpoints, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs
from .gate import gate_backward
from .launcher import THREADS, Launch, current
from .scan import Geometry, Setting, channel_blocks, defines, direction_values, geometry, launch_together, setting
from .tokens import FORMATS, sum_terms

TWO_BLOCKS = 113 * 1024  # bytes a block may have if two are to fit on an H100's multiprocessor


class Plan(NamedTuple):
    """How the backward divides a block's work beside `Geometry`; src/backward.cuh says what each name means."""

    TILE: int
    BATCH: int


def plans(shape: Geometry) -> tuple[Plan, ...]:
    """From the fastest to the one that takes the least shared memory."""
    batch = min(4, shape.STATE_LANES, shape.GROUP)
    keep = (Plan(shape.CHUNK, batch),) if shape.CHUNK * shape.states <= 2048 else ()
    return (*keep, *(Plan(shape.GROUP, small) for small in (batch, batch // 2) if small))


def shared_bytes(shape: Geometry, plan: Plan | None = None) -> int:
    """Bytes of `Shared` in src/backward.cuh, which checks them, by default with the smallest plan."""
    plan = plan or plans(shape)[-1]
    run = min(4, shape.LANE_STATES)
    row = plan.BATCH * 2 * shape.LANE_STATES * shape.STATE_LANES + (4 if run == 4 else 1)
    arrays = (
        shape.CHUNK // shape.GROUP * 2 * shape.LANE_STATES * THREADS * 4,
        shape.CHUNK * shape.block_channels * 8,
        *(2 * (plan.TILE * shape.states * 4,)),
        plan.BATCH * THREADS * 16,
        *(THREADS // 32 * (32 // shape.STATE_LANES * row * 4, shape.GROUP * 2 * shape.states * 4)),
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
    for one in directions:
        states, groups = one.A.shape[1], one.B.shape[2]
        if states % 2 or states != geometry(states).states or one.A.shape[0] // groups % 2:
            return False
        for t in (one.u, one.delta, one.B, one.C, gy):
            strides = [stride for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
            if t.stride(-1) != 1 or t.data_ptr() % (2 * t.element_size()) or any(n % 2 for n in strides):
                return False
    return True


class _Partials:
    """What the blocks of one direction write, and the gradients made of it."""

    def __init__(self, one: ScanInputs, needs: frozenset[str], sequences: int):
        self.one, self.needs = one, needs
        batch, length, channels = one.u.shape
        groups, states = one.B.shape[2:]
        self.u = self._empty(batch, length, channels, dtype=one.u.dtype)
        self.delta = self._empty(batch, length, channels, dtype=one.delta.dtype)
        self.BC = self._empty(channel_blocks(one)[0], batch * length * groups, 2 * states)
        self.A = self._empty(1, sequences, channels * states)
        self.D = self._empty(1, sequences, channels) if one.D is not None else None
        self.delta_bias = self._empty(1, sequences, channels) if one.delta_bias is not None else None

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.one.u.device)

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
        one, states = self.one, self.one.B.shape[3]

        def of(name: str, partial: Tensor | None) -> Tensor | None:
            like = getattr(one, name)
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
    set_ = setting(call._replace(z=None, grid=None, reduction=None))
    gy, dz = grad_out, None
    if z is not None or reduction is not None:
        y = None if z is None else checkpoints[-1]
        gy, dz = gate_backward(grad_out, directions[0].u.shape[1], z, y, grid, reduction)
    partials = [_Partials(one, needs, set_.sequences) for one in directions]
    start = torch.empty_like(initial_state) if initial_state is not None and "initial_state" in needs else None
    outer = {
        "gy": gy,
        **dict(zip(("gy_batch", "gy_row", "gy_channel"), gy.stride(), strict=True)),
        "grad_final_state": None if grad_final_state is None else grad_final_state.contiguous(),
        "grad_initial_state": start,
    }
    for together in launch_together(directions):
        _launch(together, directions, checkpoints, set_, partials, outer, delta_softplus)
    return tuple(partial.gradients() for partial in partials), dz if "z" in needs else None, start


def _steps(one: ScanInputs, gy: Tensor, batch: int, group: int) -> dict:
    """`Steps` of src/backward.cuh."""
    sign = -batch if one.reverse else batch
    steps = {name: t.stride(1) * t.element_size() for name, t in (("u", one.u), ("delta", one.delta), ("gy", gy))}
    steps |= {"du": one.u.shape[2] * one.u.element_size(), "ddelta": one.u.shape[2] * one.delta.element_size()}
    one_token = {name: sign // batch * t.stride(1) * t.element_size() for name, t in (("B", one.B), ("C", one.C))}
    return (
        {name: sign * step for name, step in steps.items()}
        | one_token
        | {"BC": sign // batch * group * one.B.shape[2] * 2 * one.B.shape[3] * 4}
    )


def _launch(
    together: tuple[int, ...],
    directions: tuple[ScanInputs, ...],
    checkpoints: tuple[Tensor, ...],
    set_: Setting,
    partials: list[_Partials],
    outer: dict,
    softplus: bool,
) -> None:
    one = directions[together[0]]
    shape = geometry(one.A.shape[1])
    plan = plan_for(shape, current().shared_limit())
    a_group, blocks = channel_blocks(one)
    groups = one.B.shape[2]
    count = blocks * set_.sequences * len(together)
    values = {
        "direction": [direction_values(directions[i], checkpoints[i]) for i in together],
        "gradients": [partials[i].values() for i in together],
        "p": set_.values | {"group_channels": one.A.shape[0] // groups, "group_blocks": a_group},
        "blocks": blocks,
        "groups": groups,
        "steps": [_steps(directions[i], outer["gy"], plan.BATCH, shape.GROUP) for i in together],
        "dA_sums": torch.empty(count * 4 * shape.LANE_STATES * THREADS, dtype=torch.float32, device=one.u.device),
        **outer,
    }
    flags = {"PAIRED": _paired(tuple(directions[i] for i in together), outer["gy"]), "SOFTPLUS": softplus}
    shared = shared_bytes(shape, plan)
    made = defines(one, None) | plan._asdict() | {name: int(flag) for name, flag in flags.items()}
    made |= {"GY_T": FORMATS[outer["gy"].dtype], "SHARED_BYTES": shared}
    current().launch(Launch("scan_backward.cu", "scan_backward", made, "BackwardArgs", values, count, shared))
