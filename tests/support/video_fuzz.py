"""Read damaged videos in a process of its own: python -m tests.support.video_fuzz FOLDER FIRST COUNT

Each case is a film of FOLDER with damage at a random place. The process prints the number of a case before it reads it,
and ends with status 1 at the first wrong answer; a crash or a hang ends it as well.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import sys
import warnings
from pathlib import Path

from storm_model.video import StormVideoError, Video

from .clips import shown

SECONDS, MIB = 20, 1024
# The four bytes of the size stand before the name of a box of MP4 and MOV.
BOXES = re.compile(rb"....(?=moov|trak|mdia|minf|stbl|stsd|stts|ctts|stss|stsz|stsc|stco|edts|elst|mdat)", re.DOTALL)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes overwritten, left out, doubled or cut off, or a box of another size, at a random place."""
    at, length = draw.randrange(len(content)), draw.choice((1, 4, 16, 64, 1000))
    kind = draw.choice(("overwritten", "overwritten", "zeros", "left out", "doubled", "cut"))
    replaced = {
        "overwritten": draw.randbytes(length),
        "zeros": bytes(length),
        "left out": b"",
        "doubled": content[at : at + length] * 2,
    }
    if kind == "cut":
        return content[:at]
    boxes = [found.start() for found in BOXES.finditer(content)]
    if boxes and draw.random() < 0.2:
        at, size = draw.choice(boxes), draw.choice((0, 1, 7, draw.randrange(2**16), draw.randrange(2**32)))
        return content[:at] + size.to_bytes(4, "big") + content[at + 4 :]
    return content[:at] + replaced[kind] + content[at + length :]


def check(path: Path, right: set[bytes], draw: random.Random) -> None:
    """Right frames, or an error that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for on_error in ("raise", "nearest"):
            try:
                video = Video(path, on_error=on_error)
                got = video.sample(at=[draw.random() * video.info.duration_s for _ in range(4)])
            except (StormVideoError, ValueError) as error:
                assert str(path) in str(error) or "at must be at most" in str(error), f"no name: {error}"
                assert "\n" not in str(error), "more than one line"
                continue
            # Damage that the decoder does not notice (HEVC, VP9) is the file's own; where packets of H.264 are missing,
            # FFmpeg shows one thing with one thread and another with more.
            played = {
                picture.tobytes() for way in ("NONE", "AUTO") for _, picture, wrong in shown(path, way) if not wrong
            }
            for number, frame in zip(got.indices, got.frames.numpy(), strict=True):
                assert frame.tobytes() in right | played, f"frame {number} of {got.info.frames} is another one"


def main() -> None:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    films = sorted(folder.iterdir())
    whole = {film: {frame.tobytes() for _, frame, _ in shown(film)} for film in films}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, first + count):
        draw = random.Random(case)
        film = draw.choice(films)
        path = folder.parent / f"case{case}{film.suffix}"
        path.write_bytes(damaged(film.read_bytes(), draw))
        print(case, film.name, flush=True)
        signal.alarm(SECONDS)
        try:
            check(path, whole[film], draw)
        except Exception as error:
            sys.exit(f"case {case}, {film.name}: {type(error).__name__}: {error}")
        signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        if grown > MIB:
            sys.exit(f"case {case}, {film.name}: {grown} MiB")
        path.unlink()


if __name__ == "__main__":
    main()
