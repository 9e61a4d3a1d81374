"""The main job on a small model and a clip made here, for the tests of what it writes and what it refuses."""

import av
import numpy as np
import pytest
from storm_benchmarks.e2e import __main__ as e2e
from storm_model import presets as models

from ..support.tiny_model import TINY

CLIP_FRAMES = 6


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Six frames of noise under a name that a page must not take for markup."""
    path = tmp_path_factory.mktemp("clip") / "<b>&'clip'.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (CLIP_FRAMES, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def job(clip, monkeypatch):
    """Runs the command in this process on the small model -> exit status."""
    monkeypatch.setitem(models.PRESETS, "tiny", TINY)

    def run(*arguments, video=clip):
        return e2e.cli(["--preset", "tiny", "--video", str(video), "--device", "cpu", *map(str, arguments)])

    return run
