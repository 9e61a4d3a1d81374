"""Wanted frames by way of the key frames before them: each group of frames that holds some is
decoded once, up to its last wanted frame.

The frame at a time is then the one that a whole decode shows there, because a decoder that starts
at a key frame shows every frame from it on as one that came from the start of the file. Where that
is not certain, `Untrusted` sends the caller to the whole decode.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.video.frame import PictureType

from .containers import StormVideoError

# A seek empties the decoder, whose threads are frames ahead: it costs as much as decoding some
# twenty frames on two cores.
WORTH_SEEKING = 20


class Untrusted(Exception):
    """The file's times do not say for certain where a frame is: decode it all."""


class Key(NamedTuple):
    """A key frame: when it is shown, and the time to seek to, which is never behind it."""

    pts: int
    seek: int


class Mark(NamedTuple):
    """What an index keeps of a packet: when it is shown and decoded, in the stream's unit; whether
    it is a key frame; whether its frame is shown (an edit list leaves some out).
    """

    pts: int | None
    dts: int | None
    key: bool
    shown: bool


class Times(NamedTuple):
    """When each frame is shown, in rising order, and the key frames among them."""

    pts: list[int]
    keys: list[Key]
    unit: Fraction  # seconds

    @classmethod
    def of(cls, marks: list[Mark], unit: Fraction) -> Times | None:
        """Of a file's packets in its order; None where times are missing or doubled, or where
        frames come before the first key frame: which of those are shown only decoding tells."""
        first, marks = marks[0], [mark for mark in marks if mark.shown]
        # From the file's very first packet the decoder may start, though an edit list does not show its frame.
        begin = [first] if first.key and not first.shown else []
        keys = [
            Key(pts, pts if dts is None else min(pts, dts))
            for pts, dts, key, _ in [*begin, *marks]
            if key and pts is not None
        ]
        pts = {mark.pts for mark in marks}
        if not keys or not first.key or None in pts or len(pts) < len(marks) or min(pts) < keys[0].pts:
            return None
        return cls(sorted(pts), sorted(keys), unit)

    def group(self, pts: int) -> int:
        """Which of ``keys`` the frame at ``pts`` is reached from."""
        return bisect_right(self.keys, pts, key=lambda key: key.pts) - 1

    def skipped(self, now: int, then: int) -> int:
        """How many frames need no decoding if a seek leads from the frame at ``now`` to the key
        frame of the one at ``then``.
        """
        return bisect_left(self.pts, self.keys[self.group(then)].pts) - bisect_right(self.pts, now)


def by_groups(
    container: av.container.InputContainer, stream: av.VideoStream, times: Times, wanted: list[int], path: Path
) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames at the times ``wanted``, which rise, each with the number of frames decoded so far.

    Raises:
        Untrusted: a seek does not lead to the key frame that it should, or the decoder shows no frame at a wanted time.
        StormVideoError: a wanted frame, or one it is predicted from, is damaged.
    """
    decoded, done = 0, 0
    while done < len(wanted):
        key = times.keys[times.group(wanted[done])]
        if key is times.keys[0]:  # nothing was read yet: as a whole decode begins
            frames = container.decode(stream)
        else:
            container.seek(key.seek, stream=stream)
            frames = _from_key(container, stream, key)
        while done < len(wanted):
            try:
                frame = next(frames, None)
            except av.FFmpegError as error:
                where = f"the frame at {_seconds(times, wanted[done]):.3f} s, or one that it is predicted from"
                raise StormVideoError(f"{path}: {where}, cannot be decoded: {error.strerror}") from error
            if frame is None or frame.pts is None or frame.pts > wanted[done]:
                raise Untrusted
            decoded += 1
            if frame.pts < wanted[done]:
                continue
            if frame.is_corrupt:
                raise StormVideoError(f"{path}: the frame at {_seconds(times, wanted[done]):.3f} s is damaged")
            yield decoded, frame
            done += 1
            if done < len(wanted) and times.skipped(wanted[done - 1], wanted[done]) > WORTH_SEEKING:
                break


def _from_key(container: av.container.InputContainer, stream: av.VideoStream, key: Key) -> Iterator[av.VideoFrame]:
    """The frames from the key frame on. Those before it are left out: pictures that are shown
    before their key frame may be predicted from what was not decoded, and fail."""
    begun = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if begun:
                raise
            continue
        for frame in frames:
            begun = begun or _begins(frame, key)
            if begun:
                yield frame
            elif frame.pts is None or frame.pts >= key.pts:
                raise Untrusted


def _begins(frame: av.VideoFrame, key: Key) -> bool:
    """Whether decoding may begin at this frame: a picture on its own, at the key frame's time. (A
    recovery point in a stream that refreshes itself bit by bit is marked as a key frame too.)"""
    return frame.pts == key.pts and frame.key_frame and frame.pict_type == PictureType.I


def _seconds(times: Times, pts: int) -> float:
    return float((pts - times.pts[0]) * times.unit)
