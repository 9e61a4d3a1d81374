"""What is asked of the main job on the command line, checked before any long work: `Settings` from
texts, or one line that names what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import filelock
import torch
from storm_model import presets
from storm_model.configuration_storm import MAX_FRAMES
from storm_model.video import StormVideoError, bikes_clip

from .. import environment
from ..harness import Rows
from .clip import Clip
from .models import weight_bytes
from .work import Settings

MAX_SIDE = 8192  # pixels
FRAMES = "32,128"
PROJECTORS = {"reference": ("reference",), "fused": ("fused",), "both": ("reference", "fused")}


class BadRequest(Exception):
    """Something asked for cannot be done: one line that names it and its value."""


def clip(path: Path | None, size: tuple[int, int] | None, **choice: float | bool | None) -> Clip:
    try:
        return Clip(path if path is not None else bikes_clip(), size, **choice)
    except (StormVideoError, OSError) as error:
        raise BadRequest(f"--video: {error}") from None
    except ValueError as error:
        raise BadRequest(f"--{error}") from None


def frames(text: str | None, clip: Clip) -> tuple[int, ...]:
    """The numbers of frames that are asked for; the one that --fps gives."""
    if clip.frames_by_fps is not None:
        if text is not None:
            raise BadRequest(f"--frames: {text!r} does not go with --fps, which gives {clip.frames_by_fps} frames")
        return (clip.frames_by_fps,)
    text = FRAMES if text is None else text
    return tuple(sorted({whole_number("frames", part, MAX_FRAMES) for part in text.split(",")}))


def whole_number(option: str, text: str, most: int) -> int:
    number = int(text) if text.strip().isascii() and text.strip().isdigit() and len(text) < 20 else 0
    if not 1 <= number <= most:
        raise BadRequest(f"--{option}: {text!r} is not a whole number from 1 to {most}")
    return number


def variants(text: str) -> tuple[presets.Variant, ...]:
    names = list(presets.VARIANTS) if text == "all" else [name.strip() for name in text.split(",")]
    return tuple(asked("variants", presets.variant, name) for name in dict.fromkeys(names))


def asked(option: str, look_up, name: str):
    try:
        return look_up(name)
    except ValueError as error:
        raise BadRequest(f"--{option}: {error}") from None


def size(text: str, encoder: int) -> tuple[int, int] | None:
    """ "360x640", "448", "encoder" (a square of ``encoder`` pixels) or "file" -> (height, width), None for the file's
    own."""
    if text == "file":
        return None
    sides = [str(encoder)] if text == "encoder" else text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side[:6]) <= MAX_SIDE for side in sides):
        raise BadRequest(
            f"--size: {text!r} is not encoder, file, a number of pixels or HEIGHTxWIDTH, each up to {MAX_SIDE}",
        )
    return int(sides[0]), int(sides[-1])


def one_of(option: str, name: str, table: dict):
    if name not in table:
        raise BadRequest(f"--{option}: {name!r} does not exist; there are: {', '.join(table)}")
    return table[name]


def device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"--device: {name!r} is not a device; try cpu, cuda or cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise BadRequest(f"--device: {name!r} is not served; there are: cpu, cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"--device: {name!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def check_memory(settings: Settings) -> None:
    """Weights, decoded frames, pixels and image tokens alone must fit: a lower bound of what is
    needed, told before the long work."""
    most, vision = max(settings.frames), settings.config.vision_config
    weights = weight_bytes(settings.config, settings.dtype, settings.variants)
    bytes_each = torch.finfo(settings.dtype).bits // 8
    needed = {"cpu": most * settings.clip.frame_bytes}
    tokens_and_pixels = (
        most
        * bytes_each
        * (3 * vision.image_size**2 + (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size)
    )
    needed[settings.device] = needed.get(settings.device, 0) + weights + tokens_and_pixels
    dtype = str(settings.dtype).removeprefix("torch.")
    for where, size in needed.items():
        there = environment.available_memory(where)
        if there is not None and size > there:
            with_weights = f" in {dtype} (weights {weights / 2**30:.1f} GiB)" if where == settings.device else ""
            raise BadRequest(
                f"--preset, --frames: {settings.config.name_or_path}{with_weights} and {most} frames of "
                f"{settings.clip.name} need more than {size / 2**30:,.1f} GiB on {where}, "
                f"which has {there / 2**30:,.1f} GiB free"
            )


@contextmanager
def output_folder(folder: Path, say) -> Iterator[Rows]:
    """An empty results file in ``folder``, which is this run's alone meanwhile; a file from an
    earlier run is kept under another name.

    The lock is the kernel's, on ``.lock`` there: it ends with the process, however that ends.
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise BadRequest(f"--out: another run is writing to {folder}; name another folder") from None
    except OSError as error:
        raise BadRequest(f"--out: cannot write to {folder}: {error.strerror}") from None
    try:
        yield _empty_results(folder, say)
    finally:
        lock.release()


def _empty_results(folder: Path, say) -> Rows:
    path = folder / "results.json"
    try:
        if path.exists():
            earlier = path.with_name(f"results-{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d_%H-%M-%S}.json")
            if earlier.exists():
                raise BadRequest(f"--out: {path} and {earlier.name} are in the way; move them, or name another folder")
            path.rename(earlier)
            say(f"The results of an earlier run are now in {earlier}")
        return Rows(path)
    except OSError as error:
        raise BadRequest(f"--out: cannot write to {folder}: {error.strerror}") from None
