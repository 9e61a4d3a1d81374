"""The fused mixer and projector against the reference ones, whose parameters they inherit."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import storm_kernels as sk
from storm_kernels import TokenReduction, reference

REDUCTIONS = [
    TokenReduction(),
    TokenReduction(4, 1, 2),
    TokenReduction(2, 2, 1),
    TokenReduction(1, 1, 3),
    TokenReduction(50, 50, 1),
]


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    plain = reference.ReferenceTemporalProjector(6, 16, **options)
    fused = sk.TemporalProjector(6, 16, **options)
    fused.load_state_dict(plain.state_dict())
    return plain.to(dtype), fused.to(dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "frames"), [(1, True, 9), (2, True, 1), (3, True, 6), (1, False, 9), (2, False, 7)]
)
def test_projector_equals_the_reference_in_float64(layers, bidirectional, frames, reduction):
    plain, fused = pair(torch.float64, layers=layers, bidirectional=bidirectional)
    features = torch.randn(2, frames, 5, 4, 6, dtype=torch.float64)
    with sk.use_backend("torch"):
        torch.testing.assert_close(fused(features, reduction), plain(features, reduction), rtol=1e-10, atol=1e-10)
        lengths = [frames, max(1, frames - 2)]
        torch.testing.assert_close(
            fused(features, reduction, lengths), plain(features, reduction, lengths), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"conv_bias": False},
        {"if_divide_out": True},
        {"d_conv": 3, "d_state": 5, "expand": 3, "dt_rank": 7},
    ],
)
def test_mixer_options_equal_the_reference(options):
    plain, fused = pair(torch.float64, **options)
    features = torch.randn(1, 5, 4, 4, 6, dtype=torch.float64)
    with sk.use_backend("torch"):
        for reduction in REDUCTIONS:
            torch.testing.assert_close(fused(features, reduction), plain(features, reduction), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "reduction"), list(itertools.product((torch.float32, torch.bfloat16, torch.float16), REDUCTIONS))
)
def test_projector_is_as_exact_as_the_reference(dtype, reduction):
    """Over whole tensors: a few numbers after a chain of roundings are luck. The reference is also
    run on features shaken by one ulp.
    """
    plain, fused = pair(dtype)
    features = torch.randn(4, 9, 8, 8, 6).to(dtype)
    truth = gradients(copy.deepcopy(plain).double(), features.double(), reduction)
    shaken = [features * (1 + torch.finfo(dtype).eps * torch.randint(-1, 2, features.shape)) for _ in range(3)]
    yardsticks = [gradients(plain, one.to(dtype), reduction) for one in (features, *shaken)]
    for name, value in gradients(fused, features, reduction).items():
        worst = max(rms(one[name], truth[name]) for one in yardsticks)
        assert rms(value, truth[name]) <= (1.25 if name == "out" else 1.5) * worst, name


def rms(value, truth):
    return (value.double() - truth).square().mean().sqrt()


def gradients(call, features, reduction, projector=None):
    """Of ``projector``'s parameters, which is ``call`` unless told, and of the features; and the result."""
    projector = projector or call
    projector.zero_grad()
    features = features.detach().requires_grad_()
    out = call(features, reduction)
    out.double().square().sum().backward()
    return {"out": out.detach(), "features": features.grad} | {
        name: p.grad.clone() for name, p in projector.named_parameters()
    }


def test_state_dicts_are_the_same():
    plain, fused = pair(layers=2)
    assert list(plain.state_dict()) == list(fused.state_dict())
    names = {name.removeprefix("layers.0.mixer.") for name in fused.state_dict() if name.startswith("layers.0.mixer.")}
    both = {"A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    backward = {
        "A_b_log",
        "D_b",
        "conv1d_b.weight",
        "conv1d_b.bias",
        "x_proj_b.weight",
        "dt_proj_b.weight",
        "dt_proj_b.bias",
    }
    assert names == both | backward | {"in_proj.weight", "out_proj.weight"}


