"""Where a video comes from: addresses, bytes, file objects, pictures; formats that do not say where they end."""

import http.server
import io
import threading
import urllib.parse
from functools import partial

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

from PIL import Image
from storm_model.video import StormVideoError, Video, sample_frames

from .test_video import write

SIZE = (48, 64)


@pytest.fixture(name="clip", scope="module")
def a_clip(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sources") / "a clip.mp4")


@pytest.fixture(name="server", scope="module")
def a_server(clip):
    """The clip's folder, served on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = partial(Quiet, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Pipe(io.RawIOBase):
    """A file that can be read only once."""

    def __init__(self, content):
        self._left = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, room):
        return self._left.readinto(room)


def test_every_source_gives_the_same(clip, server):
    right = sample_frames(clip, 5).frames
    with clip.open("rb") as file:
        sources = {
            "str": str(clip),
            "file address": clip.as_uri(),
            "file:": f"file:{clip}",
            "http": f"{server}/{urllib.parse.quote(clip.name)}",
            "bytes": clip.read_bytes(),
            "memoryview": memoryview(clip.read_bytes()),
            "BytesIO": io.BytesIO(clip.read_bytes()),
            "file object": file,
            "pipe": Pipe(clip.read_bytes()),
        }
        for name, source in sources.items():
            video = Video(source)
            assert np.array_equal(video.sample(5).frames, right), name
            assert np.array_equal(video.sample(5).frames, right), f"{name}, again"
        assert not file.closed


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (
            "http://127.0.0.1:9/none.mp4",
            StormVideoError,
            r"http://127.0.0.1:9/none.mp4: cannot be downloaded: .*refused",
        ),
        ("file:///no/such.mp4", StormVideoError, r"/no/such.mp4: no such file"),
        (b"", StormVideoError, r"<0 bytes>: the file is empty"),
        (5, TypeError, r"source must be a path, a URL, bytes, a binary file object or images, got 5"),
        (io.StringIO("x"), TypeError, r"source must be a path"),
        ([], StormVideoError, r"<0 images>: no images"),
        ([np.zeros((4, 4), np.uint8)], TypeError, r"images must be uint8 of shape \(height, width, 3\)"),
    ],
)
def test_no_source(source, error, said):
    with pytest.raises(error, match=said) as raised:
        sample_frames(source, 3)
    assert "\n" not in str(raised.value)


def test_a_server_that_has_no_such_file(server):
    with pytest.raises(StormVideoError, match=r"gone.mp4: the server answers 404"):
        Video(f"{server}/gone.mp4")


def colour(i):
    return (10 * i, 255 - 10 * i, 60)


@pytest.fixture(name="folder")
def a_folder(tmp_path):
    for i in range(12):
        Image.new("RGB", SIZE[::-1], colour(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images_in_the_order_of_their_numbers(folder):
    got = sample_frames(folder, 12)
    assert [tuple(frame[0, 0].tolist()) for frame in got.frames] == [colour(i) for i in range(12)]
    assert sample_frames(folder, fps=1, frame_rate=3).indices == (0, 3, 6, 9)
    with pytest.raises(ValueError, match="fps needs the times of the images: give frame_rate, images a second"):
        sample_frames(folder, fps=1)
    with pytest.raises(ValueError, match="frame_rate must be a positive number of images a second, got 0"):
        sample_frames(folder, 2, frame_rate=0)


def test_a_list_of_images(folder):
    paths = sorted(folder.glob("*.png"))[:3]
    right = sample_frames(paths, 3).frames
    opened = [Image.open(path) for path in paths]
    for images in (opened, [np.asarray(image) for image in opened], [path.read_bytes() for path in paths], list(right)):
        assert np.array_equal(sample_frames(images, 3).frames, right)


def test_a_damaged_image(folder):
    (folder / "frame5.png").write_bytes((folder / "frame5.png").read_bytes()[:60])
    with pytest.raises(StormVideoError, match=r"image 5: cannot be read as an image"):
        sample_frames(folder, 12)
    assert sample_frames(folder, 2).indices == (0, 11)
    with pytest.warns(UserWarning, match=r"image 5: .*: number 6 is taken"):
        got = sample_frames(folder, 12, on_error="nearest")
    assert got.replaced == {5: 6} and got.indices[5] == 6
    assert [line.split(":")[1] for line in Video(folder).check()] == [" image 5"]


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp", "photo.bmp", "photo.gif", "photo.avif"])
def test_one_image_is_a_video_of_one_frame(tmp_path, name):
    Image.new("RGB", SIZE[::-1], (200, 40, 90)).save(tmp_path / name)
    got = sample_frames(tmp_path / name)
    assert got.frames.shape == (1, *SIZE, 3) and not got.looped
    assert np.abs(got.frames[0, 0, 0].numpy().astype(int) - [200, 40, 90]).max() <= 6


def test_a_photo_is_turned_as_it_says(tmp_path):
    picture = Image.new("RGB", (64, 48))
    picture.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show it
    picture.save(tmp_path / "photo.png", exif=exif)
    shown = sample_frames(tmp_path / "photo.png").frames[0]
    assert shown.shape == (64, 48, 3) and shown[0, -1].tolist() == [255, 255, 255]


def test_sixteen_bits_of_grey(tmp_path):
    Image.fromarray(np.full(SIZE, 0x80FF, np.uint16)).save(tmp_path / "depth.png")
    assert sample_frames(tmp_path / "depth.png").frames.unique().tolist() == [0x80]


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.webp", "film.avif"])
def test_animations(tmp_path, name):
    images = [Image.new("RGB", SIZE[::-1], (20 * i, 0, 255 - 20 * i)) for i in range(10)]
    path = tmp_path / name
    times = [100] * 5 + [500] * 5
    lossless = {"lossless": True} if name.endswith("webp") else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0, **lossless)
    video = Video(path)
    assert video.info.frames == 10 and video.info.duration_s == pytest.approx(3.0)
    got = video.sample(at=[2.9, 0.05, 1.2])
    assert got.indices == (9, 0, 6)
    right = [np.array(images[i])[0, 0].astype(int) for i in got.indices]
    assert all(np.abs(frame[0, 0].numpy() - one).max() <= 8 for frame, one in zip(got.frames, right, strict=True))
    assert video.sample(fps=2).indices == (0, 5, 6, 7, 8, 9)


FORMATS = {
    "clip.ts": "libx264",
    "clip.flv": "libx264",
    "clip.asf": "wmv2",
    "clip.ogv": "libvpx",
    "clip.h264": "libx264",
    "clip.mxf": "mpeg2video",
    "clip.mpg": "mpeg2video",
    "clip.nut": "mpeg4",
    "clip.ivf": "libvpx-vp9",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_do_not_say_where_they_end(tmp_path, name):
    path = write(tmp_path / name, codec=FORMATS[name])
    video = Video(path)
    assert video.info.frames == 36
    got = video.sample(36)
    assert len(set(got.indices)) >= 35  # times of MPEG's program streams are not even
    assert np.abs(got.frames.float().mean((1, 2, 3)).numpy() - 7.0 * np.array(got.indices)).max() < 6
    assert video.check() == []


def test_a_recording_of_unknown_size(tmp_path):
    path = write(tmp_path / "live.webm", codec="libvpx", live="1")
    assert sample_frames(path, 36).info.frames == 36
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StormVideoError, match="live.webm: truncated"):
        Video(path)
    with pytest.warns(UserWarning, match="live.webm: truncated, .*; what there is of it is read"):
        assert Video(path, on_error="nearest").info.frames == 35


def test_a_trailer_is_no_damage(clip, tmp_path):
    path = tmp_path / "camera.mp4"
    path.write_bytes(clip.read_bytes() + bytes(range(1, 250)))
    assert np.array_equal(sample_frames(path, 4).frames, sample_frames(clip, 4).frames)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'nearest', got 'skip'"):
        Video(path, on_error="skip")
