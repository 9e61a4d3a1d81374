"""The reference as if its functions were those of a GPU, for the bound of kernels whose approximate
functions err as far as they may.

The PTX manual allows ex2.approx an error of 2^-22.5 of its value and rcp.approx one of 2^-23. SiLU
and softplus are made of both.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EXPONENTIAL = 2**-22.5
ERRORS = {torch.exp: EXPONENTIAL, F.silu: EXPONENTIAL + 2**-23, F.softplus: EXPONENTIAL + 2**-23}


class ApproximateFunctions(TorchFunctionMode):
    """While entered, float32 results of exp, silu and softplus, and their gradients, are off by
    what the manual allows, drawn from ``seed``.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.draw = np.random.default_rng(seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        error = ERRORS.get(function)
        if error is None or found.dtype != torch.float32:
            return found
        return found * torch.from_numpy(1 + error * self.draw.uniform(-1, 1, tuple(found.shape))).float()
