"""The check that comes before a fused projector is timed end to end."""

from __future__ import annotations

import copy

from storm_model.storm import VideoModel
from torch import Tensor

from storm_kernels.reference import reduce_tokens
from storm_kernels.tokens import TokenGrid, TokenReduction

from .. import harness
from ..harness import Row

# The check covers as many whole frames as have at most this many tokens: all of them in storm-mini at 128 frames, the first 16 in storm-7b.
CHECKED_TOKENS = 4096


class ProjectorCheck:
    """Outputs of the reference projector on one video's image tokens, in float64 and in the model's own precision, to hold fused ones against.

    ``reference`` has the reference form of the temporal projector. Reduction is linear, so both are made once, unreduced, for all variants.
    """

    def __init__(self, reference: VideoModel, features: Tensor):
        grid = reference.config.token_grid(features.shape[1])
        frames = max(1, min(grid.frames, CHECKED_TOKENS // grid.tokens_per_frame))
        self.grid = TokenGrid(frames, grid.height, grid.width)
        self.features = features[:, :frames]
        self.plain = reference.projector(self.features, TokenReduction())
        self.truth = copy.deepcopy(reference.projector).double()(self.features.double(), TokenReduction())

    def check(self, fused: VideoModel) -> Row:
        """The columns `error`, `error_plain` and `checked_frames`; raises `harness.CheckFailed`."""
        reduction = fused.variant.reduction
        plain, truth = (reduce_tokens(x, self.grid, reduction) for x in (self.plain, self.truth))
        result = fused.projector(self.features, reduction)
        what = f"fused projector of {fused.variant.title} on {self.grid.frames} frames in {result.dtype}"
        return harness.verify(what, result, plain, truth) | {"checked_frames": self.grid.frames}
