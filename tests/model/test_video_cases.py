"""Files that players show and readers trip over: what the right frames are."""

import io

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from PIL import Image
from storm_model import check
from storm_model.pixels import preprocess
from storm_model.video import StormVideoError, Video, sample_frames

from ..support.clips import CHANGES, FILMS, HEVC, MPEG2, from_key, remuxed, shown, write_film
from .test_video_shown import corners, turned

OPEN = "log-level=none:bframes=4:b-adapt=0:open-gop=1:keyint=10:min-keyint=10:scenecut=0"
QUARTER = (0, 65536, -65536, 0)


def film(path, name="closed groups.mp4", **more):
    return write_film(path, *FILMS[name], **more)


def same_as_played(path):
    """The reader's frames of a file are those of a whole decode, all of them."""
    video, right = Video(path), [picture for _, picture, _ in shown(path)]
    got = video.sample(at=[seconds + 1e-4 for seconds in video._film.seconds])
    assert len(got.frames) == video.info.frames == len(right)
    assert all(np.array_equal(frame, picture) for frame, picture in zip(got.frames.numpy(), right, strict=True))
    return video.info


def test_ten_bit_hevc_on_its_side(tmp_path):
    """3: what a phone records in HLG."""
    options = {"x265-params": "log-level=none:bframes=4:transfer=arib-std-b67:colorprim=bt2020:colormatrix=bt2020nc"}
    path = turned(write_film(tmp_path / "phone.mov", "libx265", "yuv420p10le", options, 10), QUARTER)
    info = Video(path).info
    assert (info.width, info.height) == (64, 96)
    assert sample_frames(path, 3).frames.shape == (3, 96, 64, 3)


def test_even_in_time_over_a_variable_rate(tmp_path):
    """6: all frames of the first two seconds, then one every two: seconds for each frame, and one a second (7)."""
    path = film(tmp_path / "vfr.mp4", times=[*range(50), *range(50, 600, 50)])
    video = Video(path)
    assert video.info.duration_s == pytest.approx(22, abs=0.05)
    assert video.sample(8).timestamps == pytest.approx([0, 3.04, 6, 8, 12, 14, 18, 22], abs=2)
    assert np.diff(video.sample(12).timestamps).max() <= 2.01
    assert len(video.sample(fps=1).timestamps) == 23  # of 22.04 s


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_parts_of_open_groups(tmp_path, ending):
    """8, 9: x265 cut at a key frame whose leading pictures are predicted from what came before."""
    whole = write_film(tmp_path / f"whole.{ending}", *HEVC, {"x265-params": OPEN}, 10)
    path = remuxed(whole, tmp_path / f"part.{ending}", from_key(15))
    stored = sum(packet.size > 0 for packet in av.open(str(path)).demux(video=0))
    info = same_as_played(path)
    assert info.frames < stored  # leading pictures are stored, and no player shows them


def test_open_groups_of_h264_cut_at_a_recovery_point(tmp_path):
    """10"""
    path = CHANGES["cut at a key frame"](film(tmp_path / "whole.mp4", "open groups.mp4"), tmp_path / "cut.mp4")
    same_as_played(path)


def test_dropped_frames_of_avi(tmp_path):
    """11: two frames of three were left out as empty chunks."""
    path = write_film(tmp_path / "dropped.avi", *FILMS["mjpeg.avi"], times=range(0, 100, 3))
    info = same_as_played(path)
    assert info.frames == 34
    assert Video(path)._film.seconds[1] == pytest.approx(3 / 25, abs=1e-3)


def test_dash_without_an_index_at_its_end(tmp_path):
    """14: fragments, and no mfra box behind them."""
    path = film(tmp_path / "whole.mp4")
    out = remuxed(path, tmp_path / "dash.mp4", movflags="dash+skip_trailer")
    assert b"mfra" not in out.read_bytes()
    assert same_as_played(out).frames == 60


@pytest.mark.parametrize("flags", ["", "faststart"])
def test_sixty_percent_of_a_file(tmp_path, flags):
    """15: the place is named."""
    path = tmp_path / "cut.mp4"
    with (
        av.open(str(film(tmp_path / "whole.mp4"))) as source,
        av.open(str(path), "w", options={"movflags": flags} if flags else {}) as to,
    ):
        copy = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                to.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(StormVideoError, match=r"cut.mp4: truncated, 'mdat' at byte \d+ should reach byte \d+"):
        Video(path)
    if flags:
        with pytest.warns(UserWarning, match="what there is of it is read"):
            video = Video(path, on_error="nearest")
        with pytest.warns(UserWarning):
            assert len(video.sample(4).frames) > 0


