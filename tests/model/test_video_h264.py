"""Pictures of H.264: which of them may be left out, and films in which some are missing."""

import contextlib
import random
from functools import partial

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.h264 import PicturesMissing, Sequence
from storm_model.video import Video, sample_frames

from ..support.clips import FILMS, remuxed, shown, write_film

# AVI and raw streams store no times of showing: where a picture is missing, nothing says what is shown when.
NAMES = [name for name, film in FILMS.items() if film[0] == "libx264" and name not in ("h264.avi", "raw.h264")]


def description(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.extradata


def test_pictures_that_nothing_is_predicted_from_are_not_decoded(tmp_path):
    """Of groups of 12 with 3 B-frames between others, of which one serves the other two."""
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"])
    got = sample_frames(path, at=[11 / 25])
    assert np.array_equal(got.frames[0].numpy(), shown(path)[11][1])
    assert got.decoded < 10


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_picture_is_concealed_as_a_player_does(name, tmp_path):
    """The decoder fills in for it with what it decoded last, from before the key frame too."""
    whole = write_film(tmp_path / name, *FILMS[name])
    for gone in random.Random(name).sample(range(13, 40), 4):
        # Without a key frame, FFmpeg shows fewer frames than there are packets, and not in their order.
        kept = partial(lambda gone, number, packet: number != gone or packet.is_keyframe, gone)
        path = remuxed(whole, tmp_path / f"{gone} {name}", kept)
        right = shown(path)
        for number in (20, 23, 24, 30, 45):
            video = Video(path)
            got = video.sample(at=[video._film.seconds[number] + 1e-4])
            assert np.array_equal(got.frames[0].numpy(), right[number][1]), (gone, number)


@pytest.mark.parametrize("name", ["closed groups.mp4", "open groups.mkv", "open groups.ts", "h264.flv"])
def test_a_whole_film_misses_nothing(name, tmp_path):
    path = write_film(tmp_path / name, *FILMS[name])
    follows = Sequence.of(description(path)).follow()
    with av.open(str(path)) as container:
        assert all(follows(packet) for packet in container.demux(video=0) if packet.size)


@pytest.mark.parametrize("name", ["closed groups.mp4", "open groups.ts"])
def test_a_missing_picture_is_noticed(name, tmp_path):
    whole = write_film(tmp_path / name, *FILMS[name])
    path = remuxed(whole, tmp_path / f"missing {name}", lambda number, _: number != 13)
    follows = Sequence.of(description(path)).follow()
    with av.open(str(path)) as container, pytest.raises(PicturesMissing):
        for packet in container.demux(video=0):
            if packet.size:
                follows(packet)


def test_films_whose_pictures_cannot_be_followed(tmp_path):
    assert Sequence.of(description(write_film(tmp_path / "i.mp4", *FILMS["interlaced.mp4"], times=range(3)))) is None
    told = description(write_film(tmp_path / "f.mp4", *FILMS["closed groups.mp4"], times=range(3)))
    assert Sequence.of(told) is not None
    for wrong in (None, b"", told[:12], b"\1" * 40, told[:5] + b"\xe2" + told[6:], b"\0\0\1" + told):
        assert Sequence.of(wrong) is None


def test_no_bytes_make_it_fail(tmp_path):
    """Descriptions and packets of noise, and right ones with a byte changed."""
    path = write_film(tmp_path / "f.mp4", *FILMS["closed groups.mp4"], times=range(3))
    told, draw = bytearray(description(path)), random.Random(0)
    with av.open(str(path)) as container:
        content = bytearray(bytes(next(container.demux(video=0))))
    for _ in range(2000):
        for whole in (told, content):
            place = draw.randrange(min(64, len(whole)))
            whole[place] ^= (changed := draw.randrange(1, 256))
            sequence = Sequence.of(bytes(told))
            if sequence is not None:
                with contextlib.suppress(PicturesMissing):
                    sequence.follow()(av.Packet(bytes(content)))
            whole[place] ^= changed
