"""Random cases at a price that lets thousands run in Triton's interpreter, whose cost is by
operation: by token and by program, hardly by channel.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

from .parity_cases import ConvCase, ReduceCase, ScanCase

# It has to be asked for before triton is imported: then kernels run on CPU tensors, and none is
# compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Every Triton kernel, without the "_kernel" of its name.
KERNELS = {"scan", "backward", "combine", "conv", "conv_backward", "conv_state", "reduce", "spread"}
# Tokens that the programs of a scan walk through, one after another: 20 milliseconds each with
# gradients.
STEPS = 24


def patch_once() -> None:
    """Let a launch patch the language for all functions that it will call. As it is, each call
    between jitted functions patches it anew, which takes half of the time."""
    from types import SimpleNamespace

    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda function: original(everything)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)


def affordable(case: ScanCase | ConvCase | ReduceCase) -> ScanCase | ConvCase | ReduceCase:
    """``case``; a scan with fewer tokens where its programs would take more than `STEPS` steps, but
    not under four. Other kernels take tiles.
    """
    if not isinstance(case, ScanCase):
        return case
    directions = 2 if case.direction == "both" else 1
    programs = directions * case.groups * math.ceil(case.channels_per_group / 32) * (1 if case.packed else case.batch)
    tokens = max(4, STEPS // programs)
    grid = list(case.grid)
    while math.prod(grid) > tokens:
        # half of the cases keep many frames, half keep large ones
        largest = 0 if case.seed % 2 and grid[0] > 1 else grid.index(max(grid))
        grid[largest] -= 1
    return replace(case, length=min(case.length, tokens), grid=tuple(grid))
