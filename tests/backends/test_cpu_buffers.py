"""The "cpu" backend's borders: buffers that do not fit, memory that was freed, threads and forked processes."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import storm_kernels as sk
from storm_kernels.backends import cpu
from storm_kernels.backends.contract import ConvCall, ConvFilter, ScanCall
from storm_kernels.backends.cpu import loader, structs

from .test_cpu import GRADIENTS, built, forward_and_backward, options, run_python, scan_inputs

# --- buffers
# --------------------------------------------------------------------------------------------------


def cut(t: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose memory ends one element early."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())
    return t


def scan_call(short: str | None):
    """A gated scan of both directions and its backward pass, in which one buffer is short."""
    pair = [scan_inputs(2, 70, 9, dtype=torch.bfloat16, reverse=reverse) for reverse in (False, True)]
    z, grad = (torch.ones(2, 70, 9, dtype=torch.bfloat16) for _ in range(2))
    checkpoints = cpu.scan(ScanCall(tuple(pair), z, **options()), save_checkpoints=True).checkpoints
    if short in ("z", "gradient of out", "checkpoints"):
        z, grad = (cut(z), grad) if short == "z" else (z, cut(grad))
        checkpoints = tuple(map(cut, checkpoints)) if short == "checkpoints" else checkpoints
    elif short:
        i, name = int(short.endswith("_b")), short.removesuffix("_b")
        pair[i] = pair[i]._replace(**{name: cut(getattr(pair[i], name))})
    if short not in ("gradient of out", "checkpoints"):
        cpu.scan(ScanCall(tuple(pair), z, **options()), save_checkpoints=False)
    cpu.scan_backward(grad, None, ScanCall(tuple(pair), z, **options()), checkpoints, needs=GRADIENTS)


@built
@pytest.mark.parametrize(
    "name", ["u", "delta", "A", "B", "C", "D", "delta_bias", "u_b", "A_b", "C_b", "z", "gradient of out", "checkpoints"]
)
def test_a_scan_refuses_a_buffer_that_is_too_small(name):
    scan_call(None)
    with pytest.raises(
        RuntimeError, match=rf"selective_scan.* of \(2, 70, 9\) torch.bfloat16: {name} is absent, or does not hold"
    ):
        scan_call(name)


@built
@pytest.mark.parametrize("name", ["x", "weight", "bias_b", "out", "initial_state"])
def test_a_convolution_refuses_a_buffer_that_is_too_small(name):
    x, weight, bias, state = torch.ones(2, 9, 5), torch.ones(5, 4), torch.ones(5), torch.ones(2, 5, 3)
    filters = [ConvFilter(weight, bias, False), ConvFilter(weight, bias, True)]
    if name in ("weight", "bias_b"):
        i, field = int(name.endswith("_b")), name.removesuffix("_b")
        filters[i] = filters[i]._replace(**{field: cut(getattr(filters[i], field))})
    start = cut(state) if name == "initial_state" else None
    inputs, grads = cut(x) if name == "x" else x, tuple(cut(x) if name == "out" else x for _ in filters)
    filters = tuple(filters[:1] if start is not None else filters)
    with pytest.raises(RuntimeError, match=rf"causal_conv1d.*: {name} is absent, or does not hold"):
        if name != "out":
            cpu.conv(ConvCall(inputs, filters, silu=True, initial_state=start, cu_seqlens=None))
        needs = frozenset({"x", "weight", "bias"})
        cpu.conv_backward(
            grads[: len(filters)],
            ConvCall(inputs, filters, silu=True, initial_state=start, cu_seqlens=None),
            needs=needs,
        )


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_the_backend_allocates_is_measured_too(dtype, monkeypatch):
    """Whatever makes an allocation too small: the call is refused, and the heap stays whole."""
    inputs, x = scan_inputs(2, 70, 9, dtype=dtype), torch.ones(2, 8, 5, dtype=dtype)
    checkpoints = cpu.scan(ScanCall((inputs,), None, **options()), save_checkpoints=True).checkpoints
    grid, reduction, weight = sk.TokenGrid(2, 2, 2), sk.TokenReduction(2), ConvFilter(torch.ones(5, 4), None, False)
    empty, refused = torch.empty, "is absent, or does not hold"
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: cut(empty(*shape, **options)))
    for name in sorted(GRADIENTS - {"z"}):
        with pytest.raises(RuntimeError, match=f"gradient of {name} {refused}"):
            cpu.scan_backward(
                inputs.u, None, ScanCall((inputs,), None, **options()), checkpoints, needs=frozenset({name})
            )
    with pytest.raises(RuntimeError, match=f"checkpoints {refused}"):
        cpu.scan(ScanCall((inputs,), None, **options()), save_checkpoints=True)
    with pytest.raises(RuntimeError, match=f"out {refused}"):
        cpu.scan(ScanCall((inputs,), None, **options()), save_checkpoints=False)
    with pytest.raises(RuntimeError, match=f"out {refused}"):
        cpu.conv(ConvCall(x, (weight,), silu=True, initial_state=None, cu_seqlens=None))
    for name in ("x", "weight"):
        with pytest.raises(RuntimeError, match=f"gradient of {name} {refused}"):
            cpu.conv_backward(
                (x,), ConvCall(x, (weight,), silu=True, initial_state=None, cu_seqlens=None), needs=frozenset({name})
            )
    for call, name in ((cpu.reduce, "out"), (cpu.reduce_backward, "x")):
        with pytest.raises(RuntimeError, match=f"{name} {refused}"):
            call(x if name == "out" else x[:, :4], grid, reduction)


@built
def test_offsets_that_leave_the_sequence_are_refused():
    inputs = scan_inputs(1, 70, 9)
    for offsets in ([0, 71], [0, 80, 70], [1, 70], [-5, 70]):
        with pytest.raises(RuntimeError, match="cu_seqlens is absent, or does not hold"):
            cpu.scan(ScanCall((inputs,), None, **options(cu_seqlens=torch.tensor(offsets))), save_checkpoints=False)


@built
def test_freed_memory_is_refused():
    """FSDP and offloading empty a parameter's storage and leave its shape."""
    weight = torch.ones(4, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight is absent, or does not hold"):
        sk.causal_conv1d(torch.ones(1, 5, 4), weight, backend="cpu")


# --- processes
# --------------------------------------------------------------------------------------------------


@built
def test_threads_share_the_library():
    """The C functions' types are set once (changing them under a running call is a crash,
    python/cpython#127946): many threads at a time agree.
    """
    first = loader.Library(loader.LIBRARY).function
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: first("reduce", ctypes.POINTER(structs.CReduce)), range(64)))
        assert all(function is found[0] for function in found)
        inputs = scan_inputs(2, 70, 40)
        whole = forward_and_backward((inputs,), inputs.u)
        assert all(
            all(map(torch.equal, one, whole))
            for one in pool.map(lambda _: forward_and_backward((inputs,), inputs.u), range(64))
        )


FORK = """
import multiprocessing, warnings
import torch
import storm_kernels as sk
torch.set_num_threads(2)
inputs = [torch.ones(2, 70, 64), torch.ones(2, 70, 64), -torch.ones(64, 4), torch.ones(2, 70, 4), torch.ones(2, 70, 4)]
expected = sk.selective_scan(*inputs)

def child(results):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = sk.selective_scan(*inputs)
    results.put((torch.equal(out, expected), [str(w.message) for w in caught]))
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.selective_scan(*inputs)

context = multiprocessing.get_context("fork")
results = context.SimpleQueue()
process = context.Process(target=child, args=(results,))
process.start()
process.join(60)
if process.is_alive():
    process.kill()
    raise SystemExit("the child waits for threads that it has not")
equal, said = results.get()
assert process.exitcode == 0 and equal and len(said) == 1 and "forked" in said[0], (process.exitcode, equal, said)
assert torch.equal(sk.selective_scan(*inputs), expected)
"""


@built
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    """As torch's DataLoader and many servers fork their workers. OpenMP's threads stay in the parent."""
    run_python(FORK)
