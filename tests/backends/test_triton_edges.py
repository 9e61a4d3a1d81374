"""Triton's kernels in the interpreter, where few random cases come: enormous decays,
sequences that meet, the most states.
"""

import pytest

from storm_kernels import why_not

from ..support.extremes import check_enormous_decays
from ..support.parity import check
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest

REASON = why_not("conv", "triton", device="cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the interpreter was not asked for: {REASON}")


def test_decays_at_the_end_of_float32():
    check_enormous_decays("triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_convolution_with_initial_states_and_neighbours(direction, packed):
    check(simplest(ConvCase, seed=3, length=9, direction=direction, packed=packed, initial=True, bias=True), "triton")


def test_the_most_states_that_it_takes():
    assert why_not("scan", "triton", device="cpu", d_state=257)
    check(simplest(ScanCase, length=3, states=256, direction="both", z="all", D=True, bias=True, batch=1), "triton")


def test_reduction_of_partial_groups():
    check(simplest(ReduceCase, grid=(7, 3, 5), reduction=(2, 2, 2)), "triton")
