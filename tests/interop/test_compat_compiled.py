"""The compiled modules that models import themselves: each generation's positional arguments,
buffers written in place, against plain loops.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from storm_kernels.interop import causal_conv1d as conv
from storm_kernels.interop import compiled

from ..support.original_mixers import conv_loop, scan_loop

b, d, n, length, w = 2, 6, 3, 7, 4


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def scan_operands(grouped=True, dtype=torch.float32):
    B, C = ((b, 2, n, length), (b, 2, n, length)) if grouped else ((d, n), (d, n))
    half = [draw(b, d, length, dtype=dtype), draw(b, d, length, seed=1, dtype=dtype)]
    return [
        *half,
        -draw(d, n).exp(),
        draw(*B, seed=2),
        draw(*C, seed=3),
        draw(d),
        draw(b, d, length, seed=4, dtype=dtype),
        draw(d, seed=5),
    ]


def loop(u, delta, A, B, C, D, z, delta_bias):
    return scan_loop(u, delta, A, B, C, D, z, delta_bias, True)


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "constant"])
@pytest.mark.parametrize("gated", [True, False])
def test_selective_scan_cuda(grouped, gated):
    """[out, x, out_z] and the gradients; mamba pull request 371: the last state holds B where B is constant, too."""
    operands = scan_operands(grouped)
    operands[6] = operands[6] if gated else None
    out, x, *gated_out = compiled.selective_scan_cuda.fwd(*operands, True)
    truth = [None if t is None else t.double().requires_grad_() for t in operands]
    ungated, state = loop(*truth[:6], None, truth[7])
    torch.testing.assert_close(out.double(), ungated, atol=1e-5, rtol=1e-5)
    assert x.shape == (b, d, 1, 2 * n) and out.is_contiguous()
    torch.testing.assert_close(x[:, :, -1, 1::2].double(), state, atol=1e-5, rtol=1e-5)
    product = torch.exp(F.softplus(truth[1] + truth[7][:, None]).sum(-1)[..., None] * truth[2])
    torch.testing.assert_close(x[:, :, -1, 0::2].double(), product, atol=1e-6, rtol=1e-5)
    expected = loop(*truth)[0]
    assert len(gated_out) == gated
    dout = draw(b, d, length, seed=9)
    dz = torch.full((b, d, length), torch.nan) if gated else None
    found = compiled.selective_scan_cuda.bwd(*operands, dout, x, out, dz, True, gated)
    grads = torch.autograd.grad((expected * dout).sum(), [t for t in truth if t is not None])
    if gated:
        torch.testing.assert_close(gated_out[0].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[8].double(), expected, atol=1e-5, rtol=1e-5)
        assert found[7] is dz
        found = [*found[:6], dz, found[6]]
    for mine, right in zip(found, grads, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine.double(), right, atol=1e-4, rtol=1e-4)


def test_the_state_after_each_chunk(monkeypatch):
    monkeypatch.setattr(compiled, "_CHUNK", 3)
    operands = scan_operands()
    out, x, _ = compiled.selective_scan_cuda.fwd(*operands, True)
    assert x.shape == (b, d, 3, 2 * n)
    for i, end in enumerate((3, 6, 7)):
        part = [t[..., :end] if t.dim() > 2 else t for t in operands]
        part[6] = None
        expected, state = loop(*part)
        torch.testing.assert_close(x[:, :, i, 1::2], state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_sequences_and_no_options(tokens):
    """mamba issue 36: one token, whose strides are nobody's business; no D, z or delta_bias."""
    operands = [t[..., :tokens].abs() if t.dim() > 2 else t for t in scan_operands()[:5]]
    out, x = compiled.selective_scan_cuda.fwd(*operands, None, None, None, False)
    torch.testing.assert_close(out, scan_loop(*operands)[0], atol=1e-5, rtol=1e-5)
    found = compiled.selective_scan_cuda.bwd(
        *operands, None, None, None, torch.ones_like(out), x, None, None, False, False
    )
    assert len(found) == 7 and found[5] is found[6] is None


