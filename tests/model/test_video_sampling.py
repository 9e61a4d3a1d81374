"""model/sampling.py and seeking.py: the frames of the times that were asked for, bit for bit those
of a whole decode.
"""

import os
import random
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.sampling import choose
from storm_model.seeking import Mark, Times
from storm_model.video import StormVideoError, Video, sample_frames

# Random sets of frames of each file; STORM_KERNELS_FUZZ=25 makes 5,000 of the 200.
SETS = max(1, round(16 * float(os.environ.get("STORM_KERNELS_FUZZ", "1"))))
H264 = ("libx264", "yuv420p")
# Of each file: name, encoder and format of its pixels, options of the encoder, frames between key
# frames.
FILES = {
    "closed groups.mp4": (*H264, {"x264-params": "bframes=3:b-pyramid=normal:open-gop=0"}, 12),
    "open groups.mp4": (*H264, {"x264-params": "bframes=3:b-pyramid=normal:open-gop=1"}, 12),
    "open groups.mkv": (*H264, {"x264-params": "bframes=2:open-gop=1"}, 9),
    "refresh.mp4": (*H264, {"x264-params": "intra-refresh=1"}, 10),
    "short groups.mp4": (*H264, {"x264-params": "bframes=3"}, 2),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:bframes=4"}, 10),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8"}, 11),
    "vp8.webm": ("libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}, 11),
    "av1.mkv": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}, 16),
    "mpeg4.mov": ("mpeg4", "yuv420p", {"bf": "2"}, 8),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}, 8),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}, 1),
    "mjpeg.mkv": ("mjpeg", "yuvj420p", {}, 1),
}


def moving(i):
    """Noise that moves: every frame is another one, and codecs predict it from several."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8)
    return av.VideoFrame.from_ndarray(
        np.ascontiguousarray(np.roll(noise, 2 * i, 1)[:, :96] // 2 + np.uint8(i)), format="rgb24"
    )


def write_film(path, codec, pixels, options, distance, times=range(60)):
    """A film of 25 frames a second, or with frames at other ``times`` (counted in 25ths of a second)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, width=96, height=64, pix_fmt=pixels, options=options)
        stream.codec_context.gop_size, stream.codec_context.thread_count = distance, 1
        stream.codec_context.time_base = Fraction(1, 25)
        for i, time in enumerate(times):
            frame = moving(i)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def whole(path):
    """(pts, RGB) of every frame, by a decoder that plays the file from its start."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_whole_decode(tmp_path, name):
    codec, *rest = FILES[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    path = write_film(tmp_path / name, codec, *rest)
    shown = whole(path)
    video = Video(path)
    assert video.info.frames == len(shown) == 60
    # The middle of a frame's time: whichever way times are rounded, it is this frame.
    middles, draw = [time + 0.01 for time in video.sample(60).timestamps], random.Random(name)
    for _ in range(SETS):
        numbers = sorted(draw.sample(range(60), draw.choice((1, 2, 5, 20))))
        got = video.sample(at=[middles[i] for i in numbers])
        assert got.indices == tuple(numbers)
        for number, frame in zip(numbers, got.frames.numpy(), strict=True):
            assert np.array_equal(frame, shown[number][1]), f"{name}: frame {number}"


def test_only_the_groups_of_wanted_frames_are_decoded(tmp_path):
    path = write_film(tmp_path / "film.mp4", *FILES["closed groups.mp4"])
    assert sample_frames(path, at=[0.0, 2.0]).decoded <= 16
    assert sample_frames(path, at=[0.0, 2.0], verify=True).decoded >= 60


def test_key_frames_that_cannot_be_trusted_mean_a_whole_decode(tmp_path):
    """A picture that is refreshed column by column is marked as a key frame, and is none."""
    path = write_film(tmp_path / "film.mp4", *FILES["refresh.mp4"])
    assert sample_frames(path, at=[2.0]).decoded == 51


def test_even_in_time(tmp_path):
    """25 frames in the first second, then one each second: ten samples lie a second apart, whatever the frames are."""
    path = write_film(tmp_path / "film.mp4", *FILES["closed groups.mp4"], times=[*range(25), *range(25, 250, 25)])
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
    assert Times.of([Mark(*packet, True) for packet in packets], Fraction(1, 25)) is None
    assert Times.of([Mark(0, -1, True, True), Mark(1, 0, False, True)], Fraction(1, 25)) is not None


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
