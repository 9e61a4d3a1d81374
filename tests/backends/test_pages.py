"""backends/pages.py: large results cost few page faults, and are tensors like any other."""

import copy
import gc
import io
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import storm_kernels as sk
from storm_kernels.backends import pages
from storm_kernels.backends.cpu import loader
from storm_kernels.backends.pages import LEAST_BYTES, empty
from storm_kernels.nn.linear import _SLOW, linear

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OFFERED = ENABLED.exists() and "[never]" not in ENABLED.read_text()
SOURCE = Path(sk.__file__).parent / "backends/cpu/src/common.cpp"
needs_huge_pages = pytest.mark.skipif(not OFFERED, reason="this system brings no huge pages")
on_linux = pytest.mark.skipif(not pages._ON_LINUX, reason="memory is kept under Linux only")
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
print(filled, faults(lambda: scan(8192)), faults(lambda: linear(x, weight)), faults(lambda: scan(8192)))
"""


def test_python_and_cpp_call_the_same_results_large():
    megabytes = int(re.search(r"LARGE = size_t\((\d+)\) << 20;", SOURCE.read_text(encoding="utf-8"))[1])
    assert megabytes * 2**20 == LEAST_BYTES


@needs_huge_pages
@pytest.mark.skipif(loader.why_missing() is not None, reason="the C++ library is not there")
def test_results_of_64_megabytes_cost_few_page_faults():
    """64 MB are 16,384 pages of 4 KB, and 32 of 2 MB. What is not aligned, and the libraries' own
    memory, may take some of the small ones. The last one lies in memory that another has left.
    """
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    counts = [int(count) for count in printed.split()]
    assert max(counts) < 4096 and counts[-1] < 64, printed


def test_a_large_result_is_a_tensor_like_any_other():
    t = empty((LEAST_BYTES // 4 + 3,), torch.float32, CPU).fill_(2.0)
    saved = io.BytesIO()
    torch.save(t, saved)
    saved.seek(0)
    assert torch.equal(copy.deepcopy(t), t) and torch.equal(torch.load(saved), t)
    assert t.numpy().base is not None and t.untyped_storage().nbytes() == t.nbytes
    assert t.share_memory_().is_shared() and t.eq(2.0).all()


@pytest.fixture(name="kept")
def what_is_kept():
    """An empty store of freed pieces, as sizes in bytes."""
    gc.collect()
    pages.release()
    yield lambda: sorted(len(piece) for pieces in pages._kept._pieces.values() for piece in pieces)
    pages.release()


def large(megabytes):
    return empty((megabytes * 2**18,), torch.float32, CPU)


@on_linux
def test_freed_memory_serves_the_next_result_of_its_size_or_a_little_less(kept):
    first = large(16)
    place = first.data_ptr()
    view = first[5:]
    del first
    assert kept() == []  # the view is of it
    del view
    assert kept() == [16 * 2**20]
    for megabytes in (16, 15, 13, 12):
        assert large(megabytes).data_ptr() == place
    for megabytes in (10, 17):
        assert large(megabytes).data_ptr() != place


@on_linux
def test_what_is_in_use_is_nobody_elses(kept):
    """Of 200 results, alive or freed at random, each keeps what was written to it."""
    draw, alive = random.Random(0), {}
    for number in range(200):
        alive[number] = large(draw.choice((4, 5, 6, 8))).fill_(number)
        while len(alive) > 6:
            gone = draw.choice(list(alive))
            assert alive.pop(gone).eq(gone).all()
    assert len({t.data_ptr() for t in alive.values()}) == 6


@on_linux
def test_what_is_kept_is_limited(kept, monkeypatch):
    monkeypatch.setattr(pages, "_MOST_BYTES", 40 * 2**20)
    alive = [large(megabytes) for megabytes in (8, 8, 16, 12)]
    while alive:
        alive.pop(0)  # the one used least lately goes first
    assert kept() == [12 * 2**20, 16 * 2**20] or sum(kept()) <= 40 * 2**20
    large(64)
    assert sum(kept()) <= 40 * 2**20
    pages.release()
    assert kept() == []


@on_linux
def test_threads_that_take_and_free_at_once(kept):
    def work(number):
        for turn in range(60):
            t = large(4 + turn % 3).fill_(number)
            assert t[:: 2**16].eq(number).all()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@on_linux
def test_tensors_that_the_garbage_collector_frees_at_any_moment(kept):
    before = gc.get_threshold()
    gc.set_threshold(1, 10**6, 10**6)  # what is new is looked through at once, and nothing else
    try:
        for turn in range(300):
            ring = [large(4 + turn % 4).fill_(turn)]
            ring.append(ring)
            alive = large(4 + turn % 3).fill_(-turn)
            del ring
            assert alive[:: 2**16].eq(-turn).all()
    finally:
        gc.set_threshold(*before)


@on_linux
def test_a_program_ends_well_with_results_alive():
    program = (
        "import torch; from storm_kernels.backends.pages import empty\n"
        "kept = [empty((2**22,), torch.float32, torch.device('cpu')) for _ in range(3)]; kept.pop()\n"
        "torch.kept = kept; ring = [kept]; ring.append(ring)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


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
