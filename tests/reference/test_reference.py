"""The reference against loops over tokens, and the identities of docs/spec.md, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from storm_kernels import Direction, TokenGrid, TokenReduction, reference

from ..support import loops
from ..support.parity_cases import Draw
from ..support.parity_random import conv_cases, fuzz_cases, reduce_cases, scan_cases

QUICK = settings(max_examples=fuzz_cases(60), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
torch_normal = Draw(7).normal


def as_numpy(operands):
    return {name: value.double().numpy() for name, value in operands.items()}


def computed(case):
    """The reference's results of a case in float64, and its operands for the loops."""
    operands = case.operands()
    return case.call(reference, {name: value.double() for name, value in operands.items()}), as_numpy(operands)


def loop_direction(t, suffix):
    B, C = (t[name + suffix] if t[name + suffix].ndim == 4 else t[name + suffix][:, :, None] for name in "BC")
    u, delta, A, D, delta_bias = (t.get(name + suffix) for name in ("u", "delta", "A", "D", "delta_bias"))
    return u, delta, A, B, C, D, delta_bias


@QUICK
@given(scan_cases)
def test_scans_equal_the_loop(case):
    results, t = computed(case)
    bounds = case.bounds(t["u"].shape[1]) if case.packed else None
    options = {"use_softplus": case.softplus, "bounds": bounds}
    if case.direction == "both":
        y = (
            loops.scan(loop_direction(t, ""), **options)[0]
            + loops.scan(loop_direction(t, "_b"), reverse=True, **options)[0]
        )
    else:
        y, state = loops.scan(
            loop_direction(t, ""), reverse=case.direction == "reverse", initial=t.get("initial_state"), **options
        )
        np.testing.assert_allclose(results["final_state"].numpy(), state, rtol=1e-10, atol=1e-10)
    expected = gated_and_reduced(case, y, t.get("z"))
    np.testing.assert_allclose(results["out"].numpy(), expected, rtol=1e-10, atol=1e-10)


def gated_and_reduced(case, y, z):
    """With a gate for the kept frames only, the others do not matter: they are gated with nothing."""
    reduction = case.token_reduction
    if z is not None and z.shape[1] != y.shape[1]:
        full = np.zeros_like(y).reshape(y.shape[0], *case.grid, -1)
        full[:, reduction.kept_frames(case.token_grid)] = z.reshape(y.shape[0], -1, *case.grid[1:], y.shape[2])
        z = full.reshape(y.shape)
    if z is not None:
        y = y * loops.silu(z)
    return y if reduction is None else loops.reduce(y, case.grid, case.reduction)


@QUICK
@given(conv_cases)
def test_convolutions_equal_the_loop(case):
    results, t = computed(case)
    bounds = Draw(case.seed).bounds(case.length) if case.packed else None
    options = {"use_silu": case.silu, "initial": t.get("initial_state"), "bounds": bounds}
    expected = loops.conv(t["x"], t["weight"], t.get("bias"), reverse=case.direction == "reverse", **options)
    np.testing.assert_allclose(results["out"].numpy(), expected, rtol=1e-10, atol=1e-10)
    if case.direction == "both":
        expected = loops.conv(t["x"], t["weight_b"], t.get("bias_b"), reverse=True, **options)
        np.testing.assert_allclose(results["out_b"].numpy(), expected, rtol=1e-10, atol=1e-10)


@QUICK
@given(reduce_cases)
def test_reductions_equal_the_loop(case):
    x = case.operands()["x"].double()
    got = reference.reduce_tokens(x, TokenGrid(*case.grid), TokenReduction(*case.reduction))
    np.testing.assert_allclose(got.numpy(), loops.reduce(x.numpy(), case.grid, case.reduction), rtol=1e-12, atol=1e-12)


def normal(*shape):
    return torch_normal(torch.float64, "dense", *shape)


def direction(batch=2, length=13, channels=4, states=3):
    A = -torch.exp(normal(channels, states))
    return Direction(
        normal(batch, length, channels), normal(batch, length, channels), A, normal(batch, length, states),
        normal(batch, length, states),
        normal(channels), normal(channels),
    )  # fmt: skip


