"""Argument checks of the public functions. A message is one line; it names the argument and prints
a type, shape or number, never contents.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..reference import Direction
from ..tokens import TokenGrid, TokenReduction, described

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object, dims: int | tuple[int, ...], like: Tensor | None = None) -> None:
    """Raise unless ``value`` is a floating-point tensor with ``dims`` axes, on ``like``'s device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if value.is_nested else value.layout} one")
    if value.dtype not in ACTIVATIONS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    allowed = dims if isinstance(dims, tuple) else (dims,)
    if value.dim() not in allowed:
        raise ValueError(f"{name} must have {' or '.join(map(str, allowed))} axes, got shape {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first operand, got {value.device}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str, hint: str = "") -> None:
    """Raise unless ``value`` has the shape ``expected``, described by ``meaning``."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(value.shape)}{hint}")


def channel_major(name: str, channels: int, x: Tensor, module: str) -> str:
    """What to add to an error where x has the ``channels`` of its parameters on its second axis, as
    other libraries' functions take it.
    """
    return f"; {name} looks channel-major, see storm_kernels.interop.{module}" if x.shape[1] == channels else ""


def direction(name: str, value: object) -> Direction:
    """``value`` as a Direction: one, or the operands of one in its order."""
    if not isinstance(value, (tuple, list)) or not 5 <= len(value) <= len(Direction._fields):
        raise TypeError(f"{name} must be a Direction, got {described(value)}")
    return Direction(*value)


def scan_operands(prefix: str, u, delta, A, B, C, D, delta_bias, like: Tensor | None = None) -> None:
    """Raise unless the operands of one direction fit together; ``prefix`` stands before each name."""
    tensor(f"{prefix}u", u, 3, like)
    batch, length, channels = u.shape
    tensor(f"{prefix}delta", delta, 3, u)
    shape(f"{prefix}delta", delta, (batch, length, channels), "(batch, L, E)")
    tensor(f"{prefix}A", A, 2, u)
    states = A.shape[1]
    hint = channel_major(f"{prefix}u", A.shape[0], u, "mamba_ssm") if A.shape[0] != channels else ""
    shape(f"{prefix}A", A, (channels, states), "(E, S)", hint)
    if channels == 0 or states == 0:
        raise ValueError(f"{prefix}A must have at least one channel and one state, got shape {tuple(A.shape)}")
    for name, value in (("B", B), ("C", C)):
        tensor(f"{prefix}{name}", value, (3, 4), u)
        groups = value.shape[2] if value.dim() == 4 else 1
        if groups == 0 or channels % groups:
            raise ValueError(
                f"{prefix}{name} must have a number of groups that divides the {channels} channels, "
                f"got shape {tuple(value.shape)}"
            )
        expected = (batch, length, states) if value.dim() == 3 else (batch, length, groups, states)
        shape(f"{prefix}{name}", value, expected, "(batch, L, S)" if value.dim() == 3 else "(batch, L, G, S)")
    if (B.shape[2] if B.dim() == 4 else 1) != (C.shape[2] if C.dim() == 4 else 1):
        raise ValueError(
            f"{prefix}B and {prefix}C must have the same groups, got shapes {tuple(B.shape)} and {tuple(C.shape)}"
        )
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            tensor(f"{prefix}{name}", value, 1, u)
            shape(f"{prefix}{name}", value, (channels,), "(E,)")


def gate(z: object, u: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None) -> None:
    """Raise unless z fits u, or the tokens that the reduction keeps."""
    if z is None:
        return
    tensor("z", z, 3, u)
    batch, length, channels = u.shape
    kept = reduction.kept(grid).tokens if reduction is not None else length
    if tuple(z.shape) not in ((batch, length, channels), (batch, kept, channels)):
        wanted = f"(batch, L, E) = {(batch, length, channels)}"
        if kept != length:
            wanted += f" or, for the frames that survive, {(batch, kept, channels)}"
        raise ValueError(f"z must have shape {wanted}, got {tuple(z.shape)}")


def packed(cu_seqlens: object, x: Tensor) -> int:
    """The number of sequences; raise unless ``cu_seqlens`` can bound the sequences of x (1, L,
    ...). The values are checked by :func:`bounds`.
    """
    if cu_seqlens is None:
        return x.shape[0]
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
    ):
        raise TypeError(f"cu_seqlens must be a one-dimensional int32 or int64 tensor, got {described(cu_seqlens)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like the first operand, got {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1, got shape {tuple(x.shape)}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have at least two entries, got {cu_seqlens.shape[0]}")
    return cu_seqlens.shape[0] - 1


def bounds(cu_seqlens: Tensor | None, length: int) -> None:
    """Raise unless the bounds ascend from 0 to ``length``. On a GPU the values are the caller's
    affair: reading them would wait for the device.
    """
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    falls = next((i for i, (a, b) in enumerate(zip(values, values[1:], strict=False), 1) if a > b), None)
    if values[0] != 0 or values[-1] != length or falls is not None:
        got = (
            f"{values[0]} to {values[-1]}"
            if falls is None
            else f"{values[falls]} after {values[falls - 1]} at cu_seqlens[{falls}]"
        )
        raise ValueError(f"cu_seqlens must ascend from 0 to L = {length}, got {got}")


def state(name: str, value: object, expected: tuple[int, ...], meaning: str, like: Tensor) -> None:
    """Raise unless an initial state is None or has the shape ``expected``."""
    if value is not None:
        tensor(name, value, 3, like)
        shape(name, value, expected, meaning)


def memory(what: str, device: torch.device, elements: int, itemsize: int) -> None:
    """Raise MemoryError before allocating what cannot be had, when it is more than a gibibyte."""
    wanted = elements * itemsize
    if wanted < 2**30 or device.type not in ("cpu", "cuda"):
        return
    free = (
        torch.cuda.mem_get_info(device)[1]
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    if wanted > free:
        raise MemoryError(f"{what} needs {wanted / 2**30:.1f} GiB on {device}, which has {free / 2**30:.1f} GiB")
