"""One self-contained `report.html` from the rows of `storm_benchmarks.e2e`: no script, no other
file, readable on a phone.

    python -m storm_benchmarks.e2e.report FOLDER      # again, with the charts, from FOLDER/results.json

Everything that comes from a row is escaped by the template engine (autoescape), file names among
it.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import jinja2
from storm_model.presets import VARIANTS

from ..harness import Row, load_rows, write_atomically
from . import figures, paper, plot, reliability, summary
from .figures import milliseconds, percent
from .summary import TO_FIRST_TOKEN, Gain, Outcome


def write(folder: Path, rows: list[Row]) -> Path:
    """Write `report.html` and the charts into ``folder``; OSError where that cannot be."""
    path = folder / "report.html"
    write_atomically(path, render(rows, plot.write(folder, summary.outcomes(rows))))
    return path


def render(rows: list[Row], charts: dict[str, bytes]) -> str:
    """The page; ``charts`` as `plot.charts` gives them."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    ).get_template("report.html.jinja")
    results, clip = summary.outcomes(rows), summary.clip_rows(rows)
    tokens, kernels = summary.token_gains(results), summary.kernel_gains(results)
    return template.render(
        preset=_said(rows, "preset"),
        clip=_said(rows, "clip"),
        looped=sorted({row["frames"] for row in rows if row.get("looped")}),
        dtype=_said(rows, "dtype"),
        device=_said(rows, "device"),
        finished=not rows or summary.finished(rows),
        cards=figures.cards(results),
        head=figures.TABLE_HEAD,
        stages=TO_FIRST_TOKEN,
        frames=[_frames_part(n, some, clip.get(n, {})) for n, some in summary.by_frames(results).items()],
        latency_chart=base64.b64encode(charts["latency.png"]).decode() if "latency.png" in charts else None,
        token_gains=_lines([(gain.after.frames, _token_cells(gain)) for gain in tokens]),
        kernel_gains=_lines([(gain.after.frames, _kernel_cells(gain)) for gain in kernels]),
        parts=_parts_table(kernels),
        ran=", ".join(sorted({str(gain.after.row.get("ran")) for gain in kernels})),
        decoding=_decoding_lines(clip),
        losses=summary.losses(results),
        cold=_cold_lines(summary.cold_rows(rows)),
        paper={"model": paper.MODEL, "device": paper.DEVICE, "frames": paper.TABLE_2_FRAMES, "rows": _paper_lines()},
        method=_method(rows, results),
        environment=_environment(rows),
    )


