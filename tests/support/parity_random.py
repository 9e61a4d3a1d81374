"""How random cases of every operation are drawn, and how many (docs/reliability.md, R1)."""

from __future__ import annotations

import os

from hypothesis import strategies as st

from .parity_cases import DTYPES, LAYOUTS, ConvCase, ReduceCase, ScanCase

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 63, 64, 65, 67)

dtypes = st.sampled_from(sorted(DTYPES))
layouts = st.sampled_from(("dense", *LAYOUTS))
seeds = st.integers(0, 2**31 - 1)


def fuzz_cases(default: int) -> int:
    """How many random cases a test draws: STORM_KERNELS_FUZZ times ``default``."""
    return max(1, int(default * float(os.environ.get("STORM_KERNELS_FUZZ", "1"))))


directions = st.sampled_from(("forward", "reverse", "both", "both"))
reductions = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
grids = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))

scan_cases = st.builds(
    ScanCase,
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    grid=grids,
    channels_per_group=st.sampled_from((1, 2, 3, 5, 8, 16, 17, 33)),
    groups=st.sampled_from((1, 1, 1, 2, 3)),
    states=st.sampled_from((16, 16, 16, 1, 2, 5, 8, 32)),
    direction=directions,
    dtype=dtypes,
    dtype_delta=dtypes,
    dtype_state=dtypes,
    layout=layouts,
    layout_state=layouts,
    softplus=st.booleans(),
    D=st.booleans(),
    z=st.sampled_from(("none", "all", "kept")),
    bias=st.booleans(),
    initial=st.booleans(),
    packed=st.sampled_from((False, False, True)),
    reduction=st.one_of(st.just((1, 1, 1)), reductions, reductions),
)
conv_cases = st.builds(
    ConvCase,
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from((1, 3, 8, 16, 17, 40)),
    width=st.sampled_from((4, 4, 4, 1, 2, 3)),
    direction=directions,
    dtype=dtypes,
    layout=layouts,
    silu=st.booleans(),
    bias=st.booleans(),
    initial=st.booleans(),
    packed=st.sampled_from((False, False, True)),
)
reduce_cases = st.builds(
    ReduceCase,
    seed=seeds,
    batch=st.integers(1, 3),
    grid=grids,
    channels=st.sampled_from((1, 3, 8, 17, 64)),
    dtype=dtypes,
    layout=layouts,
    reduction=reductions,
)
CASES = {"scan": scan_cases, "conv": conv_cases, "reduce": reduce_cases}
