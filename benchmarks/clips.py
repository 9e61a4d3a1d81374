"""Video clips for storm_benchmarks.decode, made by PyAV: any length and key-frame distance out of
one short piece, whose frames are known."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray
from storm_model.video import bikes_clip

FPS = 25
# Frames that are encoded for a clip of another size than the bikes': ten seconds of 1080p take some
# seconds to encode.
PIECE_FRAMES = 250


@dataclass(frozen=True)
class Clip:
    """A film that repeats ``piece``: its frame i is bit for bit frame i % ``piece_frames`` of the piece."""

    name: str  # "bikes", "1080p"
    path: Path
    piece: Path
    piece_frames: int
    frames: int
    keys: str  # distances of key frames, for the row: "30-55", "250"

    def truth(self, indices: list[int]) -> NDArray[np.uint8]:
        """The frames (n, height, width, 3) RGB of a whole decode, which is that of the piece."""
        wanted, found = {index % self.piece_frames for index in indices}, {}
        with av.open(str(self.piece)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
        return np.stack([found[index % self.piece_frames] for index in indices])


def bikes(folder: Path, seconds: int) -> Clip:
    """The bikes clip (640x272, 10 s) by itself, or played again and again until ``seconds`` are full."""
    return _looped("bikes", folder, bikes_clip(), seconds)


def large(folder: Path, seconds: int, key_distance: int, piece_frames: int = PIECE_FRAMES) -> Clip:
    """The bikes clip at 1920x1080 with a key frame every ``key_distance`` frames, H.264 with B-frames."""
    piece = folder / f"1080p-{key_distance}.mp4"
    if not piece.exists():
        _encode(piece, key_distance, piece_frames)
    return _looped("1080p", folder, piece, seconds)


def _encode(path: Path, key_distance: int, frames: int) -> None:
    options = {
        "preset": "veryfast",
        "crf": "23",
        "g": str(key_distance),
        "keyint_min": str(key_distance),
        "sc_threshold": "0",
    }
    with av.open(str(bikes_clip())) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            if number == frames:
                break
            larger = frame.reformat(1920, 1080, "yuv420p")
            larger.pts, larger.time_base, larger.pict_type = number, Fraction(1, FPS), PictureType.NONE
            target.mux(stream.encode(larger))
        target.mux(stream.encode())


def _looped(name: str, folder: Path, piece: Path, seconds: int) -> Clip:
    """``piece`` repeated by copying its packets, each time later by its own length: nothing is encoded again."""
    path = folder / f"{piece.stem}-{seconds}s.mp4"
    with av.open(str(piece)) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.dts is not None]
        step = packets[0].duration
        times = -(-seconds * FPS // len(packets))
        keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        with av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(stream)
            starts = [(packet.pts, packet.dts) for packet in packets]
            for turn in range(times):
                for packet, (pts, dts) in zip(packets, starts, strict=True):
                    packet.pts, packet.dts = pts + turn * len(packets) * step, dts + turn * len(packets) * step
                    packet.stream, packet.time_base = copy, stream.time_base
                    target.mux(packet)
    distances = [after - before for before, after in zip(keys, [*keys[1:], len(packets)], strict=True)]
    spread = f"{min(distances)}-{max(distances)}" if min(distances) < max(distances) else str(distances[0])
    return Clip(name, path, piece, len(packets), times * len(packets), spread)
