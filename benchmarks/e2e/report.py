"""One self-contained `report.html` from the rows of `storm_benchmarks.e2e`: no script, no other file, readable on a phone.

    python -m storm_benchmarks.e2e.report FOLDER      # again, from FOLDER/results.json

Everything that comes from a row is escaped by the template engine (autoescape), file names among it.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import jinja2
from storm_model.config import VARIANTS

from ..harness import Row, load_rows, write_atomically
from . import paper, plot, summary
from .summary import TO_FIRST_TOKEN, KernelGain, Outcome, TokenGain

# The variant that the paper's headline (65.5 % less) is about.
HEADLINE_VARIANT = "storm-tp-ts"


def write(folder: Path, rows: list[Row], charts: dict[str, bytes], finished: bool = True) -> Path:
    """Write `report.html` into ``folder``; ``charts`` as `plot.charts` gives them."""
    path = folder / "report.html"
    write_atomically(path, render(rows, charts, finished))
    return path


def render(rows: list[Row], charts: dict[str, bytes], finished: bool = True) -> str:
    """The page. ``finished`` is False after a run that was stopped."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    ).get_template("report.html.jinja")
    results, clip = summary.outcomes(rows), summary.clip_rows(rows)
    tokens, kernels = summary.token_gains(results), summary.kernel_gains(results)
    return template.render(
        preset=_said(rows, "preset"),
        clip=_said(rows, "clip"),
        looped=sorted({row["frames"] for row in rows if row.get("looped")}),
        dtype=_said(rows, "dtype"),
        device=_said(rows, "device"),
        finished=finished,
        cards=_cards(results, tokens, kernels),
        stages=TO_FIRST_TOKEN,
        frames=[_frames_part(frames, some, clip.get(frames, {})) for frames, some in summary.by_frames(results).items()],
        latency_chart=base64.b64encode(charts["latency.png"]).decode() if "latency.png" in charts else None,
        token_gains=_lines([(gain.reduced.frames, _token_cells(gain)) for gain in tokens]),
        kernel_gains=_lines([(gain.fused.frames, _kernel_cells(gain)) for gain in kernels]),
        parts=_parts_table(kernels),
        ran=", ".join(sorted({str(gain.fused.row.get("ran")) for gain in kernels})),
        losses=summary.losses(results),
        cold=_cold_lines(summary.cold_rows(rows)),
        paper={"model": paper.MODEL, "device": paper.DEVICE, "frames": paper.TABLE_2_FRAMES, "rows": _paper_lines()},
        method=_method(rows, results),
        environment=_environment(rows),
    )


def milliseconds(value: float) -> str:
    """Three significant digits or whole milliseconds: 0.123, 1.23, 12.3, 123, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A saving: "65.0 % less", or what it costs: "3.7 % more"."""
    return "-" if value is None else f"{abs(value):.1f} % {'less' if value >= 0 else 'more'}"


def against_vila(results: list[Outcome], one: Outcome) -> str:
    """ "-65.0 %": how the total differs from the VILA baseline's."""
    baseline = summary.find(results, one.frames, "vila", "vila")
    return "-" if baseline is None or one is baseline else f"{-summary.saved_percent(baseline.total_ms, one.total_ms):+.1f} %"


def table_cells(results: list[Outcome], one: Outcome, name: str) -> list[str]:
    """One line of the main table, the console's too: name, projector, tokens, ms of each stage, total, against VILA, peak MiB."""
    stages = [milliseconds(one.ms(stage)) for stage in TO_FIRST_TOKEN]
    projector = "its own" if one.projector == "vila" else one.projector
    peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}"
    return [name, projector, f"{one.row['tokens']:,}", *stages, milliseconds(one.total_ms), against_vila(results, one), peak]


