"""Video files, frames and images to the vision tower's input, without torchvision and torchcodec:
:mod:`video` reads.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from storm_kernels.tokens import described, positive_int

from .configuration_storm import checked_reduction
from .pixels import preprocess
from .sampling import choose
from .video import Video

# Frames of a video file where the call says neither how many nor how many a second: the paper's
# figures are at 128.
NUM_FRAMES = 128
REDUCTION = ("temporal_pool", "spatial_pool", "temporal_stride")


class StormVideosKwargs(VideosKwargs, total=False):
    """What a call may say about its videos, beside transformers' own names.

    start, end: seconds from the first frame; only what is shown between them is taken.
    max_frames: with ``fps``: where that gives more, so many at even distances in time.
    verify: decode the whole file, and raise if anything in it is damaged.
    temporal_pool, spatial_pool, temporal_stride: the token reduction (k, p, s).
    image_size, patch_size: of the vision tower, in pixels.
    """

    start: int | float | None
    end: int | float | None
    max_frames: int | None
    verify: bool | None
    temporal_pool: int | None
    spatial_pool: int | None
    temporal_stride: int | None
    image_size: int | None
    patch_size: int | None


class StormImagesKwargs(ImagesKwargs, total=False):
    """What a call may say about its images: the token reduction, of which only the spatial part changes anything."""

    temporal_pool: int | None
    spatial_pool: int | None
    temporal_stride: int | None
    image_size: int | None
    patch_size: int | None


class _Sizes:
    """What both processors know of the model: its tower's sizes and the reduction where a call chooses none."""

    image_size = 384
    patch_size = 14
    temporal_pool = 1
    spatial_pool = 1
    temporal_stride = 1

    @property
    def size(self) -> dict[str, int]:
        """The frames' size as transformers spells it; engines read it."""
        return {"height": self.image_size, "width": self.image_size}

    def reductions(self, n: int, options: dict[str, Any]) -> Tensor:
        """(n, 3) int64: temporal_pool, spatial_pool and temporal_stride of each of n videos or images."""
        chosen = [getattr(self, name) if options.get(name) is None else options[name] for name in REDUCTION]
        checked_reduction(*chosen)
        return torch.tensor([chosen] * n, dtype=torch.int64, device="cpu")


class StormVideoProcessor(_Sizes, VideoProcessorMixin):
    """Videos to pixels.

    A video is a path or address, bytes of a file, frames (T, H, W, 3) or (T, 3, H, W) uint8 (NumPy, torch), or PIL
    images.

    Args:
        image_size, patch_size: of the vision tower, in pixels.
        num_frames: of a file, where a call names neither ``num_frames`` nor ``fps``. A clip that has fewer gives all it
            has, once.
        temporal_pool, spatial_pool, temporal_stride: the token reduction where a call chooses none.

    Example:
        >>> frames = np.zeros((5, 32, 32, 3), np.uint8)
        >>> StormVideoProcessor(image_size=28)([frames])["pixel_values_videos"].shape
        torch.Size([1, 5, 3, 28, 28])
    """

    model_input_names = ["pixel_values_videos", "video_reductions"]
    valid_kwargs = StormVideosKwargs
    num_frames = NUM_FRAMES

    def preprocess(self, videos: Any, **options: Any) -> BatchFeature:
        """Videos as a model takes them.

        Args:
            videos: one video or a list of them, lists of lists included.
            options: see :class:`StormVideosKwargs`; ``num_frames`` or ``fps``, ``return_metadata``, ``device``.

        Returns:
            ``pixel_values_videos``: (n, T, 3, S, S), or a list of n tensors (T, 3, S, S) where T differs;
            ``video_reductions`` (n, 3): temporal_pool, spatial_pool, temporal_stride; with
            ``return_metadata`` also ``video_metadata``.

        Raises:
            StormVideoError: a file cannot be read (:class:`storm_model.video.Video`).
            TypeError: an argument of the wrong type, named.
            ValueError: an argument out of range, named.
        """
        flat = list(flat_videos(videos))
        if not flat:
            raise ValueError("videos must hold a video, got none")
        given = options.get("video_metadata") or [None] * len(flat)
        given = given if isinstance(given, list) else [given]
        read = [self._read(video, known, options) for video, known in zip(flat, given, strict=True)]
        pixels = [preprocess(frames.to(options.get("device") or frames.device), self.image_size) for frames, _ in read]
        alike = len({len(video) for video in pixels}) == 1
        data: dict[str, Any] = {
            "pixel_values_videos": torch.stack(pixels) if alike else pixels,
            "video_reductions": self.reductions(len(pixels), options),
        }
        if options.get("return_metadata"):
            data["video_metadata"] = [metadata for _, metadata in read]
        return BatchFeature(data)

    def _read(self, video: Any, known: Any, options: dict[str, Any]) -> tuple[Tensor, VideoMetadata]:
        choice = {name: options.get(name) for name in ("fps", "max_frames", "start", "end")}
        n = options.get("num_frames")
        if n is not None and choice["fps"] is not None:
            raise ValueError(f"give num_frames or fps, not both, got {n} and {choice['fps']}")
        if isinstance(video, (str, os.PathLike, bytes)):
            return self._read_file(video, n, choice, bool(options.get("verify")))
        return _read_frames(video, known, n, choice, options.get("do_sample_frames"))

    def _read_file(
        self, path: Any, n: int | None, choice: dict[str, Any], verify: bool
    ) -> tuple[Tensor, VideoMetadata]:
        film = Video(path)
        if n is None and choice["fps"] is None:
            n = self.num_frames
        indices, looped = film.choose(n, **choice)
        if looped:
            n = len(set(indices))
        sampled = film.sample(n, **choice, size=self.image_size, verify=verify)
        info = sampled.info
        metadata = VideoMetadata(
            total_num_frames=info.frames,
            fps=info.fps,
            width=info.width,
            height=info.height,
            duration=info.duration_s,
            video_backend="storm_model",
            frames_indices=list(sampled.indices),
        )
        return sampled.frames, metadata


