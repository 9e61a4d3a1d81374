"""What the launchers of CUDA's kernels without a GPU have in common."""

from __future__ import annotations

from collections.abc import Mapping


class StandIn:
    """A `Launcher` (storm_kernels.backends.cuda.launcher) but for `launch`; CPU tensors are its own.

    Its figures are an H100's if not given: bytes of ``shared`` memory that a block can have,
    ``multiprocessors``, and ``resident`` blocks on each of these, whatever the kernel.
    """

    device_type = "cpu"

    def __init__(self, shared: int = 227 * 1024, multiprocessors: int = 132, resident: int = 2):
        self._shared, self._multiprocessors, self._resident = shared, multiprocessors, resident

    def why_not(self) -> None:
        return None

    def shared_limit(self) -> int:
        return self._shared

    def multiprocessors(self) -> int:
        return self._multiprocessors

    def resident(self, name: str, kernel: str, defines: Mapping[str, object], shared: int) -> int:
        return self._resident
