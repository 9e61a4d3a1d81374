"""What the originals promise beside values: padding slots, memory layout, packed indices that come
back, both generations of the norms.
"""

import pytest
import torch
import torch.nn.functional as F

from storm_kernels.interop import causal_conv1d as conv
from storm_kernels.interop import mamba_ssm, norms, vim, vmamba

from ..support.original_mixers import conv_loop, scan_loop

b, d, n, length, w = 3, 6, 3, 7, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("slots", [[1, -1, 0], [-1, 3, -5], [-1, -1, -1], [0, 1, 2]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_negative_slot_is_padding_for_the_convolution(slots, dtype):
    """causal-conv1d pull request 78: such a row is skipped, its result is zero, no state is touched."""
    states, x, weight = draw(4, d, w), draw(b, d, 2), draw(d, w)
    before = states.clone()
    out = conv.causal_conv1d_update(
        x, states, weight, activation="silu", conv_state_indices=torch.tensor(slots, dtype=dtype)
    )
    for i, slot in enumerate(slots):
        if slot < 0:
            assert not out[i].any()
            continue
        torch.testing.assert_close(
            out[i : i + 1], conv_loop(x[i : i + 1], weight, None, "silu", before[slot : slot + 1, :, 1:])
        )
        torch.testing.assert_close(states[slot], torch.cat([before[slot], x[i]], -1)[:, -w:])
    untouched = [row for row in range(4) if row not in slots]
    assert torch.equal(states[untouched], before[untouched])


@pytest.mark.parametrize("slots", [[1, -1, 0], [-1, 3, -5], [-1, -1, -1]])
def test_a_negative_slot_is_padding_for_the_state_update(slots):
    states, x, dt, A, B, C = (
        draw(4, d, n),
        draw(b, d),
        draw(b, d, seed=1),
        -draw(d, n).exp(),
        draw(b, n),
        draw(b, n, seed=1),
    )
    before = states.clone()
    out = mamba_ssm.selective_state_update(
        states, x, dt, A, B, C, dt_softplus=True, state_batch_indices=torch.tensor(slots, dtype=torch.int32)
    )
    for i, slot in enumerate(slots):
        if slot < 0:
            assert not out[i].any()
            continue
        one = [t[i : i + 1, :, None] for t in (x, dt, B, C)]
        y, after = scan_loop(one[0], one[1], A, one[2], one[3], delta_softplus=True, state=before[slot : slot + 1])
        torch.testing.assert_close(out[i], y[0, :, 0])
        torch.testing.assert_close(states[slot], after[0])
    untouched = [row for row in range(4) if row not in slots]
    assert torch.equal(states[untouched], before[untouched])


def test_gradients_of_padding_are_zero():
    states, x, weight = draw(4, d, w), draw(b, d).requires_grad_(), draw(d, w)
    conv.causal_conv1d_update(x, states, weight, conv_state_indices=torch.tensor([2, -1, 0])).sum().backward()
    assert not x.grad[1].any() and x.grad[0].any()


def seq_idx_loop(x, weight, bias, seq_idx):
    """Token by token and tap by tap: a token meets those within the taps that have its index."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[2]):
            if seq_idx[row, t] < 0:
                continue
            total = bias.clone()
            for k in range(min(w, t + 1)):
                if seq_idx[row, t - k] == seq_idx[row, t]:
                    total = total + weight[:, w - 1 - k] * x[row, :, t - k]
            out[row, :, t] = F.silu(total)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 0, 1, 0, 2, 2], [0, 0, 1, 0, 0, -1, 0]],
        [[0, 0, 1, 1, 1, 1, 0], [3, 3, 3, 3, 2, 2, 2]],
        [[5, 1, 1, 5, 1, 1, 5], [-1, 0, -1, 0, 0, 0, 0]],
    ],
)
def test_seq_idx_that_comes_back(rows, dtype):
    x, weight, bias = draw(2, d, length).to(dtype), draw(d, w).to(dtype), draw(d).to(dtype)
    seq_idx = torch.tensor(rows, dtype=torch.int32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    found = conv.causal_conv1d_fn(*leaves, seq_idx=seq_idx, activation="silu")
    truth = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = seq_idx_loop(*truth, seq_idx)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    signal = draw(2, d, length, seed=3)
    grads = torch.autograd.grad((found * signal).sum(), leaves)
    for mine, right in zip(grads, torch.autograd.grad((expected * signal).sum(), truth), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-5)


def as_the_originals(batch=2, channels=d):
    """Operands (b, d, l) with the length innermost in memory, and the same with the channels innermost."""
    x = draw(batch, channels, length)
    return x, x.transpose(1, 2).contiguous().transpose(1, 2)


def test_results_lie_in_memory_as_the_inputs_do():
    weight, A = draw(d, w), -draw(d, n).exp()
    B, C = draw(2, n, length), draw(2, n, length, seed=1)
    K_B = draw(2, 1, n, length)
    for x, contiguous in zip(as_the_originals(), (True, False), strict=True):
        results = [
            conv.causal_conv1d_fn(x, weight),
            conv.causal_conv1d_fn(x, weight, activation="silu", return_final_states=True)[0],
            conv.causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, length, dtype=torch.int32)),
            conv.causal_conv1d_update(x, draw(2, d, w), weight),
            mamba_ssm.selective_scan_fn(x, x, A, B, C, z=x, delta_softplus=True),
            mamba_ssm.selective_scan_fn(x, x, A, B, C, return_last_state=True)[0],
            vmamba.selective_scan_fn(x, x, A, K_B, K_B),
        ]
        for i, result in enumerate(results):
            assert result.is_contiguous() == contiguous, i
            assert contiguous or result.transpose(1, 2).is_contiguous(), i
    xz = draw(2, 2 * d, length)
    out = vim.mamba_inner_fn_no_out_proj(xz, draw(d, 1, w), None, draw(2 + 2 * n, d), draw(d, 2), A)
    assert out.is_contiguous()
    half, _ = xz.chunk(2, 1)  # not contiguous as a whole, but the originals' result is
    assert conv.causal_conv1d_fn(half, weight).is_contiguous()


def test_varlen_states():
    x, bounds = draw(9, d), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    states = conv.causal_conv1d_varlen_states(x, bounds, 3)
    expected = torch.zeros(3, d, 3)
    expected[0, :, 1:], expected[2] = x[:2].T, x[6:].T
    assert torch.equal(states, expected)


def plain_norm(x, weight, bias, is_rms):
    x = x.double()
    centred = x if is_rms else x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-3) * weight + bias


@pytest.mark.parametrize("is_rms", [False, True])
def test_both_orders_of_the_norms_arguments(is_rms):
    """mamba_ssm 1.x and 2.x put different things after the residual; read wrongly, eps becomes x1
    or a switch becomes eps, in silence.
    """
    x, residual, weight, bias = draw(2, 5, 8), draw(2, 5, 8, seed=1), draw(8), draw(8, seed=1)
    expected = plain_norm(x + residual, weight, bias, is_rms)
    name = norms.rms_norm_fn if is_rms else norms.layer_norm_fn
    calls = [
        name(x, weight, bias, residual, None, None, None, 1e-3, 0.0, None, True, True),
        name(x, weight, bias, residual, prenorm=True, residual_in_fp32=True, eps=1e-3),
        norms.layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, is_rms),
        norms.layer_norm_fn(x, weight, bias, residual, 1e-3, prenorm=True, is_rms_norm=is_rms),
        norms.layer_norm_fn(x, weight, bias, residual, None, None, None, 1e-3, 0.0, None, True, False, is_rms),
    ]
    if is_rms:
        calls += [
            name(x, weight, bias, residual, True, True, 1e-3),
            name(x, weight, bias, residual, True, False, eps=1e-3),
        ]
    for normed, total in calls:
        torch.testing.assert_close(normed.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(total, x + residual)
    assert norms.rms_norm_fn(x, weight, bias, residual, False).shape == x.shape


@pytest.mark.parametrize("is_rms", [False, True])
def test_two_norms_of_one_sum(is_rms):
    x, x1, residual = (draw(2, 5, 8, seed=i).requires_grad_() for i in range(3))
    weight, bias, weight1, bias1 = (draw(8, seed=i).requires_grad_() for i in range(4))
    results = norms.layer_norm_fn(x, weight, bias, residual, x1, weight1, bias1, 1e-3, prenorm=True, is_rms_norm=is_rms)
    total = x + x1 + residual
    expected = plain_norm(total, weight, bias, is_rms), plain_norm(total, weight1, bias1, is_rms), total
    for found, right in zip(results, expected, strict=True):
        torch.testing.assert_close(found.double(), right.double(), atol=1e-5, rtol=1e-5)
    leaves = [x, x1, residual, weight, bias, weight1, bias1]
    for found, right in zip(
        *(torch.autograd.grad(sum(r.sum() for r in rs), leaves) for rs in (results, expected)), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def test_dropout_and_rowscale_of_the_norms():
    torch.manual_seed(0)
    x, residual, weight, scale = draw(40, 64), draw(40, 64, seed=1), draw(64), draw(40)
    normed, total, kept, kept1 = norms.layer_norm_fn(
        x, weight, None, residual, eps=1e-3, dropout_p=0.25, rowscale=scale, prenorm=True, return_dropout_mask=True
    )
    assert kept1 is None and 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(total, torch.where(kept, x * scale[:, None] / 0.75, 0) + residual)
    torch.testing.assert_close(normed.double(), plain_norm(total, weight, 0, False), atol=1e-5, rtol=1e-5)
    same = norms.layer_norm_ref(
        x, weight, None, residual, eps=1e-3, dropout_p=0.25, rowscale=scale, prenorm=True, dropout_mask=kept
    )
    torch.testing.assert_close(same, (normed, total))
    assert norms.rms_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)
    with pytest.raises(ValueError, match="rowscale cannot be combined with x1"):
        norms.layer_norm_fn(x, weight, None, x1=x, rowscale=scale)
    with pytest.raises(ValueError, match=r"rowscale must be \(40,\) for x \(40, 64\), got shape \(64,\)"):
        norms.layer_norm_fn(x, weight, None, rowscale=weight)
    with pytest.raises(TypeError, match="weight1 must be a tensor or None, got True"):
        norms.layer_norm_fn(x, weight, None, None, None, True)


def test_references_of_the_norms():
    x, residual, weight, bias = draw(4, 8).bfloat16(), draw(4, 8, seed=1), draw(8), draw(8, seed=1)
    for ref, is_rms in ((norms.layer_norm_ref, False), (norms.rms_norm_ref, True)):
        normed, total = ref(x, weight, bias, residual, eps=1e-3, prenorm=True)
        assert normed.dtype == total.dtype == torch.bfloat16
        assert (
            ref(x, weight, bias, residual, 1e-3, True, True)[1].dtype == torch.float32
        )  # upcast, as version 1.x has it
        expected = plain_norm(x.double() + residual, weight, bias, is_rms)
        torch.testing.assert_close(ref(x, weight, bias, residual, eps=1e-3).double(), expected, atol=4e-2, rtol=1e-2)


def test_rms_norm_module():
    """Constructed as version 2.x has it and as version 1.x did; mamba_ssm issue 44: forward takes
    the residual's switches.
    """
    assert mamba_ssm.RMSNorm(8, 1e-3, 0.1, "cpu", torch.bfloat16).weight.dtype == torch.bfloat16
    assert mamba_ssm.RMSNorm(8, 1e-3, "cpu", torch.bfloat16).weight.dtype == torch.bfloat16
    norm, x = mamba_ssm.RMSNorm(8, eps=1e-3, dropout_p=0.5), draw(30, 8)
    normed, total = norm(x, x, prenorm=True, residual_in_fp32=True)
    assert not torch.equal(total, 2 * x)
    normed, total = norm.eval()(x, x, prenorm=True, residual_in_fp32=True)
    assert torch.equal(total, 2 * x)
    torch.testing.assert_close(normed.double(), plain_norm(2 * x, 1, 0, True), atol=1e-5, rtol=1e-5)
    torch.nn.init.zeros_(norm.weight)
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))
