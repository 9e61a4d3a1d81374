"""What the rows of `storm_benchmarks.e2e` say: one `Outcome` for each variant, projector and number of frames, and the two gains between them.

Shared by the console table, the charts and the report, so that all three give the same figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from storm_model.config import VARIANTS

from ..harness import Row

# The stages of time to first token, in order; decode and preprocess come before it (the paper's definition: docs/spec.md).
TO_FIRST_TOKEN = ("vision", "projector", "prefill")
BEFORE = ("decode", "preprocess")


@dataclass(frozen=True)
class Outcome:
    """A finished measurement. ``stages`` maps a stage ("projector/scan", "total", and what all variants share: "vision") to its row; times are
    medians in ms."""

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

    def parts(self) -> dict[str, float]:
        """The projector's parts, in ms."""
        return {name.partition("/")[2]: row["p50_ms"] for name, row in self.stages.items() if name.startswith("projector/")}


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


def cold_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["op"] == "e2e" and row["mode"] == "cold"]


def by_frames(results: list[Outcome]) -> dict[int, list[Outcome]]:
    """frames -> outcomes, fewest frames first."""
    return {frames: [one for one in results if one.frames == frames] for frames in sorted({one.frames for one in results})}


def find(results: list[Outcome], frames: int, variant: str, projector: str) -> Outcome | None:
    return next((one for one in results if (one.frames, one.variant, one.projector) == (frames, variant, projector)), None)


@dataclass(frozen=True)
class TokenGain:
    """Fewer LLM tokens: a variant with the reference projector against the VILA baseline."""

    baseline: Outcome
    reduced: Outcome

    @property
    def saved_percent(self) -> float:
        return saved_percent(self.baseline.total_ms, self.reduced.total_ms)

    @property
    def paper_saved_percent(self) -> float | None:
        ours, vila = VARIANTS[self.reduced.variant].paper_latency_s, VARIANTS["vila"].paper_latency_s
        return None if ours is None else saved_percent(vila, ours)


@dataclass(frozen=True)
class KernelGain:
    """Faster kernels: the same variant with the reference and with the fused projector."""

    reference: Outcome
    fused: Outcome

    @property
    def projector_speedup(self) -> float:
        return self.reference.ms("projector") / self.fused.ms("projector")

    @property
    def saved_percent(self) -> float:
        return saved_percent(self.reference.total_ms, self.fused.total_ms)


def token_gains(results: list[Outcome]) -> list[TokenGain]:
    gains = []
    for one in results:
        baseline = find(results, one.frames, "vila", "vila")
        if one.projector == "reference" and baseline:
            gains.append(TokenGain(baseline, one))
    return gains


def kernel_gains(results: list[Outcome]) -> list[KernelGain]:
    pairs = [(find(results, one.frames, one.variant, "reference"), one) for one in results if one.projector == "fused"]
    return [KernelGain(reference, fused) for reference, fused in pairs if reference]


def saved_percent(before: float, after: float) -> float:
    """How much less ``after`` is than ``before``, in percent; negative where it is more."""
    return 100 * (1 - after / before)


def losses(results: list[Outcome]) -> list[str]:
    """Where ours is not better, in words: total time, and each part of the projector that the fused one does more slowly."""
    found = []
    for gain in token_gains(results):
        if gain.saved_percent <= 0:
            found.append(
                f"{gain.reduced.title}, {gain.reduced.frames} frames: {-gain.saved_percent:.1f} % more time to first token than the VILA baseline."
            )
    for gain in kernel_gains(results):
        where = f"{gain.fused.title}, {gain.fused.frames} frames"
        if gain.saved_percent <= 0:
            found.append(f"{where}: the fused projector costs {-gain.saved_percent:.1f} % more in total than the reference.")
        reference, fused = gain.reference.parts(), gain.fused.parts()
        slower = [f"{part} {fused[part] / reference[part]:.2f}x" for part in fused if part in reference and fused[part] > 1.05 * reference[part]]
        if slower:
            found.append(f"{where}: parts of the fused projector that take longer than the reference's: {', '.join(slower)}.")
    return found
