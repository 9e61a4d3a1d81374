"""patch(), unpatch(), patched(): which modules, same results, shared weights, wrappers, clear
refusals (transformers: test_patch_transformers).
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from storm_kernels import BiMambaMixer, TemporalProjector, TokenReduction, reference
from storm_kernels.interop.mamba_ssm import Mamba
from storm_kernels.interop.patching import PatchError, patch, patched, unpatch

from ..support import original_mixers


def vim_block(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(16), original_mixers.Mamba(16, **options)).eval()


def same(model, other_call, atol=1e-5):
    """The model's results and gradients before and after ``other_call``, which changes how it computes."""
    x = torch.randn(2, 9, 16)
    outs, grads = [], []
    for change in (lambda: None, other_call):
        change()
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outs[1], outs[0], atol=atol, rtol=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bimamba_type": "v1"},
        {"bimamba_type": "v2"},
        {"bimamba_type": "v2", "if_devide_out": True, "init_layer_scale": 0.3, "bias": True},
    ],
    ids=str,
)
def test_modules_shaped_like_the_originals(options):
    model = vim_block(**options)
    same(model, lambda: patch(model))
    assert isinstance(model[1], original_mixers.Mamba)


def projector():
    torch.manual_seed(0)
    return reference.ReferenceTemporalProjector(6, 16, layers=2, d_state=4)


def test_reference_projector():
    model, x = nn.ModuleDict({"projector": projector(), "head": nn.Linear(16, 3)}), torch.randn(1, 5, 4, 3, 6)
    reductions = (TokenReduction(), TokenReduction(2, 2, 2))
    before = [model["projector"](x, r) for r in reductions]
    report = patch(model)
    assert [e.name for e in report.replaced] == ["projector", "projector.layers.0.mixer", "projector.layers.1.mixer"]
    assert isinstance(model["projector"], TemporalProjector) and isinstance(
        model["projector"].layers[0].mixer, BiMambaMixer
    )
    for reduction, expected in zip(reductions, before, strict=True):
        torch.testing.assert_close(model["projector"](x, reduction), expected, atol=1e-5, rtol=1e-4)
    unpatch(model)
    assert type(model["projector"]) is reference.ReferenceTemporalProjector
    assert all(torch.equal(model["projector"](x, r), b) for r, b in zip(reductions, before, strict=True))


