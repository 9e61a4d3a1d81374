"""How many threads a call may use: torch's number, but one in a process that was forked off after
the kernels had run on several.

GNU OpenMP keeps its threads for the next parallel region, and a fork copies the list of them but
not the threads: the child would wait for them for ever (pytorch/pytorch#75147 and its kin).
PyTorch's own operators hang there too; a DataLoader's workers run on one thread and do not.
"""

from __future__ import annotations

import os

import torch

from ...callers import warn_caller

_ran_on_several = False
_lost_in_fork = False


def thread_count() -> int:
    """The number of threads for one call of the library."""
    global _ran_on_several
    count = torch.get_num_threads()
    if count == 1:
        return 1
    if _lost_in_fork:
        message = (
            "this process was forked off after the CPU kernels had run on several threads, "
            "which a fork does not copy: they run on one here. "
            "Start workers with the spawn method, or call torch.set_num_threads(1) in them."
        )
        warn_caller(message, RuntimeWarning)
        return 1
    _ran_on_several = True
    return count


def _after_fork() -> None:
    global _lost_in_fork
    _lost_in_fork = _ran_on_several


os.register_at_fork(after_in_child=_after_fork)
