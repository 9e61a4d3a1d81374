"""A stream's pieces against the float64 reference on the whole video; what it keeps, refuses and survives."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import storm_kernels as sk
from storm_kernels import TokenReduction, reference

REDUCTIONS = [None, TokenReduction(4, 1, 2), TokenReduction(3, 2, 1), TokenReduction(1, 1, 3), TokenReduction(50, 50)]
SPLITS = [[1] * 11, [11], [2, 1, 5, 3]]


def pair(dtype=torch.float64, **options):
    torch.manual_seed(0)
    plain = reference.ReferenceTemporalProjector(6, 16, bidirectional=False, **options)
    fused = sk.TemporalProjector(6, 16, bidirectional=False, **options)
    fused.load_state_dict(plain.state_dict())
    return plain.to(dtype).requires_grad_(False), fused.to(dtype).requires_grad_(False)


def run(stream, features, split):
    return torch.cat([*(stream.push(part) for part in features.split(split, 1)), stream.finish()], 1)


def clip(frames=11, batch=2, dtype=torch.float64):
    return torch.randn(batch, frames, 5, 4, 6, dtype=dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    "options", [{"layers": 2}, {"d_conv": 1}, {"layers": 0}, {"d_conv": 40, "bias": True}], ids=str
)
def test_any_split_equals_the_reference_of_the_whole_video(options, split, reduction):
    plain, fused = pair(**options)
    features = clip()
    out = run(fused.stream(5, 4, reduction, batch=2), features, split)
    torch.testing.assert_close(out, plain(features, reduction), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_float32_kernels_equal_the_float64_reference(split):
    plain, fused = pair(layers=2)
    features, reduction = clip(), TokenReduction(4, 2, 1)
    out = run(fused.float().stream(5, 4, reduction, batch=2), features.float(), split)
    torch.testing.assert_close(out.double(), plain(features, reduction), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"])
def test_a_module_that_is_not_plain_is_called(name):
    plain, fused = pair()
    for projector in (plain, fused):
        getattr(projector.layers[0].mixer, name).register_forward_hook(lambda module, args, out: out * 1.5)
    features = clip()
    out = run(fused.stream(5, 4, batch=2), features, [1, 7, 3])
    torch.testing.assert_close(out, plain(features), rtol=1e-10, atol=1e-10)


RESTORE = """
import sys, torch, storm_kernels as sk
saved = torch.load(sys.argv[1], weights_only=True)
projector = sk.TemporalProjector(6, 16, bidirectional=False, layers=2).double()
projector.load_state_dict(saved["weights"])
stream = projector.stream(5, 4, sk.TokenReduction(4, 2, 1), batch=2)
stream.load_state_dict(saved["stream"])
torch.save([stream.push(saved["rest"]), stream.finish()], sys.argv[2])
"""


def test_a_stream_goes_on_in_another_process(tmp_path):
    plain, fused = pair(layers=2)
    features, reduction = clip(), TokenReduction(4, 2, 1)
    stream = fused.stream(5, 4, reduction, batch=2)
    first = stream.push(features[:, :6])
    saved = {"weights": fused.state_dict(), "stream": stream.state_dict(), "rest": features[:, 6:]}
    torch.save(saved, tmp_path / "saved.pt")
    subprocess.run([sys.executable, "-c", RESTORE, tmp_path / "saved.pt", tmp_path / "out.pt"], check=True)
    out = torch.cat([first, *torch.load(tmp_path / "out.pt", weights_only=True)], 1)
    torch.testing.assert_close(out, plain(features, reduction), rtol=1e-10, atol=1e-10)


def kept(stream):
    """The number of tensors that a stream keeps, and the bytes of memory behind them."""
    tensors = [t for value in stream.state_dict().values() if isinstance(value, list) for t in value]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert all(t.grad_fn is None for t in tensors)
    return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)


def test_what_is_kept_does_not_grow_in_a_thousand_frames():
    _, fused = pair(torch.float32, layers=2)
    stream = fused.requires_grad_().stream(5, 4, TokenReduction(4))
    stream.push(clip(1, 1, torch.float32))
    sizes = {kept(stream)}
    for frames in [4] * 150 + [400]:  # at the same place of a pool each time
        stream.push(clip(frames, 1, torch.float32))
        sizes.add(kept(stream))
    assert stream.frames == 1001
    assert len(sizes) == 1


def test_a_thousandth_frame_costs_the_operations_of_the_second():
    _, fused = pair(torch.float32)
    stream = fused.stream(5, 4)

    def cost():
        with FlopCounterMode(display=False) as counter:
            stream.push(clip(1, 1, torch.float32))
        return counter.get_total_flops()

    stream.push(clip(1, 1, torch.float32))
    early = cost()
    stream.push(clip(997, 1, torch.float32))
    assert early == cost() > 0


def test_a_bidirectional_projector_is_refused_with_what_would_serve():
    with pytest.raises(ValueError, match=r"bidirectional must be False for a stream.*whole video"):
        sk.TemporalProjector(6, 16).stream(5, 4)


def test_a_layer_with_a_hook_is_refused_by_name():
    _, fused = pair(layers=2)
    fused.layers[1].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"layers\.1 must be a MixerLayer"):
        fused.stream(5, 4)


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        (torch.ones(2, 0, 5, 4, 6).double(), ValueError, "at least one frame"),
        (torch.ones(2, 1, 4, 5, 6).double(), ValueError, r"= \(2, 5, 4\), got shape \(2, 1, 4, 5, 6\)"),
        (torch.ones(1, 1, 5, 4, 6).double(), ValueError, r"= \(2, 5, 4\), got shape"),
        (torch.ones(2, 1, 5, 4, 7).double(), ValueError, "width"),
        (torch.ones(2, 1, 5, 4, 6), TypeError, r"must be torch\.float64 as those before, got torch\.float32"),
        (torch.ones(2, 1, 5, 4, 6, device="meta").double(), ValueError, "must be on cpu"),
        ([1], TypeError, "features must be a tensor"),
    ],
)
def test_a_wrong_push_is_refused_and_leaves_the_stream_as_it_was(features, error, match):
    plain, fused = pair()
    stream, whole = fused.stream(5, 4, TokenReduction(4), batch=2), clip()
    parts = [stream.push(whole[:, :2])]
    with pytest.raises(error, match=match):
        stream.push(features)
    parts += [stream.push(whole[:, 2:]), stream.finish()]
    torch.testing.assert_close(torch.cat(parts, 1), plain(whole, TokenReduction(4)), rtol=1e-10, atol=1e-10)


def test_a_finished_or_empty_stream_is_refused():
    _, fused = pair()
    stream = fused.stream(5, 4, batch=2)
    with pytest.raises(RuntimeError, match="has taken no frame"):
        stream.finish()
    stream.push(clip())
    assert stream.finish().shape == (2, 0, 16)
    for again in (stream.finish, lambda: stream.push(clip())):
        with pytest.raises(RuntimeError, match="stream is finished"):
            again()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: pair()[1].stream(5, 4), r"state\['batch'\] must be the stream's 1, got 2"),
        (lambda: pair()[1].stream(5, 4, TokenReduction(2), 2), r"state\['reduction'\]"),
        (lambda: pair(layers=2)[1].stream(5, 4, batch=2), r"state\['history'\] must have the shapes"),
        (lambda: pair(d_state=8)[1].stream(5, 4, batch=2), r"state\['state'\] must have the shapes"),
    ],
)
def test_the_state_of_another_stream_is_refused(other, match):
    stream = pair()[1].stream(5, 4, batch=2)
    stream.push(clip())
    with pytest.raises(ValueError, match=match):
        other().load_state_dict(stream.state_dict())


@pytest.mark.parametrize("pending", [[], [torch.ones(1)]], ids=["none", "another shape"])
def test_the_sum_of_an_open_pool_has_to_be_there_and_to_fit(pending):
    stream = pair()[1].stream(5, 4, TokenReduction(4), 2)
    stream.push(clip())
    with pytest.raises(ValueError, match=r"state\['pending'\] must have the shapes"):
        stream.load_state_dict({**stream.state_dict(), "pending": pending})


def test_a_replaced_projection_is_called_and_saved_with():
    class Wrapped(torch.nn.Module):
        """A layer as an adapter's: it has no weight of its own."""

        def __init__(self, layer):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            return 2 * self.inner(x)

    torch.manual_seed(0)
    projector = sk.TemporalProjector(8, 16, bidirectional=False)
    projector.proj = Wrapped(projector.proj)
    features, reduction = torch.randn(1, 5, 4, 4, 8), TokenReduction(temporal_pool=4)
    with torch.no_grad():
        whole = projector(features, reduction)
    first, second = (projector.stream(4, 4, reduction) for _ in range(2))
    tokens = [first.push(features[:, :2])]
    second.load_state_dict(first.state_dict())
    tokens += [second.push(features[:, 2:]), second.finish()]
    torch.testing.assert_close(torch.cat(tokens, 1), whole)
