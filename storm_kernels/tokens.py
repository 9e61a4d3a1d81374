"""Where each token of a video sits, and which ones survive the reduction (STORM, arXiv 2503.04130, eqs. 6-8).

Sequence order is the paper's sweep: left to right, top to bottom, frame to frame: ``l = (t * height
+ i) * width + j``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields

import torch

# No video has a side of more than 2^31 tokens; the bound turns absurd requests into an error
# instead of an allocation.
_LARGEST = 2**31 - 1


def positive_int(name: str, value: object) -> int:
    """``value`` as an ``int`` from 1 to 2^31 - 1; otherwise raise, naming it.

    An integer is whatever Python takes for an index (NumPy's, a tensor of one element), but no
    bool. The symbol that stands for a size while a program is traced stays one.
    """
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # stands for an int
    if type(value) is not int:
        value = integer(name, value)
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be between 1 and {_LARGEST}, got {described(value)}")
    return value


def integer(name: str, value: object) -> int:
    """``value`` as an ``int``; raise where it is none, naming it. See :func:`positive_int`."""
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # TypeError is what is asked for
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {described(value)}") from None


def described(value: object) -> str:
    """What was given for an argument, for one line of an error: a number or a short text itself, a
    tensor's or an array's shape, else the type.

    >>> described([1.0] * 1000), described(torch.ones(2, 3)), described(4)
    ('list', 'Tensor of shape (2, 3) and torch.float32', '4 of type int')
    """
    kind = type(value).__name__
    if value is None or (isinstance(value, str) and len(value) <= 60):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    # A number of NumPy's has a shape too, but a tensor may lie on a device that it takes a wait to
    # read.
    number = isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 128)
    if number or (shape == () and not isinstance(value, torch.Tensor)):
        return f"{value!r} of type {kind}"
    return (
        f"{kind} of shape {tuple(shape)} and {value.dtype}"
        if isinstance(shape, tuple) and hasattr(value, "dtype")
        else kind
    )


def _sides_as_int(record: TokenGrid | TokenReduction) -> None:
    """Bring the fields of a frozen record to `int`, or raise."""
    for field in fields(record):
        given = getattr(record, field.name)
        side = positive_int(f"{type(record).__name__}.{field.name}", given)
        if side is not given:
            object.__setattr__(record, field.name, side)


@dataclass(frozen=True)
class TokenGrid:
    """A video's tokens: ``frames`` x ``height`` x ``width``. An image is a video of one frame.

    Args:
        frames: T, a positive integer.
        height: H, tokens of a column of a frame.
        width: W, tokens of a row of a frame.

    Raises:
        TypeError: a side that is no integer, named.
        ValueError: a side that is not between 1 and 2^31 - 1, named.

    Example:
        >>> TokenGrid(frames=8, height=14, width=14).tokens
        1568
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        _sides_as_int(self)

    @property
    def tokens_per_frame(self) -> int:
        """H * W."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """L = T * H * W."""
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class TokenReduction:
    """Which of a video's tokens survive (docs/spec.md, Token reduction).

    Blocks of ``temporal_pool`` frames and ``spatial_pool`` x ``spatial_pool`` tokens are averaged; then
    every ``temporal_stride``-th pooled frame is kept, the first included. A last block that is not full
    averages what it has: nothing is dropped, nothing padded. All ones changes nothing.

    Args:
        temporal_pool: k, frames; 1 by default.
        spatial_pool: p, tokens a side; 1 by default.
        temporal_stride: s, pooled frames; 1 by default.

    Raises:
        TypeError: a size that is no integer, named.
        ValueError: a size that is not between 1 and 2^31 - 1, named.

    Source:
        STORM, arXiv 2503.04130, eqs. 6-8.

    Example:
        >>> TokenReduction(temporal_pool=4, spatial_pool=2, temporal_stride=2).reduced(TokenGrid(32, 14, 14))
        TokenGrid(frames=4, height=7, width=7)
    """

    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_stride: int = 1

    def __post_init__(self) -> None:
        _sides_as_int(self)

    @property
    def is_identity(self) -> bool:
        """Whether every token survives as it is."""
        return self.temporal_pool == self.spatial_pool == self.temporal_stride == 1

    def reduced(self, grid: TokenGrid) -> TokenGrid:
        """The grid that is left: ``ceil(ceil(T/k)/s) x ceil(H/p) x ceil(W/p)``."""
        return TokenGrid(
            self._kept_groups(grid),
            _blocks(grid.height, self.spatial_pool),
            _blocks(grid.width, self.spatial_pool),
        )

    def kept(self, grid: TokenGrid) -> TokenGrid:
        """The frames that some surviving token averages, at full resolution; the others are dropped by the sampling."""
        groups = self._kept_groups(grid)
        last_start = (groups - 1) * self.temporal_stride * self.temporal_pool
        # A traced program whose number of frames is a symbol would be bound to the side that `min`
        # takes.
        last = torch.sym_min(self.temporal_pool, grid.frames - last_start)
        return TokenGrid((groups - 1) * self.temporal_pool + last, grid.height, grid.width)

    def leaves_out(self, grid: TokenGrid) -> bool:
        """Whether the frames that the sampling drops are to be left out of what need not know them.

        Not from an exported program for any number of frames: that the number of :meth:`kept` fits
        for all of them is more than torch.export proves.
        """
        return self.temporal_stride != 1 and not (
            torch.compiler.is_exporting() and isinstance(grid.frames, torch.SymInt)
        )

    def kept_frames(self, grid: TokenGrid) -> list[int]:
        """Indices of the frames of :meth:`kept`, ascending."""
        return self.kept_index(grid).tolist()

    def kept_index(self, grid: TokenGrid, device: torch.device | None = None) -> torch.Tensor:
        """The same as a tensor, (frames,) int64."""
        position = torch.arange(self.kept(grid).frames, dtype=torch.int64, device=device)
        group, within = position // self.temporal_pool, position % self.temporal_pool
        return group * (self.temporal_pool * self.temporal_stride) + within

    def _kept_groups(self, grid: TokenGrid) -> int:
        return _blocks(_blocks(grid.frames, self.temporal_pool), self.temporal_stride)


def placed(
    length: int, grid: object, reduction: object, cu_seqlens: object = None
) -> tuple[TokenGrid | None, TokenReduction | None]:
    """(grid, reduction) if there is something to reduce, else (None, None); raise unless the grid
    holds ``length`` tokens.
    """
    reduction = reducing(reduction)
    if grid is not None and not isinstance(grid, TokenGrid):
        raise TypeError(f"grid must be a TokenGrid, got {described(grid)}")
    if grid is not None and grid.tokens != length:
        raise ValueError(f"grid must hold the sequence's {length} tokens, got {grid} with {grid.tokens}")
    if reduction is None:
        return None, None
    if grid is None:
        raise ValueError(f"grid must be given with a reduction, got None with {reduction}")
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens and reduction cannot be combined; reduce each sequence afterwards, got {reduction}"
        )
    return grid, reduction


def reducing(reduction: object) -> TokenReduction | None:
    """``reduction``, or None where it changes nothing; raise unless it is a TokenReduction or None."""
    if reduction is not None and not isinstance(reduction, TokenReduction):
        raise TypeError(f"reduction must be a TokenReduction, got {described(reduction)}")
    return None if reduction is None or reduction.is_identity else reduction


def _blocks(side: int, size: int) -> int:
    """ceil(side / size). Nothing negative is divided: in an ONNX model the quotient of a size is
    rounded towards zero.
    """
    return (side + size - 1) // size
