"""Other projects' functions on our kernels: signatures, layouts, dtypes, values and every gradient,
against plain float64 loops.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F

from storm_kernels.interop import causal_conv1d as conv
from storm_kernels.interop import mamba_ssm, vim, vmamba

from ..support.original_mixers import conv_loop, scan_loop

# docs/compat.md, Call signatures: names, order and defaults.
SIGNATURES = {
    mamba_ssm.selective_scan_fn: (
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
    ),
    mamba_ssm.selective_scan_ref: (
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
    ),
    mamba_ssm.mamba_inner_fn: (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, "
        "C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, "
        "b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06"
    ),
    mamba_ssm.selective_state_update: (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None"
    ),
    conv.causal_conv1d_fn: (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, "
        "activation=None"
    ),
    conv.causal_conv1d_update: (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None"
    ),
    vim.bimamba_inner_fn: (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b, "
        "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
    ),
    vim.mamba_inner_fn_no_out_proj: (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B=None, C=None, D=None, "
        "delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
    ),
    mamba_ssm.mamba_inner_ref: (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, "
        "C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
    ),
    mamba_ssm.selective_state_update_ref: "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False",
    mamba_ssm.layer_norm_fn: (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
        "prenorm=False, residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False"
    ),
    mamba_ssm.rms_norm_fn: (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
        "prenorm=False, residual_in_fp32=False, return_dropout_mask=False"
    ),
    mamba_ssm.RMSNorm: "hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None",
    conv.causal_conv1d_ref: (
        "x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None"
    ),
    conv.causal_conv1d_update_ref: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None",
    vim.bimamba_inner_ref: (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, A_b, "
        "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
    ),
    vmamba.selective_scan_fn: (
        "u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}")
def test_signature(function):
    """Names, order and defaults are the originals'; the types, which they do not give, are ours."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[function]})"


b, d, n, length, w, rank, d_model = 2, 6, 3, 7, 4, 2, 5


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def decay(seed=0):
    return -torch.exp(draw(d, n, seed=seed))


def agree(function, loop, operands, **options):
    """Results and gradients of every operand: ours in float32 and in float64 against the loop in float64."""
    truth = run(loop, {k: v.double() for k, v in operands.items()}, options)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        found = run(function, {k: v.to(dtype) for k, v in operands.items()}, options)
        for name, value in found.items():
            scale = truth[name].abs().max().clamp(min=1e-3)
            assert value.shape == truth[name].shape, name
            assert (value.double() - truth[name]).abs().max() <= tolerance * scale, f"{name} in {dtype}"


def run(function, operands, options):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in operands.items()}
    result = function(**leaves, **options)
    results = dict(enumerate(result if isinstance(result, tuple) else (result,)))
    loss = sum((r * draw(*r.shape, seed=9).to(r.dtype)).sum() for r in results.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))  # raises if an argument has no gradient
    assert all(g.abs().sum() > 0 for g in grads)
    return {k: v.detach() for k, v in results.items()} | {f"grad_{k}": g for k, g in zip(leaves, grads, strict=True)}


def scan_operands(B, C, extras=True):
    found = {"u": draw(b, d, length), "delta": draw(b, d, length, seed=1), "A": decay(), "B": B, "C": C}
    more = {"D": draw(d), "z": draw(b, d, length, seed=2), "delta_bias": draw(d, seed=3)} if extras else {}
    return found | more


LAYOUTS = {"constant": (d, n), "variable": (b, n, length), "grouped": (b, 2, n, length)}


@pytest.mark.parametrize("layout_B", LAYOUTS)
@pytest.mark.parametrize("layout_C", LAYOUTS)
def test_selective_scan(layout_B, layout_C):
    operands = scan_operands(draw(*LAYOUTS[layout_B], seed=4), draw(*LAYOUTS[layout_C], seed=5))
    for function in (mamba_ssm.selective_scan_fn, mamba_ssm.selective_scan_ref):
        agree(
            function,
            lambda delta_softplus, return_last_state, **t: scan_loop(**t, delta_softplus=delta_softplus),
            operands, delta_softplus=True, return_last_state=True,
        )  # fmt: skip


def test_selective_scan_without_options():
    operands = scan_operands(draw(b, n, length, seed=4), draw(b, n, length, seed=5), extras=False)
    operands["delta"] = operands["delta"].abs() * 0.3
    agree(mamba_ssm.selective_scan_fn, lambda **t: scan_loop(**t)[0], operands)


def test_dtypes_of_results():
    t = scan_operands(draw(b, n, length), draw(b, n, length, seed=1))
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in t.items()}
    out, state = mamba_ssm.selective_scan_fn(**half, delta_softplus=True, return_last_state=True)
    assert (out.dtype, out.shape, state.dtype, state.shape) == (
        torch.bfloat16,
        (b, d, length),
        torch.float32,
        (b, d, n),
    )


