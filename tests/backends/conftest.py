"""The CUDA kernels on a CPU, for every test of them."""

import pytest

from storm_kernels.backends.cuda import launcher

from ..support.cuda_on_cpu import OnCpu


@pytest.fixture(scope="module")
def on_cpu():
    """Runs the launches of a module's tests by tests/support/cuda_on_cpu, and lists them."""
    with launcher.using(OnCpu()) as runs:
        yield runs
