"""What is known of a video, and where its frames go: converted, turned and resized as they are decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import torch
from av.video.reformatter import Interpolation
from torch import Tensor

from storm_kernels.callers import warn_caller
from storm_kernels.tokens import described, positive_int

from .containers import StormVideoError
from .display import Turn

# 8192 x 8192; 8K video has half of that. What is larger is refused before it is decoded.
MAX_PIXELS = 2**26


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before a frame of it is read."""

    name: str  # its path or address, or what stands in place of one
    width: int  # pixels, as shown: after a quarter turn these are the stored height and width
    height: int
    frames: int  # all that are shown
    fps: float
    duration_s: float  # until the last frame's time is over
    stored: int  # frames in the file, those too that an edit list leaves out
    sample_aspect: Fraction = Fraction(1)  # width to height of one stored pixel as a player shows it; not applied


class Read(NamedTuple):
    """Frames that were read."""

    frames: Tensor  # (n, height, width, 3) uint8 RGB
    decoded: int  # frames decoded for them
    replaced: dict[int, int]  # number of each damaged frame, and of the whole one that stands in its place


class Store:
    """Where frames go: each is converted to RGB, resized if a size is given, and turned, as soon as it is decoded.

    Args:
        info: of the video.
        indices: the wanted frames, by number, in the order of the result; repeated ones are decoded once.
        size: (height, width) of the result; None is the video's.
        turns: of each angle of the video that is known already.

    A frame of another size than the first one, where none is given, is resized to it, and a warning says so.
    """

    def __init__(self, info: VideoInfo, indices: tuple[int, ...], size: tuple[int, int] | None, turns: dict[int, Turn]):
        self.info, self.told, self.turns = info, size is not None, turns
        self.height, self.width = size or (info.height, info.width)
        self.places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            self.places.setdefault(index, []).append(place)
        self.frames = torch.empty(len(indices), self.height, self.width, 3, dtype=torch.uint8, device="cpu")

    def put(self, number: int, frame: av.VideoFrame) -> None:
        """Keep frame ``number`` of the video if it is wanted."""
        if number not in self.places:
            return
        turn = Turn.of(frame, self.turns)
        height, width = turn.sides(frame.height, frame.width)
        if not self.told and (height, width) != (self.height, self.width):
            self.told = True
            warn_caller(
                f"{self.info.name}: frame {number} has {width}x{height} pixels, the first one "
                f"{self.width}x{self.height}: frames of another size are resized to that"
            )
        height, width = turn.sides(self.height, self.width)
        rgb = turn.apply(frame.reformat(width, height, "rgb24", interpolation=Interpolation.BICUBIC).to_ndarray())
        for place in self.places[number]:
            self.frames.numpy()[place] = rgb


def checked_size(size: object) -> tuple[int, int] | None:
    """``size`` of a call as (height, width)."""
    if size is None:
        return None
    sides = tuple(positive_int("size", side) for side in (size if isinstance(size, tuple) else (size, size)))
    if len(sides) != 2:
        raise ValueError(f"size must be two numbers, got {sides}")
    return sides


def checked_track(track: object) -> int | None:
    """``track`` of a call: a number from 0, or None."""
    if track is not None and (isinstance(track, bool) or not isinstance(track, int)):
        raise TypeError(f"track must be a number from 0, got {described(track)}")
    if track is not None and track < 0:
        raise ValueError(f"track must be a number from 0, got {track}")
    return track


def check_memory(n: int, height: int, width: int) -> None:
    """Refuse frames that would fill more than half of this machine's memory."""
    needed, limit = n * height * width * 3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if needed > limit:
        raise ValueError(
            f"n = {n} frames of {height}x{width} need {needed} bytes, more than half of this machine's memory "
            f"({limit}); ask for fewer or smaller"
        )


def check_sides(name: object, width: int, height: int) -> None:
    """Refuse a video of no pixels, or of more than `MAX_PIXELS`."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise StormVideoError(f"{name}: frames of {width}x{height} pixels; at most {MAX_PIXELS} pixels are decoded")
