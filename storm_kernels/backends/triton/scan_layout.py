"""What the forward and the backward scan share on the host: the layouts their kernels read, and the
facts that choose a kernel.

Symbols: E channels, S states, Sp = S rounded up to a power of two, G groups, n sequences. Tensors
of states are kept states first, (..., Sp, E), so that lanes meet channels; B and C are packed in
float32 to (batch, L, G, 2, Sp): 2 Sp floats a token beside 4 E activations, and their loads are
then aligned, unmasked and free of conversions whatever S, dtypes and strides are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..contract import ScanInputs

# Tokens between two checkpoints (docs/kernels.md, Backward scan).
INTERVAL = 256


class Shape(NamedTuple):
    """The sizes of one scan."""

    batch: int
    length: int
    channels: int
    states: int
    groups: int
    sequences: int

    @classmethod
    def of(cls, one: ScanInputs, cu_seqlens: Tensor | None) -> Shape:
        batch, length, channels = one.u.shape
        return cls(
            batch,
            length,
            channels,
            one.A.shape[1],
            one.B.shape[2],
            batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        )

    @property
    def padded(self) -> int:
        """Sp."""
        return triton.next_power_of_2(self.states)

    def blocks(self, width: int) -> int:
        """Blocks of channels in one group: none straddles two groups."""
        return triton.cdiv(self.channels // self.groups, width)

    def programs(self, width: int) -> int:
        """Programs of one direction."""
        return self.sequences * self.groups * self.blocks(width)


def checkpoint_shapes(
    batch: int, length: int, channels: int, states: int, *, directions: int, sequences: int, **gate
) -> tuple[tuple[int, ...], ...]:
    """The state before every `INTERVAL`-th step of each sequence; packed sequence i starts at row
    ``cu_seqlens[i] // INTERVAL + i``.
    """
    rows = length // INTERVAL + sequences if sequences else batch * -(-length // INTERVAL)
    return ((rows, triton.next_power_of_2(states), channels),) * directions


def states_first(states: Tensor) -> Tensor:
    """(..., E, S) -> contiguous (..., Sp, E), zero beyond S."""
    *lead, channels, count = states.shape
    out = states.new_zeros(*lead, triton.next_power_of_2(count), channels, dtype=torch.float32)
    out[..., :count, :] = states.transpose(-1, -2)
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
    bc, A = pack_bc(one.B, one.C), states_first(one.A)
    return one.u, one.delta, bc, A, one.D, one.delta_bias, one.u.stride()[:2], one.delta.stride()[:2]


def gate_operands(z: Tensor | None, kept: Tensor | None) -> tuple:
    """z, its strides in batch and time, and where each token's stands if z holds the kept tokens
    only; ``kept`` as of `reduce.token_places`.
    """
    offsets = None if z is None or kept is None else kept.clamp(min=0) * z.stride(1)
    return z, (0, 0) if z is None else z.stride()[:2], offsets


def gate_mode(z: Tensor | None, length: int) -> str:
    return "none" if z is None else "all" if z.shape[1] == length else "kept"
