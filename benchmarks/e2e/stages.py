"""A recorder for `storm_kernels.profiling` that says how long each stage took: device events on a
GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageClock:
    """``with recording(clock): ...`` then ``clock.take()`` -> milliseconds of each stage, nested
    ones under "outer/inner".

    A stage entered several times is summed. One thread at a time. On a GPU nothing waits for the
    device before `take`.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device
        self._open: list[str] = []
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._open.append(name)
        path = "/".join(self._open)
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((path, start, self._mark()))
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Milliseconds by stage since the last `take`, in the order in which the stages first ended."""
        spans, self._spans = self._spans, []
        if self._cuda:
            torch.cuda.synchronize(self._device)
        taken: dict[str, float] = {}
        for path, start, end in spans:
            taken[path] = taken.get(path, 0.0) + (start.elapsed_time(end) if self._cuda else (end - start) * 1e3)
        return taken

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
