"""Results do not depend on defaults of process or thread: dtype, device, autocast, gradients,
determinism, threads (docs/reliability.md, R18).
"""

import ast
import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import storm_kernels as sk
from storm_kernels import TemporalProjector, TokenReduction, reference
from storm_kernels.backends.cpu import loader
from storm_kernels.backends.cuda import launcher
from storm_kernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from storm_kernels.interop.mamba_ssm import Mamba, selective_state_update

from ..support.cuda_on_cpu import OnCpu
from ..support.parity_cases import (
    ConvCase,
    Draw,
    ReduceCase,
    ScanCase,
    simplest,
)

ROOT = Path(__file__).resolve().parent.parent.parent
built = pytest.mark.skipif(
    loader.why_missing() is not None, reason=f"the C++ library is not there: {loader.why_missing()}"
)
CASES = {
    "scan": simplest(ScanCase, direction="reverse", initial=True, D=True, bias=True, z="all", groups=2, length=70),
    "scan of packed sequences": simplest(
        ScanCase, seed=3, packed=True, initial=True, z="all", dtype="bfloat16", length=70
    ),
    "scan of both, reduced": simplest(
        ScanCase, direction="both", D=True, bias=True, z="kept", reduction=(2, 2, 2), dtype_state="float16"
    ),
    "conv": simplest(ConvCase, direction="reverse", initial=True, bias=True),
    "conv of packed sequences": simplest(ConvCase, seed=3, packed=True, initial=True, bias=True, dtype="bfloat16"),
    "conv of both": simplest(ConvCase, direction="both", bias=True),
    "reduce": simplest(ReduceCase, reduction=(2, 2, 2), dtype="float16"),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def undeterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


@contextlib.contextmanager
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(before)


STATES = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: default_device("meta"),
    "with the meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "undeterministic": undeterministic,
    "three threads": three_threads,
}


def same(one, other):
    """Whether two dictionaries hold tensors that agree in dtype, device and every bit."""
    assert one.keys() == other.keys()
    return all(
        a.dtype == other[n].dtype and a.device == other[n].device and torch.equal(a, other[n]) for n, a in one.items()
    )


def run(case, backend, forward=contextlib.nullcontext, backward=contextlib.nullcontext):
    """Results and gradients; operands and incoming gradients are made outside of the states in
    which the two passes run.
    """
    leaves = {name: value.requires_grad_() for name, value in case.operands().items()}
    with forward():
        results = case.call(sk, leaves, backend=backend)
    incoming = [Draw(case.seed + 1).normal(out.dtype, "dense", *out.shape) for out in results.values()]
    with backward():
        grads = torch.autograd.grad(list(results.values()), list(leaves.values()), incoming)
    return {name: out.detach() for name, out in results.items()} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_operators_give_the_same_bits(backend):
    """Either pass in each state."""
    if sk.why_not("scan", backend):
        pytest.skip(f"{backend}: {sk.why_not('scan', backend)}")
    for name, case in CASES.items():
        if sk.why_not(name.split()[0], backend):
            continue
        expected = run(case, backend)
        for state, enter in STATES.items():
            assert same(run(case, backend, forward=enter), expected), f"{name}: forward with {state}"
            assert same(run(case, backend, backward=enter), expected), f"{name}: backward with {state}"


def test_operators_give_the_same_bits_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "from tests.support.interpreted import patch_once; patch_once(); "
        "from tests.ops.test_global_state import check_triton; check_triton()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_triton():
    """Run in a subprocess: the interpreter takes its time, so few tokens, and two of the states
    that an allocation can depend on.
    """
    for name, case in CASES.items():
        case = replace(
            case,
            **{"grid": (2, 2, 2)} if hasattr(case, "grid") else {},
            **{} if name == "reduce" else {"length": 3},
        )
        expected = run(case, "triton")
        for state in ("bfloat16 by default", "meta by default"):
            assert same(run(case, "triton", forward=STATES[state], backward=STATES[state]), expected), (
                f"{name} with {state}"
            )


