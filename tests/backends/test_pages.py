"""backends/pages.py: large results cost few page faults, and are tensors like any other."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import storm_kernels as sk
from storm_kernels.backends.cpu import loader
from storm_kernels.backends.pages import LEAST_BYTES, empty
from storm_kernels.nn.linear import _SLOW, linear

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OFFERED = ENABLED.exists() and "[never]" not in ENABLED.read_text()
SOURCE = Path(sk.__file__).parent / "backends/cpu/src/common.cpp"
needs_huge_pages = pytest.mark.skipif(not OFFERED, reason="this system brings no huge pages")
CPU = torch.device("cpu")

FAULTS = """
import resource, sys, torch
from storm_kernels.backends.pages import empty
from storm_kernels import selective_scan
from storm_kernels.nn.linear import _SLOW, linear
def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_grad_enabled(False)
torch.set_num_threads(1)
u, bc = torch.ones(1, 2048, 8192), torch.ones(1, 2048, 4)
scan = lambda n: selective_scan(u[..., :n], u[..., :n], -torch.ones(n, 4), bc, bc)
x, weight = torch.ones(2048, 64), torch.ones(8192, 64)
scan(64), linear(x, weight[:64])
filled = faults(lambda: empty((2**24,), torch.float32, torch.device("cpu")).fill_(1.0))
print(filled, faults(lambda: scan(8192)), faults(lambda: linear(x, weight)))
"""


def test_python_and_cpp_call_the_same_results_large():
    megabytes = int(re.search(r"LARGE = size_t\((\d+)\) << 20;", SOURCE.read_text(encoding="utf-8"))[1])
    assert megabytes * 2**20 == LEAST_BYTES


@needs_huge_pages
@pytest.mark.skipif(loader.why_missing() is not None, reason="the C++ library is not there")
def test_results_of_64_megabytes_cost_few_page_faults():
    """64 MB are 16,384 pages of 4 KB, and 32 of 2 MB. What is not aligned, and the libraries' own
    memory, may take some of the small ones.
    """
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert all(int(count) < 4096 for count in printed.split()), printed


def test_a_large_result_is_a_tensor_like_any_other():
    t = empty((LEAST_BYTES // 4 + 3,), torch.float32, CPU).fill_(2.0)
    saved = io.BytesIO()
    torch.save(t, saved)
    saved.seek(0)
    assert torch.equal(copy.deepcopy(t), t) and torch.equal(torch.load(saved), t)
    assert t.resize_(2 * t.numel())[: t.numel() // 2].eq(2.0).all()
    assert t.share_memory_().is_shared()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_product_is_that_of_pytorch(bias, dtype):
    """PyTorch's own where it has a kernel for this CPU (AVX-512 has one for bfloat16), else float32's, rounded."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 600, 24, generator=draw), torch.randn(1024, 24, generator=draw)
    operands = [t.to(dtype) for t in (x.transpose(0, 1), weight, *([weight[:, 0]] if bias else []))]
    with torch.inference_mode():
        got = linear(*operands)
    assert got.dtype == dtype and got.numel() * 4 >= LEAST_BYTES
    own = torch.nn.functional.linear(*operands)
    right = torch.nn.functional.linear(*(t.float() for t in operands)).to(dtype) if dtype in _SLOW else own
    torch.testing.assert_close(got, right)


def test_gradients_of_a_large_product():
    weight = torch.randn(1024, 24, requires_grad=True)
    linear(torch.randn(1200, 24), weight).sum().backward()
    assert weight.grad is not None


def test_a_compiled_large_product():
    weight = torch.randn(1024, 24)
    compiled = torch.compile(lambda x: linear(x, weight), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = torch.randn(1200, 24)
        torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, weight))


class _Kept(torch.Tensor):
    """A subclass that PyTorch's operations hand on."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_product_of_a_subclass_keeps_its_kind(dtype):
    x, weight = torch.randn(1200, 24).to(dtype), torch.randn(1024, 24).to(dtype)
    with torch.no_grad():
        got = linear(x.as_subclass(_Kept), weight)
    assert type(got) is _Kept
    torch.testing.assert_close(
        got.as_subclass(torch.Tensor), torch.nn.functional.linear(x.float(), weight.float()).to(dtype)
    )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_product_is_traced_without_memory(dtype, mode):
    x, weight = torch.randn(1200, 24).to(dtype), torch.randn(1024, 24).to(dtype)
    with torch.no_grad():
        traced = make_fx(lambda x, weight: linear(x, weight), tracing_mode=mode)(x, weight)
        torch.testing.assert_close(traced(x, weight), linear(x, weight))


def test_huge_pages_in_a_projector_change_no_result():
    torch.manual_seed(0)
    projector = sk.TemporalProjector(8, 256).eval()
    features = torch.randn(1, 16, 32, 32, 8)
    with torch.inference_mode():
        large = projector(features)
    torch.testing.assert_close(large, projector(features).detach(), rtol=1e-4, atol=1e-5)
