"""Frames to image tokens: preprocessing and the SigLIP tower (arXiv 2303.15343) from transformers, with random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from storm_kernels.profiling import stage

from .config import VisionConfig

# Frames resized or encoded at a time. At 448 pixels in bfloat16 one frame's widest activation is 9 MB: a GPU is full with 16, and memory stays small.
FRAME_BATCH = 16


class VisionTower(nn.Module):
    """SigLIP up to the layer the projector reads. Neither the pooling head nor the final norm is part of it: VILA and STORM use patch tokens of an
    inner layer (:class:`model.config.VisionConfig`, ``feature_layer``)."""

    def __init__(self, tower: SiglipVisionModel, layers: int):
        super().__init__()
        tower = getattr(tower, "vision_model", tower)  # some releases of transformers nest the tower once more
        self.embeddings = tower.embeddings
        self.layers = tower.encoder.layers[:layers]

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (n, 3, S, S) -> tokens (n, h, w, width); h = w = S // patch size."""
        hidden = self.embeddings(pixels)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        side = round(hidden.shape[1] ** 0.5)
        return hidden.unflatten(1, (side, side))


def build_vision(config: VisionConfig, dtype: torch.dtype = torch.float32) -> VisionTower:
    """A tower with random weights in ``dtype``, on the current default device (``torch.device`` as a context)."""
    sizes = SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers_run,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )
    return VisionTower(SiglipVisionModel._from_config(sizes, dtype=dtype, attn_implementation="sdpa"), config.layers_run).eval()


def preprocess(frames: Tensor, image_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """SigLIP's input: resized to a square (bicubic, antialiased, aspect ratio not kept, as VILA does), scaled from 0..255 to -1..1.

    frames (n, H, W, 3) uint8 -> (n, 3, image_size, image_size) in ``dtype``, on the frames' device. Works on a few frames at a time.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 of shape (n, H, W, 3) with no side 0, got {frames.dtype} of shape {tuple(frames.shape)}")
    with stage("preprocess"):
        pixels = torch.empty(frames.shape[0], 3, image_size, image_size, dtype=dtype, device=frames.device)
        for start in range(0, frames.shape[0], FRAME_BATCH):
            part = frames[start : start + FRAME_BATCH].permute(0, 3, 1, 2).float()
            if part.shape[-2:] != (image_size, image_size):
                part = F.interpolate(part, (image_size, image_size), mode="bicubic", antialias=True).clamp_(0, 255)
            pixels[start : start + FRAME_BATCH] = part.div_(127.5).sub_(1)
        return pixels
