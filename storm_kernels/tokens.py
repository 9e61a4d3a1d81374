"""Where each token of a video sits, and which ones survive the reduction (STORM, arXiv 2503.04130, eqs. 6-8).

Sequence order is the paper's sweep: left to right, top to bottom, frame to frame: ``l = (t * height + i) * width + j``.
"""

from __future__ import annotations

from dataclasses import dataclass

# No video has a side of more than 2^31 tokens; the bound turns absurd requests into an error instead of an allocation.
_LARGEST = 2**31 - 1


def positive_int(name: str, value: object) -> int:
    """Return ``value`` if it is an integer from 1 to 2^31 - 1; otherwise raise, naming it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be between 1 and {_LARGEST}, got {value}")
    return value


@dataclass(frozen=True)
class TokenGrid:
    """A video's tokens: ``frames`` x ``height`` x ``width``. An image is a video of one frame."""

    frames: int
    height: int
    width: int

    def __post_init__(self):
        for name in ("frames", "height", "width"):
            positive_int(f"TokenGrid.{name}", getattr(self, name))

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class TokenReduction:
    """Average over blocks of ``temporal_pool`` frames and ``spatial_pool`` x ``spatial_pool`` tokens, then keep every ``temporal_stride``-th
    pooled frame, the first included (SPEC.md, Token reduction).

    A last block that is not full averages what it has: nothing is dropped, nothing padded. All ones changes nothing.
    """

    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_stride: int = 1

    def __post_init__(self):
        for name in ("temporal_pool", "spatial_pool", "temporal_stride"):
            positive_int(f"TokenReduction.{name}", getattr(self, name))

    @property
    def is_identity(self) -> bool:
        return self.temporal_pool == self.spatial_pool == self.temporal_stride == 1

    def reduced(self, grid: TokenGrid) -> TokenGrid:
        """The grid that is left: ``ceil(ceil(T/k)/s) x ceil(H/p) x ceil(W/p)``."""
        return TokenGrid(
            self._kept_groups(grid),
            -(-grid.height // self.spatial_pool),
            -(-grid.width // self.spatial_pool),
        )

    def kept(self, grid: TokenGrid) -> TokenGrid:
        """The frames that some surviving token averages, at full resolution; the others are dropped by the sampling."""
        groups = self._kept_groups(grid)
        last_start = (groups - 1) * self.temporal_stride * self.temporal_pool
        frames = (groups - 1) * self.temporal_pool + min(self.temporal_pool, grid.frames - last_start)
        return TokenGrid(frames, grid.height, grid.width)

    def kept_frames(self, grid: TokenGrid) -> list[int]:
        """Indices of the frames of :meth:`kept`, ascending."""
        return [t for t in range(grid.frames) if (t // self.temporal_pool) % self.temporal_stride == 0]

    def _kept_groups(self, grid: TokenGrid) -> int:
        pooled = -(-grid.frames // self.temporal_pool)
        return -(-pooled // self.temporal_stride)
