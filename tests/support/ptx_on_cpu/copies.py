"""Asynchronous copies under way."""

from __future__ import annotations

import numpy as np


class Copies:
    """What lands where when its lane waits for its group. The values are those that memory held
    when the copy was asked for.
    """

    def __init__(self, machine):
        self.committed = np.zeros(machine.lanes, np.int64)  # groups of each lane
        self.open: list[tuple] = []  # (lanes, places, values)
        self.groups: list[tuple] = []  # (lanes, places, values, the lanes' numbers of the group)

    def clear(self) -> None:
        self.committed[:] = 0
        self.open, self.groups = [], []

    def commit(self, mask: np.ndarray) -> None:
        for lanes, places, values in self.open:
            some = mask[lanes]
            self.groups.append((lanes[some], places[some], values[some], self.committed[lanes[some]]))
        self.open = [
            (lanes[~mask[lanes]], p[~mask[lanes]], v[~mask[lanes]])
            for lanes, p, v in self.open
            if not mask[lanes].all()
        ]
        self.committed[mask] += 1

    def land(self, machine, mask: np.ndarray, pending: int) -> None:
        kept = []
        for lanes, places, values, numbers in self.groups:
            due = mask[lanes] & (numbers < self.committed[lanes] - pending)
            if due.any():
                machine.shared.data.view(np.uint64).reshape(-1, 2)[places[due] // 16] = values[due]
                machine.shared.landed(lanes[due], places[due], 16)
            if not due.all():
                kept.append((lanes[~due], places[~due], values[~due], numbers[~due]))
        self.groups = kept
