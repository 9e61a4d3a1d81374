"""model/sampling.py and seeking.py: which frames are taken, and what is decoded for them."""

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.index import NO_TIME, Index, Times
from storm_model.sampling import choose
from storm_model.video import StormVideoError, Video, sample_frames

from ..support.clips import FILMS, H264, write_film


def test_only_the_groups_of_wanted_frames_are_decoded(tmp_path):
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"])
    assert sample_frames(path, at=[0.0, 2.0]).decoded <= 16
    assert sample_frames(path, at=[0.0, 2.0], verify=True).decoded >= 60


def test_key_frames_that_cannot_be_trusted_mean_a_whole_decode(tmp_path):
    """A picture that is refreshed column by column is marked as a key frame, and is none."""
    path = write_film(tmp_path / "film.mp4", *FILMS["refresh.mp4"])
    assert sample_frames(path, at=[2.0]).decoded == 51


def test_even_in_time(tmp_path):
    """25 frames in the first second, then one each second: ten samples lie a second apart, whatever the frames are."""
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"], times=[*range(25), *range(25, 250, 25)])
    video = sample_frames(path, 10)
    assert video.timestamps == pytest.approx(list(range(10)), abs=0.05)
    by_rate = sample_frames(path, fps=2, start=7.5, end=9.4)
    assert by_rate.timestamps == pytest.approx([7, 8, 8, 9], abs=0.05)  # shown at 7.5, 8, 8.5 and 9 s


def test_damage_elsewhere_is_no_error(tmp_path):
    path = write_film(tmp_path / "film.mp4", *H264, {"x264-params": "bframes=0"}, 10)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        place = [packet.pos for packet in container.demux(video=0) if packet.size][30]
    content[place + 8 : place + 200] = b"\xff" * 192
    path.write_bytes(content)
    assert sample_frames(path, at=[0.0, 2.0]).indices == (0, 50)
    with pytest.raises(StormVideoError, match=r"film.mp4: the frame at 1.200 s, or one that it is predicted from"):
        sample_frames(path, at=[1.21])
    with pytest.raises(StormVideoError, match=r"film.mp4: frame 30 of 60, at 1.200 s in the file, is damaged"):
        sample_frames(path, at=[0.0], verify=True)
    assert len(Video(path).check()) == 1
    with pytest.warns(UserWarning, match=r"film.mp4: the frame at 1.200 s, .* is damaged: the one at 1.280 s is taken"):
        got = sample_frames(path, at=[1.21, 2.0], on_error="nearest")
    assert (got.indices, got.replaced) == ((32, 50), {30: 32})
    assert got.timestamps == pytest.approx((1.28, 2.0))
    assert np.array_equal(got.frames[0].numpy(), sample_frames(path, at=[1.281]).frames[0].numpy())


@pytest.mark.parametrize(
    "packets",
    [
        [(0, 0, True), (None, 1, False)],
        [(0, 0, True), (0, 1, False)],
        [(1, 0, False), (2, 1, False)],
        [(0, 1, True), (1, 0, False)],
    ],
    ids=["no time", "one time twice", "no key frame", "decoded backwards"],
)
def test_times_that_are_not_trusted(packets):
    assert times_of(packets) is None
    assert times_of([(0, -1, True), (1, 0, False)]) is not None


def times_of(packets):
    """Of packets that say when they are shown and decoded, and whether they are key frames."""
    pts, dts, key = ([NO_TIME if value is None else value for value in column] for column in zip(*packets, strict=True))
    shown = np.ones(len(packets), bool)
    index = Index(np.array(pts), np.array(dts), np.array(key), shown, None, Fraction(0), False)
    return Times.of(index, Fraction(1, 25), None)


SECONDS = [i / 25 for i in range(100)]


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ({"n": 1}, (0,)),
        ({"n": 3}, (0, 49, 99)),
        ({"fps": 1}, (0, 25, 50, 75)),
        ({"fps": 1, "start": 1, "end": 3}, (25, 50)),
        ({"fps": 50, "end": 0.08}, (0, 0, 1, 1)),
        ({"fps": 25, "max_frames": 2}, (0, 99)),
        ({"n": 2, "start": 1, "end": 2}, (25, 49)),
        ({"at": [3.99, 0, 4.0]}, (99, 0, 99)),
        ({"n": 1, "start": 0.05}, (1,)),
    ],
)
def test_chosen_frames(choice, chosen):
    assert choose(SECONDS, 4.0, **choice) == (chosen, False)


def test_a_window_that_is_too_short_is_looped():
    assert choose(SECONDS, 4.0, 5, start=1, end=1.08) == ((25, 26, 25, 26, 25), True)


@pytest.mark.parametrize(
    ("choice", "error", "said"),
    [
        ({}, ValueError, "give one of n, fps and at, got none of them"),
        ({"n": 2, "fps": 1}, ValueError, "give one of n, fps and at, got n and fps"),
        ({"at": [1], "start": 0}, ValueError, "at names the times itself: start, end and max_frames"),
        ({"at": [5]}, ValueError, "at must be at most the video's 4.000 s, got 5"),
        ({"at": ["1"]}, TypeError, "at must be a number of seconds, got '1'"),
        ({"fps": 0}, ValueError, "fps must be positive, got 0"),
        ({"fps": "2"}, TypeError, "fps must be a number, got '2'"),
        ({"fps": float("nan")}, ValueError, "fps must be at least 0, got nan"),
        ({"fps": 1, "max_frames": 0}, ValueError, "max_frames must be"),
        ({"fps": 10**6}, ValueError, "frames must be at most 65536"),
        ({"n": 1, "max_frames": 3}, ValueError, "max_frames goes with fps, not with n = 1"),
        ({"n": 1, "start": 4}, ValueError, "start must be before the end of the video, 4.000 s, got 4"),
        ({"n": 1, "start": 2, "end": 1}, ValueError, "end must be after start = 2.0, got 1"),
        ({"n": 1, "start": -1}, ValueError, "start must be at least 0, got -1"),
    ],
)
def test_wrong_choices(choice, error, said):
    with pytest.raises(error, match=said):
        choose(SECONDS, 4.0, **choice)
