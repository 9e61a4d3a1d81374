"""The index of a film's frames: when each is shown and decoded, and which are key frames. It comes of one pass over the
packets, or, much faster, of the header of an MP4 file.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from .display import Turn
from .h264 import Sequence
from .mp4_samples import Samples

# A time that a packet does not have, as FFmpeg writes it (AV_NOPTS_VALUE).
NO_TIME = -(2**63)

# Packets that are decoded at most to see a first frame: its matrix says how large frames are shown.
_TRIED = 64

# Entries of FFmpeg's own index that a file's sample table is held against, beside the first and the last.
_COMPARED = 1024


class First(NamedTuple):
    """What the first frame says of all: its sides in pixels, as shown."""

    height: int
    width: int


class Index(NamedTuple):
    """The packets of a video track, in the file's order; times in the stream's unit."""

    pts: NDArray[np.int64]  # when it is shown, or `NO_TIME`
    dts: NDArray[np.int64]  # when it is decoded, or `NO_TIME`
    key: NDArray[np.bool_]  # a key frame
    shown: NDArray[np.bool_]  # its frame is shown: an edit list leaves some out
    first: First | None  # None if none can be decoded
    last: Fraction  # seconds that the frame that is shown last is shown
    listed: bool  # the file's header says so; no packet but the first few was read


class Key(NamedTuple):
    """A key frame: when it is shown, and the time to seek to, which is never behind it."""

    pts: int
    seek: int


class Times(NamedTuple):
    """When each frame is shown, in rising order, and the key frames among them."""

    pts: NDArray[np.int64]
    keys: list[Key]
    unit: Fraction  # seconds
    settled: NDArray[np.int64]  # of each frame, when the last one is shown that is decoded before it, or it itself
    sequence: Sequence | None  # where pictures say whether others are predicted from them
    listed: bool  # the file's header says so; no packet was read

    @classmethod
    def of(cls, index: Index, unit: Fraction, sequence: Sequence | None) -> Times | None:
        """Of a file's index; None where times are missing, doubled or run backwards, or there is no key frame."""
        pts, dts, timed = index.pts[index.shown], index.dts[index.shown], index.pts != NO_TIME
        keyed = index.key & timed & index.shown
        # From the file's very first packet the decoder may start, though an edit list does not show its frame.
        keyed[:1] = index.key[:1] & timed[:1]
        keys = [
            Key(shown, shown if decoded == NO_TIME else min(shown, decoded))
            for shown, decoded in zip(index.pts[keyed].tolist(), index.dts[keyed].tolist(), strict=True)
        ]
        order, decoded = pts.argsort(kind="stable"), dts[dts != NO_TIME]
        rising = pts[order]
        if not keys or not timed[index.shown].all() or (np.diff(rising) == 0).any() or (np.diff(decoded) < 0).any():
            return None
        return cls(rising, sorted(keys), unit, np.maximum.accumulate(pts)[order], sequence, index.listed)

    def without(self, pts: NDArray[np.int64]) -> Times:
        """Less the frames at the times ``pts``."""
        kept = ~np.isin(self.pts, pts)
        return self._replace(pts=self.pts[kept], settled=self.settled[kept])

    @property
    def doubtful(self) -> NDArray[np.int64]:
        """The times of the frames before the first key frame: which of those are shown only decoding tells."""
        return self.pts[: self.number(self.keys[0].pts)]

    def number(self, pts: int) -> int:
        """How many frames are shown before ``pts``: the number of the one that is shown then."""
        return int(self.pts.searchsorted(pts))

    def has(self, pts: int | None) -> bool:
        """Whether a frame is shown at ``pts``."""
        return pts is not None and self.pts[self.number(pts) :][:1].tolist() == [pts]

    def seconds(self) -> list[float]:
        """When each frame is shown, from the first one on."""
        return ((self.pts - self.pts[0]).astype(float) * self.unit.numerator / self.unit.denominator).tolist()

    def is_settled(self, pts: int, last: int) -> bool:
        """Whether, once the frame at ``last`` is there, those are that are decoded before the one at ``pts``."""
        return bool(self.settled[self.number(pts)] <= last)

    def group(self, pts: int) -> int:
        """Which of ``keys`` the frame at ``pts`` is reached from."""
        return max(0, bisect_right(self.keys, pts, key=lambda key: key.pts) - 1)

    def within(self, group: int) -> list[int]:
        """The times of a group's frames; what comes before the first key frame belongs to the first group."""
        begin = self.number(self.keys[group].pts) if group else 0
        end = self.number(self.keys[group + 1].pts) if group + 1 < len(self.keys) else None
        return self.pts[begin:end].tolist()

    def skipped(self, now: int, then: int) -> int:
        """How many frames need no decoding if a seek leads from the frame at ``now`` to the key
        frame of the one at ``then``.
        """
        return self.number(self.keys[self.group(then)].pts) - self.number(now) - 1