def _said(rows: list[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(str(row[column]) for row in rows)) or "-"


def _lines(keyed_cells: list[tuple[object, list[str]]]) -> list[dict]:
    """Table lines; a new key starts a group, which gets a rule above it."""
    keys = [key for key, _ in keyed_cells]
    first = [place > 0 and key != keys[place - 1] for place, key in enumerate(keys)]
    return [{"cells": cells, "first": new} for new, (_, cells) in zip(first, keyed_cells, strict=True)]


def _frames_part(frames: int, results: list[Outcome], shared: dict[str, Row]) -> dict:
    before = figures.before(shared)
    rows = _lines([(one.variant, figures.table_cells(results, one, one.title)) for one in results])
    return {
        "frames": frames,
        "doubts": figures.doubts(results),
        "bars": _bars(results),
        "rows": rows,
        "before": f"Before it: {before}." if before else "",
    }


def _decoding_lines(clip: dict[int, dict[str, Row]]) -> list[dict]:
    lines = []
    for frames, row in ((frames, stages["decode"]) for frames, stages in sorted(clip.items()) if "decode" in stages):
        wanted, decoded = row.get("wanted_frames"), row.get("decoded_frames")
        counts = [f"{wanted:,}", f"{decoded:,}", f"{decoded / wanted:.1f}"] if wanted and decoded else ["-"] * 3
        times = [milliseconds(row["p50_ms"]), milliseconds(row["p50_ms"] / (wanted or frames))]
        lines.append((0, [str(frames), *counts, *times]))
    return _lines(lines)


def _bars(results: list[Outcome]) -> list[dict]:
    """For each outcome, the lengths of its stages in percent of the longest outcome."""
    longest = max(sum(one.ms(stage) for stage in TO_FIRST_TOKEN) for one in results)
    bars = []
    for one in results:
        lengths = [(stage, round(100 * one.ms(stage) / longest, 2)) for stage in TO_FIRST_TOKEN]
        name = one.title if one.projector == "vila" else f"{one.title}, {one.projector}"
        bars.append({"name": name, "total": milliseconds(one.total_ms), "lengths": lengths})
    return bars


def _token_cells(gain: Gain) -> list[str]:
    one, theirs = gain.after, VARIANTS[gain.after.variant]
    ours = [
        one.title,
        str(one.frames),
        f"{one.row['kept_percent']:g}",
        milliseconds(one.total_ms),
        percent(gain.saved_percent),
    ]
    paper_saved = percent(summary.paper_saved_percent(one.variant))
    return [
        *ours,
        figures.between(gain.saved),
        f"{theirs.paper_kept_percent:g}",
        f"{theirs.paper_latency_s:.2f}",
        paper_saved,
    ]


def _kernel_cells(gain: Gain) -> list[str]:
    one, row = gain.after, gain.after.row
    times = [
        milliseconds(gain.before.ms("projector")),
        milliseconds(one.ms("projector")),
        f"{gain.projector_speedup:.1f}x",
    ]
    errors = [f"{row['error']:.1e}", f"{row['error_plain']:.1e}", str(row["checked_frames"])]
    return [one.title, str(one.frames), *times, percent(gain.saved_percent), figures.between(gain.saved), *errors]


def _parts_table(gains: list[Gain]) -> dict:
    both = [(gain, one) for gain in gains for one in (gain.before, gain.after)]
    names = list(dict.fromkeys(name for _, one in both for name in one.parts()))
    rows = []
    for gain, one in both:
        parts = [milliseconds(one.parts()[name]) if name in one.parts() else "-" for name in names]
        rows.append(
            (
                (gain.after.variant, one.frames),
                [one.title, str(one.frames), one.projector, *parts, milliseconds(one.ms("projector"))],
            )
        )
    return {"head": ["variant", "frames", "projector", *names, "all"], "rows": _lines(rows)}


def _cold_lines(rows: list[Row]) -> list[dict]:
    once = {"open": "open and index the file", "build": "build the model"}
    lines = [
        [f"{once[row['stage']]}: {row['clip' if row['stage'] == 'open' else 'preset']}", str(row["frames"]), *["-"] * 4]
        + [milliseconds(row["p50_ms"])]
        for row in rows
        if row["stage"] in once
    ]
    passes: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["stage"] not in once:
            passes.setdefault((row["variant"], row["projector"], row["frames"]), {})[row["stage"]] = row
    for (variant, projector, frames), stages in passes.items():
        title = VARIANTS[variant].title if variant in VARIANTS else variant
        name = title if projector == "vila" else f"{title}, {projector} projector"
        taken = {stage: milliseconds(row["p50_ms"]) for stage, row in stages.items()}
        times = [taken.get(stage, "-") for stage in ("preprocess", *TO_FIRST_TOKEN, "total")]
        lines.append([f"first pass: {name}", str(frames), *times])
    return _lines([(0, cells) for cells in lines])


def _paper_lines() -> list[dict]:
    def cell(row: paper.Latency, stage: str) -> str:
        value = getattr(row, stage)
        return f"{value:,.0f} ({100 * value / row.total:.0f} %)"

    rows = paper.TABLE_13
    return _lines(
        [
            (
                r.frames,
                [
                    str(r.frames),
                    f"{r.compression}x",
                    *(cell(r, s) for s in ("vision", "projector", "language")),
                    f"{r.total:,.0f}",
                ],
            )
            for r in rows
        ]
    )


def _method(rows: list[Row], results: list[Outcome]) -> list[str]:
    """How often each stage ran, read off the rows."""

    def times(stage: str) -> str:
        counts = sorted({row["samples"] for row in rows if row.get("stage") == stage and row["mode"] == "forward"})
        return " or ".join(map(str, counts)) or "0"

    loads = [row["load"] for row in rows if row["load"] is not None]
    busy = f" The machine's load average was {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    return [
        "Every figure is a median; results.json has the 20th and 80th percentiles and each round's time too." + busy,
        f"Timed rounds: {times('total')}, after one to warm up. In a round the video is decoded, preprocessed and "
        "encoded once, for every variant gets the same image tokens; then all variants with all their projectors take "
        "turns. Savings are made within rounds; what stands behind ± is half of how far the rounds are apart.",
        f"A saving is not reliable (a question mark) where its rounds are more than {reliability.MOST_POINTS:g} points "
        f"apart, a speed-up where they are more than {reliability.MOST_PERCENT:g} % apart, both where the program's "
        f"threads waited for a core for more than {reliability.MOST_WAITED_PERCENT:g} % of their time, or where there "
        "was one round only.",
        "Times are device events on a GPU and the wall clock on a CPU. Peak memory is all that was held at once, with "
        "weights: torch's allocations on a GPU, the process's resident memory on a CPU.",
    ]


def _environment(rows: list[Row]) -> list[tuple[str, str]]:
    times = sorted(str(row["time"]) for row in rows)
    span = " to ".join(dict.fromkeys(times[:1] + times[-1:]))
    columns = [(name, _said(rows, name)) for name in ("device", "dtype", "versions", "commit")]
    return [*columns, ("time", span)]


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 2 and one line about what cannot be read or written."""
    if len(arguments) != 1:
        print("usage: python -m storm_benchmarks.e2e.report FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        print(write(folder, load_rows(folder / "results.json")))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__} {error}"
        spoilt = f"{folder / 'results.json'} does not hold whole rows of storm_benchmarks.e2e: {what}"
        print(f"error: {error if isinstance(error, ValueError) else spoilt}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
