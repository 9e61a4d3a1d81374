"""Frames to the vision tower's input."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from storm_kernels.profiling import stage
from storm_kernels.tokens import described

# Frames resized or encoded at a time. At 448 pixels in bfloat16 one frame's widest activation is 9
# MB: a GPU is full with 16, and memory stays small.
FRAME_BATCH = 16


def preprocess(frames: Tensor | NDArray[np.uint8], image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """SigLIP's input: resized to a square (bicubic, antialiased, aspect ratio not kept, as VILA does), -1..1.

    frames (n, H, W, 3) uint8, of torch or NumPy -> (n, 3, image_size, image_size) in ``dtype``, on the frames'
    device. Works on a few frames at a time.

    Example:
        >>> preprocess(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), 8).shape
        torch.Size([2, 3, 8, 8])
    """
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8:
        frames = torch.from_numpy(np.ascontiguousarray(frames))
    if (
        not isinstance(frames, Tensor)
        or frames.dtype != torch.uint8
        or frames.dim() != 4
        or frames.shape[-1] != 3
        or 0 in frames.shape
    ):
        raise ValueError(f"frames must be uint8 of shape (n, H, W, 3) with no side 0, got {described(frames)}")
    with stage("preprocess"):
        pixels = torch.empty(frames.shape[0], 3, image_size, image_size, dtype=dtype, device=frames.device)
        for start in range(0, frames.shape[0], FRAME_BATCH):
            part = frames[start : start + FRAME_BATCH].permute(0, 3, 1, 2).float()
            if part.shape[-2:] != (image_size, image_size):
                part = F.interpolate(part, (image_size, image_size), mode="bicubic", antialias=True).clamp_(0, 255)
            pixels[start : start + FRAME_BATCH] = part.div_(127.5).sub_(1)
        return pixels
