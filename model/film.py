"""A film that FFmpeg reads (PyAV): indexed in one pass over its packets, then frames by way of its
key frames (seeking.py), or by decoding all where its times cannot be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.stream import Disposition
from torch import Tensor

from . import frames as limits
from .containers import StormVideoError, checked_container
from .display import Turn
from .frames import Store, VideoInfo, check_sides
from .seeking import Mark, Times, Untrusted, by_groups

# Titles in another encoding than UTF-8 are no reason to refuse a file. PyAV 19 has no such argument
# and needs none.
_ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

# Packets that are decoded at most to see a first frame: its matrix says how large frames are shown.
_TRIED = 64


class First(NamedTuple):
    """What the first frame says of all: its sides as shown, in pixels."""

    height: int
    width: int


class Film:
    """One video track of a file.

    Args:
        path: of the file.
        track: which of its video tracks, from 0, pictures of covers not counted; None is the one a player shows.

    Attributes: `info`; `seconds`, when each frame is shown; `end`, when the last one's time is over.
    """

    def __init__(self, path: Path, track: int | None = None):
        self._path, self._track = path, track
        self._kind = checked_container(path)
        self._turns: dict[int, Turn] = {}
        with self._opened() as (container, stream):
            stream.codec_context.thread_count = 1  # one frame is decoded here
            marks, first, last = _index(stream, self._turns)
            stored = self._stored(container, stream, len(marks))
            frames = sum(mark.shown for mark in marks)
            if frames == 0:
                raise StormVideoError(f"{path}: the video stream has no frames")
            self._times = Times.of(marks, stream.time_base)
            height, width = first or (stream.codec_context.height, stream.codec_context.width)
            check_sides(path, width, height)
            fps = _rate(path, container, stream, frames)
        if self._times is None:
            self.seconds, last = [i / fps for i in range(frames)], 0
        else:
            self.seconds = [float((pts - self._times.pts[0]) * self._times.unit) for pts in self._times.pts]
        self.end = self.seconds[-1] + (float(last) or 1 / fps)
        self.info = VideoInfo(path, width, height, frames, fps, self.end, stored)

    def read(self, indices: tuple[int, ...], size: tuple[int, int] | None, verify: bool) -> tuple[Tensor, int]:
        """The frames ``indices``: (n, height, width, 3) uint8, and how many were decoded for them."""
        try:
            if verify or self._times is None:
                raise Untrusted
            return self._by_groups(indices, size)
        except Untrusted:
            return self._decoded_whole(indices, size), self.info.frames

    def _by_groups(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> tuple[Tensor, int]:
        store = Store(self.info, indices, size, self._turns)
        numbers = {self._times.pts[index]: index for index in store.places}
        with self._opened() as (container, stream):
            decoded = 0
            for count, frame in by_groups(container, stream, self._times, sorted(numbers), self.info.path):
                store.put(numbers[frame.pts], frame)
                decoded = count
        return store.frames, decoded

    def _decoded_whole(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Tensor:
        """Decode the whole file, keep the frames of ``indices``: (n, height, width, 3) uint8."""
        info, store, decoded = self.info, Store(self.info, indices, size, self._turns), 0
        with self._opened() as (container, stream):
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

    @contextmanager
    def _opened(self, **options: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        """The container and its video track. The demuxer is named, so that no playlist or text is taken for a video."""
        strict = {"max_pixels": str(limits.MAX_PIXELS), "err_detect": "explode"}
        try:
            with av.open(
                str(self._path.absolute()), format=self._kind.demuxer, options={**options, **strict}, **_ANY_TITLE
            ) as container:
                stream = _video_track(self._path, container, self._track)
                if stream.codec_context is None:
                    raise StormVideoError(f"{self._path}: this build of FFmpeg has no decoder for its video stream")
                stream.codec_context.options = strict
                stream.thread_type = "AUTO"
                yield container, stream
        except av.FFmpegError as error:
            raise StormVideoError(f"{self._path}: cannot be read as a video: {error.strerror}") from error

    def _stored(self, container: av.container.InputContainer, stream: av.VideoStream, found: int) -> int:
        """How many frames the file holds; an error where the container declares other frames than it holds."""
        kind, strangers = self._kind, self._kind.fragments.keys() - {s.id for s in container.streams}
        if strangers:
            raise StormVideoError(
                f"{self._path}: corrupt, fragments of tracks {sorted(strangers)}, which the file does not have"
            )
        blocks = kind.blocks and kind.blocks[container.streams.video.index(stream)]
        declared = stream.frames + kind.fragments.get(stream.id, 0) if kind.blocks is None else blocks
        if found != declared and kind.demuxer == "mov":
            # An edit list leaves frames out, or shows them again: without it, all are there.
            with self._opened(ignore_editlist="1") as (whole, track):
                found = sum(packet.size > 0 for packet in whole.demux(track))
        if found != declared:
            raise StormVideoError(f"{self._path}: the file declares {declared} frames but holds {found}")
        return found


def _video_track(path: Path, container: av.container.InputContainer, track: int | None) -> av.VideoStream:
    """The video track number ``track``; by default the first that is marked as the default one, or the first."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [s for s in container.streams.video if not s.disposition & pictures]
    if not tracks:
        others = [s.type for s in container.streams if s not in container.streams.video]
        cover = "only a cover picture" * bool(container.streams.video)
        held = " and ".join(filter(None, (str(others) if others else "", cover)))
        raise StormVideoError(f"{path}: no video stream; it holds {held or 'nothing'}")
    if track is None:
        return next((s for s in tracks if s.disposition & Disposition.default), tracks[0])
    if track >= len(tracks):
        raise ValueError(f"track must be less than {len(tracks)}, the number of video tracks of {path}, got {track}")
    return tracks[track]


def _index(stream: av.VideoStream, turns: dict[int, Turn]) -> tuple[list[Mark], First | None, Fraction]:
    """A mark of each packet, what the first frame that can be decoded says, and the seconds that the last is shown."""
    hides = stream.codec_context.name == "vp8"
    marks, first, last = [], None, (-math.inf, 0)
    for packet in stream.container.demux(stream):
        if not packet.size:
            continue
        mark = Mark(
            packet.pts, packet.dts, packet.is_keyframe, not packet.is_discard and not (hides and hidden(packet))
        )
        marks.append(mark)
        if mark.shown and mark.pts is not None and mark.pts > last[0]:
            last = mark.pts, packet.duration or 0
        if first is None and len(marks) <= _TRIED:
            first = _first(packet, stream, turns)
    return marks, first or _first(None, stream, turns), last[1] * stream.time_base


def _rate(path: Path, container: av.container.InputContainer, stream: av.VideoStream, frames: int) -> float:
    """Frames a second, on average."""
    whole = float((container.duration or 0) / av.time_base)  # of the longest stream
    fps = float(stream.average_rate) if stream.average_rate else frames / whole if whole else 0.0
    if fps <= 0:
        raise StormVideoError(f"{path}: the file declares neither a frame rate nor a duration")
    return fps


def _first(packet: av.Packet | None, stream: av.VideoStream, turns: dict[int, Turn]) -> First | None:
    """The first frame that comes out of the decoder after ``packet``; None is the end of them all."""
    try:
        frames = stream.codec_context.decode(packet)
    except av.FFmpegError:  # told if the frame is asked for
        return None
    return First(*Turn.of(frames[0], turns).sides(frames[0].height, frames[0].width)) if frames else None


def hidden(packet: av.Packet) -> bool:
    """Whether a packet of VP8 becomes no frame (RFC 6386, 9.1, show_frame). Those of other codecs all do."""
    return not bytes(packet)[0] & 0x10
