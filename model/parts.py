"""What building any part of a model needs: the same weights from the same seed, on the device and
in the dtype they will stay in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers.initialization import no_init_weights

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: object) -> torch.dtype:
    """``dtype`` if a model can be built in it."""
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS.values()))}, got {dtype!r}")
    return dtype


@contextmanager
def seeded(seed: int, device: torch.device, *, blank: bool = False) -> Iterator[None]:
    """Inside, random numbers follow from ``seed`` and new tensors land on ``device``; outside, the
    caller's random state is as it was.

    ``blank``: modules made inside keep their weights unset. Billions of random numbers that a
    loader overwrites would take minutes on a CPU.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device, no_init_weights() if blank else nullcontext():
        torch.manual_seed(seed)
        yield
