"""Pictures as a video: one image, a folder or list of them, an animation (GIF, APNG, WebP, AVIF). Pillow reads them.

Transparent parts are given as their colours are stored, as Pillow's and FFmpeg's conversions to RGB do.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from storm_kernels.callers import warn_caller
from storm_kernels.tokens import described

from .containers import StormVideoError
from .frames import Read, Store, VideoInfo, check_sides
from .source import Source

# Other formats that Pillow knows are films to it as well, or need other programs.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM")
_ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}

# A frame of an animation that asks for no time, or next to none, is shown for 0.1 s, as browsers do.
_SHORTEST, _USUAL = 0.011, 0.1


class Stills:
    """Pictures in place of a film; it has what a :class:`storm_model.film.Film` has.

    Args:
        name: for messages.
        load: the number of a picture -> (height, width, 3) uint8.
        durations: seconds that each is shown; None where nothing says: then choices by time are refused.
        count: of pictures.
        nearest: whether a picture that cannot be read is told by a warning; else it is an error.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[int], NDArray[np.uint8]],
        durations: Sequence[float] | None,
        count: int,
        nearest: bool = False,
    ):
        self.name, self._load, self._nearest = name, load, nearest
        self.timed = durations is not None
        ends = list(accumulate(durations or [1.0] * count))
        self.seconds, self.end = [0.0, *ends[:-1]], ends[-1]
        height, width = self._picture((self._near(0) or 0) if nearest else 0).shape[:2]
        self.info = VideoInfo(name, width, height, count, count / self.end, self.end, count)

    def read(self, indices: tuple[int, ...], size: tuple[int, int] | None) -> Read:
        """The pictures ``indices``; see :meth:`storm_model.film.Film.read`."""
        store, replaced = Store(self.info, indices, size, {}), {}
        for number in sorted(store.places):
            try:
                picture = self._picture(number)
            except StormVideoError as error:
                near = self._near(number) if self._nearest else None
                if near is None:
                    raise
                warn_caller(f"{error}: number {near} is taken")
                replaced[number], picture = near, self._picture(near)
            store.put(number, av.VideoFrame.from_ndarray(picture, format="rgb24"))
        return Read(store.frames, len(store.places), replaced)

    def findings(self, progress: Callable[[int], object]) -> Iterator[str]:
        """What is wrong with the pictures, all of it; a line each. ``progress`` is told how many were read."""
        for number in range(self.info.frames):
            try:
                self._picture(number)
            except StormVideoError as error:
                yield str(error)
            progress(number + 1)

    def _near(self, number: int) -> int | None:
        """The number of the next picture that can be read, else of the last one before; None if there is none."""
        for near in [*range(number, len(self.seconds)), *range(number - 1, -1, -1)]:
            try:
                self._picture(near)
            except StormVideoError:
                continue
            return near
        return None

    def _picture(self, number: int) -> NDArray[np.uint8]:
        with _readable(f"{self.name}: image {number}" if len(self.seconds) > 1 else self.name):
            return self._load(number)


def stills(source: Source, nearest: bool = False) -> Stills | None:
    """The picture or animation that a file holds; None if it holds neither."""
    with source.opened() as file, _readable(source.name):
        try:
            image = _opened(file)
        except UnidentifiedImageError:
            return None
        # The picture of an animated PNG that only programs without animation show.
        begin = int(getattr(image, "default_image", False))
        count = getattr(image, "n_frames", 1) - begin
        if count < 2 or image.format == "TIFF":
            return Stills(source.name, lambda number: _of_file(source), None, 1, nearest)
        durations = []
        for number in range(begin, begin + count):
            image.seek(number)
            if image.format in ("WEBP", "AVIF"):  # these tell a frame's time when it is decoded
                image.load()
            seconds = (image.info.get("duration") or 0) / 1000
            durations.append(seconds if seconds >= _SHORTEST else _USUAL)
    return Stills(source.name, _Animation(source, begin), durations, count, nearest)


def stills_of(pictures: Sequence[object], name: str, frame_rate: float | None = None, nearest: bool = False) -> Stills:
    """Images as the frames of a video.

    Args:
        pictures: each a path, an address, bytes, a file object, a PIL image, or uint8 (height, width, 3).
        name: for messages.
        frame_rate: images a second.
        nearest: see :class:`Stills`.
    """
    if not len(pictures):
        raise StormVideoError(f"{name}: no images; a video needs at least one")
    durations = None if frame_rate is None else [1 / frame_rate] * len(pictures)
    return Stills(name, lambda number: _of_any(pictures[number]), durations, len(pictures), nearest)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names, with numbers in them as numbers: 2 before 10."""

    def key(path: Path) -> list:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", path.name)]

    return sorted((path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS), key=key)


class _Animation:
    """Loads an animation's frames; in rising order each is decoded once."""

    def __init__(self, source: Source, begin: int):
        self._source, self._begin = source, begin
        self._image: Image.Image | None = None

    def __call__(self, number: int) -> NDArray[np.uint8]:
        if self._image is None:
            with self._source.opened() as file:
                self._image = _opened(io.BytesIO(file.read()))
        self._image.seek(self._begin + number)
        return _rgb(self._image)


def _of_file(source: Source) -> NDArray[np.uint8]:
    with source.opened() as file:
        return _rgb(_opened(file))


def _of_any(picture: object) -> NDArray[np.uint8]:
    if isinstance(picture, Image.Image):
        return _rgb(picture)
    shape = getattr(picture, "shape", None)
    if shape is None:
        return _of_file(Source(picture))
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(f"images must be uint8 of shape (height, width, 3), got {described(picture)}")
    return np.ascontiguousarray(array)


def _opened(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=FORMATS)
    check_sides("the image", image.width, image.height)
    return image


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, turned as its Exif data says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits of grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Every error of Pillow is a StormVideoError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large ones are refused by name
            yield
    except StormVideoError as error:
        raise error if str(error).startswith(name) else StormVideoError(f"{name}: {error}") from error
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StormVideoError(f"{name}: cannot be read as an image: {error}") from error
