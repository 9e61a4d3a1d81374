"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operators.

A multiplication with its addition is two, as PyTorch counts products. Both directions count alike,
and every token does, whatever the reduction leaves of them. A backward pass counts twice its
forward pass: each product of the forward pass has two there. What a backward pass computes once
more from checkpoints is not counted, as it would not be for a plain layer.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable

import torch

from .conv import CONV, CONV_BACKWARD
from .operands import Table
from .reduce import REDUCE, REDUCE_BACKWARD
from .scan_operator import SCAN, SCAN_BACKWARD

# Of the scan, for each token, channel and state: the figure by which the Mamba family is reported
# (github.com/state-spaces/mamba, issue 110). Ours by hand is less: delta*A and exp (2), times h
# (1), delta*u*B and its addition (2), times C and the sum over states (2).
SCAN_PER_STATE = 9

_COUNTER = "torch.utils.flop_counter"


# Arguments are those of the operators by name, each tensor replaced by its shape. A backward
# operator has those of its forward operator among its own.
def _scan(a) -> int:
    directions = 1 if a.u_b is None else 2
    return directions * SCAN_PER_STATE * math.prod(a.u) * a.A[-1]


def _conv(a) -> int:
    filters = 1 if a.weight_b is None else 2
    return filters * 2 * math.prod(a.x) * a.weight[-1]


# Each operator's table and the count of its arguments. A reduction adds each element; its backward
# pass multiplies each element of the gradient.
FORMULAS = {
    "scan": (SCAN, _scan),
    "scan_backward": (SCAN_BACKWARD, lambda a: 2 * _scan(a)),
    "conv": (CONV, _conv),
    "conv_backward": (CONV_BACKWARD, lambda a: 2 * _conv(a)),
    "reduce": (REDUCE, lambda a: math.prod(a.x)),
    "reduce_backward": (REDUCE_BACKWARD, lambda a: math.prod(a.grad)),
}


def _formula(table: Table, count: Callable[[object], int]) -> Callable[..., int]:
    return lambda *args, **options: count(table.read(args))


def _register(counter) -> None:
    for name, (table, count) in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.storm_kernels, name))(_formula(table, count))


class _OnceImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the formulas when the counter is imported, and not before: it imports Triton, a
    fifth of a second that few imports of ours need.
    """

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader
        _register(module)


def offer() -> None:
    """Have the formulas registered: at once where the counter is imported already."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _OnceImported())
