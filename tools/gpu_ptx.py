"""The PTX interpreter as the device of `make gpu`'s steps: kernels take CPU tensors, and rows say what ran them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

NAME = "PTX interpreter in place of an NVIDIA H100 (its times say nothing of a GPU)"


@contextlib.contextmanager
def kernels_on(device: str, backend: str) -> Iterator[None]:
    """Within it ``backend`` runs: on the GPU, or in the PTX interpreter."""
    if device == "cuda":
        yield
    elif backend == "cuda":
        from storm_kernels.backends.cuda import launcher
        from tests.support.ptx_on_cpu import OnPtx

        with launcher.using(OnPtx()):
            yield
    else:
        from tests.support.ptx_on_cpu.triton import triton_on_ptx

        with triton_on_ptx():
            yield


@contextlib.contextmanager
def in_place_of_a_gpu() -> Iterator[None]:
    """Within it CPU tensors are served as a GPU's are, by both backends; benchmarks have the preset
    "tiny" and take one round.
    """
    from storm_benchmarks import environment, harness
    from storm_model import presets

    from storm_kernels.backends import dispatch
    from tests.support.tiny_model import TINY

    in_rounds = harness.time_rounds

    def in_one_round(contenders, device, **options):
        return in_rounds(contenders, device, **options | {"rounds": 1})

    with contextlib.ExitStack() as stack:
        for backend in ("cuda", "triton"):
            stack.enter_context(kernels_on("ptx", backend))
        stack.enter_context(mock.patch.dict(dispatch.ORDER, cpu=dispatch.ORDER["cuda"]))
        stack.enter_context(mock.patch.dict(presets.PRESETS, tiny=TINY))
        stack.enter_context(mock.patch.object(environment, "device_name", lambda device: NAME))
        stack.enter_context(mock.patch.object(harness, "time_rounds", in_one_round))
        yield
