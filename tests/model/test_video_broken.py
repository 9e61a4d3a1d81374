"""Every video file that is not whole or no video is a StormVideoError that names it; none gives
fewer frames silently (docs/reliability.md R11).
"""

import random
import re
import wave

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.containers import Chunk
from storm_model.video import StormVideoError, probe, sample_frames

from .test_video import CLIPS, FRAMES, MOVFLAGS, made_clips, picture, write  # noqa: F401 (a fixture)


def boxes(content):
    at = 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4])
        yield Chunk(content[at + 4 : at + 8], at + 8, at + size)
        at += size


@pytest.mark.parametrize("name", CLIPS)
def test_truncated_at_any_byte(clips, tmp_path, name):
    """An error that names the file, or all frames (a cut that took only padding); never fewer. But fragments are whole
    by themselves: of a film that ends with one, nothing says that others came after it.
    """
    whole = clips[name].read_bytes()
    chosen = random.Random(name)
    cut_file = tmp_path / clips[name].name
    fragmented = name in MOVFLAGS or name == "fragmented with sound"
    ends = {box.end for box in boxes(whole) if box.kind == b"mdat"} if fragmented else set()
    for cut in sorted({0, 1, len(whole) - 1, *ends, *(chosen.randrange(len(whole)) for _ in range(40))} - {len(whole)}):
        cut_file.write_bytes(whole[:cut])
        try:
            frames = probe(cut_file).frames
        except StormVideoError as error:
            assert str(cut_file) in str(error)
        else:
            assert frames == FRAMES or any(0 <= cut - end < 8 for end in ends), f"byte {cut}: {frames} frames"


@pytest.mark.parametrize("name", CLIPS)
def test_damaged_anywhere(clips, tmp_path, name):
    """Up to 32 wrong bytes: an error or all frames, though a damaged edit list may say that fewer are shown."""
    whole = clips[name].read_bytes()
    chosen = random.Random(name)
    damaged_file = tmp_path / clips[name].name
    for _ in range(40):
        content, at, length = bytearray(whole), chosen.randrange(len(whole)), chosen.choice([1, 4, 32])
        content[at : at + length] = chosen.randbytes(len(content[at : at + length]))
        damaged_file.write_bytes(content)
        try:
            assert sample_frames(damaged_file, FRAMES, size=16, verify=True).info.stored == FRAMES, (
                f"byte {at}, {length} bytes"
            )
        except StormVideoError as error:
            assert str(damaged_file) in str(error)


def no_bytes(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("frame 1\nframe 2\n" * 100)


def noise(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def zeros(path):
    path.write_bytes(bytes(5000))


def playlist(path):
    path.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")


def sound_only_mp4(path):
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 16000
        for packet in stream.encode(silence) + stream.encode():
            out.mux(packet)


def sound_only_wav(path):
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(2000))


def no_frames(path, **options):
    with av.open(str(path), "w", format="mp4", options=options) as out:
        out.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
        out.start_encoding()


def no_fragments(path):
    no_frames(path, movflags="empty_moov")


def only_header(path):
    path.write_bytes(b"\x00\x00\x00\x14ftypisom\x00\x00\x02\x00isom")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_bytes, "the file is empty"),
        (text, "cannot be read as a video"),
        (noise, "cannot be read as a video"),
        (zeros, "cannot be read as a video"),
        (playlist, "cannot be read as a video"),
        (sound_only_wav, "cannot be read as a video"),
        (sound_only_mp4, r"no video stream; it holds \['audio'\]"),
        (no_frames, "no video stream; it holds nothing"),
        (no_fragments, "has no frames"),
        (only_header, "no moov box in 20 bytes"),
    ],
)
def test_files_that_are_no_whole_video(tmp_path, make, message):
    path = tmp_path / "clip.mp4"
    make(path)
    for read in (probe, lambda file: sample_frames(file, 4)):
        with pytest.raises(StormVideoError, match=rf"{re.escape(str(path))}: .*({message})"):
            read(path)


def test_missing_and_no_file(tmp_path):
    with pytest.raises(StormVideoError, match=r"gone.mp4: no such file"):
        sample_frames(tmp_path / "gone.mp4", 4)
    with pytest.raises(StormVideoError, match=r"no images; a video needs at least one"):
        sample_frames(tmp_path, 4)


def test_fewer_frames_than_declared(clips, tmp_path):
    """The last 40 bytes of the frames are missing, and the box around them says so: only the sample table tells."""
    content = clips["faststart"].read_bytes()
    data = next(box for box in boxes(content) if box.kind == b"mdat")
    assert data.end == len(content)
    path = tmp_path / "fewer.mp4"
    path.write_bytes(
        content[: data.start - 8] + (data.end - data.start - 32).to_bytes(4) + b"mdat" + content[data.start : -40]
    )
    for read in (probe, lambda file: sample_frames(file, 4)):
        with pytest.raises(StormVideoError, match=r"fewer.mp4: the file declares 36 frames but holds \d+"):
            read(path)


def jpeg_sizes(content, width, height):
    """Every JPEG frame header (SOF0) says ``width`` x ``height``."""
    return re.sub(
        rb"(\xff\xc0\x00\x11\x08)....",
        lambda m: m[1] + height.to_bytes(2) + width.to_bytes(2),
        content,
        flags=re.DOTALL,
    )


def test_huge_dimensions(tmp_path, monkeypatch):
    path = write(tmp_path / "huge.avi", frames=3, codec="mjpeg", pix_fmt="yuvj420p")
    monkeypatch.setattr("storm_model.frames.MAX_PIXELS", 64 * 48)
    assert sample_frames(path, 3, size=16).info.frames == 3
    monkeypatch.setattr("storm_model.frames.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(StormVideoError, match=r"huge.avi"):
        sample_frames(path, 3, size=16)
    monkeypatch.undo()
    path.write_bytes(jpeg_sizes(path.read_bytes(), 65_000, 65_000))
    with pytest.raises(StormVideoError, match=r"huge.avi"):
        sample_frames(path, 3, size=16)


def test_one_huge_frame(tmp_path):
    """Only the last frame claims 65,000 x 65,000: nothing tells before it is decoded."""
    path = write(tmp_path / "huge.avi", frames=9, codec="mjpeg", pix_fmt="yuvj420p")
    content = path.read_bytes()
    last = content.rindex(b"\xff\xc0\x00\x11\x08")
    path.write_bytes(content[:last] + jpeg_sizes(content[last:], 65_000, 65_000))
    assert probe(path).frames == 9
    with pytest.raises(
        StormVideoError, match=r"huge.avi: the frame at 0.320 s, or one that it is predicted from, is damaged"
    ):
        sample_frames(path, 3, size=16)
    with pytest.raises(StormVideoError, match=r"huge.avi: frame 8 of 9, at 0.320 s in the file, is damaged"):
        sample_frames(path, 3, size=16, verify=True)
