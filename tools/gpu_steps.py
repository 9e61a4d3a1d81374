"""The steps of `make gpu` after the first one: which modules run, with which arguments, on a GPU
and in the PTX interpreter.

The interpreter's steps are the GPU's at sizes that it can run: the same modules and options, on CPU
tensors, which the kernels take there.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]


class Step(NamedTuple):
    """``modules``, each with its arguments, run one after the other.

    Each one runs once behind every command of ``before``. ``fuzz`` is the value of
    STORM_KERNELS_FUZZ.
    """

    modules: list[list[str]]
    before: tuple[list[str], ...] = ([],)
    fuzz: str = "1"


def results(device: str, state: Path = STATE) -> Path:
    """Where rows go: a GPU's are kept in the repository, the interpreter's beside what notes the steps."""
    return ROOT / "benchmarks" / "results" if device == "cuda" else state.absolute() / "ptx"


def steps(device: str, state: Path = STATE) -> dict[str, Step]:
    """The steps on ``device``, "cuda" or "ptx", in the order in which they run."""
    return {"cuda": on_a_gpu, "ptx": in_the_interpreter}[device](str(results(device, state)))


def _scan(where: list[str], channels: str, out: str) -> list[str]:
    """The options of the scan's benchmark, less its lengths."""
    formats = ["--dtypes", "bfloat16", "--modes", "forward,backward"]
    return [*where, "--channels", channels, *formats, "--out", f"{out}/scan.json"]


def on_a_gpu(out: str) -> dict[str, Step]:
    where, tests = ["--device", "cuda"], ["pytest", "tests/backends/test_parity.py", "-m", "gpu"]
    scan = _scan(where, "7168", out)
    e2e = ["storm_benchmarks.e2e", "--preset", "storm-7b", *where]
    return {
        "test": Step([tests]),
        "sanitize": Step([[*tests, "-k", "cuda"]], ([*SANITIZER, "memcheck"], [*SANITIZER, "racecheck"]), "0.02"),
        # With every peer, those that loop over tokens too; then 256 frames, where only mamba-ssm
        # can follow.
        "scan": Step([["storm_benchmarks.scan", *scan, "--lengths", "2048"]]),
        "scan-long": Step([["storm_benchmarks.scan", *scan, "--lengths", "65536"]]),
        "kernels": Step([[f"storm_benchmarks.{op}", *where, "--out", f"{out}/{op}.json"] for op in ("conv", "reduce")]),
        "projector": Step([["storm_benchmarks.projector", *where, "--out", f"{out}/projector.json"]]),
        # The reference projector of storm-7b takes one token after the other: at 50 to 100 us of
        # launches for each, 128 frames (32,768 tokens, 2 directions, 4 layers) are 13 to 26 s a
        # pass. Seven passes fit nine minutes beside the rest: the first one, and two variants to
        # warm up and in two rounds. Seven variants, or 256 frames, might not.
        "e2e-128": Step([
            [*e2e, "--frames", "128", "--projector", "fused", "--out", f"{out}/e2e-128"],
            [*e2e, "--frames", "128", "--projector", "both", "--variants", "vila,storm,storm-tp-ts", "--repeat", "2",
             "--out", f"{out}/e2e-128-both"],
        ]),
        "e2e-256": Step([[*e2e, "--frames", "256", "--projector", "fused", "--out", f"{out}/e2e-256"]]),
    }  # fmt: skip


def in_the_interpreter(out: str) -> dict[str, Step]:
    where, tests = ["--device", "cpu"], ["pytest", "tests/backends/test_parity.py", "-m", "gpu"]
    scan = _scan(where, "8", out)
    small = [*where, "--dtypes", "float32"]
    e2e = ["storm_benchmarks.e2e", "--preset", "tiny", *where, "--repeat", "1"]
    return {
        "test": Step([tests], fuzz="0.002"),
        "sanitize": Step([[*tests, "-k", "cuda"]], ([*SANITIZER, "memcheck"], [*SANITIZER, "racecheck"]), "0.002"),
        "scan": Step([["storm_benchmarks.scan", *scan, "--lengths", "16"]]),
        "scan-long": Step([["storm_benchmarks.scan", *scan, "--lengths", "32", "--peer-length", "16"]]),
        "kernels": Step([
            ["storm_benchmarks.conv", *small, "--lengths", "9", "--channels", "9", "--out", f"{out}/conv.json"],
            ["storm_benchmarks.reduce", *small, "--frames", "4", "--side", "2", "--channels", "9", "--out",
                f"{out}/reduce.json"],
        ]),
        "projector": Step([
            ["storm_benchmarks.projector", *small, "--frames", "2", "--side", "2", "--width", "16",
             "--vision-width", "8",
             "--out", f"{out}/projector.json"]
        ]),
        "e2e-128": Step([
            [*e2e, "--frames", "2", "--projector", "fused", "--variants", "vila,storm,storm-tp-ts", "--out",
                f"{out}/e2e-128"],
            [*e2e, "--frames", "2", "--projector", "both", "--variants", "vila,storm-tp-ts", "--out",
                f"{out}/e2e-128-both"],
        ]),
        "e2e-256": Step([[*e2e, "--frames", "4", "--projector", "fused", "--variants", "vila,storm", "--out",
            f"{out}/e2e-256"]]),
    }  # fmt: skip
