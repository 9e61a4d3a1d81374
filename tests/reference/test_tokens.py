"""TokenGrid and TokenReduction: counts, kept frames and bad arguments."""

import itertools
import re

import numpy as np
import pytest
import torch

from storm_kernels import TemporalProjector, TokenGrid, TokenReduction


@pytest.mark.parametrize(
    ("frames", "k", "s"), list(itertools.product((1, 2, 3, 7, 8, 9, 16), (1, 2, 3, 4, 10), (1, 2, 3)))
)
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


INTEGERS = [np.int64, np.uint8, np.array, torch.tensor]


@pytest.mark.parametrize("integer", INTEGERS)
def test_whatever_python_takes_for_an_index_is_an_integer(integer):
    grid, reduction = TokenGrid(integer(4), integer(2), integer(3)), TokenReduction(integer(2), integer(1), integer(2))
    assert (grid, reduction) == (TokenGrid(4, 2, 3), TokenReduction(2, 1, 2))
    assert {type(side) for record in (grid, reduction) for side in vars(record).values()} == {int}
    assert hash(grid) == hash(TokenGrid(4, 2, 3))
    with pytest.raises(ValueError, match=r"TokenGrid\.frames must be between 1 and \d+, got 0"):
        TokenGrid(integer(0), 1, 1)


@pytest.mark.parametrize(
    "lengths",
    [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4], dtype=torch.int32), [torch.tensor(3), np.int64(4)]],
    ids=repr,
)
def test_lengths_in_every_form(lengths):
    torch.manual_seed(0)
    projector, features = TemporalProjector(8, 16, d_state=4), torch.randn(2, 4, 4, 4, 8)
    assert torch.equal(projector(features, TokenReduction(2), lengths), projector(features, TokenReduction(2), [3, 4]))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3.0, 4], TypeError, r"lengths\[0\] must be an integer, got 3.0 of type float"),
        (np.array([3.0, 4.0]), TypeError, r"lengths\[0\] must be an integer, got 3.0 of type float"),
        (torch.tensor([True, True]), TypeError, r"lengths\[0\] must be an integer, got True of type bool"),
        (torch.tensor(3), TypeError, r"lengths must be a sequence of integers, one a video, got Tensor of shape \(\)"),
        (3, TypeError, r"lengths must be a sequence of integers, one a video, got 3"),
        (torch.tensor([3, 5]), ValueError,
            r"lengths must be between 1 and 4, the frames of the batch, got 5 of type int for lengths\[1\]"),
        (np.array([3]), ValueError, r"lengths must name one number of frames for each of the 2 videos, got 1$"),
    ],
)  # fmt: skip
def test_bad_lengths_are_named(lengths, error, message):
    with pytest.raises(error, match=message):
        TemporalProjector(8, 16, d_state=4)(torch.randn(2, 4, 4, 4, 8), lengths=lengths)


@pytest.mark.parametrize("value", [1.0, "4", None, True, np.float32(2), np.True_])
@pytest.mark.parametrize("field", ["temporal_pool", "spatial_pool", "temporal_stride"])
def test_a_reduction_that_is_no_integer_is_named_with_its_value(field, value):
    with pytest.raises(TypeError, match=re.escape(f"TokenReduction.{field} must be an integer, got {value!r}")):
        TokenReduction(**{field: value})


def test_a_tensor_of_bool_is_no_integer():
    with pytest.raises(
        TypeError, match=r"TokenGrid\.frames must be an integer, got Tensor of shape \(\) and torch.bool"
    ):
        TokenGrid(torch.tensor(True), 1, 1)
