"""Starting kernels: on the tensors' device and current stream, or only noting what would be started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .configs import Config


class Launch(NamedTuple):
    """One kernel with its arguments, as `launch` would start it."""

    kernel: object
    args: tuple
    options: dict
    programs: int


_recording: list[Launch] | None = None


def launch(kernel, programs: int, config: Config, device: torch.device, *args, **constants) -> None:
    """Start ``programs`` programs of ``kernel``, all on the grid's x axis: y and z stop at 65,535."""
    options = {**constants, **config.options()}
    if _recording is not None:
        _recording.append(Launch(kernel, args, options, programs))
    elif programs > 0:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            kernel[(programs,)](*args, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it nothing is started; the list holds what would have been. Tensors may be on the meta device."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before
