"""The VILA baseline's projector, which STORM is compared with (docs/spec.md, Projector)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storm_kernels.profiling import stage
from storm_kernels.reference import reduce_tokens
from storm_kernels.reference.modules import downsample
from storm_kernels.tokens import TokenGrid, TokenReduction


class BaselineProjector(nn.Module):
    """2x2 downsample, LayerNorm(4 Dv), Linear(4 Dv -> D), GELU, Linear(D -> D); each frame by itself. A reduction is still possible."""

    def __init__(self, vision_width: int, d_model: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * vision_width, **factory)
        self.proj = nn.Linear(4 * vision_width, d_model, **factory)
        self.out = nn.Linear(d_model, d_model, **factory)

    def forward(self, features: Tensor, reduction: TokenReduction = TokenReduction()) -> Tensor:
        """features (batch, T, h, w, vision_width) -> (batch, tokens, D)."""
        with stage("downsample"):
            blocks = downsample(features)
        with stage("mlp"):
            tokens = self.out(F.gelu(self.proj(self.norm(blocks))))
        with stage("reduce"):
            return reduce_tokens(tokens.flatten(1, 3), TokenGrid(*blocks.shape[1:4]), reduction)
