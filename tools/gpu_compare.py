"""Measured times of the kernels beside what arithmetic expects of the device (docs/kernels.md), and
the first places to look where they differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from storm_benchmarks import environment
from storm_benchmarks.harness import Row, load_rows


class Gpu(NamedTuple):
    multiprocessors: int
    clock: float  # Hz, under load
    bandwidth: float  # bytes a second that copies reach


# By a part of the device's name. Clocks under load and bandwidths that copies reach, from public
# measurements.
GPUS = {
    "H100 PCIe": Gpu(114, 1.755e9, 1.8e12),
    "H100": Gpu(132, 1.755e9, 3.0e12),
    "H200": Gpu(132, 1.755e9, 4.2e12),
    "A100": Gpu(108, 1.41e9, 1.7e12),
    "B200": Gpu(148, 1.85e9, 7.0e12),
}
EXP2 = 16  # a clock and multiprocessor
SLOTS = 128  # lanes of issued instructions a clock and multiprocessor
# Slots an item (tests/backends/test_cuda_code.py, tests/backends/test_cuda_backward.py,
# tools/kernel_mix.py), with the passes over y beside the scan.
SLOTS_PER_ITEM = {
    ("cuda", "forward"): 7.8, ("cuda", "backward"): 23.8, ("triton", "forward"): 9.5, ("triton", "backward"): 41.0,
}  # fmt: skip
EXPONENTIALS = {"forward": 1, "backward": 2}  # an item; the backward pass computes the decays twice
SLACK = 1.3
PLACES = {
    "scan": (
        "the clock under load (nvidia-smi -q -d CLOCK): expected time goes with it",
        "bank conflicts of shared memory (ncu --metrics l1tex__data_bank_conflicts_pipe_lsu): "
        "pairs of lanes should share addresses",
        "the rate of exp2 alone (the benchmark's limit loop)",
        "blocks a multiprocessor (ncu: achieved occupancy): 3 of a forward scan of 16 states, else 2",
        "tickets against one block a chain (storm_kernels/backends/cuda/tickets.py): its constants are estimates",
    ),
    "memory": (
        "the bandwidth that a copy of the same bytes reaches (the benchmark's limit)",
        "sectors a request (ncu: memory workload analysis): rows should be read in whole 128 bytes",
    ),
}


def device_of(row: Row) -> Gpu | None:
    return next((gpu for name, gpu in GPUS.items() if all(word in str(row["device"]) for word in name.split())), None)


def expected_ms(row: Row, gpu: Gpu) -> tuple[float, str] | None:
    """Milliseconds that the limits allow, and which of them holds; None for what there is no arithmetic of."""
    backend, mode = str(row["backend"]), str(row["mode"])
    if row["op"] in ("scan", "bidirectional_scan") and (backend, mode) in SLOTS_PER_ITEM:
        rate = gpu.multiprocessors * gpu.clock
        issue = row["work"] * SLOTS_PER_ITEM[backend, mode] / (SLOTS * rate)
        power = row["work"] * EXPONENTIALS[mode] / (EXP2 * rate)
        return (1e3 * issue, "issue slots") if issue > power else (1e3 * power, "exp2")
    if row.get("unit") == "bytes" and backend in ("cuda", "triton"):
        return 1e3 * row["work"] / gpu.bandwidth, "memory"
    return None


def compare(results: Path) -> list[str]:
    """Print and return one line a row of this commit: measured, expected, their ratio; after those
    over `SLACK` the places to look at first.
    """
    rows = [
        row
        for path in sorted(results.glob("*.json"))
        for row in load_rows(path)
        if row["commit"] == environment.commit()
    ]
    lines, slow = [], set()
    for row in rows:
        gpu = device_of(row)
        found = expected_ms(row, gpu) if gpu else None
        if found is None:
            continue
        ratio = row["p50_ms"] / found[0]
        shape = re.sub(r"batch=1 ", "", str(row["shape"]))
        what = f"{row['backend']:7} {row['op']} {row['mode']}, {shape}, {row['dtype']}"
        lines.append(
            f"{what:88} {row['p50_ms']:9.3f} ms, expected {found[0]:9.3f} by {found[1]}: "
            f"{ratio:5.2f}x  [{row['device']}, {row['commit']}]"
        )
        if ratio > SLACK:
            slow.add("memory" if found[1] == "memory" else "scan")
    lines = lines or ["no row of this commit was measured on a GPU that there is arithmetic for"]
    for kind in sorted(slow):
        lines.append(f"over {SLACK} times the expected time ({kind}); look first at")
        lines += [f"  {i}. {place}" for i, place in enumerate(PLACES[kind], 1)]
    print("\n".join(lines))
    return lines
