"""A film that FFmpeg reads (PyAV): indexed in one pass over its packets, then frames by way of its
key frames (seeking.py), or by decoding all where its times cannot be trusted (played.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

from storm_kernels.callers import warn_caller

from . import frames as limits
from .containers import Container, StormVideoError, checked_container
from .display import Turn
from .frames import Read, Store, VideoInfo, check_sides
from .h264 import Sequence
from .index import Index, Times, by_packets, by_samples
from .mp4_samples import samples
from .played import faults, played
from .seeking import Groups, Opened, Untrusted
from .source import Source

# Titles in another encoding than UTF-8 are no reason to refuse a file. PyAV 19 has no such argument
# and needs none.
ANY_TITLE = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

# FFmpeg's demuxers of files that hold video. Others are left out: playlists, which name other files, devices, and those
# that take any text or noise for pictures.
_DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,asf_o,ogg,h264,hevc,vvc,av1,obu,ivf,mxf,nut,m4v,h263,h261,"
    "vc1,dv,gxf,wtv,rm,yuv4mpegpipe,swf,nuv,nsv,smjpeg,flic,roq,dhav"
)

# Codecs whose decoders tell damage as an error only where any oddity is one. Elsewhere that would be too much: pictures
# that play well would be refused.
_STRICT = {"mjpeg", "hevc"}

# Codecs that are decoded with one thread: with more, FFmpeg loses the marks of damaged pictures of some, and gives
# other pictures of VP8 where a reference is missing.
_ONE_THREAD = {"mpeg1video", "mpeg2video", "mpeg4", "vp8"}


class Film:
    """One video track of a file.

    Args:
        source: the file.
        track: which of its video tracks, from 0, pictures of covers not counted; None is the one a player shows.
        nearest: whether a file that is cut off, and damaged frames, are told by a warning; else they are errors.

    Attributes: `info`; `seconds`, when each frame is shown; `end`, when the last one's time is over.
    """

    def __init__(self, source: Source, track: int | None = None, nearest: bool = False):
        self._source, self._track, self._nearest = source, track, nearest
        self._turns: dict[int, Turn] = {}
        self._held = self._checked_container()
        self._times, self._faults = self._indexed(), {}
        if self._times is None:
            self._play()
        else:
            self._set(self._times.seconds(), float(self._last))

    def _indexed(self) -> Times | None:
        """Learn of the frames without decoding them; their times, if they can be trusted."""
        with self._opened(False) as (container, stream):
            table = None
            if self._held and self._held.kind == "mp4":
                with self._source.opened() as file:
                    table = samples(self.name, file, stream.id, len(stream.index_entries))
            index = table and by_samples(stream, self._turns, table)
            times = index and self._learned(container, stream, index)
        if index is None:
            with self._opened(False) as (container, stream):
                times = self._learned(container, stream, by_packets(stream, self._turns))
        if times is not None and times.doubtful.size:
            shown = Groups(self._opened, times).shown_before_key()
            times = times.without(np.setdiff1d(times.doubtful, list(shown)))
        return times

    def _learned(self, container: av.container.InputContainer, stream: av.VideoStream, index: Index) -> Times | None:
        count, first = len(index.pts), index.first
        self._stored = self._count(container, stream, count)
        if not index.shown.any():
            raise StormVideoError(f"{self.name}: the video stream has no frames")
        height, width = first or (stream.codec_context.height, stream.codec_context.width)
        check_sides(self.name, width, height)
        self._sides, self._aspect = (height, width), stream.sample_aspect_ratio or Fraction(1)
        self._rate, self._last = _rate(container, stream, count), index.last
        told = stream.codec_context.name == "h264"
        return Times.of(index, stream.time_base, Sequence.of(stream.codec_context.extradata) if told else None)

    @property
    def name(self) -> str:
        return self._source.name

    def read(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Read:
        """The frames ``indices``.

        Raises:
            StormVideoError: one of them is damaged (with ``nearest``: all of the file is).
            Untrusted: the file's times turn out not to be true. The frames have other numbers now: choose again.
        """
        try:
            return self._by_groups(indices, size) if self._times else self._by_playing(indices, size)
        except Untrusted:
            self._play()
            raise

    def findings(self, progress: Callable[[int], object]) -> Iterator[str]:
        """What is wrong with the file, all of it; a line each. ``progress`` is told the number of decoded frames."""
        try:
            with self._source.opened() as file:
                checked_container(self.name, file)
        except StormVideoError as error:
            yield str(error)
        count, told = 0, ""
        with self._opened(False, strict=True) as opened:
            for shown in played(opened):
                if shown.fault and shown.fault != told:
                    at = "" if shown.seconds is None else f", at {shown.seconds:.3f} s in the file"
                    yield f"{self.name}: frame {count} of {self.info.frames}{at}, is damaged: {shown.fault}"
                told = shown.fault
                count += 1
                progress(count)
        if count != self.info.frames:
            yield f"{self.name}: the file holds {self.info.frames} frames, but {count} can be decoded"

    def _by_groups(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Read:
        times, groups = self._times, Groups(self._opened, self._times)
        store = Store(self.info, indices, size, self._turns)
        left, replaced = {int(times.pts[index]): [index] for index in store.places}, {}
        while left:
            damaged = {}
            for pts, frame in groups.frames(sorted(left)):
                for number in left[pts]:
                    if frame is None:
                        damaged[number] = pts
                    else:
                        store.put(number, frame)
            left = {}
            for number, pts in damaged.items():
                near = groups.nearest(pts) if self._nearest else None
                replaced[number] = self._instead(number, None if near is None else times.number(near))
                left.setdefault(near, []).append(number)
        return Read(store.frames, groups.decoded, replaced)

    def _by_playing(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Read:
        """Decode from the beginning to the last wanted frame."""
        whole = [number for number in range(self.info.frames) if number not in self._faults]
        store, replaced, given = Store(self.info, indices, size, self._turns), {}, {}
        for number in store.places:
            if number in self._faults:
                near = min(whole, key=lambda w: (w < number, abs(w - number)), default=None) if self._nearest else None
                replaced[number] = self._instead(number, near)
            given.setdefault(replaced.get(number, number), []).append(number)
        decoded, last = 0, max(given)
        with self._opened(not self._faults) as opened:
            # Where nothing is damaged, every error is one of the pictures that nobody sees before the first.
            seen = (shown for shown in played(opened) if self._faults or shown.frame is not None)
            for place, shown in enumerate(seen):
                decoded += shown.frame is not None
                for number in given.get(place, ()):
                    store.put(number, shown.frame)
                if place == last:
                    break
        return Read(store.frames, decoded, replaced)

    def _instead(self, number: int, near: int | None) -> int:
        """The frame that is given in place of a damaged one; an error where there is none, or none is asked for."""
        said = f"{self.name}: the frame at {self.seconds[number]:.3f} s, or one that it is predicted from, is damaged"
        if number in self._faults:
            said += f" ({self._faults[number]})"
        if not self._nearest:
            raise StormVideoError(f"{said}; on_error='nearest' takes the next whole one")
        if near is None:
            raise StormVideoError(f"{said}, and there is no whole one")
        warn_caller(f"{said}: the one at {self.seconds[near]:.3f} s is taken")
        return near

    def _play(self) -> None:
        """Learn from a whole decode which frames are shown, and when."""
        self._times = None
        with self._opened(False) as opened:
            shown = [one._replace(frame=None) for one in played(opened)]
        self._faults = faults(shown)
        if len(self._faults) == len(shown):
            fault = next(iter(self._faults.values()), "the video stream has no frames")
            raise StormVideoError(f"{self.name}: no frame can be decoded: {fault}")
        seconds = [one.seconds for one in shown]
        if None in seconds or any(b <= a for a, b in zip(seconds, seconds[1:], strict=False)):
            seconds = [i / self._rate for i in range(len(shown))]
        self._set([t - seconds[0] for t in seconds], 0.0)

    def _set(self, seconds: list[float], last: float) -> None:
        """Take the frames' times, and the duration of the last one where it is known."""
        self.seconds, self.end = seconds, seconds[-1] + (last or 1 / self._rate)
        height, width = self._sides
        self.info = VideoInfo(self.name, width, height, len(seconds), self._rate, self.end, self._stored, self._aspect)

    def _checked_container(self) -> Container | None:
        """What the container says of its frames; None where it says that it is cut off, which was told."""
        try:
            with self._source.opened() as file:
                return checked_container(self.name, file)
        except StormVideoError as error:
            if not self._nearest:
                raise
            warn_caller(f"{error}; what there is of it is read")
            return None

    @contextmanager
    def _opened(self, threads: bool, strict: bool = False, **options: str) -> Iterator[Opened]:
        """The container and its video track, decoded with as many threads as there are processors, or with one.
        ``strict`` makes every oddity an error.
        """
        options = {"format_whitelist": _DEMUXERS, "max_pixels": str(limits.MAX_PIXELS), **options}
        try:
            with av.open(self._source.for_ffmpeg, options=options, **ANY_TITLE) as container:
                stream = _video_track(self.name, container, self._track, self._held and self._held.blocks)
                if stream.codec_context is None:
                    raise StormVideoError(f"{self.name}: this build of FFmpeg has no decoder for its video stream")
                checks = "crccheck+explode" if strict or stream.codec_context.name in _STRICT else "crccheck"
                stream.codec_context.options = {"max_pixels": str(limits.MAX_PIXELS), "err_detect": checks}
                threads = threads and stream.codec_context.name not in _ONE_THREAD
                stream.thread_type = "AUTO" if threads else "NONE"
                if not threads:
                    stream.codec_context.thread_count = 1
                yield container, stream
        except av.FFmpegError as error:
            raise StormVideoError(f"{self.name}: cannot be read as a video: {error.strerror}") from error

    def _count(self, container: av.container.InputContainer, stream: av.VideoStream, found: int) -> int:
        """How many frames the file holds; an error where the container declares other frames than it holds."""
        held = self._held
        if held is None or held.kind not in ("mp4", "matroska"):
            return found
        strangers = held.fragments.keys() - {s.id for s in container.streams}
        if strangers:
            raise StormVideoError(
                f"{self.name}: corrupt, fragments of tracks {sorted(strangers)}, which the file does not have"
            )
        if held.blocks is None:
            declared = stream.frames + held.fragments.get(stream.id, 0)
        else:
            declared = held.blocks[container.streams.video.index(stream)]
        if found != declared and held.kind == "mp4":
            # An edit list leaves frames out, or shows them again: without it, all are there.
            with self._opened(False, ignore_editlist="1") as (whole, track):
                found = sum(packet.size > 0 for packet in whole.demux(track))
        if found != declared:
            said = f"{self.name}: the file declares {declared} frames but holds {found}"
            if not self._nearest:
                raise StormVideoError(said)
            warn_caller(f"{said}; those are read")
        return found


