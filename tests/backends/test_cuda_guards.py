"""ptxas leaves no access to memory without the condition that guards it in the PTX."""

import pytest
import torch

from storm_kernels.backends.cuda import source

from ..support.ptx_on_cpu import compile_both
from ..support.ptx_on_cpu.guards import of_cubin, of_ptx, unconditional, unguarded
from .test_cuda_code import FORMATS, TARGETS, forward_of, variants

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings and nvidia-cuda-nvrtc to compile")


def check(asked: dict, arch: str) -> None:
    for name, kernel, defines in asked:
        ptx, cubin = compile_both(name, dict(defines), arch)
        places, compiled = unconditional(of_ptx(ptx, kernel))[1], unconditional(of_cubin(cubin, kernel))[1]
        assert len(places & compiled) >= 0.75 * len(places), (
            f"{kernel}: the places of the PTX are not found again in the machine code"
        )
        assert not unguarded(ptx, cubin, kernel), kernel


def test_a_guard_that_is_missing_in_the_machine_code_is_seen(monkeypatch):
    """The PTX of the scan as it is, the machine code of one in which threads without a quad prepare a tile."""
    (((name, kernel, defines), _),) = forward_of(32, FORMATS["float32"], False).items()
    ptx, sound = compile_both(name, dict(defines), "sm_90")
    assert not unguarded(ptx, sound, kernel)
    text = source.text(name)
    assert text.count("if (!at.idle()) {") == 1
    monkeypatch.setattr(source, "text", lambda _: text.replace("if (!at.idle()) {", "{"))
    _, faulty = compile_both(name, dict(defines), "sm_90")
    found = unguarded(ptx, faulty, kernel)
    assert found and all("LDS" in one or "STS" in one for one in found)


@pytest.mark.ptx
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("reduction", [False, True])
def test_a_mixer(reduction, arch):
    check(variants(torch.bfloat16, reduction), arch)


@pytest.mark.ptx
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("states", [1, 17, 200])
def test_scans_of_few_and_many_states(states, reduction):
    check(forward_of(states, FORMATS["mixed"], reduction), "sm_90")