def _said(rows: list[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(str(row[column]) for row in rows)) or "-"


def _lines(keyed_cells: list[tuple[object, list[str]]]) -> list[dict]:
    """Table lines; a new key starts a group, which gets a rule above it."""
    return [{"cells": cells, "first": place > 0 and key != keyed_cells[place - 1][0]} for place, (key, cells) in enumerate(keyed_cells)]


def _cards(results: list[Outcome], tokens: list[TokenGain], kernels: list[KernelGain]) -> list[dict[str, str]]:
    """The two gains apart, then both together, for the headline variant (or the last one there is) at the most frames."""
    most = max((one.frames for one in results), default=0)
    token = _headline([(gain.reduced.variant, gain) for gain in tokens if gain.reduced.frames == most])
    kernel = _headline([(gain.fused.variant, gain) for gain in kernels if gain.fused.frames == most])
    cards = []
    if token:
        change = f"{milliseconds(token.baseline.total_ms)} → {milliseconds(token.reduced.total_ms)} ms"
        note = f"{token.reduced.title}, reference projector, {most} frames. The paper: {percent(token.paper_saved_percent)}."
        cards.append({"name": "Fewer tokens", "figure": percent(token.saved_percent), "from_to": change, "note": note})
    if kernel:
        change = f"projector {milliseconds(kernel.reference.ms('projector'))} → {milliseconds(kernel.fused.ms('projector'))} ms"
        note = f"{kernel.fused.title}, {most} frames: {percent(kernel.saved_percent)} in total, fused against reference projector."
        cards.append({"name": "Faster kernels", "figure": f"{kernel.projector_speedup:.1f}x", "from_to": change, "note": note})
    if token and kernel and token.reduced.variant == kernel.fused.variant:
        change = f"{milliseconds(token.baseline.total_ms)} → {milliseconds(kernel.fused.total_ms)} ms"
        saved = percent(summary.saved_percent(token.baseline.total_ms, kernel.fused.total_ms))
        cards.append(
            {
                "name": "Both together",
                "figure": saved,
                "from_to": change,
                "note": f"{kernel.fused.title}, fused, against the VILA baseline, {most} frames.",
            }
        )
    return cards


def _headline(named: list[tuple[str, TokenGain | KernelGain]]):
    return dict(named).get(HEADLINE_VARIANT, named[-1][1] if named else None)


def _frames_part(frames: int, results: list[Outcome], shared: dict[str, Row]) -> dict:
    before = ", ".join(f"{stage} {milliseconds(shared[stage]['p50_ms'])} ms" for stage in summary.BEFORE if stage in shared)
    rows = _lines([(one.variant, table_cells(results, one, one.title)) for one in results])
    return {"frames": frames, "bars": _bars(results), "rows": rows, "before": f"Before it: {before}." if before else ""}


def _bars(results: list[Outcome]) -> list[dict]:
    """For each outcome, the lengths of its stages in percent of the longest outcome."""
    longest = max(sum(one.ms(stage) for stage in TO_FIRST_TOKEN) for one in results)
    bars = []
    for one in results:
        lengths = [(stage, round(100 * one.ms(stage) / longest, 2)) for stage in TO_FIRST_TOKEN]
        name = one.title if one.projector == "vila" else f"{one.title}, {one.projector}"
        bars.append({"name": name, "total": milliseconds(one.total_ms), "lengths": lengths})
    return bars


def _token_cells(gain: TokenGain) -> list[str]:
    one, theirs = gain.reduced, VARIANTS[gain.reduced.variant]
    ours = [one.title, str(one.frames), f"{one.row['kept_percent']:g}", milliseconds(one.total_ms), percent(gain.saved_percent)]
    return [*ours, f"{theirs.paper_kept_percent:g}", f"{theirs.paper_latency_s:.2f}", percent(gain.paper_saved_percent)]


def _kernel_cells(gain: KernelGain) -> list[str]:
    one, row = gain.fused, gain.fused.row
    times = [milliseconds(gain.reference.ms("projector")), milliseconds(one.ms("projector")), f"{gain.projector_speedup:.1f}x"]
    errors = [f"{row['error']:.1e}", f"{row['error_plain']:.1e}", str(row["checked_frames"])]
    return [one.title, str(one.frames), *times, percent(gain.saved_percent), *errors]


def _parts_table(gains: list[KernelGain]) -> dict:
    both = [(gain, one) for gain in gains for one in (gain.reference, gain.fused)]
    names = list(dict.fromkeys(name for _, one in both for name in one.parts()))
    rows = []
    for gain, one in both:
        parts = [milliseconds(one.parts()[name]) if name in one.parts() else "-" for name in names]
        rows.append(((gain.fused.variant, one.frames), [one.title, str(one.frames), one.projector, *parts, milliseconds(one.ms("projector"))]))
    return {"head": ["variant", "frames", "projector", *names, "all"], "rows": _lines(rows)}


def _cold_lines(rows: list[Row]) -> list[dict]:
    lines = [
        [f"build the model: {row['preset']}", str(row["frames"]), *["-"] * 4, milliseconds(row["p50_ms"])] for row in rows if row["stage"] == "build"
    ]
    passes: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["stage"] != "build":
            passes.setdefault((row["variant"], row["projector"], row["frames"]), {})[row["stage"]] = row
    for (variant, projector, frames), stages in passes.items():
        title = VARIANTS[variant].title if variant in VARIANTS else variant
        name = title if projector == "vila" else f"{title}, {projector} projector"
        times = [milliseconds(stages[stage]["p50_ms"]) if stage in stages else "-" for stage in ("preprocess", *TO_FIRST_TOKEN, "total")]
        lines.append([f"first pass: {name}", str(frames), *times])
    return _lines([(0, cells) for cells in lines])


def _paper_lines() -> list[dict]:
    def cell(row: paper.Latency, stage: str) -> str:
        value = getattr(row, stage)
        return f"{value:,.0f} ({100 * value / row.total:.0f} %)"

    rows = paper.TABLE_13
    return _lines(
        [
            (r.frames, [str(r.frames), f"{r.compression}x", *(cell(r, s) for s in ("vision", "projector", "language")), f"{r.total:,.0f}"])
            for r in rows
        ]
    )


def _method(rows: list[Row], results: list[Outcome]) -> list[str]:
    """How often each stage ran, read off the rows."""

    def times(stage: str) -> str:
        counts = sorted({row["samples"] for row in rows if row.get("stage") == stage and row["mode"] == "forward"})
        return " or ".join(map(str, counts)) or "0"

    loads = [row["load"] for row in rows if row["load"] is not None]
    busy = f" The machine's load average was {min(loads):.1f} to {max(loads):.1f}; above its number of cores, times are noisy." if loads else ""
    return [
        "Every figure is a median; results.json has the 20th and 80th percentiles too." + busy,
        f"Timed passes: decode {times('decode')}, preprocess {times('preprocess')}, vision {times('vision')}, projector {times('projector')}, "
        f"prefill {times('prefill')}; each after one warm-up pass, decode apart.",
        "Vision was timed once for each number of frames and its median is part of every variant's total: every variant gets the same image tokens. "
        "The reference and the fused projector took turns, pass by pass.",
        "Times are device events on a GPU and the wall clock on a CPU. Peak memory is all that was held at once, with weights: torch's allocations "
        "on a GPU, the process's resident memory on a CPU.",
    ]


def _environment(rows: list[Row]) -> list[tuple[str, str]]:
    times = sorted(str(row["time"]) for row in rows)
    span = " to ".join(dict.fromkeys(times[:1] + times[-1:]))
    columns = [(name, _said(rows, name)) for name in ("device", "dtype", "versions", "commit")]
    return [*columns, ("time", span)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m storm_benchmarks.e2e.report FOLDER")
    out = Path(sys.argv[1])
    measured = load_rows(out / "results.json")
    print(write(out, measured, plot.write(out, summary.outcomes(measured))))
