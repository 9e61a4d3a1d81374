"""A mixer in blocks of its channels: what it gives, what it takes, and when it is cut."""

import copy
import functools
import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

import storm_kernels as sk
from storm_kernels.nn import memory
from storm_kernels.nn.channels import mix_by_channels
from storm_kernels.nn.memory import peak_bytes
from storm_kernels.reference import ReferenceMixer

from ..support.allocations import Allocations
from ..support.parity import FEW

GRID = sk.TokenGrid(7, 2, 3)
WIDTH, CHANNELS = 12, 24
OPTIONS = {
    "plain": {},
    "one direction": {"bidirectional": False},
    "biases": {"bias": True, "if_divide_out": True},
    "no bias of convolutions": {"conv_bias": False, "d_conv": 2, "dt_rank": 3},
}
CALLS = {
    "all tokens": (None, None, None),
    "pooled": (GRID, sk.TokenReduction(2, 2), None),
    "sampled": (GRID, sk.TokenReduction(3, 1, 2), None),
    "packed": (None, None, torch.tensor([0, 5, 5, 20, 42])),
}


def gradients(mixer, x, call):
    x = x.detach().requires_grad_()
    out = mixer(x, *call)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, [x, *mixer.parameters()], weight)
    return [out.detach(), *found]


@functools.cache
def yardsticks(options, call, dtype):
    """A mixer, an input, what is right for it in float64; of each result the reference's worst errors on several."""
    torch.manual_seed(0)
    mixer = sk.BiMambaMixer(WIDTH, d_state=4, **OPTIONS[options]).to(dtype)
    plain = ReferenceMixer(WIDTH, d_state=4, **OPTIONS[options]).to(dtype)
    plain.load_state_dict(mixer.state_dict())
    inputs = [torch.randn(1 if call == "packed" else 2, GRID.tokens, WIDTH).to(dtype) for _ in range(8)]
    truths = [gradients(copy.deepcopy(plain).double(), x.double(), CALLS[call]) for x in inputs]
    plains = [gradients(plain, x, CALLS[call]) for x in inputs]
    errors = [
        [size_of_error(one, truth) for one, truth in zip(*results, strict=True)]
        for results in zip(plains, truths, strict=True)
    ]
    worst = [tuple(map(max, zip(*of_result, strict=True))) for of_result in zip(*errors, strict=True)]
    return mixer, inputs[0], truths[0], worst


@pytest.mark.parametrize(
    ("options", "backend", "dtype"),
    [
        *itertools.product(OPTIONS, ["cpu"], [torch.float32]),
        ("plain", "cpu", torch.bfloat16),
        ("biases", "cpu", torch.bfloat16),
        ("plain", "torch", torch.float32),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_results_and_gradients_are_those_of_the_whole(options, backend, dtype, call):
    """Within the bound of docs/reliability.md, that of the reference in the same precision on several inputs."""
    mixer, x, truth, worst = yardsticks(options, call, dtype)
    names = ["out", "x", *dict(mixer.named_parameters())]
    for block in (1, 7, CHANNELS):
        mixer.channel_block = block
        with sk.use_backend(backend):
            got = gradients(mixer, x, CALLS[call])
        for name, value, right, (rms, largest) in zip(names, got, truth, worst, strict=True):
            assert value.shape == right.shape and torch.isfinite(value).all(), name
            error, ulp = size_of_error(value, right), torch.finfo(value.dtype).eps
            # A block of one channel adds as many parts as there are channels, one after the other.
            ratio = (1.25 if name == "out" else 1.5) * (2 if block == 1 else 1)
            few = value.numel() < FEW  # too few numbers for a mean
            assert few or error[0] <= ratio * rms + 0.5 * ulp * right.square().mean().sqrt(), f"block {block}, {name}"
            assert error[1] <= 2 * largest + 2 * ulp * right.abs().max(), f"block {block}, {name}"


def size_of_error(value, truth):
    """Root mean square, and the largest."""
    error = (value.double() - truth).abs()
    return error.square().mean().sqrt().item(), error.max().item()


def test_a_projector_in_blocks():
    torch.manual_seed(0)
    projector, reduction = sk.TemporalProjector(8, WIDTH, layers=2), sk.TokenReduction(2, 1, 2)
    features = torch.randn(2, 5, 6, 6, 8)
    whole = projector(features, reduction)
    projector.channel_block = 10
    assert projector.channel_block == 10 and projector.layers[1].mixer.channel_block == 10
    torch.testing.assert_close(projector(features, reduction), whole)
    torch.testing.assert_close(projector(features, lengths=[3, 5]), projector(features, lengths=torch.tensor([3, 5])))


def test_under_autocast():
    torch.manual_seed(0)
    mixer, x = sk.BiMambaMixer(WIDTH), torch.randn(1, 20, WIDTH)
    results = []
    for block in (None, 8):
        mixer.channel_block = block
        with torch.autocast("cpu", torch.bfloat16):
            out = mixer(x)
        out.float().sum().backward()
        results.append((out, mixer.in_proj.weight.grad.clone()))
        mixer.zero_grad()
    (whole, of_whole), (cut, of_cut) = results
    assert whole.dtype == cut.dtype == torch.bfloat16
    torch.testing.assert_close(cut, whole, atol=0.02, rtol=0.02)
    torch.testing.assert_close(of_cut, of_whole, atol=0.05, rtol=0.05)


def test_only_what_needs_gradients_gets_them():
    mixer, x = sk.BiMambaMixer(WIDTH), torch.randn(1, 20, WIDTH)
    mixer.channel_block = 8
    mixer.requires_grad_(False).x_proj.requires_grad_(True)
    mixer(x).sum().backward()
    assert {name for name, p in mixer.named_parameters() if p.grad is not None} == {"x_proj.weight"}


def test_gradients_of_gradients_are_refused():
    mixer, x = sk.BiMambaMixer(WIDTH), torch.randn(1, 20, WIDTH, requires_grad=True)
    mixer.channel_block = 8
    (found,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.sum().backward()


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0, ValueError, "channel_block must be between 1 and the mixer's 24 channels, got 0"),
        (25, ValueError, "channel_block must be between 1 and the mixer's 24 channels, got 25"),
        ("all", ValueError, "channel_block must be 'auto', None or a number of channels, got 'all'"),
        (2.5, TypeError, "channel_block must be an integer, got 2.5 of type float"),
        (True, TypeError, "channel_block must be an integer, got True of type bool"),
    ],
)
def test_other_blocks_are_refused(value, error, said):
    with pytest.raises(error, match=said):
        sk.BiMambaMixer(WIDTH).channel_block = value


