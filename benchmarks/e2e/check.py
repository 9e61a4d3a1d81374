"""The check that comes before a fused projector is timed end to end."""

from __future__ import annotations

import copy

from storm_model.presets import Variant
from torch import Tensor

from storm_kernels.reference import reduce_tokens
from storm_kernels.tokens import TokenGrid

from .. import harness
from ..harness import Row
from .models import Models

# The check covers as many whole frames as have at most this many tokens: all of them in storm-mini
# at 128 frames, the first 16 in storm-7b.
CHECKED_TOKENS = 4096


class ProjectorCheck:
    """Outputs of the reference projector on one video's image tokens, in float64 and in the model's
    own precision, to hold fused ones against.

    ``variant`` is any with the temporal projector. Reduction is linear, so both are made once,
    unreduced, for all variants.
    """

    def __init__(self, models: Models, variant: Variant, features: Tensor):
        self.models = models
        grid = models.config.token_grid(len(features))
        frames = max(1, min(grid.frames, CHECKED_TOKENS // grid.tokens_per_frame))
        self.grid = TokenGrid(frames, grid.height, grid.width)
        self.features = features[:frames]
        projector, all_tokens = models.unreduced_projector(variant)
        self.plain = projector(self.features[None], all_tokens)
        self.truth = copy.deepcopy(projector).double()(self.features[None].double(), all_tokens)

    def check(self, variant: Variant) -> Row:
        """The columns `error`, `error_plain` and `checked_frames` of the fused projector; raises
        `harness.CheckFailed`."""
        plain, truth = (reduce_tokens(x, self.grid, variant.reduction) for x in (self.plain, self.truth))
        result = self.models.project(variant, "fused", self.features)[None]
        what = f"fused projector of {variant.title} on {self.grid.frames} frames in {result.dtype}"
        return harness.verify(what, result, plain, truth) | {"checked_frames": self.grid.frames}
