import os

import pytest
import torch
from hypothesis import Phase, settings

from storm_kernels.backends import dispatch

# For tools/mutants.py: any failure will do, it need not be the smallest.
settings.register_profile("first-failure", phases=[Phase.explicit, Phase.generate])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every uninitialised tensor is full of NaN, so that an unwritten element shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors of most tests are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# How the kernel schedules this process, before any library could change it.
_POLICY = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None


@pytest.fixture(autouse=True)
def same_scheduling():
    """No test leaves a real-time process: such a one that waits actively keeps the others from their cores."""
    yield
    assert _POLICY is None or os.sched_getscheduler(0) == _POLICY, "a library made this process a real-time one"


@pytest.fixture
def gpu():
    """The device whose tensors the CUDA backend takes: a GPU, or the CPU where `make gpu`'s steps
    run in the PTX interpreter.
    """
    device = torch.device(dispatch.load("cuda").own_device())
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU; torch sees none here")
    return device