def test_weights_are_shared_and_the_state_dict_stays():
    model = vim_block(bimamba_type="v2")
    parameters = dict(model.named_parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    patch(model)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
    with torch.no_grad():
        model[1].out_proj.weight.zero_()
    assert not model(torch.randn(1, 3, 16)).any()


def test_patched_restores_on_exit_and_on_error():
    model = vim_block()
    with patched(model) as report:
        assert len(report.replaced) == 1 and type(model[1]) is not original_mixers.Mamba
    assert type(model[1]) is original_mixers.Mamba
    with pytest.raises(KeyError), patched(model):
        raise KeyError
    assert type(model[1]) is original_mixers.Mamba


def test_report_names_what_was_replaced_and_why_not():
    model = nn.ModuleDict({"a": vim_block(), "b": original_mixers.Mamba(16)})
    model["b"].activation = "gelu"
    report = patch(model)
    assert [e.name for e in report.replaced] == ["a.1"]
    assert [(e.name, e.why) for e in report.skipped] == [("b", "its activation is 'gelu'; only silu is fused")]
    assert str(report).splitlines() == [
        "replaced 1, skipped 1",
        "  replaced a.1: Mamba",
        "  skipped b: Mamba: its activation is 'gelu'; only silu is fused",
    ]


class SubclassedMixer(reference.ReferenceMixer):
    def forward(self, x, **options):
        return 2 * super().forward(x, **options)


class Mamba2(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(3))


class Renamed(original_mixers.MambaMixer):
    def forward(self, hidden_states, cache_params=None, attention_mask=None):
        return super().forward(hidden_states) * 2


def changed(mixer, **attributes):
    for name, value in attributes.items():
        setattr(mixer, name, value)
    return mixer


REFUSED = {
    "a third scan": (
        lambda: changed(original_mixers.Mamba(16), A_s_log=nn.Parameter(torch.zeros(1))),
        "no supported variant has: A_s_log",
    ),
    "v3": (lambda: changed(original_mixers.Mamba(16), bimamba_type="v3"), "bimamba_type='v3' is not supported"),
    "forward only": (
        lambda: changed(original_mixers.Mamba(16, bimamba_type="v2"), use_fast_path=False),
        "use_fast_path=False",
    ),
    "Mamba-2": (Mamba2, "is not a Mamba-1 mixer: it has no in_proj, conv1d"),
    "a subclass": (lambda: SubclassedMixer(16), "subclass of the reference whose changes a patch would lose: forward"),
    "another class": (lambda: type("Other", (nn.Module,), {})(), None),
    "an overridden forward": (Renamed, "Renamed overrides the forward of MambaMixer"),
    "ours": (lambda: Mamba(16), "runs on storm_kernels already"),
    "on the instance": (lambda: changed(original_mixers.Mamba(16), forward=lambda x: x), "overridden on the instance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_why(case):
    make, reason = REFUSED[case]
    model = nn.Sequential(make())
    kind = type(model[0])
    with pytest.raises(PatchError, match="no Mamba-1 mixer, nothing to patch" if reason is None else reason):
        patch(model)
    assert type(model[0]) is kind


def test_unknown_class_with_the_parameters_of_a_mixer():
    mixer = original_mixers.Mamba(16)
    mixer.__class__ = type("Resampler", (nn.Module,), {"forward": lambda self, x: x})
    with pytest.raises(PatchError, match="what Resampler computes with them is not known here"):
        patch(mixer)


def test_twice_and_unpatching_nothing():
    model = vim_block()
    with pytest.raises(PatchError, match="unpatch: no module of this Sequential is patched"):
        unpatch(model)
    patch(model)
    with pytest.raises(PatchError, match="patched already .1 modules.; unpatch"):
        patch(model)
    assert unpatch(model) == ("1",)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 3"):
        patch(3)


@pytest.mark.parametrize(
    "make", [lambda: vim_block(bimamba_type="v2"), lambda: nn.Sequential(reference.ReferenceMixer(16, d_state=4))]
)
def test_copies_and_pickles_stay_patched(make):
    model, x = make(), torch.randn(1, 5, 16)
    patch(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert twin[-1].in_proj.weight is not model[-1].in_proj.weight
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert type(other[-1]) is type(model[-1])
        unpatch(other)
        torch.testing.assert_close(other(x), expected, atol=1e-5, rtol=1e-4)


def test_hooks_keep_firing():
    model, seen = vim_block(), []
    model[1].register_forward_hook(lambda *_: seen.append("mixer"))
    model[1].x_proj.register_forward_hook(lambda *_: seen.append("x_proj"))
    patch(model)
    model(torch.randn(1, 3, 16))
    assert seen == ["x_proj", "mixer"]


class LowRank(nn.Module):
    """What PEFT puts in place of a linear layer: the layer, and a low-rank term beside it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_in_the_projections():
    model = vim_block()
    model.requires_grad_(False)
    for name in ("in_proj", "x_proj", "out_proj"):
        setattr(model[1], name, LowRank(getattr(model[1], name)))
    same(model, lambda: patch(model))


def test_data_parallel_is_walked():
    wrapped = nn.DataParallel(vim_block(bimamba_type="v2"))
    same(wrapped, lambda: patch(wrapped))
    assert unpatch(wrapped) == ("module.1",)


def test_torchscript_is_refused():
    traced = torch.jit.trace(original_mixers.Mamba(16), torch.randn(1, 3, 16))
    with pytest.raises(PatchError, match="patch the model before scripting it"):
        patch(traced)


def test_half_precision_modules():
    model = vim_block(bimamba_type="v2")
    x = torch.randn(1, 9, 16)
    expected = model(x)
    patch(model.bfloat16())
    out = model(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


def test_old_transformers_mixer_with_mask_and_cache():
    """The generation before functions could be swapped: masking after in_proj, a cache of tensors
    by layer, positions beside it.
    """
    torch.manual_seed(0)
    mixer, x = original_mixers.MambaMixer().eval(), torch.randn(2, 9, 12)
    mask = torch.ones(2, 9)
    mask[0, :3] = mask[1, 7:] = 0

    def run():
        cache = original_mixers.LayerCache(1, 2, mixer.intermediate_size, mixer.conv_kernel_size, mixer.ssm_state_size)
        outs = [mixer(x, attention_mask=mask), mixer(x[:, :2], cache, torch.arange(4))]
        outs += [mixer(x[:, t : t + 1], cache, torch.tensor([t + 2])) for t in range(2, 9)]
        return [*outs, cache.conv_states[0], cache.ssm_states[0]]

    with torch.no_grad():
        plain = run()
        report = patch(mixer)
        fast = run()
    assert len(report.replaced) == 1
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(fast[1:9], 1), mixer(x), atol=1e-5, rtol=1e-4)
