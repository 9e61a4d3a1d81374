"""Films made with PyAV, whole and remuxed, and what a player shows of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from storm_model.film import ANY_TITLE

H264 = ("libx264", "yuv420p")
HEVC = ("libx265", "yuv420p")
MPEG2 = ("mpeg2video", "yuv420p", {"bf": "2"}, 9)
# Of each file: encoder and format of its pixels, options of the encoder, frames between key frames.
FILMS = {
    "closed groups.mp4": (*H264, {"x264-params": "bframes=3:b-pyramid=normal:open-gop=0"}, 12),
    "open groups.mp4": (*H264, {"x264-params": "bframes=3:b-pyramid=normal:open-gop=1"}, 12),
    "open groups.mkv": (*H264, {"x264-params": "bframes=2:open-gop=1"}, 9),
    "pyramid.mkv": (*H264, {"x264-params": "bframes=7:b-pyramid=strict:open-gop=1"}, 20),
    "refresh.mp4": (*H264, {"x264-params": "intra-refresh=1"}, 10),
    "short groups.mp4": (*H264, {"x264-params": "bframes=3"}, 2),
    "interlaced.mp4": (*H264, {"x264-params": "bframes=2:interlaced=1"}, 12),
    "h264.avi": (*H264, {"x264-params": "bframes=3"}, 12),
    "h264.flv": (*H264, {"x264-params": "bframes=3"}, 12),
    "open groups.ts": (*H264, {"x264-params": "bframes=2:open-gop=1"}, 9),
    "raw.h264": (*H264, {"x264-params": "bframes=3"}, 12),
    "hevc.mp4": (*HEVC, {"x265-params": "log-level=none:bframes=4"}, 10),
    "hevc open groups.mkv": (*HEVC, {"x265-params": "log-level=none:bframes=4:open-gop=1:keyint=10"}, 10),
    "hevc.ts": (*HEVC, {"x265-params": "log-level=none:bframes=4"}, 10),
    "raw.hevc": (*HEVC, {"x265-params": "log-level=none:bframes=4"}, 10),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8"}, 11),
    "vp9.ivf": ("libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, 20),
    "vp8.webm": ("libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}, 11),
    "vp8.ogv": ("libvpx", "yuv420p", {"cpu-used": "8"}, 11),
    "av1.mkv": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}, 16),
    "mpeg4.mov": ("mpeg4", "yuv420p", {"bf": "2"}, 8),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}, 8),
    "mpeg4.nut": ("mpeg4", "yuv420p", {"bf": "2"}, 8),
    "mpeg2.ts": MPEG2,
    "mpeg2.mxf": MPEG2,
    "mpeg2.mpg": MPEG2,
    "wmv.asf": ("wmv2", "yuv420p", {}, 9),
    "flv1.flv": ("flv", "yuv420p", {}, 10),
    "prores.mov": ("prores_ks", "yuv422p10le", {}, 1),
    "ffv1.mkv": ("ffv1", "yuv420p", {}, 12),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}, 1),
    "mjpeg.mkv": ("mjpeg", "yuvj420p", {}, 1),
}
FRAMES = 60
# Muxers and encoders of PyAV give them no way to be copied packet by packet.
NOT_REMUXED = {"av1.mkv", "vp8.ogv", "mpeg2.mpg"}
if av.__version__ == "18.0.0":
    NOT_REMUXED.add("mpeg2.mxf")


def moving(i: int) -> av.VideoFrame:
    """Noise that moves: every frame is another one, and codecs predict it from several."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8)
    return av.VideoFrame.from_ndarray(
        np.ascontiguousarray(np.roll(noise, 2 * i, 1)[:, :96] // 2 + np.uint8(i % 200)), format="rgb24"
    )


@contextlib.contextmanager
def same_scheduling() -> Iterator[None]:
    """This thread is scheduled afterwards as before.

    Where root opens SVT-AV1, it makes the thread that does so a real-time one (SCHED_FIFO, 99) for good. Such a thread
    that waits actively, as OpenMP's do, never lets go of its core to the one that it waits for.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def write_film(path: Path, codec, pixels, options, distance, times=range(FRAMES)) -> Path:
    """A film of 25 frames a second, or with frames at other ``times`` (counted in 25ths of a second)."""
    with same_scheduling(), av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, width=96, height=64, pix_fmt=pixels, options=options)
        stream.codec_context.gop_size, stream.codec_context.thread_count = distance, 1
        stream.codec_context.time_base = Fraction(1, 25)
        for i, time in enumerate(times):
            frame = moving(i)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def remuxed(
    path: Path, out_path: Path, keep: Callable[[int, av.Packet], bool] = lambda *_: True, shift: int = 0, **options: str
) -> Path:
    """The packets that ``keep`` takes, by number and packet, each ``shift`` 25ths of a second later, muxed with
    ``options``.
    """
    with av.open(str(path)) as source, av.open(str(out_path), "w", options=options) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if keep(number, packet):
                later = round(shift / 25 / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + later
                packet.dts = None if packet.dts is None else packet.dts + later
                packet.stream = copy
                out.mux(packet)
    return out_path


def from_key(after: int) -> Callable[[int, av.Packet], bool]:
    """Keeps what a cut at the first key frame from packet ``after`` on leaves."""
    begun = False

    def keep(number: int, packet: av.Packet) -> bool:
        nonlocal begun
        begun = begun or (number >= after and packet.is_keyframe)
        return begun

    return keep


# What cutting and moving without decoding does to a film.
CHANGES = {
    "cut at a key frame": lambda path, out: remuxed(path, out, from_key(20)),
    "cut in a group": lambda path, out: remuxed(path, out, lambda number, _: number >= 17),
    "negative times": lambda path, out: remuxed(path, out, shift=-5),
    "late times": lambda path, out: remuxed(path, out, shift=50),
}


def shown(path: Path, threads: str = "NONE") -> list[tuple[float | None, np.ndarray, bool]]:
    """Seconds and RGB of every frame that a decoder shows that plays the file from its start, and whether it marks it
    as wrong; packets that it cannot decode are passed over, as players do.
    """
    frames = []
    with av.open(str(path), **ANY_TITLE) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = threads, int(threads == "NONE")
        for packet in container.demux(stream):
            try:
                frames += [(f.time, f.to_ndarray(format="rgb24"), f.is_corrupt) for f in packet.decode()]
            except av.FFmpegError:
                continue
    return frames
