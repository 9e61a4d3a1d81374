"""Runs the Triton backend on CPU tensors: its launches compiled for a GPU that need not be there, and interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.compiler import compile

import storm_kernels.backends.triton as backend
from storm_kernels.backends.triton import launch as starting
from storm_kernels.backends.triton.launch import Launch
from tools import kernel_mix

from .machine import WARP, Machine, Options
from .memory import Global
from .parser import Kernel, parse
from .shared import Shared

_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
_kernels: dict[tuple, tuple[Kernel, int]] = {}


class TritonOnPtx:
    """What stands in for the list of recorded launches: each is compiled for ``target`` ("sm_90")
    and interpreted as it comes.

    ``edit`` changes the PTX before it is read; ``watch`` is called with each `Machine` before it
    runs.
    """

    def __init__(
        self, target: str, options: Options, edit: Callable[[str], str] | None, watch: Callable[[Machine], None] | None
    ):
        self.target, self.options, self.edit, self.watch = target, options, edit, watch
        self.launched: set[str] = set()

    def append(self, launch: Launch) -> None:
        if launch.programs == 0:
            return
        self.launched.add(launch.kernel.__name__)
        source = kernel_mix.source(launch)
        kernel, shared = self._compiled(launch, source)
        memory = Global()
        values = _leaves(launch, source, memory)
        memory.fill()
        program = Machine(
            kernel,
            kernel.threads,
            launch.programs,
            _parameters(kernel, values),
            memory,
            Shared(kernel, shared),
            self.options,
        )
        if self.watch:
            self.watch(program)
        program.run()
        memory.take_back()

    def _compiled(self, launch: Launch, source) -> tuple[Kernel, int]:
        options = {key: value for key, value in launch.options.items() if key in _OPTIONS}
        key = (source.hash(), self.target, *sorted(options.items()), self.edit)
        if key not in _kernels:
            compiled = compile(source, target=kernel_mix.TARGETS[self.target], options=options)
            text = compiled.asm["ptx"]
            kernel = parse(self.edit(text) if self.edit else text, compiled.metadata.name)
            assert kernel.threads == WARP * compiled.metadata.num_warps
            _kernels[key] = kernel, compiled.metadata.shared
        return _kernels[key]


def _leaves(launch: Launch, source, memory: Global) -> list[int | float]:
    """The values that the kernel is given, tensors as their addresses: the arguments that are no
    constants, tuples opened.
    """
    kernel, found = launch.kernel, []
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.options

    def visit(kind, value, name: str) -> None:
        if isinstance(kind, tuple):
            for i, (one, item) in enumerate(zip(kind, value, strict=True)):
                visit(one, item, f"{name}[{i}]")
        elif kind != "constexpr":
            found.append(memory.put(name, value, True) if isinstance(value, torch.Tensor) else value)

    for name, kind in source.signature.items():
        visit(kind, values[name], name)
    return found


def _parameters(kernel: Kernel, values: list[int | float]) -> np.ndarray:
    """Laid out as the PTX declares them; the two after ours are scratch memory that these kernels do not have."""
    places = list(kernel.parameters.values())
    assert len(places) == len(values) + 2, f"{kernel.name} has {len(places)} parameters for {len(values)} values"
    data = np.zeros(kernel.parameter_bytes, np.uint8)
    for (offset, size), value in zip(places, values, strict=False):
        number = np.float32(value) if isinstance(value, float) else np.array(value & (1 << 8 * size) - 1, f"u{size}")
        data[offset : offset + size] = np.frombuffer(number.tobytes(), np.uint8)
    return data


@contextmanager
def triton_on_ptx(
    target: str = "sm_90", options: Options | None = None, *, edit=None, watch=None
) -> Iterator[TritonOnPtx]:
    """Within it, backend "triton" takes CPU tensors and runs `TritonOnPtx`."""
    runner = TritonOnPtx(target, options or Options(), edit, watch)
    before, interpreted = starting._recording, backend.INTERPRETED
    starting._recording, backend.INTERPRETED = runner, True
    try:
        yield runner
    finally:
        starting._recording, backend.INTERPRETED = before, interpreted
