"""The two projectors: STORM's, from the library, and VILA's, which mixes nothing over time
(docs/spec.md, Projector).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import storm_kernels
from storm_kernels.profiling import stage
from storm_kernels.reference import ReferenceTemporalProjector, reduce_tokens
from storm_kernels.reference.projector import downsample, packed_grids
from storm_kernels.tokens import TokenGrid, TokenReduction

from .configuration_storm import StormConfig


class VilaProjector(nn.Module):
    """2x2 downsample, LayerNorm(4 Dv), Linear(4 Dv -> D), GELU, Linear(D -> D); each frame by itself.

    The names of its weights are VILA's: ``layers.1`` is the norm, ``layers.2`` and ``layers.4`` are
    the products, and ``layers.0``, the downsample, and ``layers.3``, the GELU, have none. A
    reduction is still possible.
    """

    def __init__(
        self,
        vision_width: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            [
                nn.Identity(),
                nn.LayerNorm(4 * vision_width, **factory),
                nn.Linear(4 * vision_width, d_model, **factory),
                nn.GELU(),
                nn.Linear(d_model, d_model, **factory),
            ]
        )

    def forward(
        self,
        features: Tensor,
        reduction: TokenReduction = TokenReduction(),
        packed: Sequence[int] | None = None,
    ) -> Tensor:
        """features (batch, T, h, w, vision_width) -> (batch, tokens, D).

        ``packed``: see :class:`storm_kernels.reference.ReferenceTemporalProjector`.
        """
        with stage("downsample"):
            blocks = downsample(features)
        with stage("mlp"):
            tokens = blocks
            for layer in self.layers:
                tokens = layer(tokens)
            tokens = tokens.flatten(1, 3)
        grid = TokenGrid(*blocks.shape[1:4])
        with stage("reduce"):
            if packed is None:
                return reduce_tokens(tokens, grid, reduction)
            grids = packed_grids(tokens, grid, packed)
            videos = tokens.split([own.tokens for own in grids], 1)
            return torch.cat([reduce_tokens(v, own, reduction) for v, own in zip(videos, grids, strict=True)], 1)


def build_projector(
    config: StormConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The projector that ``config`` names, with random weights; ``device`` and ``dtype`` are the current defaults."""
    widths = (config.vision_config.hidden_size, config.text_config.hidden_size)
    if config.projector_type == "vila":
        return VilaProjector(*widths, device=device, dtype=dtype)
    fused = config.projector_implementation == "fused"
    cls = storm_kernels.TemporalProjector if fused else ReferenceTemporalProjector
    return cls(
        *widths,
        layers=config.projector_layers,
        bidirectional=config.projector_bidirectional,
        d_state=config.projector_state,
        d_conv=config.projector_conv,
        expand=config.projector_expand,
        device=device,
        dtype=dtype,
    )
