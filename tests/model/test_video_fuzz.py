"""Files damaged at random places: right frames or an error that names the file; no crash, no hang, no flood."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import av

from ..support.clips import FILMS, write_film

# STORM_KERNELS_FUZZ=50 (`make video-cases`) makes 2,000.
CASES = max(1, round(40 * float(os.environ.get("STORM_KERNELS_FUZZ", "1"))))
# Frame threads of FFmpeg's VP8 decoder give other pictures than one thread where a reference is missing.
LEFT_OUT = {"vp8.webm", "vp8.ogv"}


def test_damaged_files(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name, (codec, *rest) in FILMS.items():
        if codec in av.codecs_available and name not in LEFT_OUT:
            write_film(folder / name, codec, *rest, times=range(30))
    command = [sys.executable, "-m", "tests.support.video_fuzz", str(folder), "0", str(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True)
    last = ran.stdout.strip().rpartition("\n")[2]
    assert ran.returncode == 0, f"status {ran.returncode} in case {last}: {ran.stderr[-500:]}"
