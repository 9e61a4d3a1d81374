"""Some frames of a video, by our reader and by others: how long from opening the file to the frames in memory.

    python -m storm_benchmarks.decode --clips bikes --lengths 10,600,3600 --frames 32
    python -m storm_benchmarks.decode --clips 1080p --keys 12,50 --lengths 600 --frames 8 --rounds 1

Clips are made here, by PyAV (clips.py): the bikes clip, or the same at 1920x1080 with another
distance of key frames, looped by copying packets. The frames are at even distances, the first and
the last included. Before it is timed, every reader's frames are held against a whole decode: ours
and PyAV's have to be equal to the bit; others convert colours in their own way, and have to be
nearer to the right frame than to its neighbours. The limit is PyAV decoding and converting as many
frames in a row from the start of the clip: what is left if finding them cost nothing.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from . import readers, subject
from .clips import FPS, Clip, bikes, large
from .harness import CheckFailed, Row
from .subject import Measurement

Frames = NDArray[np.uint8]  # (n, height, width, 3) RGB
EXACT = ("storm_model", "PyAV seek", "PyAV linear")


def main(
    clips: Annotated[str, typer.Option(help="bikes (640x272), 1080p; comma between.")] = "bikes",
    lengths: Annotated[str, typer.Option(help="Seconds of film, comma between.")] = "10,600,3600",
    keys: Annotated[
        str,
        typer.Option(help="Frames from one key frame to the next, of 1080p only; comma between."),
    ] = "12,50",
    frames: Annotated[str, typer.Option(help="Frames wanted, comma between.")] = "32",
    linear_length: Annotated[str, typer.Option(help="Longer films are timed without PyAV linear.")] = "60",
    rounds: Annotated[str, typer.Option(help="Turns that each reader takes.")] = "3",
    out: Annotated[Path | None, typer.Option(help="Append rows to this file.")] = None,
) -> None:
    """Time readers of video."""
    kinds = subject.names("clips", clips, ("bikes", "1080p"))
    seconds, counts = subject.numbers("lengths", lengths), subject.numbers("frames", frames)
    distances = subject.numbers("keys", keys)
    (turns,), (linear,) = subject.numbers("rounds", rounds), subject.numbers("linear-length", linear_length)
    rows = subject.open_rows(out)
    subject.say_environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        makers = [bikes] if "bikes" in kinds else []
        makers += [partial(large, key_distance=distance) for distance in distances] if "1080p" in kinds else []
        for make in makers:
            for length in seconds:
                film = make(Path(folder), length)
                for count in counts:
                    subject.measure(measurement(film, count, length <= linear), "cpu", rows, rounds=turns)
                film.path.unlink()


def measurement(clip: Clip, count: int, linear: bool) -> Measurement:
    """The checked measurement of one clip and number of frames."""
    found, notes = readers.installed()
    if not linear:
        del found["PyAV linear"]
        notes.append("PyAV linear left out: it would decode the whole film")
    indices = [number * (clip.frames - 1) // max(count - 1, 1) for number in range(count)]
    right = clip.truth(indices)
    beside = {step: clip.truth([min(max(index + step, 0), clip.frames - 1) for index in indices]) for step in (-1, 1)}
    checked = {
        name: _check(name, reader(clip.path, indices), right, beside, clip, indices) for name, reader in found.items()
    }
    calls = {name: partial(reader, clip.path, indices) for name, reader in found.items()}
    height, width = right.shape[1:3]
    shape = f"clip={clip.name} {width}x{height} seconds={clip.frames // FPS} keys={clip.keys} frames={count}"
    limit = (
        "as many frames in a row, by PyAV",
        partial(readers.pyav_linear, clip.path, list(range(min(count, clip.frames)))),
    )
    return Measurement("decode", "forward", shape, torch.uint8, calls, checked, count, "frames", limit, notes)


def _check(name: str, got: Frames, right: Frames, beside: dict[int, Frames], clip: Clip, indices: list[int]) -> Row:
    """The column `error`, rms over the values of all channels (0 to 255); raises `CheckFailed` for other frames.

    ``beside`` are the frames before (-1) and after (1) each of the right ones.
    """
    if got.shape != right.shape or got.dtype != np.uint8:
        raise CheckFailed(f"decode by {name}: {got.dtype} {got.shape} against uint8 {right.shape}")
    for number, index in enumerate(indices):
        error = _rms(got[number], right[number])
        if name in EXACT and error:
            what = f"frame {index} of {clip.path.name}"
            raise CheckFailed(f"decode by {name}: {what} differs from what a whole decode shows")
        for step, others in beside.items():
            same = np.array_equal(others[number], right[number])
            if not same and _rms(got[number], others[number]) <= error:
                raise CheckFailed(
                    f"decode by {name}: frame {index} of {clip.path.name} is nearer to frame {index + step}"
                )
    return {"error": float(np.mean([_rms(one, truth) ** 2 for one, truth in zip(got, right, strict=True)]) ** 0.5)}


def _rms(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.mean((a.astype(np.float32) - b) ** 2) ** 0.5)


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


if __name__ == "__main__":
    sys.exit(cli())
