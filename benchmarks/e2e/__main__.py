"""The main job: a real video through the complete model, the eight variants of docs/spec.md's table timed by stage.

    python -m storm_benchmarks.e2e                                    # storm-mini, 32 and 128 frames of a real clip
    python -m storm_benchmarks.e2e --preset storm-7b --device cuda --frames 128,256 --variants vila,storm-tp-ts

Prints a table; writes results.json after every round, then report.html and PNG charts. Rows:
harness.py and pipeline.py.
"""

from __future__ import annotations

import sys
import warnings
from datetime import datetime
from pathlib import Path

import typer
from storm_model import presets
from storm_model.loading import FLOATS
from storm_model.video import StormVideoError

from .. import environment, subject
from ..harness import Rows
from . import arguments, options, pipeline, report, summary, work
from .console import progress_of, say, show


def main(
    video: arguments.Video = None,
    preset: arguments.Preset = "storm-mini",
    frames: arguments.Frames = None,
    fps: arguments.Fps = None,
    start: arguments.Start = None,
    end: arguments.End = None,
    verify: arguments.Verify = False,
    size: arguments.Size = "encoder",
    variants: arguments.Variants = "all",
    projector: arguments.Projector = "both",
    device: arguments.Device = None,
    dtype: arguments.Dtype = None,
    repeat: arguments.Repeat = "3",
    trace: arguments.Trace = False,
    out: arguments.Out = None,
) -> None:
    """Time a video through the complete model, variant by variant, stage by stage."""
    config = options.asked("preset", presets.preset, preset)
    window = {"fps": fps, "start": start, "end": end, "verify": verify}
    clip = options.clip(video, options.size(size, config.vision_config.image_size), **window)
    settings = work.Settings(
        clip=clip,
        config=config,
        frames=options.frames(frames, clip),
        variants=options.variants(variants),
        projectors=options.one_of("projector", projector, options.PROJECTORS),
        device=(where := options.device(device)),
        dtype=options.one_of("dtype", dtype or ("bfloat16" if where.startswith("cuda") else "float32"), FLOATS),
        repeat=options.whole_number("repeat", repeat, 1000),
    )
    options.check_memory(settings)
    folder = out if out is not None else Path("out/e2e") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    with options.output_folder(folder, say) as rows:
        _say_what_runs(settings, folder)
        run_and_write(settings, rows, folder, trace)


def run_and_write(settings: work.Settings, rows: Rows, folder: Path, trace: bool) -> None:
    """Measure; whatever ends the measurement, show and write what is finished."""
    begun = folder.stat().st_ino
    try:
        with progress_of(work.operations(settings)) as progress:
            run = pipeline.Run(settings, rows, progress)
            run.measure()
            if trace:
                progress.says("trace")
                run.trace(folder / "trace.json.gz")
    except KeyboardInterrupt:
        say(f"Stopped. {len(rows.rows)} finished rows are in {rows.path}", style="bold")
        raise typer.Exit(130) from None
    finally:
        show(rows.rows)
        if summary.outcomes(rows.rows):
            rows.save()
            page = report.write(folder, rows.rows)
            if folder.stat().st_ino != begun:
                say(f"{folder} was removed while this ran; it is there again, with all rows", style="yellow")
            say(f"{page}\n{rows.path}: {len(rows.rows)} rows")


def _say_what_runs(settings: work.Settings, folder: Path) -> None:
    clip = settings.clip
    looped = [n for n in settings.frames if clip.is_looped(n)]
    dtype = str(settings.dtype).removeprefix("torch.")
    where = f"{dtype}, {environment.device_name(settings.device)}"
    say(
        f"{settings.config.name_or_path} on {clip}, {', '.join(map(str, settings.frames))} frames, {where}\n"
        f"output: {folder}"
    )
    if looped:
        say(f"The clip has {clip.info.frames} frames: it is looped for {', '.join(map(str, looped))}.", style="yellow")


def cli(arguments: list[str] | None = None, prog: str = "python -m storm_benchmarks.e2e") -> int:
    """Exit status: 0; 1 a failed check, or results that cannot be written; 2 bad input, told in one
    line; 130 Ctrl-C.
    """
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # of libraries to their callers, which users are not
            warnings.simplefilter("ignore", kind)
        return subject.command(main, arguments, prog, refusals=(options.BadRequest, StormVideoError))


if __name__ == "__main__":
    sys.exit(cli())
