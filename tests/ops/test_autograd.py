"""Autograd's other doors: forward mode, torch.func, batched gradients, second derivatives. Truth is
the same door of the reference in float64.
"""

import re

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import storm_kernels as sk
from storm_kernels import reference
from storm_kernels.backends.dispatch import OPS
from storm_kernels.nn import linear as home

from .test_ops import CALLS, Recorder

# None leaves the choice to dispatch; "torch" is the way out that always works.
BACKENDS = [None, "torch"]


@pytest.fixture(autouse=True)
def every_reason_is_new(monkeypatch):
    monkeypatch.setattr(sk.backends.dispatch, "_warned", set())


pytestmark = pytest.mark.filterwarnings("ignore::storm_kernels.SlowPathWarning")


class Call:
    """One call of an operator as a function of its operands' values, in a room and a dtype."""

    def __init__(self, case, room, backend, dtype):
        self.case, self.room, self.backend = case, room, backend
        self.names = list(case.operands())
        self.values = tuple(value.to(dtype) for value in case.operands().values())
        case.call(
            reference, case.operands()
        )  # what a case draws beside its operands may not be drawn within a transform
        draw = torch.Generator().manual_seed(5)
        self.tangents = tuple(torch.randn(v.shape, generator=draw).to(dtype) for v in self.values)

    def outs(self, *values):
        options = {} if self.backend is None else {"backend": self.backend}
        return tuple(self.case.call(self.room, dict(zip(self.names, values, strict=True)), **options).values())

    def loss(self, *values):
        return sum(out.square().sum() for out in self.outs(*values))

    @property
    def all(self):
        return tuple(range(len(self.values)))


def by_jvp(c):
    outs, tangents = jvp(c.outs, c.values, c.tangents)
    return outs + tangents


def by_dual_numbers(c):
    with fwAD.dual_level():
        return tuple(fwAD.unpack_dual(out).tangent for out in c.outs(*map(fwAD.make_dual, c.values, c.tangents)))


def by_one_dual_number(c):
    """Only the last operand has a tangent; no tangent of a result is a zero."""
    with fwAD.dual_level():
        outs = c.outs(*c.values[:-1], fwAD.make_dual(c.values[-1], c.tangents[-1]))
        return tuple(
            torch.zeros_like(out) if tangent is None else tangent for out, tangent in map(fwAD.unpack_dual, outs)
        )


def by_jacfwd(c):
    return jacfwd(lambda t: c.loss(*(v + t * d for v, d in zip(c.values, c.tangents, strict=True))))(
        c.values[0].new_zeros(3, 1).sum(0)
    )


def by_grad(c):
    return grad(c.loss, c.all)(*c.values)


def by_grad_of_one(c):
    return grad(c.loss)(*c.values)


def by_vjp(c):
    outs, pull = vjp(c.outs, *c.values)
    return outs + pull(outs)


def by_jacrev(c):
    return jacrev(lambda *values: torch.cat([out.flatten()[:3] for out in c.outs(*values)]), c.all)(*c.values)


def by_vmap(c):
    """Every operand its own batch of three: an ensemble."""
    return vmap(c.outs)(*(torch.stack([v, v + d / 8, v - d / 8]) for v, d in zip(c.values, c.tangents, strict=True)))


def by_per_sample_gradients(c):
    """The first operand in a batch, along its last axis; the others shared."""
    first = torch.stack([c.values[0], c.tangents[0]], -1)
    return vmap(grad(c.loss, c.all), (-1, *(None,) * (len(c.values) - 1)))(first, *c.values[1:])


def by_vmap_of_a_learning_model(c):
    """torch.vmap inside, ordinary autograd outside."""
    leaves = [v.clone().requires_grad_() for v in c.values]
    first = torch.stack([c.values[0], c.tangents[0]])
    outs = vmap(c.outs, (0, *(None,) * (len(leaves) - 1)))(first, *leaves[1:])
    return torch.autograd.grad(sum(out.square().sum() for out in outs), leaves[1:]) if leaves[1:] else outs


def by_batched_gradients(c):
    leaves = [v.clone().requires_grad_() for v in c.values]
    outs = c.outs(*leaves)
    incoming = [torch.stack([out.detach(), torch.ones_like(out)]) for out in outs]
    return torch.autograd.grad(outs, leaves, incoming, is_grads_batched=True)


def by_second_derivatives(c):
    leaves = [v.clone().requires_grad_() for v in c.values]
    first = torch.autograd.grad(c.loss(*leaves), leaves, create_graph=True)
    return first + torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, c.tangents, strict=True)), leaves)


def by_forward_over_backward(c):
    """The incoming gradient is a dual number, the operator ran outside."""
    leaves = [v.clone().requires_grad_() for v in c.values]
    outs = c.outs(*leaves)
    with fwAD.dual_level():
        duals = [fwAD.make_dual(torch.ones_like(out), torch.full_like(out, 0.5)) for out in outs]
        return tuple(fwAD.unpack_dual(g).tangent for g in torch.autograd.grad(outs, leaves, duals))


