"""The most memory that tensors hold together while a program runs, counted as they come and go."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """``with Allocations() as memory: ...``, then ``memory.peak`` in bytes: storages that were made within.

    On the meta device too, where nothing is really there.
    """

    def __init__(self):
        super().__init__()
        self.held, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and storage(t) not in before | self._known:
                self._count(t.untyped_storage())
        return out

    def _count(self, memory):
        size, place = memory.nbytes(), memory._cdata
        self._known.add(place)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(memory, self._gone, place, size).atexit = False

    def _gone(self, place, size):
        self._known.discard(place)
        self.held -= size


def storage(t):
    return t.untyped_storage()._cdata
