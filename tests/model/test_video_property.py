"""The frame given for a time is, bit for bit, the one that a whole decode shows then (docs/reliability.md R11)."""

import contextlib
import os
import random

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.video import StormVideoError, Video

from ..support.clips import CHANGES, FILMS, FRAMES, NOT_REMUXED, shown, write_film

# Random sets of frames of each file; STORM_KERNELS_FUZZ=25 (`make video-cases`) makes over 5,000 of the 200.
_FUZZ = float(os.environ.get("STORM_KERNELS_FUZZ", "1"))
SETS = max(1, round(5 * _FUZZ))
CHANGED_SETS = max(1, round(2 * _FUZZ))


@pytest.fixture(name="folder", scope="module")
def where_films_are_made(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


def film(folder, name):
    path = folder / name
    codec, *rest = FILMS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    return path if path.exists() else write_film(path, codec, *rest)


def check(path, sets, seed):
    """Random sets of the file's frames. Those that the decoder marks as wrong (what they are predicted from was cut
    away) are errors, and so may be those that may be predicted from them.
    """
    right, video, draw = shown(path), Video(path), random.Random(seed)
    with contextlib.suppress(StormVideoError):
        video.sample(video.info.frames)  # a file whose times are not true is decoded then, and knows its frames
    assert video.info.frames == len(right)
    wrong = [number for number, (_, _, marked) in enumerate(right) if marked]
    times = [seconds + 1e-4 for seconds in video._film.seconds]
    for _ in range(sets):
        numbers = sorted(draw.sample(range(len(right)), min(len(right), draw.choice((1, 2, 5, 20)))))
        try:
            got = video.sample(at=[times[i] for i in numbers])
        except StormVideoError:
            assert wrong
            continue
        assert got.indices == tuple(numbers)
        for number, frame in zip(numbers, got.frames.numpy(), strict=True):
            assert np.array_equal(frame, right[number][1]), f"frame {number} of {len(right)}"
    for number in wrong:
        with pytest.raises(StormVideoError, match=f"the frame at {video._film.seconds[number]:.3f} s, or one that it"):
            video.sample(at=[times[number]])
    seconds = [time for time, _, _ in right]
    if None not in seconds and seconds == sorted(set(seconds)):
        assert np.allclose(video._film.seconds, np.subtract(seconds, seconds[0]), atol=1e-3)


@pytest.mark.parametrize("name", FILMS)
def test_frames_are_those_of_a_whole_decode(folder, name):
    path = film(folder, name)
    assert Video(path).info.frames == FRAMES
    check(path, SETS, name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [name for name in FILMS if name not in NOT_REMUXED])
def test_frames_of_a_film_that_was_cut_or_moved(folder, name, change):
    path = CHANGES[change](film(folder, name), folder / f"{change} {name}")
    check(path, CHANGED_SETS, f"{change} {name}")