def along(c):
    return lambda t: c.loss(*(v + t.sum() * d for v, d in zip(c.values, c.tangents, strict=True)))


def by_hessian(c):
    return hessian(along(c))(c.values[0].new_zeros(2))


def by_reverse_over_reverse(c):
    return jacrev(jacrev(along(c)))(c.values[0].new_zeros(2))


def by_reverse_over_forward(c):
    return jacrev(jacfwd(along(c)))(c.values[0].new_zeros(2))


DOORS = {name.removeprefix("by_"): door for name, door in list(globals().items()) if name.startswith("by_")}


def flat(found):
    return [t for t in torch.utils._pytree.tree_leaves(found) if t is not None]


def agree(found, truth):
    found, truth = flat(found), flat(truth)
    assert len(found) == len(truth) > 0
    for one, true in zip(found, truth, strict=True):
        assert one.shape == true.shape
        assert (one.double() - true).abs().max() <= 2e-4 * true.abs().max() + 1e-6
    assert any((true != 0).any() for true in truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("call", CALLS)
def test_operators_through_every_door(call, door, backend):
    ours = Call(CALLS[call], sk, backend, torch.float32)
    try:
        truth = DOORS[door](Call(CALLS[call], reference, None, torch.float64))
    except NotImplementedError as error:  # PyTorch has no forward mode of SiLU's backward: nor have we
        with pytest.raises(NotImplementedError, match=re.escape(str(error).split("\n")[0])):
            DOORS[door](ours)
    else:
        agree(DOORS[door](ours), truth)


@pytest.mark.parametrize("door", DOORS)
def test_the_widened_product_through_every_door(door, monkeypatch):
    """linear.py's own product of halves: where it would drop tangents or know no transform,
    PyTorch's of the same widened operands.
    """
    monkeypatch.setattr(home, "_SLOW", frozenset({torch.bfloat16}))

    class Product:
        def __init__(self, function, dtype):
            draw = torch.Generator().manual_seed(0)
            shapes = (2, 17, 8), (3, 8), (3,)
            self.values, self.tangents = (
                tuple(torch.randn(shape, generator=draw).bfloat16().to(dtype) for shape in shapes) for _ in range(2)
            )
            self.outs, self.all = lambda *values: (function(*values),), (0, 1, 2)

        def loss(self, *values):
            return self.outs(*values)[0].double().square().sum()

    found, truth = DOORS[door](Product(home.linear, torch.bfloat16)), DOORS[door](Product(F.linear, torch.float64))
    for one, true in zip(flat(found), flat(truth), strict=True):
        assert (one.double() - true).abs().max() <= 0.03 * true.abs().max()


def test_kernels_run_under_grad_and_vmap():
    """Only what no kernel computes is plain PyTorch's; that is told, counted, and forbidden in strict mode."""
    c = Call(CALLS["scan"], sk, None, torch.float32)
    if sk.why_not("scan", "cpu"):
        pytest.skip("needs the C++ library: no kernel but torch's runs here")
    sk.stats(reset=True)
    with sk.strict():
        by_per_sample_gradients(c), by_jacrev(c), by_batched_gradients(c), by_vmap(c)
    assert set(sk.stats(reset=True)["scan"]) == {"cpu"}
    with pytest.warns(
        sk.SlowPathWarning,
        match="scan runs on the torch backend, because all others: no kernel computes forward-mode derivatives",
    ):
        by_jvp(c)
    assert set(sk.stats(reset=True)["scan"]) == {"torch"}
    with (
        sk.strict(),
        pytest.raises(sk.BackendError, match="strict mode: scan .* no kernel computes derivatives of gradients"),
    ):
        by_second_derivatives(c)
    named = Call(CALLS["scan"], sk, "cpu", torch.float32)
    with pytest.raises(
        sk.BackendError,
        match="backend='cpu' cannot run scan: no kernel computes forward-mode .* ask for backend='torch'",
    ):
        by_jvp(named)


@pytest.mark.parametrize("op", OPS)
def test_an_operator_called_by_itself_never_drops_a_tangent(op):
    """As a traced program calls it."""
    with Recorder() as recorder:
        CALLS[op].call(sk, CALLS[op].operands())
    ((function, args),) = recorder.calls
    with (
        fwAD.dual_level(),
        pytest.raises(NotImplementedError, match=f"storm_kernels.{op}: no kernel .* use_backend\\('torch'\\)"),
    ):
        function(fwAD.make_dual(args[0], torch.ones_like(args[0])), *args[1:])


@pytest.mark.parametrize("call", CALLS)
def test_gradgradcheck(call):
    c = Call(CALLS[call], sk, None, torch.float64)
    leaves = tuple(v.requires_grad_() for v in c.values)
    assert torch.autograd.gradgradcheck(c.outs, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(c.outs, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
