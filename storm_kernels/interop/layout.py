"""From the channel-major layout of the original libraries, (batch, channels, length), to our
token-major one, and the checks both need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.normalise import MaybeTensor


def token_major(x: MaybeTensor) -> MaybeTensor:
    """(b, d, l) -> (b, l, d) with the channels innermost in memory, as the kernels read: a view, or
    a copy where x has the length innermost.
    """
    if x is None:
        return None
    return _turned(x) if x.stride(-1) == 1 and x.shape[1] > 1 else x.transpose(1, 2)


def channel_major(y: Tensor, like: Tensor) -> Tensor:
    """(b, l, d) -> (b, d, l): with the length innermost in memory where ``like`` (b, d, l) has it
    there, as the originals return it, else a view.
    """
    return _turned(y) if like.stride(-1) == 1 else y.transpose(1, 2)


def _turned(x: Tensor) -> Tensor:
    """(b, m, n) -> (b, n, m), contiguous.

    On a CPU one matrix after the other: PyTorch copies a transposed matrix by blocks, but more than
    two axes element by element, which takes about four times as long (2048 x 1536, float32).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x.transpose(1, 2).contiguous()
    matrices = [matrix.t().contiguous() for matrix in x]
    if len(matrices) == 1:
        return matrices[0].unsqueeze(0)
    return torch.stack(matrices) if matrices else x.new_empty(0, x.shape[2], x.shape[1])


def read_slots(states: Tensor, slots: Tensor | None) -> Tensor:
    """The rows of ``states`` that ``slots`` (b,) names, copied; a negative slot is padding and gets
    some row. All rows where ``slots`` is None.
    """
    return states.clone() if slots is None else states[slots.clamp(min=0)]


@torch.no_grad()
def write_slots(states: Tensor, slots: Tensor | None, rows: Tensor) -> None:
    """Write ``rows`` (b, ...) back to where :func:`read_slots` took them from; a row of padding is dropped.

    Nothing here waits for the device: a row of padding repeats the first one that is none, or,
    where all are padding, what row 0 holds already.
    """
    if slots is None:
        states.copy_(rows)
        return
    if slots.numel() == 0:
        return
    slots = slots.to(states.device)
    real = slots >= 0
    source = torch.where(
        real, torch.arange(len(slots), dtype=torch.int64, device=slots.device), real.to(torch.int32).argmax()
    )
    target = slots[source].clamp(min=0)
    keep = (~real[source]).view(-1, *[1] * (rows.dim() - 1))
    states[target] = torch.where(keep, states[target], rows[source].to(states.dtype))


def zero_padding(out: Tensor, slots: Tensor | None) -> Tensor:
    """``out`` (b, ...) with zeros in the rows whose slot is padding."""
    return out if slots is None else out.masked_fill((slots < 0).to(out.device).view(-1, *[1] * (out.dim() - 1)), 0)


def check_scan_layout(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> None:
    """Raise if a tensor is complex or not laid out as ``selective_scan_fn`` of mamba_ssm has it."""
    for name, tensor in (("A", A), ("B", B), ("C", C), ("u", u)):
        if tensor.is_complex():
            raise TypeError(
                f"{name} is {tensor.dtype}: complex state spaces are not supported; only real A, B and C are"
            )
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, channels, length), got shape {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A must be (channels, states), got shape {tuple(A.shape)}")
    if u.shape[1] != A.shape[0]:
        hint = ""
        if u.shape[2] == A.shape[0]:
            hint = (
                "; its last axis has A's channels, so it looks token-major: transpose it, "
                "or call storm_kernels.selective_scan"
            )
        raise ValueError(
            f"u must be (batch, channels, length) with the {A.shape[0]} channels of A, got shape {tuple(u.shape)}{hint}"
        )
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {tuple(u.shape)}, got {tuple(tensor.shape)}")


def scan_operands(B: Tensor, C: Tensor, batch: int, channels: int, length: int) -> tuple[Tensor, Tensor]:
    """B and C as (batch, length, groups, states) from (d, n), (b, n, l) or (b, g, n, l).

    A constant (d, n) operand is one group a channel, expanded without a copy.
    """
    B, C = _operand("B", B, batch, channels, length), _operand("C", C, batch, channels, length)
    groups = max(B.shape[2], C.shape[2])
    return _regroup(B, groups), _regroup(C, groups)


def _operand(name: str, x: Tensor, batch: int, channels: int, length: int) -> Tensor:
    if x.dim() == 2 and x.shape[0] == channels:
        return x.expand(batch, length, *x.shape)
    if x.dim() == 3 and x.shape[0] == batch and x.shape[2] == length:
        return x.transpose(1, 2).unsqueeze(2)
    if x.dim() == 4 and x.shape[0] == batch and x.shape[3] == length:
        return x.permute(0, 3, 1, 2)
    raise ValueError(
        f"{name} must be (channels, states), (batch, states, length) or (batch, groups, states, length) "
        f"with batch {batch}, channels {channels}, length {length}; got shape {tuple(x.shape)}"
    )


def _regroup(x: Tensor, groups: int) -> Tensor:
    """Repeat each group of (b, l, g, n) until there are ``groups``."""
    b, length, g, n = x.shape
    if g == groups:
        return x
    return x.expand(b, length, groups, n) if g == 1 else x.repeat_interleave(groups // g, 2)


def accumulate(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums: float64 if any operand is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
