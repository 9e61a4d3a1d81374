"""Every backend that can run here against the reference, on random cases (RELIABILITY.md, R1 and R2)."""

import os

import pytest
from hypothesis import HealthCheck, given, settings

import storm_kernels as sk

from .parity import CASES, check, fuzz_cases

# Triton's interpreter has to be asked for before triton is imported: then this file is about nothing else.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEFAULT_CASES = {"torch": 40, "cpu": 500, "triton": 75}


def backends() -> list:
    names = ("triton",) if INTERPRETED else ("torch", "cpu")
    found = []
    for name in names:
        for op in CASES:
            reason = sk.why_not(op, name)
            marks = [pytest.mark.skip(reason=f"{name} cannot run {op} here: {reason}")] if reason else []
            found.append(pytest.param(name, op, marks=marks, id=f"{name}-{op}"))
    return found


@pytest.mark.parametrize(("backend", "op"), backends())
def test_random_cases_keep_the_bound(backend, op):
    limits = settings(max_examples=fuzz_cases(DEFAULT_CASES[backend]), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

    @limits
    @given(CASES[op])
    def run(case):
        check(case, backend)

    run()


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_random_cases_keep_the_bound_on_a_gpu(backend, op, gpu):
    reason = sk.why_not(op, backend, device="cuda")
    if reason:
        pytest.skip(f"{backend} cannot run {op}: {reason}")

    @settings(max_examples=fuzz_cases(500), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(CASES[op])
    def run(case):
        check(case, backend, device="cuda")

    run()
