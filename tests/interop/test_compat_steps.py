"""Other projects' convolutions and decoding steps on our kernels: values, states and every gradient
against plain loops.
"""

import pytest
import torch

from storm_kernels.interop import causal_conv1d as conv
from storm_kernels.interop import mamba_ssm

from ..support.original_mixers import conv_loop, scan_loop
from .test_compat_functions import agree, b, d, decay, draw, length, n, w


def update_loop(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    y, after = scan_loop(
        *(t[..., None] for t in (x, dt)), A, B[..., None], C[..., None], D, z[..., None], dt_bias, dt_softplus, state
    )
    return y[..., 0]


def update_operands():
    return {
        "state": draw(b, d, n), "x": draw(b, d), "dt": draw(b, d, seed=1), "A": decay(), "B": draw(b, n),
        "C": draw(b, n, seed=1), "D": draw(d),
        "z": draw(b, d, seed=2), "dt_bias": draw(d, seed=3),
    }  # fmt: skip


def test_selective_state_update_values_and_gradients():
    agree(mamba_ssm.selective_state_update, update_loop, update_operands(), dt_softplus=True)


def test_selective_state_update_writes_the_state():
    t = update_operands()
    expected = scan_loop(
        t["x"][..., None], t["dt"][..., None], t["A"], t["B"][..., None], t["C"][..., None], state=t["state"]
    )[1]
    mamba_ssm.selective_state_update(t["state"], t["x"], t["dt"], t["A"], t["B"], t["C"])
    torch.testing.assert_close(t["state"], expected)


def test_selective_state_update_with_heads_groups_and_rows():
    heads, groups = 4, 2
    state, x, dt = draw(5, heads, d, n), draw(b, heads, d), draw(b, heads, d, seed=1)
    A, B, C = -draw(heads, d, n).exp(), draw(b, groups, n), draw(b, groups, n, seed=1)
    rows = torch.tensor([3, 1])
    before = state.clone()
    out = mamba_ssm.selective_state_update(state, x, dt, A, B, C, dt_softplus=True, state_batch_indices=rows)
    for i, row in enumerate(rows):
        for h in range(heads):
            g = h // (heads // groups)
            y, after = scan_loop(
                x[i : i + 1, h, :, None], dt[i : i + 1, h, :, None], A[h], B[i : i + 1, g, :, None],
                C[i : i + 1, g, :, None],
                delta_softplus=True, state=before[row : row + 1, h],
            )  # fmt: skip
            torch.testing.assert_close(out[i, h], y[0, :, 0])
            torch.testing.assert_close(state[row, h], after[0])
    untouched = [i for i in range(5) if i not in rows.tolist()]
    assert torch.equal(state[untouched], before[untouched])


def conv_operands(**more):
    return {"x": draw(b, d, length), "weight": draw(d, w), "bias": draw(d)} | more


def conv_with_states(x, weight, bias, initial_states, return_final_states):
    return conv_loop(x, weight, bias, None, initial_states), torch.cat([initial_states, x], -1)[..., -(w - 1) :]


def test_causal_conv1d_fn():
    agree(
        conv.causal_conv1d_fn,
        lambda activation, **t: conv_loop(**t, activation=activation),
        conv_operands(),
        activation="silu",
    )
    operands = conv_operands(initial_states=draw(b, d, w - 1))
    agree(conv.causal_conv1d_fn, conv_with_states, operands, return_final_states=True)
    operands["x"] = draw(b, d, 2)  # shorter than the filter
    agree(conv.causal_conv1d_fn, conv_with_states, operands, return_final_states=True)


def test_causal_conv1d_old_callers_pass_activation_fourth():
    t = conv_operands()
    torch.testing.assert_close(
        conv.causal_conv1d_fn(t["x"], t["weight"], t["bias"], "silu"), conv_loop(**t, activation="silu")
    )


def test_causal_conv1d_final_states_out():
    t, out = conv_operands(), torch.empty(b, d, w - 1)
    _, states = conv.causal_conv1d_fn(**t, return_final_states=True, final_states_out=out)
    assert states.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, t["x"][..., -(w - 1) :])


def test_causal_conv1d_seq_idx_keeps_sequences_apart():
    t = conv_operands()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, -1, -1]], dtype=torch.int32)
    out = conv.causal_conv1d_fn(**t, seq_idx=seq_idx, activation="silu")
    expected = torch.zeros_like(out)
    for row, bounds in ((0, (0, 3, 7)), (1, (0, 1, 3, 5))):
        for start, end in zip(bounds, bounds[1:], strict=False):
            part = t["x"][row : row + 1, :, start:end]
            expected[row, :, start:end] = conv_loop(part, t["weight"], t["bias"], "silu")[0]
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="seq_idx cannot be combined"):
        conv.causal_conv1d_fn(**t, seq_idx=seq_idx, return_final_states=True)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_causal_conv1d_update(tokens):
    whole, state = draw(b, d, 6 + tokens), torch.zeros(b, d, w + 1)
    state.copy_(whole[..., 6 - (w + 1) : 6])
    weight, bias = draw(d, w), draw(d)
    out = conv.causal_conv1d_update(whole[..., 6:], state, weight, bias, "silu")
    torch.testing.assert_close(out, conv_loop(whole, weight, bias, "silu")[..., 6:])
    torch.testing.assert_close(state, whole[..., -(w + 1) :])


def test_causal_conv1d_update_of_one_token_and_chosen_rows():
    whole, weight = draw(b, d, 7), draw(d, w)
    states = torch.zeros(4, d, w)
    rows = torch.tensor([2, 0])
    for t in range(7):
        out = conv.causal_conv1d_update(whole[..., t], states, weight, conv_state_indices=rows)
        torch.testing.assert_close(out, conv_loop(whole, weight)[..., t])
    torch.testing.assert_close(states[rows], whole[..., -w:])
    assert not states[[1, 3]].any()


@pytest.mark.parametrize("capacity", [3, 5])
def test_causal_conv1d_update_ring_buffer(capacity):
    whole, weight, ring = draw(b, d, 12), draw(d, w), torch.zeros(b, d, capacity)
    expected, at = conv_loop(whole, weight), 0
    for tokens in (1, 2, 1, 7, 1):
        out = conv.causal_conv1d_update(
            whole[..., at : at + tokens], ring, weight, cache_seqlens=torch.full((b,), at, dtype=torch.int32)
        )
        torch.testing.assert_close(out, expected[..., at : at + tokens])
        at += tokens


def test_causal_conv1d_update_gradients():
    operands = {"x": draw(b, d, 2), "conv_state": draw(b, d, w), "weight": draw(d, w), "bias": draw(d)}
    agree(
        conv.causal_conv1d_update,
        lambda x, conv_state, weight, bias: conv_loop(x, weight, bias, None, conv_state[..., 1:]),
        operands,
    )
