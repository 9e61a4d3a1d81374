"""The structures of src/api.h, field by field, and how tensors become them."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int64, c_void_p

import torch
from torch import Tensor

from ...tokens import TokenGrid, TokenReduction
from ..pages import empty
from .threads import thread_count

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OK, _NO_MEMORY, _REFUSED = 0, 1, 2


class CTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("count", "batch_stride", "row_stride", "group_stride", "dtype")),
    ]


class CFloats(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("count", c_int64)]


class CReduction(ctypes.Structure):
    _fields_ = [
        (name, c_int64) for name in ("frames", "height", "width", "temporal_pool", "spatial_pool", "temporal_stride")
    ]


class CShape(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels", "sequences")),
        ("cu_seqlens", c_void_p),
        ("threads", c_int64),
    ]


class CDirection(ctypes.Structure):
    _fields_ = [
        *((name, CTensor) for name in ("u", "delta", "B", "C")),
        *((name, CFloats) for name in ("A", "D", "delta_bias", "checkpoints")),
        ("reverse", c_int64),
    ]


class CScan(ctypes.Structure):
    _fields_ = [
        ("shape", CShape),
        ("reduction", CReduction),
        ("direction", CDirection * 2),
        ("z", CTensor),
        ("out", CTensor),
        ("initial_state", CFloats),
        ("final_state", CFloats),
        *((name, c_int64) for name in ("states", "groups", "directions", "softplus", "z_is_kept")),
        ("refused", c_char_p),
    ]


class CDirectionGrads(ctypes.Structure):
    _fields_ = [
        *((name, CTensor) for name in ("u", "delta", "B", "C")),
        *((name, CFloats) for name in ("A", "D", "delta_bias")),
    ]


class CScanGrads(ctypes.Structure):
    _fields_ = [
        ("direction", CDirectionGrads * 2),
        ("z", CTensor),
        ("final_state", CFloats),
        ("initial_state", CFloats),
    ]


class CFilter(ctypes.Structure):
    _fields_ = [
        ("weight", CFloats),
        ("bias", CFloats),
        ("out", CTensor),
        ("grad_weight", CFloats),
        ("grad_bias", CFloats),
        ("reverse", c_int64),
    ]


class CConv(ctypes.Structure):
    _fields_ = [
        ("shape", CShape),
        *((name, CTensor) for name in ("x", "grad_x")),
        ("filter", CFilter * 2),
        *((name, CFloats) for name in ("initial_state", "grad_initial_state")),
        *((name, c_int64) for name in ("filters", "taps", "silu")),
        ("refused", c_char_p),
    ]


class CReduce(ctypes.Structure):
    _fields_ = [
        ("reduction", CReduction),
        ("x", CTensor),
        ("out", CTensor),
        *((name, c_int64) for name in ("batch", "channels", "threads")),
        ("refused", c_char_p),
    ]


# In the order of storm_structure_bytes() in src/common.cpp: the library is asked for them when it is loaded.
STRUCTURES = (
    CTensor,
    CFloats,
    CReduction,
    CShape,
    CDirection,
    CScan,
    CDirectionGrads,
    CScanGrads,
    CFilter,
    CConv,
    CReduce,
)


def elements_from(t: Tensor) -> int:
    """Elements from the tensor's first one to the end of its memory: the shape alone says nothing,
    a storage may have been freed (as FSDP does).
    """
    return t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()


def floats(t: Tensor | None) -> CFloats:
    """A contiguous float32 tensor; a null one for None."""
    if t is None:
        return CFloats()
    if t.dtype != torch.float32 or not t.is_contiguous():
        raise TypeError(
            "the C++ library wants a contiguous float32 tensor, "
            f"got {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()}"
        )
    return CFloats(t.data_ptr(), elements_from(t))


def rows(t: Tensor | None) -> CTensor:
    """(batch, rows, channels) or (batch, rows, groups, states); a null tensor for None."""
    if t is None:
        return CTensor()
    strides = t.stride()
    return CTensor(
        t.data_ptr(), elements_from(t), strides[0], strides[1], strides[2] if len(strides) == 4 else 0, DTYPES[t.dtype]
    )


def empty_like(t: Tensor | None) -> Tensor | None:
    """Contiguous and unwritten, in the shape and dtype of ``t``."""
    return None if t is None else empty(t.shape, t.dtype, t.device)


def unit_innermost(t: Tensor) -> Tensor:
    """``t``, copied only if its last axis is strided; incoming gradients may be."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def reduction_struct(grid: TokenGrid | None, reduction: TokenReduction | None) -> CReduction:
    if reduction is None:
        return CReduction()
    return CReduction(
        grid.frames, grid.height, grid.width, reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride
    )


def shape_struct(x: Tensor, offsets: Tensor | None) -> CShape:
    """``x`` (batch, L, E); ``offsets`` are `int64_offsets` of cu_seqlens, which the caller keeps alive."""
    batch, length, channels = x.shape
    sequences = 0 if offsets is None else len(offsets) - 1
    return CShape(batch, length, channels, sequences, None if offsets is None else offsets.data_ptr(), thread_count())


def int64_offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def sequence_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def check(status: int, op: str, x: Tensor, args: ctypes.Structure) -> None:
    """Raise what a C function's status means; ``args`` is the structure that it was given."""
    if status == _NO_MEMORY:
        raise MemoryError(f"{op} of {tuple(x.shape)} {x.dtype}: no memory for its workspace")
    if status == _REFUSED:
        raise RuntimeError(
            f"{op} of {tuple(x.shape)} {x.dtype}: {args.refused.decode()} is absent, "
            "or does not hold what these shapes ask for"
        )
    if status != _OK:
        raise RuntimeError(f"{op} of {tuple(x.shape)} {x.dtype}: the C++ library returned status {status}")
