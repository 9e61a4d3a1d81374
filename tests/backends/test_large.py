"""Offsets past 2^31 and 2^32 elements, and axes past the limits of launch grids (docs/reliability.md, R6).

The far-apart rows lie in an anonymous mapping of which only the touched pages exist, so most of
this needs little memory.
"""

import mmap
from contextlib import nullcontext

import pytest
import torch

import storm_kernels as sk
from storm_kernels.backends.cuda import launcher

from ..support.cuda_on_cpu import OnCpu
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest

FAR = 2**32 + 64  # elements from the first token to the last
INTERPRETED = not sk.why_not("scan", "triton", device="cpu")
BACKENDS = [name for name in ("cpu",) if not INTERPRETED and not sk.why_not("scan", name)]
HALF = {"batch": 1, "dtype": "bfloat16", "dtype_delta": "bfloat16", "dtype_state": "bfloat16"}
# Rows far enough apart for one step to pass 2^31, and so many that the offset of a kernel's next
# tile does.
CASES = {
    "scan": simplest(ScanCase, direction="both", length=5, states=16, D=True, z="all", **HALF),
    "scan_tiles": simplest(ScanCase, direction="both", length=70, states=16, D=True, z="all", **HALF),
    "scan_reduced": simplest(ScanCase, direction="both", grid=(5, 1, 1), reduction=(2, 1, 2), z="kept", **HALF),
    "conv": simplest(ConvCase, direction="both", length=5, **HALF),
    "conv_tiles": simplest(ConvCase, direction="both", length=70, **HALF),
    "reduce": simplest(ReduceCase, grid=(5, 1, 1), reduction=(2, 1, 2), **HALF),
    "reduce_frames": simplest(ReduceCase, grid=(70, 1, 1), reduction=(2, 1, 2), **HALF),
}


@pytest.fixture(scope="module")
def far_rows():
    """A function that copies tensors (1, L, ...) into rows far apart, side by side."""
    space = torch.frombuffer(mmap.mmap(-1, 2 * (FAR + 8192)), dtype=torch.bfloat16)
    used = 0

    def place(value):
        nonlocal used
        view = space.as_strided(value.shape, (0, FAR // (value.shape[1] - 1), *value[0, 0].stride()), used)
        used += value[0, 0].numel()
        return view.copy_(value)

    return place


@pytest.fixture(scope="module", params=["triton"] if INTERPRETED else [*BACKENDS, "cuda"])
def far_backend(request):
    """CUDA's kernels run on the CPU; Triton's where the interpreter was asked for, then nothing else."""
    with launcher.using(OnCpu()) if request.param == "cuda" else nullcontext():
        yield request.param


# A Triton scan has no tiles, and the interpreter takes minutes for 70 tokens.
@pytest.mark.parametrize("name", [name for name in CASES if not (INTERPRETED and name == "scan_tiles")])
def test_far_apart_rows_are_read_where_they_are(name, far_backend, far_rows):
    case = CASES[name]
    operands = case.operands()
    apart = {n: far_rows(v) if v.dim() >= 3 else v for n, v in operands.items()}
    assert max((v.shape[1] - 1) * v.stride(1) for v in apart.values() if v.dim() >= 3) >= 2**32
    near, far = (results(case, far_backend, given) for given in (operands, apart))
    for result, value in near.items():
        assert torch.equal(value, far[result]), result


WIDE = {
    "channels of a scan": simplest(ScanCase, channels_per_group=65_540, length=3, batch=1, direction="both", z="all"),
    "sequences": simplest(ScanCase, length=2, batch=65_540, channels_per_group=1, states=1),
    "channels of a convolution": simplest(ConvCase, channels=65_540, length=3, batch=1, direction="both"),
    "channels of a reduction": simplest(ReduceCase, channels=65_540, grid=(3, 1, 1), batch=1, reduction=(2, 1, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WIDE)
def test_axes_past_65535_are_their_parts(name, backend):
    """The last few of 65,540 channels or sequences come out, forward and backward, as they do alone."""
    case = WIDE[name]
    operands, size = case.operands(), 65_540

    def last(value):
        own = next((a for a in (value.dim() - 1, 0) if value.shape[a] == size), None)
        return value if own is None else value.narrow(own, size - 20, 20).clone()

    whole = results(case, backend, operands)
    alone = results(case, backend, {n: last(v) for n, v in operands.items()})
    for name, value in alone.items():
        if value.shape != whole[name].shape:
            assert torch.equal(last(whole[name]), value), name


def results(case, backend, operands):
    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    outs = case.call(sk, leaves, backend=backend)
    grads = torch.autograd.grad([out.square().sum() for out in outs.values()], list(leaves.values()))
    return outs | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.large
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_of_more_than_2_to_the_31_elements(backend):
    channels, length = 1024, 2**21 + 3
    x = torch.randn(1, length, 1, dtype=torch.bfloat16).repeat(1, 1, channels)
    assert x.numel() > 2**31
    weight = torch.randn(channels, 4)
    out = sk.causal_conv1d(x, weight, activation="silu", backend=backend)
    for part in (slice(0, 64), slice(length // 2, length // 2 + 64), slice(length - 64, length)):
        history = slice(max(part.start - 3, 0), part.stop)
        expected = sk.causal_conv1d(x[:, history], weight, activation="silu", backend=backend)[
            :, part.start - history.start :
        ]
        assert torch.equal(out[:, part], expected)
