"""Where and with what a row was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

# Packages whose version can change a figure; absent ones are left out.
_PACKAGES = ("torch", "triton", "transformers", "av", "numpy", "numba", "jax", "mambapy", "mamba-ssm", "cuda-core")
_PACKAGES += ("torchcodec", "decord")  # readers of video


@cache
def device_name(device: str) -> str:
    """One line naming the hardware that ``device`` ("cpu", "cuda", "cuda:1") runs on, with what limits its speed."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda or torch.version.hip}"
        )
    return f"{_cpu_model()}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


@cache
def versions() -> str:
    """``"python 3.11.7, torch 2.13.0, ..."``."""
    found = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


@cache
def commit() -> str:
    """The checkout's commit, short, with ``+changes`` if tracked files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def load() -> float | None:
    """Processes that wanted a core in the last minute, this one included: above the core count,
    timings are noisy. None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_seconds() -> tuple[float, float] | None:
    """Seconds that this process's threads have (run, waited for a core), as Linux counts them for
    each living thread; None where it does not.

    The difference of two calls says whether somebody else used the cores meanwhile.
    """
    ran = waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # the thread has ended meanwhile
            of_thread = thread.read_text(encoding="ascii").split()
            ran, waited = ran + int(of_thread[0]), waited + int(of_thread[1])
    return (ran / 1e9, waited / 1e9) if ran else None


def available_memory(device: str) -> int | None:
    """Bytes that could still be allocated on ``device``; None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None
