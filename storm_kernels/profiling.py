"""Named stages, so that a profile can say where a forward pass spends its time.

They cost nothing while nobody records.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from . import context

__all__ = ["recording", "stage"]

Recorder = Callable[[str], AbstractContextManager[object]]
_UNRECORDED = nullcontext()


def stage(name: str) -> AbstractContextManager[object]:
    """Context manager around a named piece of work; handed to the recorder, if there is one.

    Args:
        name: what the work is called, such as "scan" or "in_proj".

    Example:
        >>> with stage("reading"):
        ...     pass
    """
    recorder: Recorder | None = context.current("recorder")
    return _UNRECORDED if recorder is None else recorder(name)


def recording(recorder: Recorder) -> AbstractContextManager[None]:
    """``with recording(recorder):`` sends it every stage that this thread or asyncio task enters meanwhile.

    Args:
        recorder: given a stage's name, returns a context manager, which is then around it; stages nest.

    Example:
        >>> import torch
        >>> from storm_kernels import BiMambaMixer
        >>> seen = []
        >>> with recording(lambda name: seen.append(name) or nullcontext()):
        ...     _ = BiMambaMixer(4, d_state=2)(torch.ones(1, 3, 4))
        >>> seen
        ['in_proj', 'conv', 'x_proj', 'dt_proj', 'x_proj', 'dt_proj', 'scan', 'out_proj']
    """
    return context.Setting("recorder", recorder, "recording(...)")
