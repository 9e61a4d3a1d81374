"""How a decoded frame has to be turned and mirrored to be shown: its display matrix, of the file's
header (tkhd box, Matroska's projection) or of the frame itself (SEI), whichever FFmpeg finds.
"""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from storm_kernels.callers import warn_caller

# A matrix whose axes are this near to quarter turns is one: its numbers are rounded.
_NEAR = 0.0175  # tangent of one degree


class Turn(NamedTuple):
    """Rows and columns exchanged, then columns and rows reversed."""

    transposed: bool = False
    columns: bool = False
    rows: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame, known: dict[int, Turn]) -> Turn:
        """Of a decoded frame; nothing is turned where it carries no matrix.

        ``known`` keeps the turn of each angle of one video. PyAV ties a frame whose side data was read to them in a
        circle, and its memory stays until Python looks for such circles: one frame of each angle is enough.
        """
        angle = frame.rotation
        if angle not in known:
            named = {data.type.name: bytes(data) for data in frame.side_data}
            matrix = named.get("DISPLAYMATRIX")
            known[angle] = cls() if matrix is None else cls.by(np.frombuffer(matrix, np.int32).tolist())
        return known[angle]

    @classmethod
    def by(cls, matrix: list[int]) -> Turn:
        """Of a 3x3 matrix (ISO/IEC 14496-12, 8.3.2), row by row: the stored point (x, y), y downwards, is shown
        at (a x + c y, b x + d y) with a, b = matrix[0:2] and c, d = matrix[3:5].

        Only quarter turns and mirrors are applied. Another angle is told by a warning, and the frame left as it is.
        Scales and shifts have no meaning for one picture alone.

        Example:
            >>> Turn.by([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])  # a quarter turn clockwise
            Turn(transposed=True, columns=True, rows=False)
        """
        a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
        if a and d and abs(b) <= _NEAR * abs(a) and abs(c) <= _NEAR * abs(d):
            return cls(False, a < 0, d < 0)
        if b and c and abs(a) <= _NEAR * abs(b) and abs(d) <= _NEAR * abs(c):
            return cls(True, c < 0, b < 0)
        if a * d != b * c:
            warn_caller(
                f"the display matrix ({a}, {b}, {c}, {d}) / 65536 is no quarter turn: frames are given as stored"
            )
        return cls()

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the turn, or before it: it is its own inverse for them."""
        return (width, height) if self.transposed else (height, width)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A picture (height, width, ...) turned: a view of it."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.rows else 1, :: -1 if self.columns else 1]
