"""The benchmark of video readers: clips whose frames are known, and no reader of other frames is timed."""

import av
import numpy as np
import pytest
from storm_benchmarks import clips, decode, harness, readers, subject
from storm_benchmarks.harness import CheckFailed, load_rows


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """The bikes clip, played twice."""
    return clips.bikes(tmp_path_factory.mktemp("clips"), 20)


def test_a_looped_clip_is_its_piece_again_and_again(film):
    assert (film.frames, film.piece_frames) == (500, 250)
    with av.open(str(film.path)) as container:
        stream = container.streams.video[0]
        assert float(stream.duration * stream.time_base) == 20
        shown = enumerate(container.decode(stream))
        decoded = [frame.to_ndarray(format="rgb24") for number, frame in shown if number % 71 == 3]
    assert np.array_equal(np.stack(decoded), film.truth(list(range(3, 500, 71))))


@pytest.mark.parametrize("distance", [5, 12])
def test_a_large_clip_has_its_key_frames_where_they_were_asked_for(tmp_path, distance):
    film = clips.large(tmp_path, 2, distance, piece_frames=24)
    with av.open(str(film.path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (1920, 1080)
        keys = [number for number, packet in enumerate(container.demux(stream)) if packet.is_keyframe]
    assert [key for key in keys if key < 24] == list(range(0, 24, distance))
    assert film.frames == 72 and {key % 24 for key in keys if key < 72} == set(range(0, 24, distance))


def test_readers_of_the_right_frames_are_timed(film, tmp_path, capsys):
    rows = harness.Rows(tmp_path / "rows.json")
    subject.measure(decode.measurement(film, 4, linear=True), "cpu", rows, rounds=1)
    done = {row["backend"]: row for row in load_rows(rows.path)}
    assert {"storm_model", "PyAV seek", "PyAV linear"} <= done.keys()
    assert all(done[name]["error"] == 0 for name in decode.EXACT)
    assert {row["shape"] for row in done.values()} == {"clip=bikes 640x272 seconds=20 keys=8-61 frames=4"}
    assert "limit: as many frames in a row" in capsys.readouterr().out


def test_what_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(readers.importlib, "import_module", missing)
    found, absent = readers.installed()
    assert tuple(found) == decode.EXACT
    assert "decord left out: No module named 'decord'" in absent


def test_a_reader_of_other_frames_is_not_timed(film):
    indices = [3, 40, 260]
    right = film.truth(indices)
    beside = {step: film.truth([index + step for index in indices]) for step in (-1, 1)}
    darker = (right * 0.99).astype(np.uint8)
    with pytest.raises(CheckFailed, match="decode by PyAV seek: frame 3 of bikes-20s.mp4 differs"):
        decode._check("PyAV seek", beside[1], right, beside, film, indices)
    with pytest.raises(CheckFailed, match="decode by other: frame 3 of bikes-20s.mp4 is nearer to frame 4"):
        decode._check("other", beside[1], right, beside, film, indices)
    with pytest.raises(CheckFailed, match="differs"):
        decode._check("storm_model", darker, right, beside, film, indices)
    with pytest.raises(CheckFailed, match=r"uint8 \(2, 272, 640, 3\) against uint8 \(3, 272, 640, 3\)"):
        decode._check("other", right[:2], right, beside, film, indices)
    assert 0 < decode._check("other", darker, right, beside, film, indices)["error"] < 3
    assert decode._check("PyAV seek", readers.pyav_seek(film.path, indices), right, beside, film, indices)["error"] == 0
