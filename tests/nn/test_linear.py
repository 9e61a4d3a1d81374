"""Matrix products in half precision on a CPU that PyTorch has no kernel for, whatever the CPU at hand has."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import storm_kernels as sk
from storm_kernels import TokenReduction
from storm_kernels.nn import linear as home
from storm_kernels.nn.linear import convolve, convolve_both, linear, project
from storm_kernels.plain import call_convolution, is_plain_convolution, is_silu

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(home, "_SLOW", frozenset(HALVES))


def operands(dtype, bias=True):
    """Small integers: products and sums are exact in float32, so only the last rounding is left."""
    torch.manual_seed(0)
    shapes = [(2, 33, 40), (24, 40), *([(24,)] if bias else [])]
    return [torch.randint(-9, 10, shape).to(dtype).requires_grad_() for shape in shapes]


def results(function, leaves):
    out = function(*leaves)
    grad_out = torch.randint(-9, 10, out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_product_and_gradients_are_rounded_once(dtype, bias):
    leaves = operands(dtype, bias)
    truth = results(F.linear, [t.detach().double().requires_grad_() for t in leaves])
    for got, exact in zip(results(linear, leaves), truth, strict=True):
        torch.testing.assert_close(got, exact.to(dtype), rtol=0, atol=0)


def test_only_what_asks_for_a_gradient_gets_one():
    x, weight, bias = operands(torch.bfloat16)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert weight.grad is not None and bias.grad is None


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_chooses_the_format(dtype):
    x, weight, bias = (t.detach().float() for t in operands(torch.float32))
    with torch.autocast("cpu", dtype=dtype):
        got, plain = linear(x, weight, bias), F.linear(x, weight, bias)
        assert linear(x.double(), weight.double()).dtype == F.linear(x.double(), weight.double()).dtype
    assert got.dtype == plain.dtype == dtype
    torch.testing.assert_close(got, plain)


def test_formats_that_do_not_agree_are_refused_as_by_pytorch():
    x, weight, bias = operands(torch.bfloat16)
    for args in ((x, weight.float()), (x, weight, bias.float())):
        with pytest.raises(RuntimeError, match="dtype"):
            linear(*args)


def test_a_hooked_or_derived_module_runs_itself():
    class Derived(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(20, 4).bfloat16()
    derived, hooked = Derived(4, 3).bfloat16(), nn.Linear(4, 3).bfloat16()
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    for module in (derived, hooked):
        torch.testing.assert_close(project(x, module), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"reverse": True}], ids=str)
def test_a_called_convolution_equals_the_fused_one(options):
    """Packed sequences (an empty one too), inputs before the first, and both directions at once; a
    hook that changes nothing has it called.
    """
    torch.manual_seed(0)
    x, bounds = torch.randn(2, 9, 6), torch.tensor([0, 4, 4, 9])
    plain = nn.Conv1d(6, 6, 4, groups=6, padding=3)
    called = copy.deepcopy(plain)
    called.register_forward_hook(lambda module, args, out: out)
    state, states = torch.randn(2, 6, 3), torch.randn(3, 6, 3)
    for inputs, more in (
        (x, {}),
        (x, {"initial_state": state}),
        (x[:1], {"cu_seqlens": bounds, "initial_state": states}),
        (x[:, :0], {}),
    ):
        torch.testing.assert_close(
            convolve(inputs, called, nn.SiLU(), **options, **more), convolve(inputs, plain, **options, **more)
        )
    torch.testing.assert_close(
        convolve(x, plain, nn.Tanh(), **options), torch.tanh(call_convolution(plain, x, **options))
    )
    for pair in ((plain, called), (called, plain)):
        for got, expected in zip(convolve_both(x, *pair), convolve_both(x, plain, plain), strict=True):
            torch.testing.assert_close(got, expected)


def test_other_convolutions_and_activations_are_not_fused():
    make = nn.Conv1d
    assert is_plain_convolution(make(6, 6, 4, groups=6, padding=3))
    others = [
        make(6, 6, 4, padding=3),
        make(6, 6, 4, groups=6),
        make(6, 6, 4, groups=6, padding="same"),
        make(6, 6, 4, groups=2, padding=3),
    ]
    others += [
        make(6, 6, 4, groups=6, padding=3, dilation=2),
        make(6, 6, 4, groups=6, padding=3, padding_mode="circular"),
        nn.Linear(6, 6),
    ]
    assert not any(map(is_plain_convolution, others))
    hooked = nn.SiLU()
    hooked.register_forward_pre_hook(lambda *_: None)
    assert all(map(is_silu, (None, F.silu, nn.SiLU(), nn.SiLU(inplace=True))))
    assert not any(map(is_silu, (F.gelu, nn.GELU(), hooked, "silu")))


@pytest.mark.parametrize("dtype", HALVES)
def test_fused_projector_compiled_too(dtype, monkeypatch):
    torch.manual_seed(0)
    projector = sk.TemporalProjector(6, 16).to(dtype)
    plain = copy.deepcopy(projector)
    features = torch.randn(1, 8, 8, 8, 6).to(dtype)
    out = projector(features, TokenReduction(2))
    torch.testing.assert_close(
        torch.compile(projector, fullgraph=True, backend="aot_eager")(features, TokenReduction(2)), out
    )
    monkeypatch.setattr(home, "_SLOW", frozenset())
    torch.testing.assert_close(plain(features, TokenReduction(2)), out)
