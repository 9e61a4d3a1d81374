"""Every backend that can run here against the reference, on random cases (docs/reliability.md, R1 and R2)."""

import pytest
from hypothesis import HealthCheck, given, settings

import storm_kernels as sk

from ..support.interpreted import INTERPRETED, affordable, patch_once
from ..support.parity import check
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest
from ..support.parity_random import CASES, fuzz_cases

if INTERPRETED:
    patch_once()
# Per run: 2,000 on the CPU, 300 interpreted; with TRITON_INTERPRET=1 this file is about nothing
# else.
DEFAULT_CASES = {
    "torch": dict.fromkeys(CASES, 40),
    "cpu": {"scan": 700, "conv": 700, "reduce": 600},
    "triton": {"scan": 100, "conv": 80, "reduce": 70},
}


def backends() -> list:
    names = ("triton",) if INTERPRETED else ("torch", "cpu")
    found = []
    for name in names:
        for op in CASES:
            reason = sk.why_not(op, name, device="cpu")
            marks = [pytest.mark.skip(reason=f"{name} cannot run {op} here: {reason}")] if reason else []
            found.append(pytest.param(name, op, marks=marks, id=f"{name}-{op}"))
    return found


@pytest.mark.parametrize(("backend", "op"), backends())
def test_random_cases_keep_the_bound(backend, op):
    limits = settings(
        max_examples=fuzz_cases(DEFAULT_CASES[backend][op]),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )

    @limits
    @given(CASES[op].map(affordable) if INTERPRETED else CASES[op])
    def run(case):
        check(case, backend)

    run()


# Long and wide enough that every chunk and every channel has an rms error worth the name.
LONG = {
    "batch": 2,
    "length": 150,
    "grid": (19, 4, 4),
    "channels_per_group": 40,
    "channels": 40,
    "states": 16,
    "D": True,
    "z": "all",
    "bias": True,
}
LONG_CASES = {
    "scan": simplest(ScanCase, direction="both", **LONG),
    "scan reduced": simplest(ScanCase, direction="both", reduction=(2, 1, 1), **LONG),
    "scan in half precision": simplest(
        ScanCase, direction="both", dtype="bfloat16", dtype_delta="bfloat16", dtype_state="bfloat16", **LONG
    ),
    "conv": simplest(ConvCase, direction="both", **LONG),
    "reduce": simplest(ReduceCase, reduction=(2, 1, 1), **LONG),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take many minutes")
@pytest.mark.parametrize(("backend", "op"), backends())
def test_long_cases_keep_the_bound_in_every_chunk_and_channel(backend, op):
    for name, case in LONG_CASES.items():
        if name.startswith(op):
            check(case, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_random_cases_keep_the_bound_on_a_gpu(backend, op, gpu):
    reason = sk.why_not(op, backend, device=gpu)
    if reason:
        pytest.skip(f"{backend} cannot run {op}: {reason}")
    cases = CASES[op].map(affordable) if gpu.type == "cpu" else CASES[op]

    @settings(max_examples=fuzz_cases(500), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def run(case):
        check(case, backend, device=gpu.type)

    run()
