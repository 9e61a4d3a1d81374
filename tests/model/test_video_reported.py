"""Films that other readers were reported to get wrong: frames equal a whole decode's (docs/reliability.md R11)."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.video import Video, sample_frames

from ..support.clips import FILMS, moving, remuxed, shown, write_film


def film(path, name="closed groups.mp4", **more):
    return write_film(path, *FILMS[name], **more)


def check_each(path, numbers):
    """One reader, asked for one frame after the other."""
    video, right = Video(path), shown(path)
    assert video.info.frames == len(right)
    for number in numbers:
        got = video.sample(at=[video._film.seconds[number] + 1e-4])
        assert got.indices == (number,) and np.array_equal(got.frames[0], right[number][1]), f"frame {number}"


def test_backwards_after_the_end(tmp_path):
    """torchcodec #1339: a decoder of HEVC that had ended gave an old frame for an earlier time."""
    path = write_film(tmp_path / "film.mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}, 3)
    check_each(path, [59, 13, 58, 12, 0, 59, 1])


@pytest.mark.parametrize("name", ["closed groups.mp4", "open groups.mkv", "mpeg4.avi"])
def test_key_frames_and_their_neighbours_in_any_order(tmp_path, name):
    """decord #78: what a seek to a key frame gave depended on the seeks before it."""
    path, distance = film(tmp_path / name, name), FILMS[name][3]
    numbers = [key + near for key in range(distance, 60 - distance, distance) for near in (-1, 0, 1)]
    check_each(path, random.Random(name).sample(numbers, len(numbers)))


def test_a_key_frame_without_times_that_comes_last(tmp_path):
    """torchcodec #1363: AVI has no presentation times, and the last picture comes when the decoder is emptied."""
    check_each(film(tmp_path / "film.avi", "h264.avi", times=range(61)), [60, 59, 60])


def test_sixteen_bits_of_grey(tmp_path):
    """torchcodec #713: depth recorded as FFV1 in Matroska, which declares no duration of the track."""
    check_each(write_film(tmp_path / "depth.mkv", "ffv1", "gray16le", {}, 12), [59, 0, 31])


def test_matroska_without_an_index(tmp_path):
    """torchcodec #1223: without Cues a late time was reached by decoding from the start."""
    path = remuxed(film(tmp_path / "whole.mp4"), tmp_path / "live.mkv", live="1")
    assert bytes.fromhex("1c53bb6b") not in path.read_bytes()  # Cues
    check_each(path, [59, 3])


def test_sound_that_goes_on_after_the_pictures(tmp_path):
    """decord #373: frames counted from the file's duration, and waited for without end."""
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, width=96, height=64, pix_fmt="yuv420p")
        sound = out.add_stream("aac", rate=16000, layout="mono")
        for i in range(25):
            out.mux(stream.encode(moving(i)))
        for _ in range(64):  # 4.1 s
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate = 16000
            out.mux(sound.encode(silence))
        out.mux(stream.encode())
        out.mux(sound.encode())
    got = sample_frames(path, 4)
    assert got.info.frames == 25 and got.info.duration_s == pytest.approx(1, abs=0.01)
    assert got.indices[-1] == 24 and not got.looped
    assert np.array_equal(got.frames[-1], shown(path)[-1][1])


def test_one_time_asked_for_twice(tmp_path):
    """decord #31: a batch held other frames than those it was asked for."""
    path = film(tmp_path / "film.mp4")
    right = shown(path)
    got = sample_frames(path, at=[0.2, 0.2, 1.401, 1.401])
    assert got.indices == (5, 5, 35, 35)
    assert all(np.array_equal(frame, right[i][1]) for frame, i in zip(got.frames.numpy(), got.indices, strict=True))


def test_pictures_with_alpha(tmp_path):
    """Screen recordings in PNG: RGB as FFmpeg converts it, alpha dropped."""
    check_each(write_film(tmp_path / "alpha.mov", "png", "rgba", {}, 1), [0, 59])


def test_readers_in_threads(tmp_path):
    """Loaders read one file in several threads: each gets its own frames."""
    path = film(tmp_path / "film.mp4")
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(lambda _: sample_frames(path, 9).frames.numpy(), range(8)))
    assert all(np.array_equal(batch, batches[0]) for batch in batches)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_no_file_stays_open(tmp_path):
    """Loaders of many films ran out of file descriptors."""
    path = film(tmp_path / "film.mp4")
    sample_frames(path, 2)
    before = len(os.listdir("/proc/self/fd"))
    videos = [Video(path) for _ in range(20)]
    for video in videos:
        video.sample(2)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_an_empty_track_before_the_film(tmp_path):
    """A recorder that announced a second camera and wrote none of it: the empty track is not the film."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        out.add_stream("mjpeg", rate=25, width=32, height=32, pix_fmt="yuvj420p")
        stream = out.add_stream("libx264", rate=25, width=96, height=64, pix_fmt="yuv420p")
        for i in range(10):
            out.mux(stream.encode(moving(i)))
        out.mux(stream.encode())
    assert sample_frames(path, 2, track=1).frames.shape == (2, 64, 96, 3)


def test_an_empty_track_is_not_shown_by_default(tmp_path):
    """FFmpeg's choice of a track prefers one that has frames, and so does ours."""
    test_an_empty_track_before_the_film(tmp_path)
    with av.open(str(tmp_path / "two.mkv")) as container:
        assert container.streams.best("video").index == 1
    assert sample_frames(tmp_path / "two.mkv", 2).frames.shape == (2, 64, 96, 3)