def _video_track(
    name: str, container: av.container.InputContainer, track: int | None, held: list[int] | None
) -> av.VideoStream:
    """The video track number ``track``; by default the first that is marked as the default one, or the first. Those
    that are known to be empty (``held``: frames of each video track) are the last choice.
    """
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [s for s in container.streams.video if not s.disposition & pictures]
    if not tracks:
        others = [s.type for s in container.streams if s not in container.streams.video]
        cover = "only a cover picture" * bool(container.streams.video)
        held = " and ".join(filter(None, (str(others) if others else "", cover)))
        raise StormVideoError(f"{name}: no video stream; it holds {held or 'nothing'}")
    if track is None:
        empty = {s.index for s, frames in zip(container.streams.video, held or (), strict=False) if frames == 0}
        return min(tracks, key=lambda s: (s.index in empty, not s.disposition & Disposition.default))
    if track >= len(tracks):
        raise ValueError(f"track must be less than {len(tracks)}, the number of video tracks of {name}, got {track}")
    return tracks[track]


def _rate(container: av.container.InputContainer, stream: av.VideoStream, frames: int) -> float:
    """Frames a second, on average; 25 where the file says nothing of it."""
    whole = float((container.duration or 0) / av.time_base)  # of the longest stream
    return float(stream.average_rate or 0) or (frames / whole if whole > 0 else 25.0)