def inner_loop(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, D, delta_bias, B=None, C=None,
    B_proj_bias=None, C_proj_bias=None,
    out_proj_weight=None, out_proj_bias=None, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, A_b=None,
    delta_softplus=True,
):  # fmt: skip
    def rms(t, weight):  # over the axis before the last
        return t if weight is None else t * torch.rsqrt(t.square().mean(-2, keepdim=True) + 1e-6) * weight[:, None]

    x, z = xz.chunk(2, 1)
    u = conv_loop(x, conv1d_weight[:, 0], conv1d_bias, "silu")
    projected = x_proj_weight @ u
    dt, own_B, own_C = projected[:, :rank], projected[:, rank : rank + n], projected[:, -n:]
    if dt_rms_weight is not None and len(dt_rms_weight) == rank:
        dt, dt_rms_weight = rms(dt, dt_rms_weight), None
    delta = rms(delta_proj_weight @ dt, dt_rms_weight)
    own_B = own_B if B_proj_bias is None else own_B + B_proj_bias[:, None]
    own_C = own_C if C_proj_bias is None else own_C + C_proj_bias[:, None]
    B, C = rms(own_B if B is None else B, b_rms_weight), rms(own_C if C is None else C, c_rms_weight)
    y = scan_loop(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0]
    if A_b is not None:
        flipped = [t if t.dim() == 2 else t.flip(-1) for t in (u, delta, B, C, z)]
        y = y + scan_loop(
            flipped[0], flipped[1], A_b, flipped[2], flipped[3], D, flipped[4], delta_bias, delta_softplus
        )[0].flip(-1)
    return y if out_proj_weight is None else F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def inner_operands(*, out=True, **more):
    found = {
        "xz": draw(b, 2 * d, length), "conv1d_weight": draw(d, 1, w), "conv1d_bias": draw(d, seed=1),
        "x_proj_weight": draw(rank + 2 * n, d),
        "delta_proj_weight": draw(d, rank), "A": decay(), "D": draw(d, seed=2), "delta_bias": draw(d, seed=3),
    }  # fmt: skip
    if out:
        found |= {"out_proj_weight": draw(d_model, d), "out_proj_bias": draw(d_model)}
    return found | more


RMS = {"b_rms_weight": draw(n, seed=4), "c_rms_weight": draw(n, seed=5), "dt_rms_weight": draw(d, seed=6)}
BIASES = {"B_proj_bias": draw(n, seed=7), "C_proj_bias": draw(n, seed=8)}
GIVEN = {"B": draw(b, n, length, seed=7), "C": draw(b, n, length, seed=8)}


BEFORE = RMS | {"dt_rms_weight": draw(rank, seed=6)}


@pytest.mark.parametrize(
    "more",
    [{}, RMS, BIASES | RMS, BEFORE],
    ids=["plain", "rms", "biases and rms", "rms of delta before its projection"],
)
def test_mamba_inner_fn(more):
    agree(mamba_ssm.mamba_inner_fn, inner_loop, inner_operands(**more))


def test_mamba_inner_fn_takes_B_and_C():
    operands = inner_operands(**GIVEN)
    agree(mamba_ssm.mamba_inner_fn, inner_loop, operands, delta_softplus=True)


CONSTANT = {"B": draw(d, n, seed=7), "C": draw(d, n, seed=8)}


@pytest.mark.parametrize("given", ["B", "C", "BC"])
def test_x_proj_has_only_the_rows_it_needs(given):
    """With a constant or a given B or C, x_proj_weight holds delta's rows and those of what is projected."""
    for source in (CONSTANT, GIVEN):
        more = {name: source[name] for name in given} | {"x_proj_weight": draw(rank + n * (2 - len(given)), d)}
        agree(mamba_ssm.mamba_inner_fn, inner_loop, inner_operands(**more))
        agree(vim.mamba_inner_fn_no_out_proj, inner_loop, inner_operands(out=False, **more))
        agree(vim.bimamba_inner_fn, inner_loop, inner_operands(A_b=decay(seed=1), **more))


def test_references_of_the_inner_functions():
    operands = inner_operands(**BIASES)
    agree(mamba_ssm.mamba_inner_ref, inner_loop, operands)
    agree(vim.bimamba_inner_ref, inner_loop, operands | {"A_b": decay(seed=1)})


@pytest.mark.parametrize("more", [{}, BIASES, GIVEN], ids=["projected", "biases", "given"])
def test_vim_functions(more):
    agree(vim.mamba_inner_fn_no_out_proj, inner_loop, inner_operands(out=False, **more))
    agree(vim.bimamba_inner_fn, inner_loop, inner_operands(A_b=decay(seed=1), **more))