def test_a_child_that_has_to_be_called_is_not_cut():
    mixer, x = sk.BiMambaMixer(WIDTH), torch.randn(1, 20, WIDTH)
    right = mixer(x)
    mixer.x_proj_b.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(mixer(x), right)
    mixer.channel_block = 8
    with pytest.raises(ValueError, match="got 8: x_proj_b is a Linear that is more than a plain layer"):
        mixer(x)


@pytest.fixture(name="calls")
def what_is_cut(monkeypatch):
    """The blocks in which mixers are cut, and no call is too small for it."""
    blocks = []

    def recorded(mixer, x, block, *arguments):
        blocks.append(block)
        return mix_by_channels(mixer, x, block, *arguments)

    monkeypatch.setattr("storm_kernels.nn.mixer.mix_by_channels", recorded)
    monkeypatch.setattr(memory, "_SMALL_BYTES", 0)
    return blocks


@pytest.mark.parametrize("training", [False, True])
def test_a_call_is_cut_where_the_whole_does_not_fit(training, calls, monkeypatch):
    torch.manual_seed(0)
    mixer, x = sk.BiMambaMixer(128), torch.randn(1, 500, 128)
    with torch.set_grad_enabled(training):
        whole = mixer(x)
        assert calls == []
        needed = [peak_bytes(mixer, 500, block=block, training=training) for block in (None, 192, 128, 64)]
        assert needed == sorted(needed, reverse=True)
        for free, expected in zip((*needed, 1), (None, 192, 128, 64, 64), strict=True):
            calls.clear()
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free / 0.8 + 1)
            torch.testing.assert_close(mixer(x), whole)
            assert calls == ([] if expected is None else [expected])
        mixer.channel_block = None
        mixer(x)
        assert len(calls) == 1


def test_a_traced_program_is_not_cut(calls, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    mixer, x = sk.BiMambaMixer(WIDTH).eval(), torch.randn(1, 20, WIDTH)
    with torch.no_grad():
        torch.compile(mixer, backend="eager", fullgraph=True)(x)
    torch.func.functional_call(mixer, dict(mixer.named_parameters()), (x,))
    calls.clear()
    torch.func.vmap(lambda row: mixer(row[None])[0])(torch.randn(2, 20, WIDTH))
    assert calls == []


def test_free_memory_is_a_number_of_bytes_or_unknown():
    assert memory.free_bytes(torch.device("meta")) is None
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("block", [None, 64, 192])
@pytest.mark.parametrize("reduction", [None, sk.TokenReduction(4, 1, 2)])
def test_no_more_memory_than_the_formula_says(block, reduction):
    grid = sk.TokenGrid(64, 8, 8)
    with FakeTensorMode(), torch.no_grad():  # sizes alone, of plain tensors
        mixer = sk.BiMambaMixer(256)
        mixer.channel_block = block
        x = torch.empty(1, grid.tokens, 256)
        with Allocations() as counted:
            mixer(x, grid, reduction)
    cells = grid.tokens if reduction is None else reduction.reduced(grid).tokens
    said = peak_bytes(mixer, grid.tokens, cells, block=block)
    assert 0.6 * said < counted.peak < 1.1 * said


def test_an_hour_of_video_in_40_gigabytes():
    """The projector of storm-7b, bfloat16, 4,096 frames of 256 tokens: from its first mixer on."""
    mixer = sk.BiMambaMixer(3584, device="meta").to(torch.bfloat16)
    norm, x = torch.nn.LayerNorm(3584, device="meta", dtype=torch.bfloat16), None
    with torch.no_grad(), Allocations() as counted:
        x = torch.empty(1, 4096 * 256, 3584, dtype=torch.bfloat16, device="meta")
        x = x + mix_by_channels(mixer, norm(x), 256)
    assert counted.peak < 40e9
    with torch.no_grad(), Allocations() as whole:
        mixer.channel_block = None
        mixer(torch.empty(1, 4096 * 256, 3584, dtype=torch.bfloat16, device="meta"))
    assert whole.peak > 100e9