def run(d, **options):
    return reference.selective_scan(
        *d[:6], delta_bias=d.delta_bias, delta_softplus=True, return_final_state=True, **options
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 5, 12, 13])
def test_a_sequence_cut_anywhere_is_the_sequence(cut, reverse):
    """docs/spec.md, the algebra: chunks handed on by their state give the whole."""
    d = direction()
    whole, last = run(d, reverse=reverse)
    parts = [
        d._replace(**{name: getattr(d, name)[:, part] for name in ("u", "delta", "B", "C")})
        for part in (slice(0, cut), slice(cut, None))
    ]
    if reverse:
        second, state = run(parts[1], reverse=True)
        first, state = run(parts[0], reverse=True, initial_state=state)
    else:
        first, state = run(parts[0])
        second, state = run(parts[1], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_reverse_is_the_flipped_scan_of_the_flipped_sequence():
    d = direction()
    flipped = d._replace(**{name: getattr(d, name).flip(1) for name in ("u", "delta", "B", "C")})
    torch.testing.assert_close(run(d, reverse=True)[0], run(flipped)[0].flip(1), rtol=1e-12, atol=1e-12)


def test_gating_each_direction_alone_is_gating_the_sum():
    forward, backward, z = direction(), direction(), normal(2, 13, 4)
    both = reference.bidirectional_selective_scan(forward, backward, z, delta_softplus=True)
    alone = [
        reference.selective_scan(*d[:6], z, d.delta_bias, delta_softplus=True, reverse=reverse)
        for d, reverse in ((forward, False), (backward, True))
    ]
    torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "reduction",
    [TokenReduction(4, 1, 2), TokenReduction(3, 2, 1), TokenReduction(1, 2, 3), TokenReduction(100, 100, 100)],
)
def test_reduction_is_linear_past_out_proj(reduction):
    """reduce(X + y W + b) = reduce(X) + reduce(y) W + b (docs/spec.md, the algebra)."""
    grid = TokenGrid(7, 3, 4)
    x, y, weight, bias = normal(2, grid.tokens, 5), normal(2, grid.tokens, 6), normal(6, 5), normal(5)
    late = reference.reduce_tokens(x + y @ weight + bias, grid, reduction)
    early = reference.reduce_tokens(x, grid, reduction) + reference.reduce_tokens(y, grid, reduction) @ weight + bias
    torch.testing.assert_close(late, early, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduction", [TokenReduction(4, 1, 2), TokenReduction(2, 2, 3)])
def test_dropped_frames_need_no_gate(reduction):
    grid = TokenGrid(9, 2, 3)
    forward, backward = direction(length=grid.tokens), direction(length=grid.tokens)
    z = normal(2, grid.tokens, 4)
    kept = z.unflatten(1, (9, 6))[:, reduction.kept_frames(grid)].flatten(1, 2)
    results = [
        reference.bidirectional_selective_scan(
            forward, backward, gate, delta_softplus=True, grid=grid, reduction=reduction
        )
        for gate in (z, kept)
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("reduction", [TokenReduction(), TokenReduction(2, 2, 2)])
def test_the_projector_gradient(grid, bidirectional, reduction):
    frames, height, width = grid
    projector = reference.ReferenceTemporalProjector(2, 4, bidirectional=bidirectional, d_state=2, expand=1).double()
    features = normal(1, frames, height, width, 2).requires_grad_()
    names, parameters = zip(*projector.named_parameters(), strict=True)

    def forward(features, *values):
        return torch.func.functional_call(projector, dict(zip(names, values, strict=True)), (features, reduction))

    assert torch.autograd.gradcheck(forward, (features, *parameters), fast_mode=True)


@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (4, 6), (27, 27)])
def test_downsampling_is_row_major_in_the_block_and_pads_at_the_end(sides):
    features = normal(2, 3, *sides, 2)
    blocks = reference.projector.downsample(features)
    height, width = -(-sides[0] // 2), -(-sides[1] // 2)
    assert blocks.shape == (2, 3, height, width, 8)
    for i in range(height):
        for j in range(width):
            for position, (di, dj) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                inside = 2 * i + di < sides[0] and 2 * j + dj < sides[1]
                expected = (
                    features[:, :, 2 * i + di, 2 * j + dj] if inside else torch.zeros(2, 3, 2, dtype=torch.float64)
                )
                assert torch.equal(blocks[:, :, i, j, 2 * position : 2 * position + 2], expected)


def test_lengths_give_each_video_what_it_gets_alone():
    projector = reference.ReferenceTemporalProjector(2, 4, layers=2, d_state=3).double()
    features, reduction = normal(3, 5, 4, 4, 2), TokenReduction(2, 2, 2)
    together = projector(features, reduction, lengths=[5, 1, 3])
    for video, frames in enumerate((5, 1, 3)):
        alone = projector(features[video : video + 1, :frames], reduction)
        torch.testing.assert_close(together[video : video + 1, : alone.shape[1]], alone, rtol=1e-12, atol=1e-12)
        assert (together[video, alone.shape[1] :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decays_and_biases_stay_float32(dtype):
    mixer = reference.ReferenceMixer(8).to(dtype)
    kept = {"A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias"}
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == kept
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.float().double()
    assert all(
        p.dtype == torch.float64 and torch.equal(p.float(), before[name].float())
        for name, p in mixer.named_parameters()
        if name in kept
    )
