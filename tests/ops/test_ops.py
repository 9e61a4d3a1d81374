"""Schemas, fake kernels, autograd and invariants of the registered operators (docs/reliability.md, R3 to R5)."""

import pytest
import torch
from torch.library import opcheck

import storm_kernels as sk
from storm_kernels.backends.dispatch import OPS

from ..support.parity_cases import KINDS, ConvCase, ReduceCase, ScanCase, simplest
from ..support.parity_random import CASES

BACKENDS = [name for name in ("torch", "cpu") if not sk.why_not("scan", name)]
CALLS = {
    "scan": simplest(ScanCase, direction="both", D=True, bias=True, z="kept", reduction=(2, 2, 2)),
    "scan_state": simplest(ScanCase, direction="reverse", initial=True, D=True, bias=True, z="all", groups=2),
    "scan_packed": simplest(ScanCase, packed=True, seed=2),
    "conv": simplest(ConvCase, direction="both", bias=True),
    "conv_state": simplest(ConvCase, direction="reverse", initial=True, bias=True),
    "reduce": simplest(ReduceCase, reduction=(2, 2, 2)),
}
CHECKED = {name for op in OPS for name in (op, f"{op}_backward")}


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments with which our operators are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "storm_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def leaves_of(case, dtype=None):
    operands = {name: value.to(dtype or value.dtype) for name, value in case.operands().items()}
    return {name: value.requires_grad_() for name, value in operands.items()}


def recorded(case, backend):
    with Recorder() as recorder, sk.use_backend(backend):
        outs = case.call(sk, leaves_of(case))
        sum(out.float().square().sum() for out in outs.values()).backward()
    return recorder.calls


def test_every_registered_operator_is_checked():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("storm_kernels::")
    }
    assert {name.split(".")[0] for name in registered} == CHECKED


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call, backend):
    if sk.why_not(call.split("_")[0], backend):
        backend = "torch"
    calls = recorded(CALLS[call], backend)
    assert len(calls) >= 2, "forward and backward"
    for function, args in calls:
        # Gradients are differentiated as plain PyTorch, a loop over tokens: test_autograd.py checks
        # that; to trace it here would take minutes.
        differentiable = not function.name().endswith("_backward")
        fresh = tuple(
            a.detach().clone().requires_grad_(a.requires_grad and differentiable) if isinstance(a, torch.Tensor) else a
            for a in args
        )
        opcheck(function, fresh)


@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(call):
    case = CALLS[call]
    leaves = leaves_of(case, torch.float64)

    def forward(*values):
        return tuple(case.call(sk, dict(zip(leaves, values, strict=True))).values())

    with sk.use_backend("torch"):
        assert torch.autograd.gradcheck(forward, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_only_needed_gradients_are_returned(call, backend):
    """A gradient asked for alone is the one asked for among all."""
    case = CALLS[call]
    if sk.why_not(call.split("_")[0], backend):
        pytest.skip(f"{backend} leaves {call} to torch")
    with sk.use_backend(backend):
        leaves = leaves_of(case)
        together = torch.autograd.grad(
            [o.sum() for o in case.call(sk, leaves).values()], list(leaves.values()), allow_unused=True
        )
        for (name, value), expected in zip(leaves.items(), together, strict=True):
            alone = {other: t.detach() for other, t in leaves.items()} | {name: value.detach().requires_grad_()}
            outs = [o.sum() for o in case.call(sk, alone).values() if o.requires_grad]
            (grad,) = torch.autograd.grad(outs, [alone[name]])
            torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def big(op, **changes):
    sizes = {"batch": 3, "length": 301, "grid": (12, 5, 5), "states": 16, "reduction": (4, 2, 2)}
    sizes |= {"channels_per_group": 37, "channels": 37}
    return simplest(KINDS[op], **(sizes | {"direction": "both", "z": "all", "D": True, "bias": True} | changes))


def results(case, backend, operands=None):
    leaves = {name: value.clone().requires_grad_() for name, value in (operands or case.operands()).items()}
    with sk.use_backend(backend):
        outs = case.call(sk, leaves)
        grads = torch.autograd.grad([o.float().square().sum() for o in outs.values()], list(leaves.values()))
    return list(outs.values()), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("op", OPS)
def test_reruns_and_threads_change_no_bit(op, backend):
    case, threads = big(op), torch.get_num_threads()
    outs, grads = results(case, backend)
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            again, grads_again = results(case, backend)
            assert all(map(torch.equal, outs, again))
            assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("op", OPS)
def test_a_batch_is_its_members_to_the_bit(op, backend):
    case = big(op)
    operands = case.operands()
    outs, grads = results(case, backend, operands)
    per_member = {name for name, value in operands.items() if value.shape[0] == case.batch}
    for i in range(case.batch):
        alone, grads_alone = results(
            case, backend, {n: v[i : i + 1] if n in per_member else v for n, v in operands.items()}
        )
        assert all(torch.equal(one[0], out[i]) for one, out in zip(alone, outs, strict=True))
        assert all(torch.equal(grads_alone[name][0], grads[name][i]) for name in per_member)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 100, 255, 256, 257, 300])
def test_streaming_is_the_whole(cut, reverse, backend):
    """Cut anywhere and handed on by conv tail and state, forward or reverse, the scan and the
    convolution are unchanged.
    """
    case = big("scan", direction="forward", reduction=(1, 1, 1), batch=1)
    t = case.operands()
    options = {"delta_softplus": True, "reverse": reverse, "return_final_state": True, "backend": backend}

    def scan(part, state):
        return sk.selective_scan(
            t["u"][:, part], t["delta"][:, part], t["A"], t["B"][:, part], t["C"][:, part], t["D"], t["z"][:, part],
            t["delta_bias"],
            initial_state=state, **options,
        )  # fmt: skip

    weight = torch.ones(case.channels_per_group, 4)

    def conv(part, state):
        return sk.causal_conv1d(
            t["u"][:, part], weight, initial_state=state, reverse=reverse, return_final_state=True, backend=backend
        )

    for step in (scan, conv):
        whole, last = step(slice(None), None)
        parts = [slice(0, cut), slice(cut, None)]
        outs, state = {}, None
        for i in (1, 0) if reverse else (0, 1):
            outs[i], state = step(parts[i], state)
        torch.testing.assert_close(torch.cat([outs[0], outs[1]], 1), whole, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(state, last, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", CASES)
def test_counters_say_what_ran(op):
    case = CALLS[op]
    sk.stats(reset=True)
    with sk.use_backend("torch"):
        case.call(sk, case.operands())
    assert sk.stats() == {op: {"torch": 1}}


def test_strict_mode_raises_where_a_slow_path_would_run():
    case = CALLS["scan"]
    operands = {name: value.double() for name, value in case.operands().items()}
    with (
        sk.strict(),
        pytest.raises(sk.BackendError, match="strict mode: scan runs on the torch backend, because cpu: "),
    ):
        case.call(sk, operands)


def test_a_slow_path_warns_once_for_each_reason(monkeypatch):
    monkeypatch.setattr(sk.backends.dispatch, "_warned", set())
    case = CALLS["conv"]
    operands = {name: value.double() for name, value in case.operands().items()}
    with pytest.warns(sk.SlowPathWarning, match="conv runs on the torch backend, because cpu: ") as caught:
        case.call(sk, operands)
        case.call(sk, operands)
    assert len(caught) == 1
