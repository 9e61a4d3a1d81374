"""The "cpu" backend's elementary functions and number formats, in every instruction set."""

import ctypes

import pytest
import torch

import storm_kernels as sk
from storm_kernels.backends.cpu import loader

from .test_cpu import built, supported

# Units in the last place above PyTorch's own largest error; without fused multiply-add every step
# of the polynomials rounds twice.
MARGIN = {"avx512": 0.4, "avx2": 0.4, "generic": 0.8}

FUNCTIONS = [
    # name, number in probe.cpp, float64 truth, range
    ("exp", 0, torch.exp, (-86.0, 88.0)),
    ("sigmoid", 1, torch.sigmoid, (-30.0, 30.0)),
    ("silu", 2, torch.nn.functional.silu, (-30.0, 30.0)),
    ("softplus", 3, torch.nn.functional.softplus, (-30.0, 25.0)),
    ("exp2", 4, torch.exp2, (-124.0, 127.9)),
]


def elementary(isa: str, number: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    probe = loader.Library(loader.LIBRARY, isa).function(
        "probe_function", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    )
    assert probe(number, x.data_ptr(), out.data_ptr(), x.numel()) == 0
    return out


@pytest.mark.parametrize("isa", supported())
@pytest.mark.parametrize(("name", "number", "function", "span"), FUNCTIONS, ids=[f[0] for f in FUNCTIONS])
def test_elementary_functions_are_as_accurate_as_torch(isa, name, number, function, span):
    x = torch.empty(200_000).uniform_(*span, generator=torch.Generator().manual_seed(1))
    truth = function(x.double())
    unit = torch.exp2(torch.floor(torch.log2(truth.abs())) - 23)
    ours, theirs = (((got.double() - truth) / unit).abs() for got in (elementary(isa, number, x), function(x)))
    assert ours.max() <= theirs.max() + MARGIN[isa]
    assert ours.square().mean().sqrt() <= 1.25 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("isa", supported())
def test_elementary_functions_at_the_ends(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([-inf, -1e30, -200.0, 200.0, 1e30, inf, nan, 0.0, -100.0, 100.0, 150.0])
    for number, expected in (
        (0, [0, 0, 0, inf, inf, inf, nan, 1, 0, inf, inf]),
        (1, [0, 0, 0, 1, 1, 1, nan, 0.5, 0, 1, 1]),
        (3, [0, 0, 0, 200, 1e30, inf, nan, 0.6931472, 0, 100, 150]),
        (4, [0, 0, 0, inf, inf, inf, nan, 1, 0, 2.0**100, inf]),
    ):
        torch.testing.assert_close(
            elementary(isa, number, x), torch.tensor(expected, dtype=torch.float32), equal_nan=True
        )


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_number_formats_round_as_torch_does(dtype):
    """Every number of the format, times some factors, through a convolution of one tap: subnormals,
    ties, overflow, infinities and NaN.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    factors = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-12, 1 / 3, 2.0, 2**-10, 3e38, 1.0])
    factors.view(torch.int32)[-1] = 0x7FFFFFFF  # a NaN that would become -0 if it were rounded like a number
    out = sk.causal_conv1d(every[None, :, None].expand(1, -1, len(factors)), factors[:, None], backend="cpu")
    expected = (every.float()[None, :, None] * factors).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()], expected[~out.isnan()])