def test_halves_of_the_compiled_scan():
    """out_z is rounded once from float32; VMamba's oflex keeps the whole result in float32, and its
    backward takes a float32 gradient.
    """
    operands = scan_operands(dtype=torch.bfloat16)
    exact = loop(*(t.double() for t in operands))[0]
    out, _, out_z = compiled.selective_scan_cuda.fwd(*operands, True)
    assert out.dtype == out_z.dtype == torch.bfloat16
    torch.testing.assert_close(out_z, exact.bfloat16(), atol=1e-3, rtol=2**-8)
    ungated = [*operands[:6], operands[7]]
    fwd, bwd = compiled.selective_scan_cuda_oflex
    out, x = fwd(*ungated, True, 1, True)
    assert out.dtype == torch.float32 and fwd(*ungated, True, 1, False)[0].dtype == torch.bfloat16
    grads = bwd(*ungated, torch.ones_like(out), x, True, 1)
    assert [g.dtype for g in grads[:2]] == [torch.bfloat16] * 2
    truth = [t.double().requires_grad_() for t in ungated]
    expected = loop(*truth[:6], None, truth[6])[0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, right in zip(grads, torch.autograd.grad(expected.sum(), truth), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-2, rtol=1e-2)


def test_vmambas_compiled_modules():
    """``core`` is the scan without z; in both, delta may have fewer channels than u, each for its neighbours."""
    u, delta, A, B, C, D, _, bias = scan_operands()
    delta, bias = delta[:, :2], bias[:2]
    truth = [t.double().requires_grad_() for t in (u, delta, A, B, C, D, bias)]
    repeated = truth[1].repeat_interleave(3, 1), truth[6].repeat_interleave(3)
    expected = scan_loop(truth[0], repeated[0], *truth[2:6], None, repeated[1], True)[0]
    grads = torch.autograd.grad(expected.sum(), truth)
    for fwd, bwd in (compiled.selective_scan_cuda_core, compiled.selective_scan_cuda_oflex):
        out, x = fwd(u, delta, A, B, C, D, bias, True, 1)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        found = bwd(u, delta, A, B, C, D, bias, torch.ones_like(out), x, True, 1)
        for mine, right in zip(found, grads, strict=True):
            torch.testing.assert_close(mine.double(), right, atol=1e-4, rtol=1e-4)


def test_every_generation_of_the_convolution():
    """ "causal_conv1d_fwd(): incompatible function arguments": Vim 34 and 41, mamba 257 and 660,
    VideoMamba 95, U-Mamba 21, DepMamba 3.
    """
    x, weight, bias, dout = draw(b, d, length), draw(d, w), draw(d), draw(b, d, length, seed=1)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = conv_loop(*leaves, "silu")
    grads = torch.autograd.grad((expected * dout).sum(), leaves)
    out = torch.full_like(x, torch.nan)
    forwards = [
        compiled.causal_conv1d_fwd(x, weight, bias, True),
        compiled.causal_conv1d_fwd(x, weight, bias, None, True),
        compiled.causal_conv1d_fwd(x, weight, bias, None, None, None, True),
    ]
    assert compiled.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True) is None
    for found in [*forwards, out]:
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    dx = [torch.full_like(x, torch.nan) for _ in range(4)]
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    backwards = [
        compiled.causal_conv1d_bwd(x, weight, bias, dout, dx[0], True),
        compiled.causal_conv1d_bwd(x, weight, bias, dout, None, dx[1], True),
        compiled.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, dx[2], False, True),
        compiled.causal_conv1d_bwd(x, weight, bias, dout, None, None, True),
    ]
    assert (
        compiled.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, dx[3], dweight, dbias, None, True) is None
    )
    assert [len(found) for found in backwards] == [3, 3, 4, 3] and backwards[2][3] is None
    for found in [*backwards, *([t, dweight, dbias] for t in dx)]:
        for mine, right in zip(found[:3], grads, strict=True):
            torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="causal_conv1d_fwd takes 4, 5, 7 or 8 arguments.* got 2"):
        compiled.causal_conv1d_fwd(x, weight)


def test_states_of_the_compiled_convolution():
    x, weight, start, last = draw(b, d, length), draw(d, w), draw(b, d, w - 1), torch.full((b, d, w - 1), torch.nan)
    leaves = [t.double().requires_grad_() for t in (x, weight, start)]
    expected = conv_loop(leaves[0], leaves[1], None, None, leaves[2])
    found = compiled.causal_conv1d_fwd(x, weight, None, None, start, last, False)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(last, x[..., -(w - 1) :])
    signals = draw(b, d, length, seed=1), draw(b, d, w - 1, seed=2)
    total = (expected * signals[0]).sum() + (leaves[0][..., -(w - 1) :] * signals[1]).sum()
    grads = torch.autograd.grad(total, leaves)
    dx, dweight, dbias, dstart = compiled.causal_conv1d_bwd(
        x, weight, None, signals[0], None, start, signals[1], None, True, False
    )
    assert dbias is None
    into = [torch.full_like(x, torch.nan), torch.zeros_like(weight), torch.full_like(start, torch.nan)]
    compiled.causal_conv1d_bwd(
        x, weight, None, signals[0], None, start, signals[1], into[0], into[1], None, into[2], False
    )
    for found in ((dx, dweight, dstart), into):
        for mine, right in zip(found, grads, strict=True):
            torch.testing.assert_close(mine.double(), right, atol=1e-5, rtol=1e-5)


