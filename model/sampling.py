"""Which frames of a video to take: so many at even distances in time, so many a second, or those at given times."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from numbers import Real

from storm_kernels.tokens import described, positive_int

from .configuration_storm import check_frames

# Times are compared in seconds; a frame's own time, computed in two ways, differs by less.
_NEAR = 1e-9


def choose(
    seconds: Sequence[float],
    end_of_last: float,
    n: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    at: Iterable[float] | None = None,
) -> tuple[tuple[int, ...], bool]:
    """The numbers of the chosen frames, in order, and whether the clip had to be looped for as many.

    Args:
        seconds: when each frame is shown, rising.
        end_of_last: when the last one's time is over, in seconds.
        n, fps, max_frames, start, end, at: see :func:`storm_model.video.sample_frames`.

    Raises:
        TypeError, ValueError: they name the argument.

    Example:
        >>> choose([0.0, 0.5, 1.0, 1.5], 2.0, 2)
        ((0, 3), False)
        >>> choose([0.0, 0.5, 1.0, 1.5], 2.0, fps=1)
        ((0, 2), False)
    """
    given = [name for name, value in (("n", n), ("fps", fps), ("at", at)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of n, fps and at, got {' and '.join(given) or 'none of them'}")
    if at is not None:
        if start is not None or end is not None or max_frames is not None:
            raise ValueError("at names the times itself: start, end and max_frames do not go with it")
        return tuple(_shown_at(seconds, end_of_last, _time("at", t)) for t in at), False
    first, last = _window(seconds, end_of_last, start, end)
    if n is not None:
        if max_frames is not None:
            raise ValueError(f"max_frames goes with fps, not with n = {n}")
        check_frames(n)
        if n > last - first + 1:
            return tuple(first + i % (last - first + 1) for i in range(n)), True
        return _even(seconds, first, last, n), False
    rate = _time("fps", fps)
    if rate <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    begin = seconds[first] if start is None else max(start, seconds[first])
    until = end_of_last if end is None else min(end, end_of_last)
    count = check_frames(max(1, math.ceil((until - begin) * rate - _NEAR)))
    if max_frames is not None and count > positive_int("max_frames", max_frames):
        return _even(seconds, first, last, max_frames), False
    return tuple(bisect_right(seconds, begin + k / rate + _NEAR) - 1 for k in range(count)), False


def _even(seconds: Sequence[float], first: int, last: int, n: int) -> tuple[int, ...]:
    """What is shown at ``n`` even distances in time from frame ``first`` to frame ``last``, both included."""
    step = (seconds[last] - seconds[first]) / max(n - 1, 1)
    return tuple(bisect_right(seconds, seconds[first] + i * step + _NEAR) - 1 for i in range(n))


def _window(seconds: Sequence[float], end_of_last: float, start: float | None, end: float | None) -> tuple[int, int]:
    """The first and the last frame of which something is shown between ``start`` and ``end``."""
    begin, until = _time("start", start or 0.0), end_of_last if end is None else _time("end", end)
    if begin >= end_of_last:
        raise ValueError(f"start must be before the end of the video, {end_of_last:.3f} s, got {start}")
    if until <= begin:
        raise ValueError(f"end must be after start = {begin}, got {end}")
    return max(0, bisect_right(seconds, begin + _NEAR) - 1), max(0, bisect_left(seconds, until - _NEAR) - 1)


def _shown_at(seconds: Sequence[float], end_of_last: float, t: float) -> int:
    if t > end_of_last + _NEAR:
        raise ValueError(f"at must be at most the video's {end_of_last:.3f} s, got {t}")
    return max(0, bisect_right(seconds, t + _NEAR) - 1)


def _time(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number{' of seconds' * (name != 'fps')}, got {described(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(value)