def test_vmamba():
    K = 2
    operands = scan_operands(draw(b, K, n, length, seed=4), draw(b, K, n, length, seed=5))
    del operands["z"]
    agree(vmamba.selective_scan_fn, lambda **t: scan_loop(**t, delta_softplus=True)[0], operands)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C") else v for k, v in operands.items()}
    assert vmamba.selective_scan_fn(**half).dtype == torch.float32
    assert vmamba.selective_scan_fn(**half, oflex=False).dtype == torch.bfloat16
    same = vmamba.selective_scan_fn(**operands, backend="torch") - vmamba.selective_scan_fn(**operands, backend="oflex")
    assert same.abs().max() < 1e-5


def test_norms():
    x, residual, weight, bias = draw(3, 8), draw(3, 8, seed=1), draw(8), draw(8, seed=1)
    normed, total = mamba_ssm.layer_norm_fn(
        x.bfloat16(), weight, bias, residual.bfloat16(), prenorm=True, residual_in_fp32=True
    )
    plain = x.bfloat16().double() + residual.bfloat16().double()
    assert (normed.dtype, total.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
    )  # a residual keeps its dtype, as in mamba_ssm
    torch.testing.assert_close(total, plain.bfloat16())
    assert (
        mamba_ssm.layer_norm_fn(x.bfloat16(), weight, bias, prenorm=True, residual_in_fp32=True)[1].dtype
        == torch.float32
    )
    torch.testing.assert_close(
        normed.double(), F.layer_norm(plain, (8,), weight.double(), bias.double(), 1e-6), atol=2e-2, rtol=1e-2
    )
    norm = mamba_ssm.RMSNorm(8)
    assert list(norm.state_dict()) == ["weight"]
    torch.testing.assert_close(
        norm(x, residual), (x + residual) * torch.rsqrt((x + residual).square().mean(-1, keepdim=True) + 1e-5)
    )
    agree(mamba_ssm.rms_norm_fn,
          lambda x, weight, bias: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight + bias,
          {"x": x, "weight": weight, "bias": bias})  # fmt: skip


def test_bad_input_is_named():
    t = scan_operands(draw(b, n, length), draw(b, n, length))
    with pytest.raises(TypeError, match="A is torch.complex64"):
        mamba_ssm.selective_scan_fn(**(t | {"A": t["A"].to(torch.complex64)}))
    with pytest.raises(TypeError, match="A is torch.complex64"):
        mamba_ssm.mamba_inner_fn(**(inner_operands() | {"A": decay().to(torch.complex64)}))
    with pytest.raises(ValueError, match=r"u must be .* got shape \(2, 7, 6\); .* token-major"):
        mamba_ssm.selective_scan_fn(**(t | {"u": t["u"].transpose(1, 2)}))
    with pytest.raises(ValueError, match=r"delta must have the shape of u, \(2, 6, 7\), got \(2, 6, 6\)"):
        mamba_ssm.selective_scan_fn(**(t | {"delta": t["delta"][..., :-1]}))
    with pytest.raises(ValueError, match=r"B must be .*; got shape \(2, 7, 3\)"):
        mamba_ssm.selective_scan_fn(**(t | {"B": t["B"].transpose(1, 2)}))
    with pytest.raises(ValueError, match="device|meta"):
        mamba_ssm.selective_scan_fn(**(t | {"A": t["A"].to("meta")}))
    with pytest.raises(ValueError, match=r"xz must be \(batch, 2 \* channels, length\)"):
        mamba_ssm.mamba_inner_fn(**(inner_operands() | {"xz": draw(b, length, 2 * d)}))
    with pytest.raises(ValueError, match="checkpoint_lvl must be 0 or 1, got 2"):
        mamba_ssm.mamba_inner_fn(**inner_operands(), checkpoint_lvl=2)
    with pytest.raises(ValueError, match=r"weight must be \(channels, taps\), got shape \(6, 1, 4\)"):
        conv.causal_conv1d_fn(draw(b, d, length), draw(d, 1, w))
    with pytest.raises(ValueError, match="token-major"):
        conv.causal_conv1d_fn(draw(b, length, d), draw(d, w))
    with pytest.raises(ValueError, match="conv_state must hold at least taps - 1 = 3 inputs"):
        conv.causal_conv1d_update(draw(b, d), torch.zeros(b, d, 2), draw(d, w))
    with pytest.raises(NotImplementedError, match="activation must be None, 'silu' or 'swish', got 'nonsense'"):
        conv.causal_conv1d_fn(draw(b, d, length), draw(d, w), activation="nonsense")
    with pytest.raises(ValueError, match=r"dt_rms_weight must be \(6,\) .* or \(2,\) .*, got shape \(5,\)"):
        mamba_ssm.mamba_inner_fn(**inner_operands(dt_rms_weight=draw(5)))
    with pytest.raises(ValueError, match=r"x_proj_weight must have 8 rows, .*, got shape \(5, 6\)"):
        mamba_ssm.mamba_inner_fn(**(inner_operands() | {"x_proj_weight": draw(rank + n, d)}))
