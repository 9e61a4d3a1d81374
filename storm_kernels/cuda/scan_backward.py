"""Selective scan, backward: launch code of src/scan_backward.cu."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import ScanGrads, ScanInputs
from ..tokens import TokenGrid, TokenReduction
from .launcher import THREADS, current
from .scan import Geometry, Setting, channel_blocks, defines, direction_values, geometry, launch_together, setting
from .tokens import sum_terms

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
        plan.BATCH * THREADS * 8,
        THREADS // shape.STATE_LANES * row * 4,
        THREADS // 32 * shape.GROUP * 2 * shape.states * 4,
        plan.BATCH * shape.block_channels * 4,
        *(2 * (shape.block_channels * 4,)),
        THREADS * 16,
        shape.CHUNK * 16,
        4 * THREADS * 8,
    )
    return sum(-(-size // 16) * 16 for size in arrays)


def plan_for(shape: Geometry, limit: int) -> Plan:
    """The fastest plan with which two blocks fit on an H100's multiprocessor, if a block may have ``limit`` bytes; else the fastest one that fits."""
    fits = [plan for plan in plans(shape) if shared_bytes(shape, plan) <= limit]
    return next((plan for plan in fits if shared_bytes(shape, plan) <= TWO_BLOCKS), fits[0] if fits else plans(shape)[-1])


def _paired(directions: tuple[ScanInputs, ...], z: Tensor | None, grad_out: Tensor) -> bool:
    """Whether the channels of a block, and the states, come in aligned pairs that lie beside each other."""
    for one in directions:
        states, groups = one.A.shape[1], one.B.shape[2]
        if states % 2 or states != geometry(states).states or one.A.shape[0] // groups % 2:
            return False
        for t in (one.u, one.delta, one.B, one.C, grad_out, *(() if z is None else (z,))):
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

    def values(self, z: Tensor | None) -> dict:
        return {"u": self.u, "delta": self.delta, "BC": self.BC, "A": self.A, "D": self.D, "delta_bias": self.delta_bias, "z": z}

    def gradients(self) -> ScanGrads:
        one, states = self.one, self.one.B.shape[3]

        def of(name: str, partial: Tensor | None) -> Tensor | None:
            like = getattr(one, name)
            return None if partial is None or name not in self.needs else sum_terms(partial, like.dtype).view(like.shape)

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
    """`Backend.scan_backward`."""
    set_ = setting(directions, z, delta_softplus=delta_softplus, initial_state=initial_state, cu_seqlens=cu_seqlens, grid=grid, reduction=reduction)
    empty = {"dtype": torch.float32, "device": grad_out.device}
    partials = [_Partials(one, needs, set_.sequences) for one in directions]
    gate = torch.empty(1, len(directions), z.numel(), **empty) if z is not None else None
    start = torch.empty(initial_state.shape, **empty) if initial_state is not None and "initial_state" in needs else None
    outer = {
        "grad_out": grad_out,
        **dict(zip(("grad_out_batch", "grad_out_row", "grad_out_channel"), grad_out.stride(), strict=True)),
        "grad_final_state": None if grad_final_state is None else grad_final_state.contiguous(),
        "grad_initial_state": start,
        "z_rows": 0 if z is None else z.shape[1],
    }
    for together in launch_together(directions):
        _launch(together, directions, z, checkpoints, set_, partials, gate, outer, delta_softplus)
    gradients = tuple(partial.gradients() for partial in partials)
    dz = sum_terms(gate, z.dtype).view(z.shape) if gate is not None and "z" in needs else None
    return gradients, dz, start


def _steps(one: ScanInputs, z: Tensor | None, outer: dict, batch: int, group: int) -> dict:
    """`Steps` of src/backward.cuh."""
    sign = -batch if one.reverse else batch
    steps = {"u": one.u.stride(1) * one.u.element_size(), "delta": one.delta.stride(1) * one.delta.element_size()}
    steps |= {"du": one.u.shape[2] * one.u.element_size(), "ddelta": one.u.shape[2] * one.delta.element_size(), "dz": one.u.shape[2] * 4}
    steps |= {"grad_out": outer["grad_out_row"] * one.u.element_size(), "z": 0 if z is None else z.stride(1) * z.element_size()}
    return {name: sign * step for name, step in steps.items()} | {"BC": sign // batch * group * one.B.shape[2] * 2 * one.B.shape[3] * 4}


def _launch(
    together: tuple[int, ...],
    directions: tuple[ScanInputs, ...],
    z: Tensor | None,
    checkpoints: tuple[Tensor, ...],
    set_: Setting,
    partials: list[_Partials],
    gate: Tensor | None,
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
        "gradients": [partials[i].values(None if gate is None else gate[0, i]) for i in together],
        "p": set_.values | {"group_channels": one.A.shape[0] // groups, "group_blocks": a_group},
        "blocks": blocks,
        "groups": groups,
        "steps": [_steps(directions[i], z, outer, plan.BATCH, shape.GROUP) for i in together],
        "dA_sums": torch.empty(count * 4 * shape.LANE_STATES * THREADS, dtype=torch.float32, device=one.u.device),
        **outer,
    }
    flags = {
        "GATED": z is not None,
        "PAIRED": _paired(tuple(directions[i] for i in together), z, outer["grad_out"]),
        "REDUCED": set_.token_map is not None,
        "SOFTPLUS": softplus,
    }
    shared = shared_bytes(shape, plan)
    made = defines(one, z) | plan._asdict() | {name: int(flag) for name, flag in flags.items()} | {"SHARED_BYTES": shared}
    current().launch("scan_backward.cu", "scan_backward", made, "BackwardArgs", values, count, shared)
