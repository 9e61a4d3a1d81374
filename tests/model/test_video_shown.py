"""model/display.py and film.py: frames as a player shows them."""

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model import StormVideoProcessor
from storm_model.display import Turn
from storm_model.video import Video, sample_frames

ONE = 65536
MATRICES = {
    "upright": ((ONE, 0, 0, ONE), lambda p: p),
    "90 clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1)),
    "180": ((-ONE, 0, 0, -ONE), lambda p: np.rot90(p, 2)),
    "270 clockwise": ((0, -ONE, ONE, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda p: p[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda p: p[::-1]),
    "transposed": ((0, ONE, ONE, 0), lambda p: p.swapaxes(0, 1)),
    "transposed across": ((0, -ONE, -ONE, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
}


def corners(path, tracks=((0, False),)):
    """12 frames of a picture with four different corners; each track is (grey that is added, whether the default)."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = 60, 120, 180
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=25, width=64, height=48, pix_fmt="yuv420p") for _ in tracks]
        for stream, (_, default) in zip(streams, tracks, strict=True):
            if default:
                stream.disposition = av.stream.Disposition.default
        for i in range(12):
            for stream, (grey, _) in zip(streams, tracks, strict=True):
                frame = av.VideoFrame.from_ndarray(picture + np.uint8(grey), format="rgb24")
                frame.pts = i
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    return path


def turned(path, matrix):
    """The matrix of the track's header (tkhd, 8.3.2) overwritten: a, b, u, c, d, v, x, y, w."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    content[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_turned_and_mirrored(tmp_path, name):
    matrix, right = MATRICES[name]
    path = corners(tmp_path / "corners.mp4")
    stored = sample_frames(path, 2).frames.numpy()
    video = Video(turned(path, matrix))
    got = video.sample(2)
    assert all(np.array_equal(frame, right(plain)) for frame, plain in zip(got.frames.numpy(), stored, strict=True))
    assert (video.info.height, video.info.width) == right(stored[0]).shape[:2]
    assert video.sample(2, size=(10, 30)).frames.shape == (2, 10, 30, 3)


def test_other_angles_are_told_at_the_callers_line(tmp_path):
    odd = (ONE // 2, 56755, -56755, ONE // 2)
    path = turned(corners(tmp_path / "odd.mp4"), odd)
    processor = StormVideoProcessor(image_size=28)
    calls = [
        lambda: Turn.by([*odd[:2], 0, *odd[2:], 0, 0, 0, 1 << 30]) == Turn(),
        lambda: sample_frames(path, 1),
        lambda: processor(str(path)),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="is no quarter turn: frames are given as stored") as told:
            assert call()
        assert {one.filename for one in told} == {__file__}


def test_the_default_track(tmp_path):
    path = corners(tmp_path / "two.mkv", [(0, False), (60, True)])
    assert sample_frames(path, 1).frames.max() > 230
    assert sample_frames(path, 1, track=0).frames.max() < 200
    with pytest.raises(ValueError, match=r"track must be less than 2, the number of video tracks of .*, got 2"):
        sample_frames(path, 1, track=2)
    with pytest.raises(TypeError, match="track must be a number from 0, got '1'"):
        sample_frames(path, 1, track="1")


def with_start(path, start):
    """A copy whose frame ``start`` is at time 0, and those before it at negative times: what a trim by copy writes."""
    out_path = path.with_name("trimmed.mp4")
    with av.open(str(path)) as source, av.open(str(out_path), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = round(start / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                out.mux(packet)
    return out_path


@pytest.mark.parametrize("start", [1, 5, 50])
def test_what_an_edit_list_leaves_out_is_not_shown(tmp_path, start):
    """Frames before time 0 are stored to decode those after it; a player begins at 0 (case 4)."""
    with av.open(str(tmp_path / "long.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25, width=64, height=48, pix_fmt="yuv420p", options={"bf": "2"})
        stream.codec_context.gop_size = 30
        for i in range(100):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * i, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    plain = sample_frames(tmp_path / "long.mp4", 100).frames
    path = with_start(tmp_path / "long.mp4", start)
    with av.open(str(path)) as container:
        right = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = Video(path)
    assert (video.info.frames, video.info.stored, len(right)) == (100 - start, 100, 100 - start)
    assert video.info.duration_s == pytest.approx((100 - start) / 25)
    assert np.array_equal(video.sample(100 - start).frames.numpy(), np.stack(right))
    assert np.array_equal(video.sample(at=[0.01]).frames[0].numpy(), plain[start].numpy())
    assert video.sample(at=[0.01, 1.0]).decoded < 100
