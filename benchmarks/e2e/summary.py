"""What the rows of `storm_benchmarks.e2e` say: one `Outcome` for each variant, projector and number
of frames, and the gains between them.

Shared by the console table, the charts and the report, so that all three give the same figures.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from storm_model.presets import VARIANTS

from ..harness import Row
from . import reliability

# The stages of time to first token, in order; decode and preprocess come before it (the paper's
# definition: docs/spec.md).
TO_FIRST_TOKEN = ("vision", "projector", "prefill")
BEFORE = ("decode", "preprocess")


@dataclass(frozen=True)
class Outcome:
    """A finished measurement. ``stages`` maps a stage ("projector/scan", "total", and what all
    variants share: "vision") to its row; times are medians in ms."""

    frames: int
    variant: str
    projector: str  # "vila", "reference" or "fused"
    stages: dict[str, Row]

    @property
    def title(self) -> str:
        return VARIANTS[self.variant].title if self.variant in VARIANTS else self.variant

    @property
    def row(self) -> Row:
        return self.stages["total"]

    @property
    def total_ms(self) -> float:
        return self.row["p50_ms"]

    @property
    def peak_bytes(self) -> int | None:
        """Most memory held at once, weights and all."""
        row = self.row
        return None if row["peak_bytes"] is None else row["held_bytes"] + row["peak_bytes"]

    def ms(self, stage: str) -> float:
        return self.stages[stage]["p50_ms"]

    def rounds(self, stage: str = "total") -> list[float]:
        """Milliseconds of each round; of rows that have none, the median."""
        row = self.stages[stage]
        return row.get("rounds_ms") or [row["p50_ms"]]

    def parts(self) -> dict[str, float]:
        """The projector's parts, in ms."""
        names = [name for name in self.stages if name.startswith("projector/")]
        return {name.partition("/")[2]: self.ms(name) for name in names}