class StormImageProcessor(_Sizes, BaseImageProcessor):
    """Images to pixels: each is a video of one frame.

    Args:
        image_size, patch_size, temporal_pool, spatial_pool, temporal_stride: see :class:`StormVideoProcessor`.

    Example:
        >>> image = Image.new("RGB", (40, 30))
        >>> StormImageProcessor(image_size=28)(image)["pixel_values"].shape
        torch.Size([1, 3, 28, 28])
    """

    model_input_names = ["pixel_values", "image_reductions"]
    valid_kwargs = StormImagesKwargs

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        """images (PIL, or uint8 arrays (H, W, 3)) -> ``pixel_values`` (n, 3, S, S), ``image_reductions`` (n, 3)."""
        flat: Any = make_flat_list_of_images(images)
        frames = [_frames_of([image]) for image in flat]
        pixels = torch.cat([preprocess(frame.to(options.get("device") or "cpu"), self.image_size) for frame in frames])
        return BatchFeature({"pixel_values": pixels, "image_reductions": self.reductions(len(flat), options)})


def flat_videos(videos: Any) -> Iterable[Any]:
    """Each video of a nested list."""
    if isinstance(videos, (str, os.PathLike, bytes)) or _is_frames(videos):
        yield videos
    elif isinstance(videos, (list, tuple)):
        for inner in videos:
            yield from flat_videos(inner)
    elif isinstance(videos, (np.ndarray, Tensor)) and videos.ndim == 5:
        yield from videos
    else:
        raise TypeError(
            f"a video must be a path, frames of shape (T, H, W, 3) or a list of images, got {described(videos)}"
        )


def is_list_of_videos(videos: Any) -> bool:
    """Whether this is a list of videos, which may be none, and not the frames of one."""
    return isinstance(videos, (list, tuple)) and not _is_frames(videos)


def _is_frames(video: Any) -> bool:
    if isinstance(video, (np.ndarray, Tensor)):
        return video.ndim == 4
    return isinstance(video, (list, tuple)) and bool(video) and all(_is_image(frame) for frame in video)


def _is_image(frame: Any) -> bool:
    return isinstance(frame, Image.Image) or (isinstance(frame, (np.ndarray, Tensor)) and frame.ndim == 3)


def _frames_of(video: Any) -> Tensor:
    """(T, H, W, 3) uint8."""
    if isinstance(video, (list, tuple)):
        arrays = [np.asarray(f.convert("RGB")) if isinstance(f, Image.Image) else np.asarray(f) for f in video]
        if len({array.shape for array in arrays}) != 1:
            raise ValueError(
                f"frames of one video must have one shape, got {sorted({array.shape for array in arrays})}"
            )
        video = np.stack(arrays)
    frames = video if isinstance(video, Tensor) else torch.from_numpy(np.ascontiguousarray(video))
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames must be uint8, 0 to 255, got {described(frames)}")
    if frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.movedim(1, -1)
    return frames


def _read_frames(
    video: Any, known: Any, n: int | None, choice: dict[str, Any], sample: bool | None
) -> tuple[Tensor, VideoMetadata]:
    """Frames that are decoded already: all of them, or those that a call chooses as it would from a file."""
    frames = _frames_of(video)
    known = dict(known or {})
    rate = known.get("fps")
    height, width = frames.shape[1:3]
    indices = list(range(len(frames)))
    chosen = {name: value for name, value in choice.items() if value is not None}
    if sample is not False and (n is not None or chosen):
        if chosen and not rate:
            raise ValueError(f"{', '.join(chosen)} need the frames' times: give video_metadata with fps, or a file")
        seconds = [i / (rate or 1) for i in indices]
        if n is None and choice["fps"] is None:
            n = len(frames)
        picked, looped = choose(seconds, len(frames) / (rate or 1), n, **choice)
        indices = sorted(set(picked)) if looped else list(picked)
        frames = frames[indices]
    stored = known.get("frames_indices")
    if stored is not None:
        indices = [int(stored[i]) for i in indices]
    total = known.get("total_num_frames") or positive_int("frames", len(video))
    return frames, VideoMetadata(total_num_frames=total, fps=rate, width=width, height=height, frames_indices=indices)
