"""Bad calls: a documented exception that names the argument and prints its value, never a crash
(docs/reliability.md, R10).
"""

import itertools
import re

import pytest
import torch

import storm_kernels as sk

from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest

CASES = {
    "scan": simplest(ScanCase, D=True, bias=True, z="all", initial=True),
    "scan_both": simplest(ScanCase, direction="both", D=True, bias=True, z="all"),
    "scan_reduced": simplest(ScanCase, direction="both", D=True, bias=True, z="kept", reduction=(2, 2, 2), groups=2),
    "conv": simplest(ConvCase, bias=True, initial=True),
    "conv_both": simplest(ConvCase, direction="both", bias=True),
    "reduce": simplest(ReduceCase, reduction=(2, 2, 2)),
}
# What goes wrong with one operand: each turns a good tensor into a bad one.
DAMAGE = {
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t > 0,
    "another device": lambda t: t.to("meta"),
    "an axis too many": lambda t: t.unsqueeze(0).unsqueeze(0),
    "an axis too few": lambda t: t.flatten() if t.dim() > 1 else t.sum(),
    "a longer last axis": lambda t: torch.cat([t, t[..., :1]], -1),
    "a shorter first axis": lambda t: t[:-1],
    "sparse": lambda t: t.to_sparse(),
    "of oneDNN": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "a list": lambda t: t.tolist(),
    "text": lambda t: "tensor",
}
# The first operand says what batch, width and device are: changed where nothing else speaks of
# them, it is no mistake.
FREE = {("conv_both", "x", "a shorter first axis")} | {
    ("reduce", "x", damage) for damage in ("another device", "a longer last axis", "a shorter first axis")
}


def bad_calls():
    for (name, case), damage in itertools.product(CASES.items(), DAMAGE):
        for operand in case.operands():
            if (name, operand, damage) in FREE:
                continue
            yield pytest.param(name, operand, damage, id=f"{name}-{operand}-{damage}")


def argument(case, operand):
    """The operand as the caller knows it."""
    if isinstance(case, ScanCase) and case.direction == "both" and operand != "z":
        return f"{'backward' if operand.endswith('_b') else 'forward'}.{operand.removesuffix('_b')}"
    return operand


@pytest.mark.parametrize(("name", "operand", "damage"), list(bad_calls()))
def test_a_bad_operand_is_refused_by_name(name, operand, damage):
    case = CASES[name]
    operands = case.operands()
    good = operands[operand]
    operands[operand] = DAMAGE[damage](good)
    with pytest.raises((TypeError, ValueError)) as caught:
        case.call(sk, operands)
    # A damaged first operand makes the others wrong: then one of them is named, with its shape,
    # instead.
    names = [argument(case, other) for other in operands] + ["grid", "reduction", "L ="]
    assert any(re.search(rf"\b{re.escape(other)}\b", str(caught.value)) for other in names), str(caught.value)
    assert "got" in str(caught.value), str(caught.value)


GRID, REDUCTION = sk.TokenGrid(5, 2, 3), sk.TokenReduction(2, 2, 2)
X = torch.ones(2, 30, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sk.reduce_tokens(X, None, REDUCTION), ValueError, "grid must be given with a reduction, got None"),
        (lambda: sk.reduce_tokens(X, (5, 2, 3), REDUCTION), TypeError, r"grid must be a TokenGrid, got tuple$"),
        (lambda: sk.reduce_tokens(X, GRID, 4), TypeError, "reduction must be a TokenReduction, got 4"),
        (lambda: sk.reduce_tokens(X[:, 1:], GRID, REDUCTION), ValueError,
            "grid must hold the sequence's 29 tokens, got .* with 30"),
        (lambda: sk.causal_conv1d(X, torch.ones(4, 4), activation="gelu"), ValueError,
            "activation must be .* got 'gelu'"),
        (lambda: sk.causal_conv1d(X, torch.ones(4, 0)), ValueError,
            r"weight must have at least one channel and one tap, got shape \(4, 0\)"),
        (lambda: sk.causal_conv1d(X, torch.ones(4, 4), backend="metal"), ValueError,
            "backend must be one of .* got 'metal'"),
        (lambda: sk.why_not("attention", "cpu"), ValueError, "op must be one of .* got 'attention'"),
        (lambda: sk.use_backend("").__enter__(), ValueError, "backend must be one of .* got ''"),
        (lambda: sk.causal_conv1d(X, torch.ones(4, 4), cu_seqlens=torch.tensor([0, 30])), ValueError,
            r"batch must be 1, got shape \(2, 30, 4\)"),
        (lambda: sk.causal_conv1d(X[:1], torch.ones(4, 4), cu_seqlens=[0, 30]), TypeError,
            r"cu_seqlens must be .* got list$"),
        (lambda: sk.causal_conv1d(X[:1], torch.ones(4, 4), cu_seqlens=torch.tensor([0])), ValueError,
            "at least two entries, got 1"),
        (lambda: sk.causal_conv1d(X[:1], torch.ones(4, 4), cu_seqlens=torch.tensor([0, 9, 5, 30])), ValueError,
            "ascend .* got 5 after 9 at"),
        (lambda: sk.causal_conv1d(X[:1], torch.ones(4, 4), cu_seqlens=torch.tensor([0, 31])), ValueError,
            r"ascend from 0 to L = 30, got 0 to 31"),
        (lambda: sk.causal_conv1d(X[:1], torch.ones(4, 4), cu_seqlens=torch.tensor([-1, 30])), ValueError,
            r"ascend .* got -1 to 30"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("tokens", [2**36, 2**45])
def test_memory_is_asked_for_before_it_is_taken(tokens):
    """A broadcast operand is small however long it says it is; the result would not be."""
    long = torch.ones(1, 1, 4).expand(1, tokens, 4)
    with pytest.raises(MemoryError, match="the convolution's result needs .* GiB on cpu, which has"):
        sk.causal_conv1d(long, torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_no_token_is_no_error(shape, direction):
    batch, length, _ = shape
    conv = simplest(ConvCase, batch=batch, length=length, direction=direction, bias=True)
    scan = simplest(ScanCase, batch=batch, length=length, direction=direction, D=True, z="all")
    for case in (conv, scan):
        operands = {name: value.requires_grad_() for name, value in case.operands().items()}
        outs = case.call(sk, operands)
        assert outs["out"].shape == shape
        sum(out.sum() for out in outs.values()).backward()
        assert all(value.grad is None or (value.grad == 0).all() for value in operands.values())


def test_a_failed_check_leaves_the_operands_alone():
    case = CASES["scan"]
    operands = case.operands()
    before = {name: value.clone() for name, value in operands.items()}
    with pytest.raises(ValueError):
        case.call(sk, operands | {"B": operands["B"][:, :, :2]})
    assert all(torch.equal(operands[name], before[name]) for name in before)
