"""Check, time, rate, record: what every benchmark here shares.

Format of a results file (``benchmarks/results/*.json``, ``results.json`` of
`storm_benchmarks.e2e`): a JSON list with one object a line, one object a measurement. Each row is
complete in itself, so files can be joined, cut and filtered. Columns of every row:

    op, backend, mode   what ran: "scan", "cpu" (or a peer's name, or "torch": the plain reference),
                        "forward" | "backward" | "both"
    shape, dtype        "batch=1 tokens=2048 channels=1536 states=16"; "float32"
    p20_ms p50_ms p80_ms, samples   percentiles of the time of one call in milliseconds, and of how many calls
    peak_bytes          most memory held at once above what was held before the call (the output
                        counts, the inputs do not); null where unknown
    held_bytes          what was held before: on a GPU torch's allocations, on a CPU the resident memory of the process
    device, versions, commit, time, load   see environment.py; `load` above the core count means noisy timings

Columns of some rows: `work`, `unit` and `rate` (work a second: "items", "bytes", "FLOP"), `limit`
(the name of the loop or limit it is held against), `limit_ms` (that loop's p50 in the same run),
`of_limit` (limit_ms / p50_ms), `error` and `error_plain` (rms error against float64 of what was
timed, and of the plain reference in the same precision). `storm_benchmarks.e2e` adds its own,
listed there. One process writes a file; files are replaced atomically, so a kill leaves the old or
the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from . import environment

Row = dict[str, object]


class Rows:
    """The rows of one results file. Rows that were in the file stay; every `append` replaces the file at once."""

    def __init__(self, path: Path):
        """Raises OSError if ``path`` cannot be written, ValueError if it holds something else than
        rows: before any long work."""
        self.path = Path(path)
        self.rows: list[Row] = load_rows(self.path) if self.path.exists() else []
        self.save()

    def append(self, *rows: Row) -> None:
        self.put(len(self.rows), *rows)

    def put(self, place: int, *rows: Row) -> None:
        """Write ``rows`` instead of all that stand from ``place`` on: a measurement that grows is
        written again after each round."""
        self.rows[place:] = rows
        self.save()

    def save(self) -> None:
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows)
        write_atomically(self.path, f"[\n{lines}\n]\n" if lines else "[]\n")


def load_rows(path: Path) -> list[Row]:
    """Rows of a results file; ValueError naming the file if it is not one, OSError if it cannot be read."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "p50_ms" in row for row in rows):
        raise ValueError(f"{path} is not a results file: expected a list of rows with p50_ms")
    return rows


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path``: whoever reads it, or finds it after a kill, sees the old content or the
    new. A folder that has gone is made again.

    Raises:
        OSError: it cannot be written; ``filename`` is ``path``, and what was there before is there still.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def row(
    op: str,
    backend: str,
    mode: str,
    shape: str,
    dtype: torch.dtype,
    samples_ms: list[float],
    *,
    device: str,
    **more: object,
) -> Row:
    """One complete row; ``more`` are further columns, `peak_bytes` and `held_bytes` among them.
    None-valued columns are kept as null."""
    p20, p50, p80 = percentiles(samples_ms)
    what = {"op": op, "backend": backend, "mode": mode, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    timing = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": len(samples_ms)}
    where = {
        "device": environment.device_name(device),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "time": environment.now(),
        "load": environment.load(),
    }
    return {**what, **timing, "peak_bytes": None, "held_bytes": None, **more, **where}


def percentiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, to a tenth of a microsecond if the samples are milliseconds."""
    samples = list(samples)
    if not samples:
        raise ValueError("percentiles: no samples")
    cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    return round(cuts[1], 4), round(cuts[4], 4), round(cuts[7], 4)


def time_rounds(
    contenders: dict[str, Callable[[], object]], device: str, *, rounds: int = 5, slice_ms: float = 40.0
) -> dict[str, list[float]]:
    """Milliseconds of single calls of each contender.

    They take turns, so that whatever disturbs the machine disturbs all: in each round each one runs
    for ``slice_ms`` or once, whichever is longer. Two calls of each come first and do not count
    (compilation, first allocation); one where it takes over a second. On a CPU caches are as the
    previous call left them; on a GPU the L2 cache is overwritten before each call.
    """
    sample = _gpu_sampler(device) if device.startswith("cuda") else _cpu_samples
    estimates = {}
    for name, call in contenders.items():
        first = sample(call, 1)[0]
        estimates[name] = first if first > 1e3 else sample(call, 1)[0]
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name] += sample(call, max(1, min(200, round(slice_ms / max(estimates[name], 1e-3)))))
    return samples


def _cpu_samples(call: Callable[[], object], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def _gpu_sampler(device: str) -> Callable[[Callable[[], object], int], list[float]]:
    # Twice the largest L2 there is (50 MB on an H100, 96 MB and more on some others).
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def samples(call: Callable[[], object], count: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in pairs]

    return samples


class MemoryMeter:
    """``with MemoryMeter(device) as memory: ...`` then ``memory.columns()``: `peak_bytes` above
    `held_bytes`, both None where unknown.

    On a GPU these are torch's own counts. On Linux they are the resident memory of the process and
    its high-water mark, so memory that was freed but not given back, then used again, does not
    show: freed heap is given back first. With ``measures=False`` it does nothing.
    """

    def __init__(self, device: str, measures: bool = True):
        self.device, self.measures = device, measures
        self.held_bytes: int | None = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> MemoryMeter:
        if not self.measures:
            return self
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held_bytes = torch.cuda.memory_allocated(self.device)
        else:
            _give_back_freed_heap()
            self.held_bytes = _process_memory("VmRSS") if _reset_high_water_mark() else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.held_bytes is None:
            return
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _process_memory("VmHWM")
        self.peak_bytes = max(0, peak - self.held_bytes)

    def columns(self) -> Row:
        return {"peak_bytes": self.peak_bytes, "held_bytes": self.held_bytes}


def peak_memory(call: Callable[[], object], device: str) -> Row:
    """The columns `peak_bytes` and `held_bytes` for one call of ``call``."""
    with MemoryMeter(device) as memory:
        call()
    return memory.columns()


def _give_back_freed_heap() -> None:
    from storm_kernels.backends import pages  # here, because who only writes rows needs no kernels

    pages.release()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    except OSError:
        return False  # not Linux, or not allowed


def _process_memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class CheckFailed(AssertionError):
    """What was about to be timed is wrong: its error, the bound and the place are in the message."""


def verify(what: str, result: Tensor, plain: Tensor, truth: Tensor, *, gradient: bool = False) -> dict[str, float]:
    """docs/reliability.md's bound over the whole tensor.

    ``truth`` is float64 from the same rounded inputs, ``plain`` the reference in the precision of
    ``result``. Returns the columns `error` and `error_plain` (rms); raises `CheckFailed`.
    """
    from storm_kernels.verify import exceeds  # here, because who only writes rows needs no kernels

    if result.shape != truth.shape or plain.shape != truth.shape:
        raise CheckFailed(
            f"{what}: shape {tuple(result.shape)} against {tuple(plain.shape)} (plain) and {tuple(truth.shape)} "
            "(float64)"
        )
    truth = truth.double()
    if failure := exceeds(result, truth, plain, 1.5 if gradient else 1.25):
        raise CheckFailed(f"{what}: {failure}")
    return {
        name: (t.double() - truth).square().mean().sqrt().item()
        for name, t in (("error", result), ("error_plain", plain))
    }
