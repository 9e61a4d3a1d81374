"""PNG charts of `storm_benchmarks.e2e`, drawn from its rows; wide enough for a page, with letters
large enough for a phone."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..harness import write_atomically
from . import summary
from .summary import TO_FIRST_TOKEN, Outcome

# Okabe and Ito's colours, told apart by colour-blind readers too.
_STAGE_COLOURS = {"vision": "#56B4E9", "projector": "#D55E00", "prefill": "#999999"}
_LINE_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7F6000")
_WIDTH_INCHES, _DPI = 5.6, 180


def charts(results: list[Outcome]) -> dict[str, bytes]:
    """file name -> PNG: `stages-<frames>.png` for each number of frames, `latency.png` where there are several."""
    drawn = {f"stages-{frames}.png": _png(stage_bars(some)) for frames, some in summary.by_frames(results).items()}
    if len(drawn) > 1:
        drawn["latency.png"] = _png(latency_lines(results))
    return drawn


def stage_bars(results: list[Outcome]) -> Figure:
    """Time to first token of each outcome (all of one number of frames), its stages stacked, in ms."""
    figure = Figure(figsize=(_WIDTH_INCHES, 1.5 + 0.3 * len(results)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    names = [short_name(one) for one in results]
    start = [0.0] * len(results)
    for stage in TO_FIRST_TOKEN:
        lengths = [one.ms(stage) for one in results]
        axes.barh(names, lengths, left=start, color=_STAGE_COLOURS[stage], label=stage, height=0.72)
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    for name, end, one in zip(names, start, results, strict=True):
        axes.annotate(
            f"{one.total_ms:,.0f}",  # as in the tables: a median of sums, of which the bar's end is near
            (end, name),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.invert_yaxis()
    axes.margins(x=0.14)  # room for the longest bar's number
    axes.set_xlabel("time to first token, ms (median)")
    _title(figure, f"{results[0].frames} frames: where the time goes{_doubt(results)}")
    figure.legend(loc="outside lower center", ncols=len(TO_FIRST_TOKEN), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def latency_lines(results: list[Outcome]) -> Figure:
    """Time to first token over frames, one line a variant, with the fused projector where it was measured."""
    figure = Figure(figsize=(_WIDTH_INCHES, 5.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    variants = list(dict.fromkeys(one.variant for one in results))
    for number, variant in enumerate(variants):
        line = _one_line([one for one in results if one.variant == variant])
        frames, totals = [one.frames for one in line], [one.total_ms for one in line]
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        dashes = "--" if variant == "vila" else "-"
        axes.plot(frames, totals, dashes, color=colour, marker="o", markersize=4, label=short_name(line[-1]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({one.frames for one in results})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    low, high = min(one.total_ms for one in results), max(one.total_ms for one in results)
    axes.set_yticks(_round_steps(low, high), [f"{step:,.0f}" for step in _round_steps(low, high)])
    axes.set_xlabel("frames")
    axes.set_ylabel("time to first token, ms (median)")
    _title(figure, f"Latency over frames{_doubt(results)}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def short_title(one: Outcome) -> str:
    """ "STORM +TP +TS": for places too narrow for the title."""
    title = one.title
    for long, short in (
        ("T. pooling", "TP"),
        ("S. pooling", "SP"),
        ("T. sampling", "TS"),
        ("+ ", "+"),
        (" baseline", ""),
    ):
        title = title.replace(long, short)
    return title


def short_name(one: Outcome) -> str:
    return short_title(one) if one.projector == "vila" else f"{short_title(one)}, {one.projector}"


def _title(figure: Figure, text: str) -> None:
    """From the picture's left edge on: over the axes alone, long names of bars leave too little room."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def _doubt(results: list[Outcome]) -> str:
    return " (not reliable)" if any(one.row.get("not_reliable") for one in results) else ""


def _one_line(results: list[Outcome]) -> list[Outcome]:
    best = {one.frames: one for one in sorted(results, key=lambda one: one.projector == "fused")}
    return [best[frames] for frames in sorted(best)]


def _round_steps(low: float, high: float) -> list[float]:
    steps = [mantissa * 10.0**power for power in range(-3, 8) for mantissa in (1, 2, 5)]
    return [step for step in steps if low / 2 <= step <= high * 2]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10}):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(folder: Path, results: list[Outcome]) -> dict[str, bytes]:
    """Draw `charts` into ``folder`` and return them."""
    drawn = charts(results)
    for name, png in drawn.items():
        write_atomically(folder / name, png)
    return drawn
