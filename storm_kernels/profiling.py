"""Named stages, so that a profile can say where a forward pass spends its time. Costs nothing while nobody records.

>>> with recording(my_recorder):        # my_recorder(name) returns a context manager; stages nest
...     model(video)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Recorder = Callable[[str], AbstractContextManager]

_recorder: Recorder | None = None


def stage(name: str) -> AbstractContextManager:
    """Context manager around the work called ``name``; handed to the recorder, if there is one."""
    return nullcontext() if _recorder is None else _recorder(name)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send every stage entered meanwhile, on any thread, to ``recorder``."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