def test_operators_give_the_same_bits_in_cuda_kernels_on_a_cpu():
    """Of formats that test_cuda.py compiles too."""
    formats = {"states": 16, "dtype": "float32", "dtype_delta": "float32", "dtype_state": "float32"}
    cases = [
        simplest(ScanCase, direction="reverse", initial=True, D=True, bias=True, z="all", **formats),
        simplest(ScanCase, direction="both", D=True, z="kept", reduction=(2, 2, 2), **formats),
        simplest(ConvCase, direction="both", bias=True, dtype="bfloat16"),
        simplest(ReduceCase, reduction=(2, 2, 2)),
    ]
    with launcher.using(OnCpu()):
        for case in cases:
            expected = run(case, "cuda")
            for state in ("bfloat16 by default", "meta by default"):
                assert same(run(case, "cuda", forward=STATES[state], backward=STATES[state]), expected), (
                    f"{case} with {state}"
                )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_forward_gives_the_same_bits_without_gradients(mode, backend):
    if sk.why_not("scan", backend):
        pytest.skip(f"{backend}: {sk.why_not('scan', backend)}")
    for name, case in CASES.items():
        if sk.why_not(name.split()[0], backend):
            continue
        leaves = {n: t.requires_grad_() for n, t in case.operands().items()}
        expected = {n: t.detach() for n, t in case.call(sk, leaves, backend=backend).items()}
        with mode():
            assert same(case.call(sk, leaves, backend=backend), expected), name


def packed_projector():
    torch.manual_seed(0)
    model, x = TemporalProjector(6, 16, d_state=4), torch.randn(2, 5, 4, 3, 6)
    return lambda: model(x, TokenReduction(2, 2, 2))


def reference_projector():
    torch.manual_seed(0)
    model, x = reference.ReferenceTemporalProjector(6, 16, d_state=4), torch.randn(2, 5, 4, 3, 6)
    return lambda: model(x, TokenReduction(2, 2, 2))


def running_convolution():
    torch.manual_seed(0)
    x, state, weight, at = torch.randn(2, 3, 2), torch.randn(2, 3, 5), torch.randn(3, 4), torch.tensor([1, 6])
    return lambda: causal_conv1d_update(x, state.clone(), weight, activation="silu", cache_seqlens=at)


def convolution_with_padding():
    torch.manual_seed(0)
    x, weight, index = torch.randn(2, 3, 6), torch.randn(3, 4), torch.tensor([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 3, 3]])
    return lambda: causal_conv1d_fn(x, weight, None, index)


def running_scan():
    torch.manual_seed(0)
    x, dt, B = torch.randn(2, 3), torch.rand(2, 3), torch.randn(2, 4)
    state, A = torch.randn(2, 3, 4), -torch.rand(3, 4)
    return lambda: selective_state_update(state.clone(), x, dt, A, B, B, dt_softplus=True)


def compatible_mixer():
    torch.manual_seed(0)
    mixer, x = Mamba(8, d_state=4, bimamba_type="v1"), torch.randn(2, 7, 8)
    return lambda: mixer(x)


@pytest.mark.parametrize(
    "make",
    [
        packed_projector,
        reference_projector,
        running_convolution,
        convolution_with_padding,
        running_scan,
        compatible_mixer,
    ],
)
@pytest.mark.parametrize("state", [name for name in STATES if name != "autocast"])
def test_modules_and_compatible_functions_give_the_same_bits(make, state):
    call = make()
    expected = call()
    with STATES[state]():
        got = call()
    assert got.device == expected.device and got.dtype == expected.dtype and torch.equal(got, expected)


# --- allocations
# --------------------------------------------------------------------------------------------------

ALLOCATE = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "rand",
    "randn",
    "randint",
    "linspace",
    "eye",
    "empty_strided",
}


def test_every_allocation_names_dtype_and_device():
    """Of what calls ``torch.empty`` and its like; the keywords may come in a dictionary."""
    forgot = []
    for path in sorted(path for room in ("storm_kernels", "model") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in ALLOCATE
            ):
                continue
            if ast.unparse(node.func.value) != "torch":
                continue
            named = {keyword.arg for keyword in node.keywords}
            if None not in named and not named >= {"dtype", "device"}:
                forgot.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not forgot, "\n".join(forgot)
