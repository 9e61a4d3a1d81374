"""When a figure must not be believed: the machine was busy, or the rounds disagree."""

from __future__ import annotations

from collections.abc import Sequence

from .. import environment
from ..harness import Row

# A median of rounds that lie further apart than this may be off by as much: in points of a saving,
# and in percent of a speed-up's median.
MOST_POINTS = 5.0
MOST_PERCENT = 20.0
# Threads that wait longer than this share of their time for a core run beside another program.
# Alone they wait for under one per cent.
MOST_WAITED_PERCENT = 10.0


class Waiting:
    """How long this process's threads wait for a core, from when it is made."""

    def __init__(self):
        self._start = environment.core_seconds()

    def columns(self) -> Row:
        """`waited_percent`, of the time that they ran or waited (null where the system does not say), and `cores`."""
        end, percent = environment.core_seconds(), None
        if self._start and end:
            ran, waited = (max(0.0, after - before) for before, after in zip(self._start, end, strict=True))
            percent = round(100 * waited / max(ran + waited, 1e-9), 1)
        return {"waited_percent": percent, "cores": environment.cores()}


def busy(row: Row) -> str | None:
    """Why the machine was too busy for this row; None if it was not. The load average counts only
    where waiting is unknown: it lags by a minute."""
    waited, load, cores = row.get("waited_percent"), row.get("load"), row.get("cores")
    if waited is not None:
        return f"threads waited {waited:.0f} % of their time for a core" if waited > MOST_WAITED_PERCENT else None
    if load is not None and cores is not None and load > cores + 0.5:
        return f"load average {load:.1f} on {cores} cores"
    return None


def apart(values: Sequence[float], most: float, unit: str) -> str | None:
    """Why a median of these rounds must not be believed, by how far they are apart; None if it may."""
    if len(values) < 2:
        return "one round says nothing about its spread"
    if max(values) - min(values) > most:
        return f"rounds from {min(values):.1f} to {max(values):.1f}{unit}"
    return None
