"""Wanted frames by way of the key frames before them: each group of frames that holds some is
decoded once, up to its last wanted frame.

The frame at a time is then the one that a whole decode shows there, because a decoder that starts
at a key frame shows every frame from it on as one that came from the start of the file. Where that
is not certain, `Untrusted` sends the caller to the whole decode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from itertools import chain

import av
from av.video.frame import PictureType

from .h264 import PicturesMissing
from .index import Key, Times

Opened = tuple[av.container.InputContainer, av.VideoStream]

# A seek empties the decoder, whose threads are frames ahead: it costs as much as decoding some
# twenty frames on two cores.
WORTH_SEEKING = 20


class Untrusted(Exception):
    """The file's times do not say for certain where a frame is: decode it all."""


class Groups:
    """Frames of a file whose times are trusted.

    Args:
        opened: opens the file: with as many threads as the machine has (True), or with one (False), which tells errors
            at the packet that holds them; ``strict`` makes every oddity an error.
        times: of the file.

    Attributes: `decoded`, frames decoded so far.
    """

    def __init__(self, opened: Callable[..., AbstractContextManager[Opened]], times: Times):
        self._opened, self._times = opened, times
        self.decoded = 0

    def frames(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """The frames at the times ``wanted``, which rise; None for one that is damaged, or predicted from one that is.

        Raises:
            Untrusted: a seek does not lead to its key frame, or the decoder shows no frame at a wanted time.
        """
        # Every oddity is an error here: threads lose some of the decoder's marks, and what is odd is read again.
        with self._opened(True, strict=True) as (container, stream):
            while wanted:
                given = 0
                try:
                    for frame in self._quickly(container, stream, wanted):
                        yield wanted[given], frame
                        given += 1
                except _Doubt:
                    group = self._times.group(wanted[given])
                    within = [pts for pts in wanted[given:] if self._times.group(pts) == group]
                    yield from self._carefully(group, within)
                    given += len(within)
                wanted = wanted[given:]

    def nearest(self, pts: int) -> int | None:
        """The time of the next frame that is whole, else of the last one before; None if there is none."""
        group = self._times.group(pts)
        for later in range(group, len(self._times.keys)):
            for frame in self._whole(later):
                if frame.pts > pts:
                    return frame.pts
        for earlier in range(group, -1, -1):
            before = [frame.pts for frame in self._whole(earlier) if frame.pts < pts]
            if before:
                return before[-1]
        return None

    def shown_before_key(self) -> set[int]:
        """The times of the frames before the first key frame that the decoder does show."""
        first, shown = self._times.keys[0].pts, set()
        with self._opened(False) as (container, stream):
            for packet in container.demux(stream):
                for frame in _decoded(packet) or ():
                    if frame.pts is None or frame.pts >= first:
                        return shown
                    shown.add(frame.pts)
        return shown

    def _quickly(self, container, stream, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """From the first wanted frame on, until a seek is worth it. Raises `_Doubt` at the first sign of damage.

        A frame is held back until those are there that are decoded before it: it may be predicted from them, and only
        then is known whether they are damaged.
        """
        times, found, last, held = self._times, 0, -math.inf, []
        try:
            for frame in self._from(container, stream, times.group(wanted[0]), frozenset(wanted)):
                self.decoded += 1
                if frame.pts is None or frame.pts <= last:
                    raise Untrusted
                last, leaves = frame.pts, found and self._leaves(wanted, found)
                if frame.is_corrupt or (not leaves and frame.pts > wanted[found]):
                    raise _Doubt
                if not leaves and frame.pts == wanted[found]:
                    found += 1
                    held.append(frame)
                while held and times.is_settled(held[0].pts, last):
                    yield held.pop(0)
                if not held and found and self._leaves(wanted, found):
                    return
        except av.FFmpegError as error:
            raise _Doubt from error
        yield from held
        if not found or not self._leaves(wanted, found):
            raise _Doubt

    def _leaves(self, wanted: list[int], found: int) -> bool:
        """Whether a seek, or the end, comes after the first ``found`` of the wanted frames."""
        return found == len(wanted) or self._times.skipped(wanted[found - 1], wanted[found]) > WORTH_SEEKING

    def _from(self, container, stream, group: int, wanted: frozenset[int]) -> Iterator[av.VideoFrame]:
        """The frames from the group's key frame on; of those that nothing is predicted from, perhaps only the
        ``wanted``. Those before the key frame are left out, and errors on the way to it: pictures that are shown before
        it may be predicted from what was not decoded.
        """
        key, begun = self._times.keys[group], False
        fed: list[int | None] = []
        for packet in self._packets(container, stream, group, wanted):
            fed.append(packet.pts)
            frames = _decoded(packet)
            wrong = frames is None or any(frame.is_corrupt for frame in frames)
            if wrong and (begun or packet.pts is None or packet.pts >= key.pts or _suspect(fed, key)):
                raise _Doubt
            for frame in frames or ():
                begun = begun or not group or _begins(frame, key)
                if begun:
                    yield frame
                elif frame.pts is None or frame.pts >= key.pts:
                    raise Untrusted

    def _carefully(self, group: int, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Wanted frames of one group, one packet after the other."""
        left = set(wanted)
        for frame in self._whole(group):
            if frame.pts in left:
                left.discard(frame.pts)
                yield frame.pts, frame
        for pts in left:
            yield pts, None

    def _whole(self, group: int) -> Iterator[av.VideoFrame]:
        """The frames of a group, but those that are decoded after a damaged packet and may be predicted from it.

        Raises:
            Untrusted: see :meth:`frames`.
        """
        times, key = self._times, self._times.keys[group]
        left, held, place, damaged = set(times.within(group)), [], {}, math.inf
        begun, last = not group, -math.inf
        after = times.keys[group + 1].pts if group + 1 < len(times.keys) else math.inf
        with self._opened(False) as (container, stream):
            try:
                for packet, frame in self._steps(self._packets(container, stream, group), place):
                    if frame is None:
                        # What is shown before the key frame may be predicted from what was not decoded.
                        if packet.pts is None or packet.pts >= key.pts:
                            damaged = min(damaged, place[packet.pts])
                        elif _suspect(place, key):
                            damaged = min(damaged, place[key.pts])
                        continue
                    begun = begun or _begins(frame, key) or damaged < math.inf
                    if frame.pts is None or frame.pts <= last or (not begun and frame.pts >= key.pts):
                        raise Untrusted
                    last = frame.pts
                    if frame.is_corrupt and begun:
                        damaged = min(damaged, place[last])
                    elif frame.is_corrupt and _suspect(place, key):
                        damaged = min(damaged, place[key.pts])
                    if last in left:
                        left.discard(last)
                        held.append(frame)
                    while held and times.is_settled(held[0].pts, last):
                        if place[held[0].pts] < damaged:
                            yield held[0]
                        held.pop(0)
                    if not held and (not left or last >= after):
                        break
            except av.FFmpegError:
                damaged = min(damaged, len(place))
        yield from (frame for frame in held if place[frame.pts] < damaged)
        if left and damaged == math.inf:
            raise Untrusted

    def _packets(self, container, stream, group: int, wanted: frozenset[int] | None = None) -> Iterator[av.Packet]:
        """The packets from the group's key frame on, or from one before it. The first group is read as a whole decode
        begins: nothing was read yet. If frames are ``wanted``, the decoder may leave out those of the others that
        nothing is predicted from.

        Raises:
            Untrusted: a seek does not lead there; a packet's time is none of those that the file's header says; or
                pictures are missing, which the decoder conceals with some from before the key frame too.
        """
        times = self._times
        follows = times.sequence.follow() if times.sequence else None
        for packet in _packets_from(container, stream, times.keys[group]) if group else container.demux(stream):
            if times.listed and packet.size and not times.has(packet.pts):
                raise Untrusted
            if follows is not None and packet.size:
                try:
                    skips = follows(packet) and wanted is not None and packet.pts not in wanted
                except PicturesMissing:
                    raise Untrusted from None
                stream.codec_context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield packet

    def _steps(self, packets: Iterator[av.Packet], place: dict) -> Iterator[tuple[av.Packet, av.VideoFrame | None]]:
        """Each frame with the packet that the decoder was given last, and None for a packet in which it finds an error.
        ``place`` takes each packet's place in the order of decoding, by its time.
        """
        for number, packet in enumerate(packets):
            place.setdefault(packet.pts, number)
            frames = _decoded(packet)
            if frames is None:
                yield packet, None
            for frame in frames or ():
                self.decoded += 1
                yield packet, frame


class _Doubt(Exception):
    """Something is not as it should be: what follows is read one packet after the other."""


def _suspect(fed: Collection[int | None], key: Key) -> bool:
    """Whether an error in a picture that is shown before the key frame may be the key frame's own: the decoder of
    MPEG-4 puts the mark of one on the other. After a seek right to the key frame, such pictures have errors of their
    own.
    """
    return key.pts in fed and next(iter(fed)) != key.pts


def _packets_from(container: av.container.InputContainer, stream: av.VideoStream, key: Key) -> Iterator[av.Packet]:
    """The packets from a key frame on, or from one before it. Most formats lead right to it by the time that it is
    shown; where that leads behind it (they go by the time of decoding), the earlier time is taken.
    """
    try:
        for time in (key.pts, key.seek):
            container.seek(time, stream=stream)
            packets = container.demux(stream)
            first = next(packets)
            if first.pts is not None and first.pts <= key.pts:
                break
    except av.FFmpegError as error:  # some formats cannot
        raise Untrusted from error
    return chain([first], packets)


def _decoded(packet: av.Packet) -> list[av.VideoFrame] | None:
    """The frames that the decoder gives for a packet; None where it finds an error."""
    try:
        return packet.decode()
    except av.FFmpegError:
        return None


def _begins(frame: av.VideoFrame, key: Key) -> bool:
    """Whether decoding may begin at this frame: a picture on its own, at the key frame's time. (A
    recovery point in a stream that refreshes itself bit by bit is marked as a key frame too.)"""
    return frame.pts == key.pts and frame.key_frame and frame.pict_type == PictureType.I
