"""The index of an MP4 file's header is the one that a pass over its packets makes, or none."""

import contextlib
import itertools

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.index import by_packets, by_samples
from storm_model.mp4_samples import samples
from storm_model.video import Video

from ..support.clips import CHANGES, FILMS, remuxed, shown, write_film

NAMES = [name for name in FILMS if name.endswith((".mp4", ".mov"))]
UNEVEN = [*range(20), *range(20, 200, 7)]


@contextlib.contextmanager
def opened(path):
    """The video track, decoded with one thread, and the sample table of it."""
    with av.open(str(path)) as container, path.open("rb") as file:
        (stream,) = container.streams.video
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield stream, samples(str(path), file, stream.id, len(stream.index_entries))


def quick(path):
    with opened(path) as (stream, table):
        return table and by_samples(stream, {}, table)


def check_equal(path):
    with opened(path) as (stream, _):
        right, declared = by_packets(stream, {}), stream.frames
    index = quick(path)
    assert (index is not None) == (right.shown.all() and len(right.pts) == declared)
    for name, found, expected in zip(right._fields, index or right, right, strict=True):
        assert name == "listed" or np.array_equal(found, expected), name


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_the_packets_say(name, change, tmp_path):
    path = write_film(tmp_path / name, *FILMS[name], times=range(40))
    if change:
        path = CHANGES[change](path, tmp_path / f"changed {name}")
    check_equal(path)


def test_frames_at_uneven_distances(tmp_path):
    check_equal(write_film(tmp_path / "vfr.mp4", *FILMS["closed groups.mp4"], times=UNEVEN))


def test_a_film_in_fragments_is_read_by_its_packets(tmp_path):
    whole = write_film(tmp_path / "whole.mp4", *FILMS["closed groups.mp4"])
    path = remuxed(whole, tmp_path / "fragments.mp4", movflags="frag_keyframe+empty_moov")
    assert quick(path) is None
    assert Video(path).info.frames == 60


def changed_edits(path, parts):
    """The film's edit list made anew: (duration in the movie's unit, begin in the track's unit or -1) of each part."""
    content = path.read_bytes()
    at = content.index(b"elst") - 4
    old = int.from_bytes(content[at : at + 4])
    numbers = [number for length, begin in parts for number in (length, begin % 2**32, 1 << 16)]
    new = b"elst\0\0\0\0" + b"".join(number.to_bytes(4) for number in (len(parts), *numbers))
    new = (len(new) + 4).to_bytes(4) + new
    grown, content = len(new) - old, bytearray(content[:at] + new + content[at + old :])
    for box in (b"moov", b"trak", b"edts"):
        place = content.index(box) - 4
        content[place : place + 4] = (int.from_bytes(content[place : place + 4]) + grown).to_bytes(4)
    out = path.with_name("edited.mp4")
    out.write_bytes(content)
    return out


# Of a film of 2.4 s whose header counts in milliseconds, and whose track counts 12,800 a second.
PARTS = {
    "whole": [(2400, 1024)],
    "late": [(500, -1), (2400, 1024)],
    "begins later": [(1400, 13824)],
    "ends early": [(1000, 1024)],
    "two parts": [(800, 1024), (800, 21504)],
    "a pause between": [(800, 1024), (400, -1), (800, 11264)],
}


@pytest.mark.parametrize("name", PARTS)
def test_edit_lists(name, tmp_path):
    film = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"])
    path = changed_edits(film, PARTS[name])
    right, video = shown(path), Video(path)
    got = video.sample(at=[seconds + 1e-4 for seconds in video._film.seconds])
    assert video.info.frames == len(right)
    assert np.array_equal(got.frames.numpy(), np.stack([frame for _, frame, _ in right]))
    assert (quick(path) is None) == (name not in ("whole", "late"))


# FFmpeg's index has no times of showing: those are held against the first packets, and against each that is read.
@pytest.mark.parametrize(
    ("field", "number"), [*itertools.product(("dts", "key"), (0, 3, 24, 59)), ("pts", 0), ("pts", 1)]
)
def test_what_ffmpeg_says_otherwise_is_not_believed(field, number, tmp_path):
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"])
    with opened(path) as (stream, table):
        wrong = getattr(table, field).copy()
        wrong[number] = not wrong[number] if field == "key" else wrong[number] + 1
        assert by_samples(stream, {}, table._replace(**{field: wrong})) is None


def test_a_wrong_time_of_showing_is_found_when_packets_near_it_are_read(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"])
    right = shown(path)

    def shifted(name, file, track, count):
        table = samples(name, file, track, count)
        late = table.pts.copy()
        late[40] += 1
        return table._replace(pts=late)

    monkeypatch.setattr("storm_model.film.samples", shifted)
    got = Video(path).sample(60)
    assert got.indices == tuple(range(60))
    assert np.array_equal(got.frames.numpy(), np.stack([frame for _, frame, _ in right]))


@pytest.mark.parametrize("box", [b"stsz", b"stts", b"ctts", b"stss", b"stsc", b"stco", b"tkhd", b"elst"])
def test_damaged_tables_are_left_to_ffmpeg(box, tmp_path):
    """Each byte of a table's head set to 0 and 255: an index of the packets that FFmpeg gives, or none; no crash."""
    path = write_film(tmp_path / "film.mp4", *FILMS["closed groups.mp4"], times=range(14))
    content = bytearray(path.read_bytes())
    begin = content.index(box) + 4
    for at in range(begin, begin + 24):
        for value in (0, 255):
            kept, content[at] = content[at], value
            broken = tmp_path / "broken.mp4"
            broken.write_bytes(content)
            content[at] = kept
            try:
                with opened(broken) as (stream, _):
                    right = by_packets(stream, {})
            except (av.FFmpegError, ValueError, AttributeError):  # no video stream, or none with a decoder
                continue
            index = quick(broken)
            if index is not None:
                assert np.array_equal(index.pts, right.pts) and np.array_equal(index.key, right.key), (at, value)
