"""The figures of `storm_benchmarks.e2e` as text, the same on the console and in the report."""

from __future__ import annotations

from dataclasses import dataclass

from . import summary
from .summary import TO_FIRST_TOKEN, Gain, Outcome

# The variant that the paper's headline (65.5 % less) is about.
HEADLINE_VARIANT = "storm-tp-ts"


@dataclass(frozen=True)
class Card:
    """One headline figure. ``spread`` tells its rounds, ``not_reliable`` why it must not be
    believed (None: it may be)."""

    name: str
    figure: str
    from_to: str
    spread: str
    note: str
    not_reliable: str | None


def milliseconds(value: float) -> str:
    """Three significant digits or whole milliseconds: 0.123, 1.23, 12.3, 123, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A saving: "65.0 % less", or what it costs: "3.7 % more"."""
    return "-" if value is None else f"{abs(value):.1f} % {'less' if value >= 0 else 'more'}"


def between(savings: list[float]) -> str:
    """The spread of a saving over its rounds: "64.1 to 65.9"; "-" of one round."""
    return "-" if len(savings) < 2 else f"{min(savings):.1f} to {max(savings):.1f}"


def cards(results: list[Outcome]) -> list[Card]:
    """The two gains apart, then both together, for the headline variant (or the last one there is)
    at the most frames."""
    most = max((one.frames for one in results), default=0)
    kinds = (
        (summary.token_gains, _token_card),
        (summary.kernel_gains, _kernel_card),
        (summary.both_gains, _both_card),
    )
    gains = [(_headline([one for one in of(results) if one.after.frames == most]), card) for of, card in kinds]
    return [card(gain) for gain, card in gains if gain]


def _token_card(gain: Gain) -> Card:
    paper = percent(summary.paper_saved_percent(gain.after.variant))
    what = f"{gain.after.title}, reference projector, against the VILA baseline, {gain.after.frames} frames"
    return _card_of_total("Fewer tokens", gain, f"{what}. The paper: {paper}.")


def _kernel_card(gain: Gain) -> Card:
    total = f"{percent(gain.saved_percent)} in total"
    return Card(
        "Faster kernels",
        f"{gain.projector_speedup:.1f}x",
        f"projector {_from_to(gain, 'projector')}",
        _rounds([f"{times:.1f}x" for times in sorted(gain.speedups)]),
        f"{gain.after.title}, {gain.after.frames} frames: {total}, fused against reference projector.",
        gain.speedup_not_reliable,
    )


def _both_card(gain: Gain) -> Card:
    note = f"{gain.after.title}, fused, against the VILA baseline, {gain.after.frames} frames."
    return _card_of_total("Both together", gain, note)


def _card_of_total(name: str, gain: Gain, note: str) -> Card:
    return Card(name, percent(gain.saved_percent), _from_to(gain, "total"), _savings(gain), note, gain.not_reliable)


def _headline(gains: list[Gain]) -> Gain | None:
    return next((gain for gain in gains if gain.after.variant == HEADLINE_VARIANT), gains[-1] if gains else None)


def _from_to(gain: Gain, stage: str) -> str:
    return f"{milliseconds(gain.before.ms(stage))} → {milliseconds(gain.after.ms(stage))} ms"


def _savings(gain: Gain) -> str:
    return _rounds([percent(saved) for saved in sorted(gain.saved)])


def _rounds(texts: list[str]) -> str:
    return "one round" if len(texts) < 2 else f"{len(texts)} rounds: {texts[0]} to {texts[-1]}"


def against_vila(results: list[Outcome], one: Outcome) -> str:
    """ "-65.0 % ±0.9": how the total differs from the VILA baseline's, and half of how far the rounds are apart.

    A question mark says that it is not reliable.
    """
    gain = summary.against_vila(results, one)
    if gain is None:
        return "-"
    half = f" ±{(max(gain.saved) - min(gain.saved)) / 2:.1f}" if len(gain.saved) > 1 else ""
    return f"{-gain.saved_percent:+.1f} %{half}{' ?' if gain.not_reliable else ''}"


def doubts(results: list[Outcome]) -> str:
    """Why figures of a table must not be believed: its reasons, each once; "" if they may."""
    reasons = dict.fromkeys(str(one.row["not_reliable"]) for one in results if one.row.get("not_reliable"))
    return "; ".join(reasons)


def table_cells(results: list[Outcome], one: Outcome, name: str) -> list[str]:
    """One line of the main table, the console's too: the columns of `TABLE_HEAD`."""
    stages = [milliseconds(one.ms(stage)) for stage in TO_FIRST_TOKEN]
    projector = "its own" if one.projector == "vila" else one.projector
    peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}"
    wait = milliseconds(one.ms("wait")) if "wait" in one.stages else "-"
    times = [*stages, milliseconds(one.total_ms), against_vila(results, one), wait]
    return [name, projector, f"{one.row['tokens']:,}", *times, peak]


TABLE_HEAD = ("variant", "projector", "tokens", *TO_FIRST_TOKEN, "total", "vs VILA", "wait", "peak MiB")


def before(shared: dict) -> str:
    """What came before the first token's time: "decode 280 ms, preprocess 165 ms"."""
    times = {stage: milliseconds(shared[stage]["p50_ms"]) for stage in summary.BEFORE if stage in shared}
    return ", ".join(f"{stage} {time} ms" for stage, time in times.items())
