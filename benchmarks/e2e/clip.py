"""The only door from the main job to the video reader."""

from __future__ import annotations

import time
from pathlib import Path

from storm_model.video import SampledVideo, Video, VideoInfo

from ..harness import Row


class Clip:
    """A video file as the main job reads it. Raises `storm_model.video.StormVideoError` for a bad one.

    Args:
        size: (height, width) in pixels that frames are resized to while they are decoded; None keeps the file's.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None):
        self.size = size
        start = time.perf_counter()
        self._video = Video(path)
        self.open_ms = (time.perf_counter() - start) * 1e3

    @property
    def info(self) -> VideoInfo:
        return self._video.info

    @property
    def name(self) -> str:
        return self.info.path.name

    @property
    def frame_bytes(self) -> int:
        """Of one decoded frame."""
        height, width = self.size or (self.info.height, self.info.width)
        return 3 * height * width

    def sample(self, frames: int) -> SampledVideo:
        """``frames`` of it at even distances. Recorded as "decode"."""
        return self._video.sample(frames, size=self.size)

    def decoding(self, video: SampledVideo) -> Row:
        """The columns of what finding these frames cost: `wanted_frames`, different ones, and `decoded_frames`."""
        return {"wanted_frames": len(set(video.indices)), "decoded_frames": video.decoded}

    def __str__(self) -> str:
        info = self.info
        return f"{self.name} ({info.width}x{info.height}, {info.frames} frames, {info.duration_s:.1f} s)"