def test_only_a_cover(tmp_path):
    """18: music with a picture."""
    path, cover = tmp_path / "song.mp4", io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(cover, "PNG")
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        picture = out.add_stream("png", width=32, height=32, pix_fmt="rgb24")
        picture.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        out.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 16000
        out.mux(sound.encode(silence) + sound.encode())
    with pytest.raises(StormVideoError, match=r"no video stream; it holds \['audio'\] and only a cover picture"):
        Video(path)


def test_frames_as_an_array():
    """22: NumPy frames are taken as tensors are."""
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    assert preprocess(frames, 14).shape == (2, 3, 14, 14)


def test_an_hour_is_not_decoded(tmp_path):
    """23: a long film costs what its wanted groups cost."""
    path = film(tmp_path / "long.mp4", times=range(1500))
    got = sample_frames(path, 8)
    assert got.info.frames == 1500 and got.decoded <= 8 * 16


# More of the same kinds, each of a public report.


def test_times_that_start_late(tmp_path):
    """A recording whose clock began before it (cameras, broadcasts): seconds count from its first frame."""
    path = CHANGES["late times"](film(tmp_path / "whole.ts", "open groups.ts"), tmp_path / "late.ts")
    assert Video(path).sample(at=[0.01]).timestamps == (0.0,)


def test_one_single_group(tmp_path):
    """One key frame in all (screen recorders): the last frame is reached from the first one."""
    path = write_film(tmp_path / "one.mp4", *FILMS["closed groups.mp4"][:3], 600)
    assert np.array_equal(sample_frames(path, at=[2.37]).frames[0], shown(path)[-1][1])


def test_field_pictures(tmp_path):
    """Interlaced broadcasts: both fields are one frame."""
    same_as_played(write_film(tmp_path / "fields.ts", "mpeg2video", "yuv420p", {"flags": "+ildct+ilme"}, 9))


def test_a_second_program_of_a_transport_stream(tmp_path):
    """Two video tracks in one stream: the first, and by its number the other."""
    path = corners(tmp_path / "two.ts", [(0, False), (60, False)])
    assert sample_frames(path, 1, track=1).frames.max() > 230
    assert sample_frames(path, 1).frames.max() < 200


def test_joined_transport_streams(tmp_path):
    """Parts of a stream one behind the other: times begin anew, and all frames are shown."""
    part = write_film(tmp_path / "part.ts", *MPEG2, times=range(20))
    path = tmp_path / "joined.ts"
    path.write_bytes(part.read_bytes() * 2)
    info = same_as_played(path)
    assert info.frames >= 39


def test_odd_sizes(tmp_path):
    """Sides that no block of the codec divides: the codec's crop is applied."""
    with av.open(str(tmp_path / "odd.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25, width=98, height=54, pix_fmt="yuv420p")
        for i in range(5):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((54, 98, 3), 40 * i, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    assert sample_frames(tmp_path / "odd.mp4", 5).frames.shape == (5, 54, 98, 3)


def test_a_name_that_looks_like_an_option_or_an_address(tmp_path, monkeypatch):
    """FFmpeg takes `a:b` for a protocol, and `%d` for numbered images."""
    monkeypatch.chdir(tmp_path)
    for name in ("-i.mp4", "a:b.mp4", "part%03d.mp4", "concat:x.mp4", "ü [x] 'y'.mp4"):
        film(tmp_path / name.replace(":", "_").replace("-i", "plain")).rename(tmp_path / name)
        assert Video(name).info.frames == 60


def test_a_film_of_one_frame(tmp_path):
    assert sample_frames(film(tmp_path / "one.mp4", times=range(1)), 1).frames.shape == (1, 64, 96, 3)


def test_the_check_command(tmp_path, capsys):
    """All that is wrong is listed: status 1; what cannot be read is one line: status 2."""
    path = write_film(tmp_path / "film.avi", *FILMS["mjpeg.avi"])
    assert check.cli([str(path)]) == 0
    assert "96x64, 60 frames, 25.000 a second, 2.400 s\n" in capsys.readouterr().out
    with av.open(str(path)) as container:
        middles = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for middle in (middles[10], middles[40]):
        content[middle : middle + 100] = b"\xff" * 100
    path.write_bytes(content)
    assert check.cli([str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("is damaged:") == 2 and "film.avi: 2 found" in out
    assert check.cli([str(tmp_path / "gone.mp4")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
