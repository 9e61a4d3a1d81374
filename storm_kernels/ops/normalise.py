"""Forms that every operator brings its operands to before a backend sees them (`contract.py`)."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import Tensor

# A tensor gives a tensor, None gives None.
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
logger = logging.getLogger(__name__)


def accumulator(*activations: Tensor | None) -> torch.dtype:
    """The dtype of states, sums and parameters: float64 if an activation is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in activations) else torch.float32


def parameter(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """A parameter or a state, contiguous in ``dtype``."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def unit_innermost(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor, copied only if its innermost axis is not dense."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    logger.debug("copied a tensor of shape %s: strides %s have no unit innermost", tuple(tensor.shape), tensor.stride())
    return tensor.contiguous()