def outcomes(rows: list[Row]) -> list[Outcome]:
    """The finished measurements, in the order in which they were made; the last one counts where one was made twice."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "e2e" and row["mode"] == "forward" and row.get("variant"):
            found.setdefault((row["frames"], row["variant"], row["projector"]), {})[row["stage"]] = row
    shared = clip_rows(rows)
    return [Outcome(*key, shared[key[0]] | stages) for key, stages in found.items() if "total" in stages]


def clip_rows(rows: list[Row]) -> dict[int, dict[str, Row]]:
    """frames -> the rows measured once for all variants: decode, preprocess, vision."""
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "e2e" and row["mode"] == "forward" and not row.get("variant"):
            found.setdefault(row["frames"], {})[row["stage"]] = row
    return found


def finished(rows: list[Row]) -> bool:
    """Whether the run that wrote these rows came to its end."""
    return any(row["op"] == "e2e" and row.get("stage") == "run" for row in rows)


def cold_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["op"] == "e2e" and row["mode"] == "cold"]


def by_frames(results: list[Outcome]) -> dict[int, list[Outcome]]:
    """frames -> outcomes, fewest frames first."""
    counts = sorted({one.frames for one in results})
    return {frames: [one for one in results if one.frames == frames] for frames in counts}


def find(results: list[Outcome], frames: int, variant: str, projector: str) -> Outcome | None:
    wanted = (frames, variant, projector)
    return next((one for one in results if (one.frames, one.variant, one.projector) == wanted), None)


@dataclass(frozen=True)
class Gain:
    """``after`` against ``before``, both of one number of frames, by rounds in which both took their turn."""

    before: Outcome
    after: Outcome

    @property
    def _together(self) -> bool:
        began = [one.row.get("rounds_from") for one in (self.before, self.after)]
        return began[0] == began[1] and len(self.before.rounds()) == len(self.after.rounds())

    def _ratios(self, stage: str) -> list[float]:
        if not self._together:
            return [self.after.ms(stage) / self.before.ms(stage)]
        pairs = zip(self.before.rounds(stage), self.after.rounds(stage), strict=True)
        return [after / before for before, after in pairs]

    @property
    def saved(self) -> list[float]:
        """How much less time to the first token ``after`` takes, in percent, by round; negative where it takes more."""
        return [100 * (1 - ratio) for ratio in self._ratios("total")]

    @property
    def saved_percent(self) -> float:
        return statistics.median(self.saved)

    @property
    def speedups(self) -> list[float]:
        """How many times faster the projector of ``after`` is, by round."""
        return [1 / ratio for ratio in self._ratios("projector")]

    @property
    def projector_speedup(self) -> float:
        return statistics.median(self.speedups)

    @property
    def not_reliable(self) -> str | None:
        """Why the saving must not be believed, or None."""
        return self._not_measured_well() or reliability.apart(self.saved, reliability.MOST_POINTS, " % less")

    @property
    def speedup_not_reliable(self) -> str | None:
        most = reliability.MOST_PERCENT / 100 * self.projector_speedup
        return self._not_measured_well() or reliability.apart(self.speedups, most, "x")

    def _not_measured_well(self) -> str | None:
        apart = None if self._together else "not measured in the same rounds"
        return apart or reliability.busy(self.before.row) or reliability.busy(self.after.row)


def against_vila(results: list[Outcome], one: Outcome) -> Gain | None:
    """``one`` against the VILA baseline of as many frames; None where there is none."""
    baseline = find(results, one.frames, "vila", "vila")
    return None if baseline is None or one is baseline else Gain(baseline, one)


def token_gains(results: list[Outcome]) -> list[Gain]:
    """Fewer LLM tokens: the variants with the reference projector against the VILA baseline."""
    gains = [against_vila(results, one) for one in results if one.projector == "reference"]
    return [gain for gain in gains if gain]


def both_gains(results: list[Outcome]) -> list[Gain]:
    """Fewer tokens and faster kernels: the variants with the fused projector against the VILA baseline."""
    gains = [against_vila(results, one) for one in results if one.projector == "fused"]
    return [gain for gain in gains if gain]


def kernel_gains(results: list[Outcome]) -> list[Gain]:
    """Faster kernels: the same variant with the reference and with the fused projector."""
    pairs = [(find(results, one.frames, one.variant, "reference"), one) for one in results if one.projector == "fused"]
    return [Gain(reference, fused) for reference, fused in pairs if reference]


def paper_saved_percent(variant: str) -> float | None:
    """What the paper's variant takes off its VILA baseline's latency, in percent."""
    ours, vila = VARIANTS[variant].paper_latency_s, VARIANTS["vila"].paper_latency_s
    return None if ours is None else 100 * (1 - ours / vila)


def with_reliability(rows: list[Row]) -> list[Row]:
    """The same rows, the column `not_reliable` of each measurement's "total" filled: why figures
    made from it must not be believed, or None."""
    results = outcomes(rows)
    speedups = {(gain.after.frames, gain.after.variant): gain.speedup_not_reliable for gain in kernel_gains(results)}
    for one in results:
        alone = reliability.busy(one.row) or ("one round only" if len(one.rounds()) < 2 else None)
        gain = against_vila(results, one)
        speedup = speedups.get((one.frames, one.variant)) if one.projector == "fused" else None
        one.row["not_reliable"] = alone or (gain.not_reliable if gain else None) or speedup
    return rows


def losses(results: list[Outcome]) -> list[str]:
    """Where ours is not better, in words: total time, and each part of the projector that the fused
    one does more slowly."""
    found = []
    for gain in token_gains(results):
        if gain.saved_percent <= 0:
            more = f"{-gain.saved_percent:.1f} % more time to first token than the VILA baseline"
            found.append(f"{gain.after.title}, {gain.after.frames} frames: {more}{_doubt(gain.not_reliable)}.")
    for gain in kernel_gains(results):
        where = f"{gain.after.title}, {gain.after.frames} frames"
        if gain.saved_percent <= 0:
            more = f"{-gain.saved_percent:.1f} % more in total than the reference"
            found.append(f"{where}: the fused projector costs {more}{_doubt(gain.not_reliable)}.")
        reference, fused = gain.before.parts(), gain.after.parts()
        ratios = {part: fused[part] / reference[part] for part in fused if part in reference}
        slower = [f"{part} {ratio:.2f}x" for part, ratio in ratios.items() if ratio > 1.05]
        if slower:
            found.append(
                f"{where}: parts of the fused projector that take longer than the reference's: {', '.join(slower)}.",
            )
    return found


def _doubt(not_reliable: str | None) -> str:
    return f" (not reliable: {not_reliable})" if not_reliable else ""
