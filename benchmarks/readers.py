"""Readers of video that storm_benchmarks.decode holds against each other: each takes a path and
frame numbers in rising order, and gives RGB frames."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from storm_model.video import sample_frames

from .clips import FPS

Reader = Callable[[Path, list[int]], NDArray[np.uint8]]  # -> (n, height, width, 3)


def ours(path: Path, indices: list[int]) -> NDArray[np.uint8]:
    """`storm_model.video`, which finds frames at even distances by itself."""
    return sample_frames(path, len(indices)).frames.numpy()


def pyav_linear(path: Path, indices: list[int]) -> NDArray[np.uint8]:
    """Everything decoded up to the last wanted frame, as a loop over `container.decode` does."""
    wanted, found = set(indices), []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == len(indices):
                break
    return np.stack(found)


def pyav_seek(path: Path, indices: list[int]) -> NDArray[np.uint8]:
    """For each frame a seek to the key frame before it, then decoding up to it."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index in indices:
            pts = round(index / FPS / stream.time_base) + (stream.start_time or 0)
            container.seek(pts, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= pts)
            found.append(frame.to_ndarray(format="rgb24"))
    return np.stack(found)


def _torchcodec(seek_mode: str) -> Reader:
    decoders = importlib.import_module("torchcodec.decoders")

    def read(path: Path, indices: list[int]) -> NDArray[np.uint8]:
        decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode=seek_mode)
        return decoder.get_frames_at(indices).data.numpy()

    return read


def _decord() -> Reader:
    decord = importlib.import_module("decord")

    def read(path: Path, indices: list[int]) -> NDArray[np.uint8]:
        return decord.VideoReader(str(path)).get_batch(indices).asnumpy()

    return read


def installed() -> tuple[dict[str, Reader], list[str]]:
    """Name -> reader of those that can be imported, and a line for each that cannot."""
    made: dict[str, Callable[[], Reader]] = {
        "storm_model": lambda: ours,
        "PyAV seek": lambda: pyav_seek,
        "PyAV linear": lambda: pyav_linear,
        "torchcodec exact": lambda: _torchcodec("exact"),
        "torchcodec approximate": lambda: _torchcodec("approximate"),
        "decord": _decord,
    }
    found, absent = {}, []
    for name, make in made.items():
        try:
            found[name] = make()
        except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg's libraries raises the last
            absent.append(f"{name} left out: {str(error).strip().splitlines()[0]}")
    return found, absent