def test_every_generation_of_the_update():
    x, weight, bias, state = draw(b, d), draw(d, w), draw(d), draw(4, d, w)
    rows, at = torch.tensor([2, -1], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)
    cases = [
        ((True,), {}, state[:b]),
        ((True, None), {}, state[:b]),
        ((True, at), {"cache_seqlens": at}, state[:b]),
        ((True, None, rows), {"conv_state_indices": rows}, state),
    ]
    for options, named, states in cases:
        mine, right = states.clone(), states.clone()
        found = compiled.causal_conv1d_update_compiled(x, mine, weight, bias, *options)
        assert torch.equal(found, conv.causal_conv1d_update(x, right, weight, bias, "silu", **named)) and torch.equal(
            mine, right
        )
    mine, right, out = state.clone(), state.clone(), torch.full((b, d, 1), torch.nan)
    assert compiled.causal_conv1d_update_compiled(x[..., None], mine, weight, bias, out, False, None, rows) is None
    assert torch.equal(
        out, conv.causal_conv1d_update(x[..., None], right, weight, bias, conv_state_indices=rows)
    ) and torch.equal(mine, right)


class CompressorScan(torch.autograd.Function):
    """Convolution, projection and gated scan on the compiled modules alone, as BIMBA's compressor
    has them: both gradients fill one buffer.

    mamba issue 342 asks whether the gradient of z arrives, which the caller only finds in the
    buffer that it handed over.
    """

    @staticmethod
    def forward(ctx, xz, conv_weight, conv_bias, projection, A, D, delta_bias):
        x, z = xz.chunk(2, 1)
        u = compiled.causal_conv1d_fwd(x, conv_weight, conv_bias, None, None, None, True)
        delta, B, C = (projection @ u).split([d, n, n], 1)
        B, C = B.unsqueeze(1).contiguous(), C.unsqueeze(1).contiguous()
        out, x_states, out_z = compiled.selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(xz, conv_weight, conv_bias, projection, A, B, C, D, delta_bias, x_states, out)
        return out_z

    @staticmethod
    def backward(ctx, dout):
        xz, conv_weight, conv_bias, projection, A, B, C, D, delta_bias, x_states, out = ctx.saved_tensors
        x, z = xz.chunk(2, 1)
        u = compiled.causal_conv1d_fwd(x, conv_weight, conv_bias, None, None, None, True)
        delta = projection[:d] @ u
        dxz = torch.full_like(xz, torch.nan)
        dx, dz = dxz.chunk(2, 1)
        du, ddelta, dA, dB, dC, dD, dbias, dz, _ = compiled.selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, delta_bias, dout.contiguous(), x_states, out, dz, True, True
        )
        dprojected = torch.cat([ddelta, dB.squeeze(1), dC.squeeze(1)], 1)
        dprojection = torch.einsum("brl,bdl->rd", dprojected, u)
        du = du + projection.T @ dprojected
        _, dconv, dconv_bias, *_ = compiled.causal_conv1d_bwd(
            x, conv_weight, conv_bias, du, None, None, None, dx, False, True
        )
        return dxz, dconv, dconv_bias, dprojection, dA, dD, dbias


def test_a_model_on_the_compiled_modules_alone():
    """Twice, once over the flipped sequence: BIMBA's bidirectional scan, and every gradient of it."""
    one = [draw(d, w), draw(d), 0.3 * draw(d + 2 * n, d), -draw(d, n).exp(), draw(d), draw(d, seed=1)]
    parameters = [*one, *(t + 0.1 for t in one[:3]), one[3] - 0.1, *(t + 0.1 for t in one[4:])]
    out_proj, tokens = nn.Linear(d, 2 * d).double(), draw(b, 2 * d, length)

    def both(scan, xz, *weights):
        return scan(xz, *weights[:6]) + scan(xz.flip(-1), *weights[6:]).flip(-1)

    def plain(xz, conv_weight, conv_bias, projection, A, D, delta_bias):
        x, z = xz.chunk(2, 1)
        u = conv_loop(x, conv_weight, conv_bias, "silu")
        delta, B, C = (projection @ u).split([d, n, n], 1)
        return scan_loop(u, delta, A, B, C, D, z, delta_bias, True)[0]

    leaves = [t.clone().requires_grad_() for t in (tokens, *parameters)]
    truth = [t.double().requires_grad_() for t in (tokens, *parameters)]
    y, expected = both(CompressorScan.apply, *leaves), both(plain, *truth)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(out_proj(y.double().mT).sin().sum(), leaves)
    right = torch.autograd.grad(out_proj(expected.mT).sin().sum(), truth)
    for mine, exact in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-4, rtol=1e-4)
