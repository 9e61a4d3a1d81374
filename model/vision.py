"""Pixels to image tokens: the SigLIP tower (arXiv 2303.15343) from transformers, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from .config import VisionConfig


class VisionTower(nn.Module):
    """SigLIP up to the layer the projector reads. Neither the pooling head nor the final norm is
    part of it: VILA and STORM use patch tokens of an inner layer
    (:class:`model.config.VisionConfig`, ``feature_layer``)."""

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
    return VisionTower(
        SiglipVisionModel._from_config(sizes, dtype=dtype, attn_implementation="sdpa"), config.layers_run
    ).eval()
