"""TokenGrid and TokenReduction: counts, kept frames and bad arguments."""

import itertools

import pytest

from storm_kernels import TokenGrid, TokenReduction


@pytest.mark.parametrize(("frames", "k", "s"), list(itertools.product((1, 2, 3, 7, 8, 9, 16), (1, 2, 3, 4, 10), (1, 2, 3))))
def test_kept_frames_are_those_that_a_surviving_group_averages(frames, k, s):
    grid, reduction = TokenGrid(frames, 3, 5), TokenReduction(k, 2, s)
    groups = [list(range(start, min(start + k, frames))) for start in range(0, frames, k)][::s]
    assert reduction.kept_frames(grid) == [t for group in groups for t in group]
    assert reduction.kept(grid) == TokenGrid(len(reduction.kept_frames(grid)), 3, 5)
    assert reduction.reduced(grid) == TokenGrid(len(groups), 2, 3)


def test_the_papers_128_frames_keep_an_eighth():
    grid = TokenGrid(128, 16, 16)
    assert grid.tokens == 32768
    assert TokenReduction(4, 1, 2).reduced(grid).tokens == 32768 // 8
    assert TokenReduction(4, 2, 2).reduced(grid).tokens == 32768 // 32


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**18])
@pytest.mark.parametrize("field", ["frames", "height", "width"])
def test_a_side_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"TokenGrid\.{field} must be between 1 and \d+, got {value}"):
        TokenGrid(**{"frames": 1, "height": 1, "width": 1, field: value})


@pytest.mark.parametrize("value", [1.0, "4", None, True])
@pytest.mark.parametrize("field", ["temporal_pool", "spatial_pool", "temporal_stride"])
def test_a_reduction_that_is_no_integer_is_named_with_its_value(field, value):
    with pytest.raises(TypeError, match=rf"TokenReduction\.{field} must be an integer, got {value!r}"):
        TokenReduction(**{field: value})
