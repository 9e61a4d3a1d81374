"""The gate outside the scans, forward and backward: launch code of src/gate.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from .launcher import THREADS, Launch, current
from .tokens import FORMATS, token_map

WIDTH = 8  # channels a thread
TILE = 16  # tokens of a block: what a thread works out once serves so many


def _aligned(*rows: Tensor | None) -> bool:
    """Whether every row consists of whole runs of WIDTH channels, each beginning on 16 bytes."""
    for t in rows:
        if t is None:
            continue
        strides = [stride for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1]
        if t.shape[-1] % WIDTH or t.stride(-1) != 1 or t.data_ptr() % 16 or any(n % WIDTH for n in strides):
            return False
    return True


def _row_bytes(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(1) * t.element_size()


def _near_rows(t: Tensor | None) -> Tensor | None:
    """``t``, copied if its rows lie 2^31 bytes or more apart."""
    return t if _row_bytes(t) < 2**31 else t.contiguous()


def _launch(
    kernel: str, struct: str, like: Tensor, result: Tensor, z: Tensor | None, flags: dict[str, bool], values: dict
) -> None:
    """One launch over the tokens of ``like`` (batch, L, E); ``result`` has the format G_T."""
    batch, length, channels = like.shape
    if length > 2**31 - TILE:
        raise ValueError(f"a gate takes at most 2^31 - {TILE} tokens a batch row, got {length}")
    blocks, tiles = -(-channels // (WIDTH * THREADS)), -(-length // TILE)
    defines = {"G_T": FORMATS[result.dtype], "Z_T": FORMATS[(result if z is None else z).dtype]}
    defines |= {"GATE_TILE": TILE, "WIDTH": WIDTH} | {name: int(flag) for name, flag in flags.items()}
    values |= {"extent": {"length": length, "channels": channels, "tiles": tiles, "blocks": blocks}}
    values |= {"z": z, "z_batch": 0 if z is None else z.stride(0), "z_row": _row_bytes(z)}
    current().launch(Launch("gate.cu", kernel, defines, struct, values, batch * tiles * blocks))


def merge_directions(y: Tensor, second: Tensor, z: Tensor | None, dtype: torch.dtype, *, save_y: bool) -> Tensor:
    """``(y + second) * SiLU(z)``, (batch, L, E) in ``dtype``, of two contiguous float32 tensors;
    with ``save_y`` their sum is left in ``y``.
    """
    out, z = torch.empty_like(y, dtype=dtype), _near_rows(z)
    flags = {"GATED": z is not None, "REDUCED": False, "SUMMED": True, "ALIGNED": _aligned(y, second, z, out)}
    values = {"y": y, "second": second, "save_y": save_y, "out": out}
    _launch("merge_directions", "MergeArgs", y, out, z, flags, values)
    return out


def gate_backward(
    grad_out: Tensor,
    length: int,
    z: Tensor | None,
    y: Tensor | None,
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y, (batch, L, E) float32, zero for dropped tokens, and of z, from that of the
    gated and reduced result.

    ``y``: (1 or 2, batch, kept tokens, E) float32, whose sum over the first axis was gated.
    """
    grad_out, z = _near_rows(grad_out), _near_rows(z)
    batch, _, channels = grad_out.shape
    summed = y is not None and len(y) == 2
    gy = torch.empty(batch, length, channels, dtype=torch.float32, device=grad_out.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    flags = {
        "GATED": z is not None,
        "REDUCED": reduction is not None,
        "SUMMED": summed,
        "ALIGNED": _aligned(grad_out, z, gy),
    }
    values = {
        "grad_out": grad_out,
        "grad_out_batch": grad_out.stride(0),
        "grad_out_row": _row_bytes(grad_out),
        "grad_out_channel": grad_out.stride(2),
        "map": None if reduction is None else token_map(grid, reduction, grad_out.device),
        "z_kept": z is not None and z.shape[1] != length,
        "z_rows": 0 if z is None else z.shape[1],
        "y": None if y is None else y[0],
        "second": y[1] if summed else None,
        "kept_rows": 0 if y is None else y.shape[2],
        "gy": gy,
        "dz": dz,
    }
    _launch("gate_backward", "GateBackwardArgs", gy, grad_out, z, flags, values)
    return gy, dz
