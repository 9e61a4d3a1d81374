"""Named stages, so that a profile can say where a forward pass spends its time. Costs nothing while nobody records.

>>> with recording(my_recorder):        # my_recorder(name) returns a context manager; stages nest
...     model(video)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from . import context

Recorder = Callable[[str], AbstractContextManager]
_UNRECORDED = nullcontext()


def stage(name: str) -> AbstractContextManager:
    """Context manager around the work called ``name``; handed to the recorder, if there is one."""
    recorder = context.current("recorder")
    return _UNRECORDED if recorder is None else recorder(name)


def recording(recorder: Recorder) -> AbstractContextManager[None]:
    """``with recording(recorder):`` sends every stage entered meanwhile, in this thread or asyncio
    task, to ``recorder``.
    """
    return context.Setting("recorder", recorder, "recording(...)")
