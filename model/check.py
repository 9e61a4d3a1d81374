"""``storm-kernels check FILE``: decode a video whole, and say everything that is wrong with it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

from .command import say, told
from .video import Video

# Seconds between two lines of progress.
EVERY = 2.0


def cli(arguments: Sequence[str] | None = None, prog: str = "storm-kernels check") -> int:
    """Exit status: 0 all files are whole; 1 something is wrong with one; 2 one cannot be read; 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog=prog, description="Decode videos whole, and say all that is wrong with them.")
    parser.add_argument("video", nargs="+", help="a file, an address or a folder of images")
    parser.add_argument("--track", type=int, help="which video track, from 0 (default: the one that a player shows)")
    options = parser.parse_args(arguments)
    return max(told(partial(_check, name, options.track)) for name in options.video)


def _check(name: str, track: int | None) -> int:
    video = Video(name, track=track)
    info = video.info
    print(
        f"{name}: {info.width}x{info.height}, {info.frames} frames, {info.fps:.3f} a second, {info.duration_s:.3f} s",
        flush=True,
    )
    last = time.monotonic()

    def progress(decoded: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(f"{decoded} of {info.frames} frames decoded")

    findings = video.check(progress)
    for finding in findings:
        print(finding)
    print(f"{name}: {len(findings) or 'nothing'} found")
    return 1 if findings else 0
