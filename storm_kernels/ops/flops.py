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

import torch

# Of the scan, for each token, channel and state: the figure by which the Mamba family is reported
# (github.com/state-spaces/mamba, issue 110). Ours by hand is less: delta*A and exp (2), times h
# (1), delta*u*B and its addition (2), times C and the sum over states (2).
SCAN_PER_STATE = 9
# Of the norm, for each element: mean (1), difference (1), its square and the sum (2), times rstd
# (1), weight and bias (2).
NORM_PER_ELEMENT = 7

_COUNTER = "torch.utils.flop_counter"


# Arguments are those of the operators, each tensor replaced by its shape.
def _scan(u, delta, A, B, C, D, delta_bias, u_b, *rest, **options) -> int:
    directions = 1 if u_b is None else 2
    return directions * SCAN_PER_STATE * math.prod(u) * A[1]


def _scan_backward(grad_out, grad_final_state, *rest, **options) -> int:
    return 2 * _scan(*rest)


def _conv(x, weight, bias, weight_b, *rest, **options) -> int:
    filters = 1 if weight_b is None else 2
    return filters * 2 * math.prod(x) * weight[1]


def _conv_backward(grad, grad_b, *rest, **options) -> int:
    return 2 * _conv(*rest)


def _reduce(x, *rest, **options) -> int:
    """An addition for each element; in the backward pass a product for each element of the gradient."""
    return math.prod(x)


def _norm(x, residual, *rest, **options) -> int:
    return (NORM_PER_ELEMENT + (residual is not None)) * math.prod(x)


def _norm_backward(grad_normed, *rest, **options) -> int:
    return 2 * NORM_PER_ELEMENT * math.prod(grad_normed)


FORMULAS = {
    "scan": _scan,
    "scan_backward": _scan_backward,
    "conv": _conv,
    "conv_backward": _conv_backward,
    "reduce": _reduce,
    "reduce_backward": _reduce,
    "norm": _norm,
    "norm_backward": _norm_backward,
}


def _register(counter) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.storm_kernels, name))(formula)


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
