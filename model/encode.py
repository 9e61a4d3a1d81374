"""``storm-kernels encode DIR --out DIR --model DIR``: the projector's tokens of every video in a folder, one file each.

Started by torchrun, each process takes its share of the files; each may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from .ask import add_model, load
from .command import say, told
from .modeling_storm import StormForConditionalGeneration
from .video_processing_storm import REDUCTION

# What a folder's tokens were made with: files of other settings are not put beside them.
SETTINGS = "encode.json"


def cli(arguments: list[str], prog: str = "storm-kernels encode") -> int:
    """Exit status: 0 all is encoded; 1 a video could not be read; 2 bad input, told in one line; 130 Ctrl-C."""
    options = _parser(prog).parse_args(arguments)
    return told(lambda: _encode(options))


_ABOUT = (
    "Encode every video of a folder: the tokens that the language model would read, a safetensors file each. What is "
    "there already is not done again. `torchrun --nproc-per-node N --no-python storm-kernels encode ...` shares the "
    "files out to N processes."
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_ABOUT)
    parser.add_argument("folder", help="of videos, folders in it too; hidden files are left out")
    parser.add_argument("--out", required=True, help="a folder; each video's tokens lie there as the video does here")
    add_model(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU for each process, else cpu)")
    parser.add_argument("--strict", action="store_true", help="stop at the first video that cannot be read")
    return parser


class Share(NamedTuple):
    """Which of the processes that torchrun started this is; alone without it."""

    rank: int
    processes: int
    local: int  # among those of this machine

    @classmethod
    def of_environment(cls) -> Share:
        """By RANK, WORLD_SIZE and LOCAL_RANK."""
        told = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        return cls(*(int(os.environ.get(name, alone)) for name, alone in told))


def _encode(options: argparse.Namespace) -> int:
    share, out = Share.of_environment(), Path(options.out)
    files = videos_in(Path(options.folder))
    choice = {"num_frames": options.frames} | {n: getattr(options, n) for n in ("fps", "max_frames", *REDUCTION)}
    choice = {name: value for name, value in choice.items() if value is not None}
    settings = {"model": str(Path(options.model).resolve()), "dtype": options.dtype, **choice}
    check_settings(out, settings)
    todo = [file for file in files[share.rank :: share.processes] if not place(out, file).exists()]
    say(f"{len(files)} videos, {len(todo)} for this process to do")
    if not todo:
        return 0
    device = options.device or (f"cuda:{share.local}" if torch.cuda.is_available() else "cpu")
    processor, model = load(options.model, options.dtype, device)
    note_settings(out, settings)
    read = partial(_read, processor.video_processor, Path(options.folder), choice)
    failed, begun = 0, time.monotonic()
    for number, (file, pixels) in enumerate(_ahead(read, todo), 1):
        if isinstance(pixels, Exception):
            if options.strict:
                raise pixels
            failed += 1
            say(f"{file}: left out: {' '.join(str(pixels).split())}")
            continue
        tokens = _tokens(model, pixels)
        write(place(out, file), tokens, pixels["frames"])
        left = (time.monotonic() - begun) / number * (len(todo) - number)
        say(f"{number} of {len(todo)}: {file}: {len(tokens)} tokens; {left:.0f} s left")
    if failed:
        say(f"{failed} of {len(todo)} videos could not be read; the others are in {out}")
    return 1 if failed else 0


def videos_in(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, by their paths within it, in order; no hidden ones."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    inner = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in inner if not any(part.startswith(".") for part in file.parts))


def place(out: Path, file: Path) -> Path:
    """Where a video's tokens go. The whole name stays: two videos may differ in their endings alone."""
    return out / file.with_name(f"{file.name}.safetensors")


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise where the folder's tokens were made with other settings."""
    noted = out / SETTINGS
    there = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else settings
    for name in sorted(there.keys() | settings.keys()):
        if there.get(name) != settings.get(name):
            raise ValueError(
                f"--out: the tokens in {out} were made with {name} = {there.get(name)}, not {settings.get(name)}; "
                "name another folder"
            )


def note_settings(out: Path, settings: dict[str, Any]) -> None:
    """Note what the folder's tokens are made with; the process that comes first does."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / SETTINGS).exists():
        _atomically(out / SETTINGS, lambda path: path.write_text(json.dumps(settings, indent=1), encoding="utf-8"))


def write(path: Path, tokens: torch.Tensor, frames: list[int]) -> None:
    """tokens (n, D), and which of the video's frames they are of, by number: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"tokens": tokens.cpu().contiguous(), "frames": torch.tensor(frames, dtype=torch.int64, device="cpu")}
    _atomically(path, lambda temporary: save_file(tensors, temporary))


def _atomically(path: Path, writes: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writes(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(processor: Any, folder: Path, choice: dict[str, Any], file: Path) -> dict[str, Any]:
    given = processor([str(folder / file)], return_metadata=True, **choice)
    metadata = given.pop("video_metadata")[0]
    return {**given, "frames": metadata.frames_indices}


def _ahead(read: Any, files: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    """Each file with what ``read`` gives or raises; the next one is read while this one is used."""

    def caught(file: Path) -> Any:
        try:
            return read(file)
        except (ValueError, TypeError, OSError) as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[Path, Any]] = []
        for file in files:
            waiting.append((file, pool.submit(caught, file)))
            if len(waiting) == 2:
                done, future = waiting.pop(0)
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@torch.inference_mode()
def _tokens(model: StormForConditionalGeneration, pixels: dict[str, Any]) -> torch.Tensor:
    videos, reductions = pixels["pixel_values_videos"].to(model.device), pixels["video_reductions"]
    (tokens,) = model.get_video_features(videos, reductions).pooler_output
    return tokens
