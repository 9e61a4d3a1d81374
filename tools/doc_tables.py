"""The tables of the documents that are made from what the code and the results files say: ``python
-m tools.doc_tables`` writes them anew.

A made table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` in a document.
tests/test_docs.py fails where one is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from storm_benchmarks.e2e import summary
from storm_benchmarks.harness import Row, load_rows

from storm_kernels.backends import dispatch
from storm_kernels.backends.cuda import launcher

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = ("cpu", "cuda", "triton", "fused", "patched", "storm_model")
E2E_FRAMES = 128
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

# Bytes of shared memory that a block may have: on an H100, and on consumer GPUs of compute
# capability 8.6, 8.9 and 12.0.
LARGE_GPU, SMALL_GPU = 227 * 1024, 99 * 1024
MOST = 4096  # states and taps that are tried
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = {
    op: ", ".join(f"`{name}`" for name, own in dispatch.FUNCTIONS.items() if own == op) for op in dispatch.OPS
}


class _Gpu:
    """A launcher of the cuda backend that answers as on a GPU with ``shared`` bytes of shared memory a block."""

    device_type = "cuda"

    def __init__(self, shared: int):
        self._shared = shared

    def why_not(self) -> None:
        return None

    def shared_limit(self) -> int:
        return self._shared


@contextmanager
def _on_a_gpu(shared: int) -> Iterator[None]:
    """Within it every backend answers ``why_not`` as if its GPU, or its compiled library, were there."""
    triton = dispatch.load("triton")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch.load("cpu"), "why_missing", lambda: None))
        stack.enter_context(launcher.using(_Gpu(shared)))
        stack.enter_context(mock.patch.object(triton, "_no_gpu", lambda: None))
        stack.enter_context(mock.patch.object(triton, "INTERPRETED", False))
        yield


def takes(backend: str, op: str, dtype: torch.dtype = torch.float32, d_state: int = 0, d_conv: int = 0) -> bool:
    """Whether ``backend`` accepts ``op`` on its own device, as its `why_not` says."""
    device = "cpu" if backend in ("cpu", "torch") else "cuda"
    return (
        dispatch.load(backend).why_not(op, device=device, dtypes=frozenset({dtype}), d_state=d_state, d_conv=d_conv)
        is None
    )


def _most(accepts: Callable[[int], bool]) -> int:
    """The largest number up to MOST that is accepted; every smaller one has to be accepted too."""
    accepted = [accepts(n) for n in range(1, MOST + 1)]
    most = sum(accepted)
    if not all(accepted[:most]):
        raise ValueError("what is accepted is no range from 1 on")
    return most


def _limit(backend: str, op: str) -> str:
    if not takes(backend, op):
        return "no"
    if op not in ("scan", "conv"):
        return "yes"
    name, plural = ("d_state", "states") if op == "scan" else ("d_conv", "taps")
    most = _most(lambda n: takes(backend, op, **{name: n}))
    return f"any number of {plural}" if most == MOST else f"up to {most} {plural}"


def backends() -> list[str]:
    """One row an operation, one column a backend: what `why_not` lets through."""
    columns = tuple(dispatch.BACKENDS)
    lines = [_line("operation", *(f"`{name}`" for name in columns)), _line(*["---"] * (1 + len(columns)))]
    for op, title in OPERATIONS.items():
        cells = []
        for name in columns:
            with _on_a_gpu(LARGE_GPU):
                large = _limit(name, op)
            with _on_a_gpu(SMALL_GPU):
                small = _limit(name, op)
            cells.append(large if small == large else f"{large}; {small} with 99 KiB of shared memory a block")
        lines.append(_line(title, *cells))
    with _on_a_gpu(LARGE_GPU):
        kinds = [", ".join(str(t).removeprefix("torch.") for t in DTYPES if takes(name, "scan", t)) for name in columns]
    return [*lines, _line("dtypes of the activations", *kinds)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _times(x: float) -> str:
    return f"{x:,.0f}x" if x >= 20 else f"{x:.1f}x"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"


def _commit(row: Row) -> str:
    """Seven digits of the commit, with a plus sign where tracked files differed from it."""
    return row["commit"][:7] + ("+" if row["commit"].endswith("+changes") else "")


def _groups(name: str) -> list[list[Row]]:
    """The rows of a results file, one list a measurement: ours first, then what ran beside it in
    the same run; newest run only.
    """
    rows = load_rows(RESULTS / f"{name}.json")
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("op", "mode", "shape", "dtype", "device")), []).append(row)
    newest = []
    for group in found.values():
        ours = [row for row in group if row["backend"] in OURS][-1]
        beside = [row for row in group if row["commit"] == ours["commit"] and row["backend"] not in OURS]
        newest.append([ours, *sorted(beside, key=lambda row: row["p50_ms"])])
    return newest


def measurements(name: str) -> list[str]:
    """Every measurement of a results file as it last ran."""
    lines = [
        _line(
            "what ran", "backend", "p20 / p50 / p80, ms", "times ours", "of the limit", "peak MiB", "device", "commit"
        ),
        _line(*["---"] * 8),
    ]
    for group in _groups(name):
        ours = group[0]
        for row in group:
            what = (
                f"{row['op']}, {row['mode']}, {row['shape'].replace('batch=1 ', '')}, {row['dtype']}"
                if row is ours
                else ""
            )
            cells = [what, row["backend"], " / ".join(_number(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms"))]
            cells += ["1" if row is ours else _times(row["p50_ms"] / ours["p50_ms"]), _percent(row["of_limit"])]
            peak = "" if row["peak_bytes"] is None else _number(row["peak_bytes"] / 2**20)
            lines.append(_line(*cells, peak, row["device"] if row is ours else "", _commit(row)))
    return lines


def end_to_end() -> list[str]:
    """Time to first token of every variant at E2E_FRAMES frames."""
    results = [one for one in summary.outcomes(load_rows(RESULTS / "e2e-storm-mini.json")) if one.frames == E2E_FRAMES]
    baseline = summary.find(results, E2E_FRAMES, "vila", "vila").total_ms
    lines = [
        _line("variant", "projector", "tokens", "vision", "projector", "prefill", "total", "against VILA"),
        _line(*["---"] * 8),
    ]
    for one in results:
        gain = "" if one.variant == "vila" else f"{100 * (one.total_ms / baseline - 1):+.1f} %"
        stages = [_number(one.ms(stage)) for stage in ("vision", "projector", "prefill", "total")]
        lines.append(_line(f"`{one.variant}`", one.projector, f"{one.row['tokens']:,}", *stages, gain))
    return lines


# What README shows: title, results file, the operation, and how the measurement's shape ends.
HIGHLIGHTS = (
    ("one scan, 2,048 tokens, E 1536, S 16", "scan", "scan", "states=16"),
    ("both directions of it, gated", "scan", "bidirectional_scan", "states=16"),
    ("the same, reduced (k=4, s=2)", "scan", "bidirectional_scan", "pool=4 stride=2"),
    ("both convolutions of 4 taps", "conv", "bidirectional_conv", "taps=4"),
    ("projector, 32 frames of 8x8, D 768", "projector", "projector", "pool=1 space=1 stride=1"),
    ("the same, reduced (k=4, s=2)", "projector", "projector", "pool=4 space=1 stride=2"),
    ("prefill of 4 Mamba layers of transformers", "prefill", "prefill mamba", "layers=4"),
)
SHORT = {
    "torch": "torch reference",
    "reference": "torch reference",
    "jax.lax.scan": "jitted JAX",
    "numba": "Numba",
    "torch F.conv1d": "`F.conv1d`",
    "transformers, mambapy": "transformers with mambapy",
}


def highlights() -> list[str]:
    """The measurements that README shows, on a CPU."""
    lines = [
        _line("float32", "ours, ms", "how many times slower the others are", "commit"),
        _line("---", "---", "---", "---"),
    ]
    for title, file, op, ending in HIGHLIGHTS:
        groups = [
            g for g in _groups(file) if (g[0]["op"], g[0]["mode"]) == (op, "forward") and g[0]["shape"].endswith(ending)
        ]
        ours, *others = next(g for g in groups if "CUDA" not in g[0]["device"])
        slower = ", ".join(
            f"{SHORT.get(row['backend'], row['backend'])} {_times(row['p50_ms'] / ours['p50_ms'])}" for row in others
        )
        lines.append(_line(title, _number(ours["p50_ms"]), slower, _commit(ours)))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "backends": backends,
    "highlights": highlights,
    "e2e": end_to_end,
    **{name: (lambda name=name: measurements(name)) for name in ("scan", "conv", "projector", "prefill", "decode")},
}


def renewed(text: str) -> str:
    """A document with each made table as it has to be."""
    return _MARKED.sub(lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[4], text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    for path in documents():
        text = path.read_text()
        if (new := renewed(text)) != text:
            path.write_text(new)
            print(f"{path.relative_to(ROOT)} renewed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
