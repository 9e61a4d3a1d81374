"""The "cpu" backend beyond the shared parity suite: variants, determinism, empty inputs, memory.
For building: test_cpu_build.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import storm_kernels as sk
from storm_kernels.backends import cpu
from storm_kernels.backends.contract import ConvCall, ConvFilter, ScanCall, ScanInputs
from storm_kernels.backends.cpu import build, loader

from ..support.extremes import check_enormous_decays
from ..support.parity import check
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest

REASON = loader.why_missing()
built = pytest.mark.skipif(REASON is not None, reason=f"the C++ library is not there: {REASON}")
ROOT = Path(__file__).resolve().parent.parent.parent
GRADIENTS = frozenset({"u", "delta", "A", "B", "C", "D", "delta_bias", "z"})


def supported() -> list[str]:
    return [] if REASON else loader.library().supported()


def scan_inputs(batch, length, channels, states=16, dtype=torch.float32, reverse=False, seed=0) -> ScanInputs:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    u, delta = (normal(batch, length, channels).to(dtype) for _ in range(2))
    B, C = (normal(batch, length, 1, states).to(dtype) for _ in range(2))
    return ScanInputs(u, delta, -torch.exp(normal(channels, states)), B, C, normal(channels), normal(channels), reverse)


def options(**changes) -> dict:
    return {
        "delta_softplus": True,
        "initial_state": None,
        "cu_seqlens": None,
        "grid": None,
        "reduction": None,
    } | changes


def forward_and_backward(directions, z, **changes) -> list[torch.Tensor]:
    result = cpu.scan(ScanCall(directions, z, **options(**changes)), save_checkpoints=True)
    draw = torch.randn(result.out.shape, generator=torch.Generator().manual_seed(9)).to(result.out.dtype)
    grads, grad_z, _ = cpu.scan_backward(
        draw, None, ScanCall(directions, z, **options(**changes)), result.checkpoints, needs=GRADIENTS
    )
    return [result.out, grad_z, *(t for one in grads for t in one)]


# --- elementary functions
# --------------------------------------------------------------------------------------------------


# --- variants
# --------------------------------------------------------------------------------------------------

SCANS = [
    {"states": 16, "direction": "both", "reduction": (2, 2, 2), "z": "kept"},
    {"states": 16, "direction": "reverse", "packed": True, "initial": True},
    {"states": 5, "groups": 2, "dtype": "bfloat16", "dtype_delta": "float16", "layout": "sliced"},
    {"states": 300, "channels_per_group": 3, "length": 9},
    {"channels_per_group": 1, "length": 1},
]


def scan_case(**changes) -> ScanCase:
    sizes = {"seed": 3, "length": 67, "grid": (5, 3, 3), "channels_per_group": 21, "states": 16}
    return simplest(ScanCase, **(sizes | {"D": True, "z": "all", "bias": True} | changes))


def check_variant() -> None:
    """Run in a subprocess by the tests below: every kernel of the variant in use against the float64 reference."""
    for changes in SCANS:
        check(scan_case(**changes), "cpu")
    for direction, width in (("both", 4), ("reverse", 7)):
        check(
            ConvCase(5, 2, 67, 21, width, direction, "float32", "sliced", True, True, direction != "both", False), "cpu"
        )
    check(ReduceCase(6, 2, (5, 3, 3), 21, "float16", "transposed", (2, 2, 2)), "cpu")
    check_enormous_decays("cpu")


@pytest.mark.parametrize("isa", supported())
def test_every_variant_keeps_the_bound(isa):
    run_python("from tests.backends.test_cpu import check_variant; check_variant()", STORM_KERNELS_CPU_ISA=isa)


@built
def test_sixteen_lanes_keep_the_bound(tmp_path):
    """The lanes of AVX-512 on whatever vectors this processor has: indices and tails are those of
    the AVX-512 variant.
    """
    isa, library = loader.library().isa, tmp_path / "lanes16.so"
    build.build(library, flags=("-O1", "-DSTORM_LANES=16"), only=(isa,))
    code = (
        f"from pathlib import Path; import storm_kernels.backends.cpu.loader as l; l.LIBRARY = Path({str(library)!r}); "
    )
    run_python(code + "from tests.backends.test_cpu import check_variant; check_variant()", STORM_KERNELS_CPU_ISA=isa)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- determinism
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_over_1000_reruns_and_any_number_of_threads(threads, dtype):
    pair = (scan_inputs(2, 70, 40, dtype=dtype), scan_inputs(2, 70, 40, dtype=dtype, reverse=True, seed=1))
    z = torch.randn(2, 70, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    filters = tuple(ConvFilter(pair[0].A[:, :4].contiguous(), pair[0].D, reverse) for reverse in (False, True))
    first = None
    for rerun in range(1000):
        threads(1 + rerun % 3)
        results = forward_and_backward(pair, z)
        grads = tuple(torch.ones_like(z) for _ in filters)
        needs = frozenset({"x", "weight", "bias"})
        grad_x, parameters, _ = cpu.conv_backward(
            grads, ConvCall(z, filters, silu=True, initial_state=None, cu_seqlens=None), needs=needs
        )
        out = cpu.conv(ConvCall(z, filters, silu=True, initial_state=None, cu_seqlens=None))
        found = [*results, *out, grad_x, *(t for one in parameters for t in one)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@built
def test_bitwise_the_same_alone_and_in_a_batch():
    whole, z = scan_inputs(3, 150, 40), torch.randn(3, 150, 40)
    out, grad_z, *grads = forward_and_backward((whole,), z)
    for i in range(3):
        one = ScanInputs(*(t[i : i + 1] if t.dim() > 2 else t for t in whole[:7]), False)
        result = cpu.scan(ScanCall((one,), z[i : i + 1], **options()), save_checkpoints=False)
        assert torch.equal(result.out, out[i : i + 1])


# --- long sequences
# --------------------------------------------------------------------------------------------------


@built
def test_long_sums_lose_nothing():
    """Parameters' gradients over 200,000 tokens, of one sign, so that every rounding of a plain sum
    would add up: within two ulp.
    """
    u = torch.rand(1, 200_000, 8, generator=torch.Generator().manual_seed(0))
    D, bias, weight = (torch.zeros(shape, requires_grad=True) for shape in (8, 8, (8, 1)))
    # exp(delta A) is zero: y = (delta + bias + D) u, and each of these gradients is the sum of u
    A, delta, B = torch.full((8, 1), -2.0), torch.full_like(u, 60.0), torch.ones(1, u.shape[1], 1)
    scanned = sk.selective_scan(u, delta, A, B, B, D, delta_bias=bias, backend="cpu")
    gradients = torch.autograd.grad(scanned.sum() + sk.causal_conv1d(u, weight, backend="cpu").sum(), [D, bias, weight])
    truth = u.double().sum((0, 1))
    for got in gradients:
        assert ((got.flatten() - truth).abs() <= 2 * torch.finfo(torch.float32).eps * truth).all()


# --- values and shapes at the edges
# ---------------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize(
    ("batch", "length", "offsets"), [(0, 7, None), (2, 0, None), (1, 0, [0, 0, 0]), (1, 5, [0, 0, 5, 5])]
)
def test_empty_batches_and_sequences(batch, length, offsets):
    inputs = scan_inputs(batch, length, 9)
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    sequences = batch if offsets is None else len(offsets) - 1
    start = torch.randn(sequences, 9, 16)
    call = options(initial_state=start, cu_seqlens=cu_seqlens)
    result = cpu.scan(ScanCall((inputs,), None, **call), save_checkpoints=True)
    empty = [i for i in range(sequences) if (length if offsets is None else offsets[i + 1] - offsets[i]) == 0]
    assert torch.equal(result.final_state[empty], start[empty])
    needs = (GRADIENTS - {"z"}) | {"initial_state"}
    grads, _, grad_start = cpu.scan_backward(
        torch.ones_like(result.out), start, ScanCall((inputs,), None, **call), result.checkpoints, needs=needs
    )
    assert torch.equal(grad_start[empty], start[empty])
    assert all(torch.isfinite(t).all() for t in grads[0])


@built
def test_extreme_decays_match_the_reference():
    """exp(delta A) that is zero, infinite or not a number, in the blocks beside tame ones too."""
    u, B = torch.ones(1, 3, 24), torch.ones(1, 3, 2)
    A = torch.full((24, 2), -1.0)
    A[0], A[1], A[2] = -1e6, 25.0, float("nan")
    delta = torch.full((1, 3, 24), 2.0)
    out, expected = (sk.selective_scan(u, delta, A, B, B, backend=backend) for backend in ("cpu", "torch"))
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert expected[0, 2, 1].isinf() and expected[0, 0, 2].isnan() and expected[0, 2, 0] == 4.0


@built
@pytest.mark.parametrize("extreme", [-1e6, 60.0, float("nan")])
def test_one_extreme_decay_matches_the_reference(extreme):
    """exp(delta A) of one channel is zero, infinite or not a number, those of its neighbours are tame."""
    u, B, delta = torch.ones(1, 3, 24), torch.ones(1, 3, 2), torch.full((1, 3, 24), 2.0)
    A = torch.full((24, 2), -1.0)
    A[1] = extreme
    out, expected = (sk.selective_scan(u, delta, A, B, B, backend=backend) for backend in ("cpu", "torch"))
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert not torch.equal(expected[0, 2, 1], expected[0, 2, 0])


@built
def test_a_decay_that_is_no_number_among_tame_ones():
    """Whatever bits it has: those of a NaN that would become a number, if the exponential took it for one."""
    u, B, delta, A = torch.ones(1, 3, 24), torch.ones(1, 3, 4), torch.ones(1, 3, 24), torch.full((24, 4), -1.0)
    A.view(torch.int32)[1, 1] = 0x7FFFFFFF
    out = sk.selective_scan(u, delta, A, B, B, backend="cpu")
    assert out[0, 1:, 1].isnan().all() and out[..., 0].isfinite().all()


@built
def test_decays_at_the_end_of_float32():
    check_enormous_decays("cpu")


MEMORY = """
import resource, sys, torch
from tests.backends.test_cpu import cpu, forward_and_backward, scan_inputs
torch.set_num_threads(2)
forward_and_backward((scan_inputs(1, 64, 256),), torch.randn(1, 64, 256))
inputs, z = scan_inputs(1, 8192, 256), torch.randn(1, 8192, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
forward_and_backward((inputs,), z)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@built
def test_backward_memory_is_below_three_times_inputs_and_gradients():
    grown = int(run_python(MEMORY)) * 1024
    tensor = 8192 * 256 * 4
    inputs_and_gradients = 7 * tensor  # u, delta, z, their gradients, and the output's; B and C are small
    assert grown + 3 * tensor < 3 * inputs_and_gradients


# --- what the backend says of itself
# -------------------------------------------------------------------------------------------------------------


@built
def test_an_unknown_instruction_set_is_named():
    reason = run_python(
        "from storm_kernels.backends.cpu import loader; print(loader.why_missing())", STORM_KERNELS_CPU_ISA="mmx"
    )
    assert "'mmx' is not available" in reason and "generic" in reason


@pytest.mark.parametrize(
    ("op", "device", "dtype", "said"),
    [
        ("scan", "cuda", torch.float32, "'cuda'"),
        ("scan", "cpu", torch.float64, "torch.float64"),
    ],
)
def test_why_not_says_why(op, device, dtype, said):
    assert said in cpu.why_not(op, device=device, dtypes=frozenset({dtype}), d_state=16, d_conv=0)


@built
def test_the_rate_of_exp_is_measured():
    assert cpu.exp2_fma_rate(repeats=1) > 1e7