def by_packets(stream: av.VideoStream, turns: dict[int, Turn]) -> Index:
    """One pass over all packets; the first few are decoded until there is a frame. ``turns`` takes its turn."""
    hides = stream.codec_context.name == "vp8"
    rows, first, last = [], None, (-math.inf, 0)
    for packet in stream.container.demux(stream):
        if not packet.size:
            continue
        pts, shown = packet.pts, not packet.is_discard and not (hides and hidden(packet))
        dts = NO_TIME if packet.dts is None else packet.dts
        rows.append((NO_TIME if pts is None else pts, dts, packet.is_keyframe, shown))
        if shown and pts is not None and pts > last[0]:
            last = pts, packet.duration or 0
        if first is None and len(rows) <= _TRIED:
            first = _first(packet, stream, turns)
    pts, dts, key, shown = np.array(rows, np.int64).reshape(-1, 4).T
    first = first or _first(None, stream, turns)
    return Index(pts, dts, key.astype(bool), shown.astype(bool), first, last[1] * stream.time_base, False)


def by_samples(stream: av.VideoStream, turns: dict[int, Turn], table: Samples) -> Index | None:
    """From the sample table of the file's header; None where FFmpeg's index or first packets are not as it says.

    FFmpeg's index has no times of showing, and it takes a while to read all of it: entries all over it are compared,
    key frames first.
    """
    entries, keys, count = stream.index_entries, np.flatnonzero(table.key), len(table.dts)
    if len(entries) != count or stream.codec_context.name == "vp8":
        return None
    head, first = [], None
    for packet in stream.container.demux(stream):
        head.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard, not packet.size))
        first = _first(packet, stream, turns)
        if first is not None or len(head) >= min(_TRIED, count):
            break
    if first is None or None in head[0][:2]:
        return None
    dts = table.dts + (head[0][1] - table.dts[0])
    pts = table.pts + (head[0][0] - table.pts[0])
    said = zip(pts.tolist(), dts.tolist(), table.key.tolist(), strict=True)
    if any(packet != (*row, False, False) for packet, row in zip(head, said, strict=False)):
        return None
    spread = [np.linspace(0, len(numbers) - 1, _COMPARED).astype(int) for numbers in (keys, table.dts)]
    for number in {*keys[spread[0]].tolist(), *spread[1].tolist()}:
        entry = entries[number]
        found = entry.timestamp, entry.is_keyframe, entry.is_discard
        if found != (dts[number], table.key[number], False) or entry.size <= 0:
            return None
    return Index(pts, dts, table.key, np.ones(count, bool), first, table.last * stream.time_base, True)


def _first(packet: av.Packet | None, stream: av.VideoStream, turns: dict[int, Turn]) -> First | None:
    """The first frame that comes out of the decoder after ``packet``; None is the end of them all."""
    try:
        frames = stream.codec_context.decode(packet)
    except av.FFmpegError:  # told if the frame is asked for
        return None
    if not frames:
        return None
    return First(*Turn.of(frames[0], turns).sides(frames[0].height, frames[0].width))


def hidden(packet: av.Packet) -> bool:
    """Whether a packet of VP8 becomes no frame (RFC 6386, 9.1, show_frame). Those of other codecs all do."""
    return not bytes(packet)[0] & 0x10
