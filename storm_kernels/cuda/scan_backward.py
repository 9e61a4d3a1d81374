"""Selective scan, backward: launch code of src/scan_backward.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import ScanGrads, ScanInputs
from ..tokens import TokenGrid, TokenReduction
from .launcher import THREADS, current
from .scan import Geometry, Setting, channel_blocks, defines, direction_values, geometry, launch_together, setting
from .tokens import sum_terms


def shared_bytes(shape: Geometry) -> int:
    tile = shape.TILE * (shape.block_channels * 8 + shape.states * 8)
    sums = shape.TILE * (shape.block_channels * 16 + THREADS // 32 * 2 * shape.states * 4)
    return tile + sums + (shape.CHUNK // shape.GROUP + 2) * 2 * shape.LANE_STATES * THREADS * 4


class _Partials:
    """What the blocks of one direction write, and the gradients made of it."""

    def __init__(self, one: ScanInputs, needs: frozenset[str], sequences: int):
        self.one, self.needs = one, needs
        batch, length, channels = one.u.shape
        groups, states = one.B.shape[2:]
        self.empty = {"dtype": torch.float32, "device": one.u.device}
        self.u = self._if("u", (batch, length, channels), one.u.dtype)
        self.delta = self._if("delta", (batch, length, channels), one.delta.dtype)
        self.A = self._if("A", (1, sequences, channels * states))
        self.D = self._if("D", (1, sequences, channels)) if one.D is not None else None
        self.delta_bias = self._if("delta_bias", (1, sequences, channels)) if one.delta_bias is not None else None
        wanted = "B" if "B" in needs else "C"
        self.BC = self._if(wanted, (channel_blocks(one)[0], batch * length * groups, 2 * states))

    def _if(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=self.one.u.device) if name in self.needs else None

    def values(self, z: Tensor | None) -> dict:
        return {"u": self.u, "delta": self.delta, "BC": self.BC, "A": self.A, "D": self.D, "delta_bias": self.delta_bias, "z": z}

    def gradients(self) -> ScanGrads:
        one, states = self.one, self.one.B.shape[3]

        def summed(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if partial is None else sum_terms(partial, like.dtype).view(like.shape)

        def of(name: str, part: slice) -> Tensor | None:
            return summed(self.BC[..., part].transpose(0, 1), getattr(one, name)) if name in self.needs else None

        dB, dC = of("B", slice(0, states)), of("C", slice(states, 2 * states))
        return ScanGrads(self.u, self.delta, summed(self.A, one.A), dB, dC, summed(self.D, one.D), summed(self.delta_bias, one.delta_bias))


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
    gate = torch.empty(1, len(directions), z.numel(), **empty) if z is not None and "z" in needs else None
    start = torch.empty(initial_state.shape, **empty) if initial_state is not None and "initial_state" in needs else None
    outer = {
        "grad_out": grad_out,
        **dict(zip(("grad_out_batch", "grad_out_row", "grad_out_channel"), grad_out.stride(), strict=True)),
        "grad_final_state": None if grad_final_state is None else grad_final_state.contiguous(),
        "grad_initial_state": start,
        "z_rows": 0 if z is None else z.shape[1],
    }
    for together in launch_together(directions):
        _launch(together, directions, z, checkpoints, set_, partials, gate, outer)
    gradients = tuple(partial.gradients() for partial in partials)
    return gradients, None if gate is None else sum_terms(gate, z.dtype).view(z.shape), start


def _launch(
    together: tuple[int, ...], directions, z: Tensor | None, checkpoints, set_: Setting, partials: list[_Partials], gate: Tensor | None, outer: dict
) -> None:
    one = directions[together[0]]
    shape = geometry(one.A.shape[1])
    a_group, blocks = channel_blocks(one)
    groups = one.B.shape[2]
    values = {
        "direction": [direction_values(directions[i], checkpoints[i]) for i in together],
        "gradients": [partials[i].values(None if gate is None else gate[0, i]) for i in together],
        "p": set_.values | {"group_channels": one.A.shape[0] // groups, "group_blocks": a_group},
        "blocks": blocks,
        "groups": groups,
        **outer,
    }
    shared = shared_bytes(shape)
    made = defines(one, z) | {"SHARED_BYTES": shared}
    count = blocks * set_.sequences * len(together)
    current().launch("scan_backward.cu", "scan_backward", made, "BackwardArgs", values, count, shared)
