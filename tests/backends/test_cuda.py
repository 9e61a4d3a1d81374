"""The CUDA backend's kernels, run on a CPU by tests/support/cuda_on_cpu: indices, tails, halos,
order, reductions, hand-over and the adjoint.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storm_kernels as sk
from storm_kernels.backends.cuda import launcher
from storm_kernels.backends.cuda.gate import gate_backward, merge_directions
from storm_kernels.backends.cuda.tokens import sum_terms

from ..support.cuda_on_cpu import OnCpu
from ..support.extremes import FINITE, check_enormous_decays
from ..support.parity import check
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest
from ..support.parity_random import CASES, fuzz_cases

# Every draw of formats and sizes would be one more compilation: these cover each format in each
# place and each mapping of threads.
SCANS = [
    {"states": 16, "dtype": "float32", "dtype_delta": "float32", "dtype_state": "float32"},
    {"states": 16, "dtype": "bfloat16", "dtype_delta": "bfloat16", "dtype_state": "bfloat16"},
    {"states": 5, "dtype": "float16", "dtype_delta": "float32", "dtype_state": "bfloat16"},
    {"states": 1, "dtype": "float32", "dtype_delta": "float16", "dtype_state": "float16"},
    {"states": 32, "dtype": "bfloat16", "dtype_delta": "float32", "dtype_state": "float32"},
]
CONVS = [
    {"width": 4, "dtype": "bfloat16"},
    {"width": 3, "dtype": "float32"},
    {"width": 1, "dtype": "float16", "packed": False},
]
VARIANTS = {"scan": SCANS, "conv": CONVS, "reduce": [{}]}
CASE_COUNTS = {"scan": 30, "conv": 40, "reduce": 15}


@pytest.mark.parametrize("op", VARIANTS)
def test_random_cases_keep_the_bound(op, on_cpu):
    variants = st.sampled_from(VARIANTS[op])
    cases = st.builds(lambda case, changes: dataclasses.replace(case, **changes), CASES[op], variants)

    @settings(
        max_examples=fuzz_cases(CASE_COUNTS[op]),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(cases)
    def run(case):
        check(case, "cuda")

    run()


def test_decays_at_the_end_of_float32(on_cpu):
    """Of an infinite A the tokens that fill the last tile make NaN, in the gradients of the
    sequence's last ones too.
    """
    check_enormous_decays("cuda", FINITE)


@pytest.mark.parametrize("changes", SCANS, ids=lambda changes: f"states{changes['states']}-{changes['dtype']}")
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_scan_over_several_intervals(changes, direction, on_cpu):
    check(
        simplest(
            ScanCase, length=300, direction=direction, initial=True, D=True, z="all", bias=True, batch=1, **changes
        ),
        "cuda",
    )


@pytest.mark.parametrize("length", [127, 128, 129, 256])
def test_scan_around_a_checkpoint(length, on_cpu):
    check(simplest(ScanCase, length=length, direction="reverse", initial=True, states=16, z="all"), "cuda")


def test_scan_of_packed_sequences_longer_than_an_interval(on_cpu):
    check(simplest(ScanCase, seed=3, length=400, direction="both", packed=True, states=16, z="all"), "cuda")
    check(simplest(ScanCase, seed=3, length=400, direction="reverse", packed=True, initial=True, states=16), "cuda")


@pytest.mark.parametrize("channels", [63, 64, 65, 130])
def test_channel_tails(channels, on_cpu):
    check(
        simplest(ScanCase, channels_per_group=channels, batch=1, states=16, direction="both", z="all", D=True), "cuda"
    )


@pytest.mark.parametrize("states", [200, 512])
def test_states_over_all_lanes(states, on_cpu):
    check(simplest(ScanCase, states=states, length=70, batch=1, direction="reverse", initial=True, z="all"), "cuda")


@pytest.mark.parametrize("reduction", [(4, 1, 2), (3, 2, 1), (4, 2, 2)])
@pytest.mark.parametrize("z", ["all", "kept"])
def test_reduced_scan_over_many_frames(reduction, z, on_cpu):
    check(
        simplest(ScanCase, grid=(23, 3, 5), reduction=reduction, direction="both", z=z, D=True, states=16, batch=1),
        "cuda",
    )


# Frames of 20 tokens: a tile lies within a pool of its own, or where two meet, never at the same
# place; of 32: where a pool begins; and rows of 16 pooled in twos.
@pytest.mark.parametrize(
    "grid, reduction",
    [((9, 4, 5), (2, 1, 2)), ((9, 4, 5), (3, 1, 1)), ((10, 4, 8), (2, 1, 3)), ((7, 3, 16), (2, 2, 1))],
)
@pytest.mark.parametrize("direction, z", [("both", "kept"), ("reverse", "all")])
def test_reduced_scan_of_tiles_within_a_pool(grid, reduction, direction, z, on_cpu):
    check(
        simplest(
            ScanCase,
            grid=grid,
            reduction=reduction,
            direction=direction,
            z=z,
            D=True,
            states=16,
            channels_per_group=70,
            batch=2,
        ),
        "cuda",
    )


# Rows of whole 16 bytes come by asynchronous copies: those of a pool that ends with its tile must
# not meet the next pool's.
@pytest.mark.parametrize(
    "grid, reduction",
    [((10, 4, 8), (2, 1, 1)), ((9, 4, 8), (2, 1, 2)), ((9, 4, 5), (2, 1, 1)), ((7, 3, 16), (2, 2, 1))],
)
@pytest.mark.parametrize("z", ["all", "kept"])
def test_reduced_scan_by_asynchronous_copies(grid, reduction, z, on_cpu):
    check(
        simplest(
            ScanCase,
            grid=grid,
            reduction=reduction,
            direction="both",
            z=z,
            D=True,
            states=16,
            channels_per_group=64,
            batch=1,
        ),
        "cuda",
    )


# A grid of 529 cells: their sums take 135 KB.
@pytest.mark.parametrize("shared", [163 * 1024, 227 * 1024])
def test_reduced_scan_whose_sums_grow_past_shared_memory(shared):
    with launcher.using(OnCpu(shared=shared)):
        check(
            simplest(
                ScanCase, grid=(3, 23, 23), reduction=(2, 1, 1), direction="both", z="all", D=True, states=16, batch=1
            ),
            "cuda",
        )


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_over_several_tiles(direction, packed, on_cpu):
    order = {"direction": direction, "packed": packed}
    check(simplest(ConvCase, seed=3, length=530, channels=5, initial=True, bias=True, **order), "cuda")


def test_reduction_of_a_large_grid(on_cpu):
    check(simplest(ReduceCase, grid=(9, 11, 13), channels=40, reduction=(4, 3, 2)), "cuda")


def _scan(**changes) -> dict:
    case = simplest(
        ScanCase, length=150, channels_per_group=70, direction="both", z="all", D=True, states=16, **changes
    )
    operands = case.operands()
    leaves = {name: value.requires_grad_() for name, value in operands.items()}
    out = case.call(_Cuda(), leaves)["out"]
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


class _Cuda:
    def __getattr__(self, name):
        return lambda *args, **options: getattr(sk, name)(*args, backend="cuda", **options)


def test_blocks_side_by_side_change_no_bit():
    with launcher.using(OnCpu()):
        alone = _scan()
    with launcher.using(OnCpu(at_once=3)):
        for _ in range(5):
            beside = _scan()
            assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_one_batch_row_gives_the_bits_of_many(on_cpu):
    case = simplest(ScanCase, length=150, channels_per_group=70, states=16, z="all", initial=True, batch=3)
    operands = case.operands()
    whole = case.call(_Cuda(), operands)
    for row in range(3):
        one = {name: value[row : row + 1] if value.shape[0] == 3 else value for name, value in operands.items()}
        found = case.call(_Cuda(), one)
        assert all(torch.equal(found[name][0], whole[name][row]) for name in whole)


def test_rows_more_than_2_to_the_31_bytes_apart(on_cpu):
    """Pages in between are never touched: they take no memory."""
    far = torch.empty(2**31 // 2 + 32, dtype=torch.bfloat16).as_strided((1, 2, 32), (0, 2**31 // 2, 1))
    near = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    far.copy_(near)
    y = torch.randn(1, 1, 2, 32, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(
        gate_backward(far, 2, far, y, None, None), gate_backward(near, 2, near, y, None, None), strict=True
    ):
        assert torch.equal(found, expected)
    sums = [merge_directions(y[0], y[0], z, torch.bfloat16, save_y=False) for z in (far, near)]
    assert torch.equal(*sums)


def test_more_tokens_than_an_index_holds_are_refused():
    endless = torch.zeros(1, 1, 8, device="meta").expand(1, 2**31, 8)
    with pytest.raises(ValueError, match="at most 2.31 - 16 tokens a batch row, got 2147483648"):
        merge_directions(endless, endless, None, torch.float32, save_y=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_formats_round_as_torch_does(dtype, on_cpu):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    same_numbers(sum_terms(every[None, None], torch.float32)[0], every.float())
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    some = torch.cat(
        [bits.view(torch.float32), every.float() * (1 + 2**-12), torch.tensor([65519.9, 65520.0, 6e-8, 2.9e-8, 3e-8])]
    )
    same_numbers(sum_terms(some[None, None], dtype)[0], some.to(dtype))


def same_numbers(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])


def test_long_sums_lose_nothing(on_cpu):
    terms = torch.rand(3, 20000, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum_terms(terms, torch.float32), terms.double().sum(1).float())
