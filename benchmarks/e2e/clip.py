"""The only door from the main job to the video reader."""

from __future__ import annotations

import time
from pathlib import Path

from storm_model.video import SampledVideo, Video, VideoInfo

from ..harness import Row


class Clip:
    """A video file as the main job reads it. Raises `storm_model.video.StormVideoError` for a bad one.

    Args:
        path: of the file.
        size: (height, width) in pixels that frames are resized to while they are decoded; None keeps the file's.
        fps: frames a second in place of a number of frames.
        start, end: seconds; only what is shown between them is used.
        verify: decode the whole file each time, and raise if anything in it is damaged.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int] | None = None,
        *,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        verify: bool = False,
    ):
        self.size, self.fps, self.verify = size, fps, verify
        self._window = {"start": start, "end": end}
        begun = time.perf_counter()
        self._video = Video(path)
        self.open_ms = (time.perf_counter() - begun) * 1e3
        self.frames_by_fps = None if fps is None else len(self._video.choose(fps=fps, **self._window)[0])
        self._video.choose(1, **self._window)  # an error in the window is told before the work

    @property
    def info(self) -> VideoInfo:
        return self._video.info

    @property
    def name(self) -> str:
        return Path(self.info.name).name

    @property
    def frame_bytes(self) -> int:
        """Of one decoded frame."""
        height, width = self.size or (self.info.height, self.info.width)
        return 3 * height * width

    def sample(self, frames: int) -> SampledVideo:
        """``frames`` of it at even distances in time, or those of ``fps``. Recorded as "decode"."""
        choice = {"n": frames} if self.fps is None else {"fps": self.fps}
        return self._video.sample(**choice, **self._window, size=self.size, verify=self.verify)

    def is_looped(self, frames: int) -> bool:
        """Whether it has fewer frames than that."""
        return self.fps is None and self._video.choose(frames, **self._window)[1]

    def decoding(self, video: SampledVideo) -> Row:
        """The columns of what finding these frames cost: `wanted_frames`, different ones, and `decoded_frames`."""
        return {"wanted_frames": len(set(video.indices)), "decoded_frames": video.decoded}

    def __str__(self) -> str:
        info = self.info
        return f"{self.name} ({info.width}x{info.height}, {info.frames} frames, {info.duration_s:.1f} s)"