class Products(TorchFunctionMode):
    """The rows of every product with a weight (or a part of one), by the weight's shape."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.rows[tuple(args[1].shape)] = args[0].shape[:-1].numel()
        return function(*args, **kwargs or {})


def test_the_last_layer_gates_and_projects_survivors_only():
    """docs/spec.md, the algebra: with k=4, s=2 of 16 frames the gate sees 8 frames and out_proj 2."""
    _, fused = pair()
    with Products() as products, torch.no_grad():
        fused(torch.randn(1, 16, 4, 4, 6), TokenReduction(4, 1, 2))
    assert products.rows[(16, 32)] == 2 * 4  # out_proj
    assert products.rows[(32, 16)] == 8 * 4  # the gate's half of in_proj, after the scan's


def halves_of(mixer):
    return {name for name, p in mixer.named_parameters() if p.dtype == torch.bfloat16}


def test_parameters_stay_float32_whatever_takes_the_place_of_dt_proj():
    """Adapters forward the bias, other layers have none, or one that is no parameter (docs/spec.md:
    states and decays are float32).
    """
    kept = {"A_log", "D", "A_b_log", "D_b"}
    mixer = sk.BiMambaMixer(16)
    mixer.dt_proj = torch.nn.Linear(1, 32, bias=False)
    mixer.dt_proj_b = torch.nn.Sequential(mixer.dt_proj_b)
    assert {name for name, _ in mixer.bfloat16().named_parameters()} - halves_of(mixer) == kept
    assert mixer(torch.randn(1, 5, 16).bfloat16()).isfinite().all()
    pruned = sk.BiMambaMixer(16)
    prune.random_unstructured(pruned.dt_proj, "bias", 0.5)
    assert {name for name, _ in pruned.half().named_parameters()} - halves_of(pruned) >= kept
    del pruned.dt_proj_b
    assert pruned.float().A_log.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hooked_dt_proj_in_half_precision(dtype, when):
    """Its bias is float32 beside half weights, which F.linear refuses; a hook that changes nothing
    changes no more than a rounding.
    """
    plain, x = sk.BiMambaMixer(16), torch.randn(1, 9, 16)
    hooked, reference_mixer = copy.deepcopy(plain), reference.ReferenceMixer(16)
    reference_mixer.load_state_dict(plain.state_dict())
    models = (hooked, reference_mixer)
    for model in models:
        if when == "after":
            model.to(dtype)
        for name in ("dt_proj", "dt_proj_b"):
            getattr(model, name).register_forward_hook(lambda module, args, out: out)
        model.to(dtype)
        assert model.dt_proj.bias.dtype == torch.float32
    truth = plain(x).detach()
    for model in models:
        torch.testing.assert_close(model(x.to(dtype)).float(), truth, atol=2e-2 * float(truth.abs().max()), rtol=0)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(hooked.float()(x).float(), truth, atol=2e-2 * float(truth.abs().max()), rtol=0)


def test_born_on_meta_and_filled_by_assignment():
    """to_empty keeps each parameter's dtype; a checkpoint in bfloat16 may be assigned as it is:
    decays are computed in float32.
    """
    torch.manual_seed(0)
    source = sk.TemporalProjector(6, 16)
    features = torch.randn(1, 3, 4, 4, 6)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            born = sk.TemporalProjector(6, 16).bfloat16()
            assert born(features.bfloat16().to("meta"), TokenReduction(2, 1, 2)).shape == (1, 4, 16)
        assert born.to_empty(device="cpu").layers[0].mixer.A_log.dtype == torch.float32
        state = {name: t.to(dtype) for name, t in source.state_dict().items()}
        born.load_state_dict(state, assign=True)
        out = born.to("cpu")(features.to(dtype), TokenReduction(2, 1, 2))
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(out.float(), source(features, TokenReduction(2, 1, 2)), atol=tolerance, rtol=0)


def test_tied_and_frozen_parameters():
    """Two layers that share one mixer, whose biases then are cast twice; and a frozen mixer through
    which gradients still flow.
    """
    _, fused = pair(layers=2)
    fused.layers[1].mixer = fused.layers[0].mixer
    fused.bfloat16()
    assert fused.layers[0].mixer.dt_proj.bias.dtype == torch.float32
    fused.float().layers.requires_grad_(False)
    features = torch.randn(1, 3, 4, 4, 6)
    fused(features, TokenReduction(2, 1, 2)).sum().backward()
    assert fused.proj.weight.grad.abs().max() > 0 and fused.layers[0].mixer.A_log.grad is None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_lengths_give_each_video_what_it_gets_alone(backend):
    """Through two layers, both directions, padding and the reduction; a parameter's gradient is the
    sum of the videos'.
    """
    reason = sk.why_not("scan", backend)
    if reason:
        pytest.skip(reason)
    _, fused = pair(layers=2)
    reduction, frames, features = TokenReduction(2, 2, 2), (5, 1, 3), torch.randn(3, 5, 4, 4, 6)
    with sk.use_backend(backend):
        together = gradients(lambda x, how: fused(x, how, list(frames)), features, reduction, fused)
        alone = [gradients(fused, features[i : i + 1, :count], reduction, fused) for i, count in enumerate(frames)]
    for video, (count, one) in enumerate(zip(frames, alone, strict=True)):
        kept = one["out"].shape[1]
        torch.testing.assert_close(together["out"][video : video + 1, :kept], one["out"])
        torch.testing.assert_close(
            together["features"][video : video + 1, :count], one["features"], rtol=1e-4, atol=1e-5
        )
        assert (together["out"][video, kept:] == 0).all() and (together["features"][video, count:] == 0).all()
    for name, _ in fused.named_parameters():
        torch.testing.assert_close(together[name], sum(one[name] for one in alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [0, 3], [3, 6]])
def test_bad_lengths_are_named(lengths):
    _, fused = pair()
    with pytest.raises(ValueError, match=r"lengths must .* got"):
        fused(torch.randn(2, 5, 4, 4, 6), lengths=lengths)
