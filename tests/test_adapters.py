"""Modules that are more than plain layers act, learn and are seen in fused and patched models as where each module is called (RELIABILITY.md, R19).

The truth here calls every module and fuses nothing; plain modules are compared elsewhere.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from storm_kernels import BiMambaMixer, TemporalProjector, TokenGrid, TokenReduction, reference
from storm_kernels.patch import patch
from storm_kernels.plain import unfused
from storm_kernels.reference.modules import downsample, run_padded

MIXER = ("in_proj", "conv1d", "x_proj", "dt_proj", "conv1d_b", "x_proj_b", "dt_proj_b", "out_proj")
REDUCTIONS = (TokenReduction(), TokenReduction(1, 1, 2), TokenReduction(2, 2, 1))
FEATURES = (2, 3, 4, 3, 3)  # batch, frames, height, width, vision width


def called_direction(mixer, x, suffix, bounds):
    conv, x_proj, dt_proj = (getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        inputs = x[:, start:end].mT
        out = conv(inputs.flip(-1) if suffix else inputs)[..., : end - start]
        parts.append(out.flip(-1) if suffix else out)
    u = getattr(mixer, "act", F.silu)(torch.cat(parts, -1)).mT
    dt_raw, B, C = x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    A = -torch.exp(mixer.A_b_log if suffix else mixer.A_log)
    return reference.Direction(u, dt_proj(dt_raw), A, B, C, getattr(mixer, f"D{suffix}"))


def called_mixer(mixer, x, cu_seqlens=None):
    """A mixer of which each module is called, on all tokens."""
    inner, z = mixer.in_proj(x).chunk(2, -1)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    one = called_direction(mixer, inner, "", bounds)
    options = {"z": z, "delta_softplus": True, "cu_seqlens": cu_seqlens}
    if hasattr(mixer, "conv1d_b"):
        return mixer.out_proj(reference.bidirectional_selective_scan(one, called_direction(mixer, inner, "_b", bounds), **options))
    if hasattr(mixer, "A_b_log"):
        return mixer.out_proj(reference.bidirectional_selective_scan(one, one._replace(A=-mixer.A_b_log.exp()), **options))
    return mixer.out_proj(reference.selective_scan(*one[:6], **options))


def called_projector(projector, features, reduction, lengths=None):
    blocks = downsample(features)
    tokens = projector.proj(blocks).flatten(1, 3)

    def mix(x, grid, reduction, cu_seqlens):
        for layer in projector.layers:
            x = x + called_mixer(layer.mixer, layer.norm(x), cu_seqlens)
        return reference.reduce_tokens(x, grid, reduction)

    return run_padded(mix, tokens, TokenGrid(*blocks.shape[1:4]), reduction, lengths)


class Adapter(nn.Module):
    """What adapter libraries put in a layer's place: the layer, a second path, and the layer's weight and bias as if they were its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = nn.Linear(base.in_features, base.out_features, bias=False) if isinstance(base, nn.Linear) else type(base)(**same_shape(base))

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + 0.5 * torch.tanh(self.extra(x))


def same_shape(module):
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": module.normalized_shape}
    names = ("in_channels", "out_channels", "kernel_size", "groups", "padding")
    return {name: getattr(module, name) for name in names}


class Packed(nn.Module):
    """A layer whose weight sits elsewhere, in a format of its own, and is empty in its place: a serving engine's, or one of four bits."""

    def __init__(self, base):
        super().__init__()
        self.packed, self.base = [base.weight.detach().double()], [base]
        self.weight = nn.Parameter(torch.empty(0))
        self.bias = base.bias

    def forward(self, x):
        return torch.func.functional_call(self.base[0], {"weight": self.packed[0].to(x.dtype)}, x)


class Louder(nn.Module):
    def forward(self, weight):
        return weight + 0.3 * weight.sin()


def louder_class(module):
    kind = type(module)
    module.__class__ = type("Louder" + kind.__name__, (kind,), {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs) + 0.1})


def louder_instance(module):
    module.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs) * 1.5, module)


def shaken(module):
    """A weight that differs between calls is as wrong as one that a hook forgot: the norms below are of the trained kind."""
    with torch.no_grad():
        module.weight.add_(0.3 * torch.randn_like(module.weight))
    return module


# Each changes a module in place, or returns what takes its place.
KINDS = {
    "adapter": Adapter,
    "packed": Packed,
    "forward hook": lambda m: m.register_forward_hook(lambda module, args, out: out + torch.tanh(out)) and None,
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (1.5 * args[0],)) and None,
    "backward hook": lambda m: m.register_full_backward_hook(lambda module, grads_in, grads_out: tuple(2 * g for g in grads_in)) and None,
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, grads_out: tuple(2 * g for g in grads_out)) and None,
    "weight_norm": lambda m: shaken(weight_norm(m)) and None,
    "weight_norm parametrized": lambda m: parametrizations.weight_norm(m) and None,
    "spectral_norm": lambda m: spectral_norm(m) and None,
    "spectral_norm parametrized": lambda m: parametrizations.spectral_norm(m) and None,
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5) and None,
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Louder()) and None,
    "class": louder_class,
    "instance": louder_instance,
    "other layer": lambda m: nn.Sequential(m, nn.Tanh()),
}


def install(kind, parent, name):
    replacement = KINDS[kind](getattr(parent, name))
    if replacement is not None:
        setattr(parent, name, replacement)


def projector(cls=reference.ReferenceTemporalProjector, layers=1, change=None):
    """The same parameters for each class, changed in the same way."""
    torch.manual_seed(0)
    model = reference.ReferenceTemporalProjector(3, 8, layers=layers, d_state=3)
    if cls is TemporalProjector:
        state, model = model.state_dict(), TemporalProjector(3, 8, layers=layers, d_state=3)
        model.load_state_dict(state)
    torch.manual_seed(1)
    if change is not None:
        change(model)
    return model


def results(model, call, *args):
    model.zero_grad()
    features = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = call(features, *args)
    out.square().sum().backward()
    return {"out": out.detach(), "features": features.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(got, truth):
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        worst, scale = (got[name] - value).abs().max(), value.abs().max()
        assert worst <= 2e-5 * scale + 1e-7, f"{name}: {worst:.3g} at scale {scale:.3g}"


def check(change, layers=1):
    """Patched projector, and for one reduction each the reference and our own one, against the truth, in results and gradients."""
    truth, patched = projector(layers=layers, change=change), projector(layers=layers, change=change)
    patch(patched)
    others = (None, projector(TemporalProjector, layers, change), projector(layers=layers, change=change))
    for reduction, other in zip(REDUCTIONS, others, strict=True):
        expected = results(truth, lambda *args: called_projector(truth, *args), reduction)
        agree(results(patched, patched, reduction), expected)
        if other is not None:  # as a fresh truth: spectral norms and quantisers change from call to call
            fresh = projector(layers=layers, change=change)
            agree(results(other, other, reduction), results(fresh, lambda *args, fresh=fresh: called_projector(fresh, *args), reduction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", (*MIXER, "proj"))
def test_what_sits_in_a_module_acts_and_learns(name, kind):
    check(lambda model: install(kind, model if name == "proj" else model.layers[-1].mixer, name), layers=1 + (name == "in_proj"))


@pytest.mark.parametrize("kind", ["adapter", "forward hook", "packed"])
def test_videos_of_different_lengths(kind):
    """Each packed video by itself, so that neither convolution mixes two."""
    for name in ("conv1d", "conv1d_b", "dt_proj_b", "out_proj"):
        truth, patched = (projector(layers=2, change=lambda model, name=name: install(kind, model.layers[0].mixer, name)) for _ in range(2))
        patch(patched)
        args = (TokenReduction(2, 1, 2), [2, 3])
        agree(results(patched, patched, *args), results(truth, lambda *a, truth=truth: called_projector(truth, *a), *args))


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_hooks_see_what_the_modules_do(reduction):
    """As often, in the same shapes and with the same values (state-spaces/mamba #59: hooks on in_proj and conv1d were never called)."""
    observed = []
    for fused in (False, True):
        model, seen = projector(layers=2), {}
        modules = {"proj": model.proj} | {f"{i}.norm": layer.norm for i, layer in enumerate(model.layers)}
        modules |= {f"{i}.{name}": getattr(layer.mixer, name) for i, layer in enumerate(model.layers) for name in MIXER}
        for name, module in modules.items():
            module.register_forward_hook(lambda m, args, out, name=name, seen=seen: seen.setdefault(name, []).extend([args[0], out]))
        features = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            if fused:
                patch(model)
            (model if fused else lambda *args, model=model: called_projector(model, *args))(features, reduction)
        observed.append(seen)
    assert observed[1].keys() == observed[0].keys()
    for name, values in observed[0].items():
        assert len(observed[1][name]) == len(values) == 2, name
        for got, truth in zip(observed[1][name], values, strict=True):
            torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-4, msg=name)


def test_hooks_on_all_modules():
    """Trackers of modules, memory and NaN register them: they see each module, and what they change counts."""
    truth, patched, reduction = projector(), projector(), TokenReduction(2, 1, 2)
    patch(patched)
    seen = []

    def hook(module, args, out):
        seen.append(type(module).__name__)
        return out + 0.1 * out.sin() if isinstance(module, (nn.Linear, nn.Conv1d, nn.LayerNorm)) else None

    handle = register_module_forward_hook(hook)
    try:
        expected = results(truth, lambda *args: called_projector(truth, *args), reduction)
        children, seen[:] = sorted(seen), []
        agree(results(patched, patched, reduction), expected)
    finally:
        handle.remove()
    assert sorted(name for name in seen if name in ("Linear", "Conv1d", "LayerNorm")) == children


QUANTISED = (("in_proj",), ("x_proj", "x_proj_b"), ("dt_proj", "dt_proj_b"), ("out_proj",))


@pytest.mark.parametrize("names", QUANTISED, ids=lambda names: names[0])
@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_projections(names):
    """Their weight and bias are methods; the mixer still moves and casts what it has."""

    def quantise(model):
        torch.ao.quantization.quantize_dynamic(model.layers[0].mixer, set(names), dtype=torch.qint8, inplace=True)

    features = torch.randn(FEATURES)
    truth, plain, patched = (projector(change=quantise) for _ in range(3))
    patch(patched)
    for reduction in REDUCTIONS:
        with torch.no_grad():
            expected = called_projector(truth, features, reduction)
            for model in (plain, patched):
                torch.testing.assert_close(model(features, reduction), expected, atol=2e-3, rtol=0)
    assert patched.to("cpu").layers[0].mixer.to(torch.bfloat16).A_log.dtype == torch.float32


class Wrapped(nn.Module):
    """A wrapper that knows what the reference hands a mixer, and no more."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, cu_seqlens=None):
        return self.module(x, cu_seqlens=cu_seqlens).relu()


AROUND = {
    "hook on the mixer": lambda layers: layers[-1].mixer.register_forward_hook(lambda module, args, out: out.relu()),
    "hook on the layer": lambda layers: layers[-1].register_forward_hook(lambda module, args, out: out.relu()),
    "wrapped mixer": lambda layers: setattr(layers[-1], "mixer", Wrapped(layers[-1].mixer)),
    "wrapped layer": lambda layers: layers.__setitem__(-1, Wrapped(layers[-1])),
    "forward of the mixer": lambda layers: louder_instance(layers[-1].mixer),
    "class of the layer": lambda layers: louder_class(layers[-1]),
}


@pytest.mark.parametrize("around", AROUND)
def test_what_sits_around_a_layer_or_its_mixer(around):
    """It sees every token, as in the reference, and the reduction comes after it."""
    plain, own = projector(layers=2), projector(TemporalProjector, layers=2)
    for model in (plain, own):
        AROUND[around](model.layers)
    for reduction in REDUCTIONS:
        agree(results(own, own, reduction), results(plain, plain, reduction))
    unchanged = projector(layers=2)
    assert not torch.allclose(results(own, own, REDUCTIONS[0])["out"], results(unchanged, unchanged, REDUCTIONS[0])["out"])


def test_a_mixer_whose_subclass_calls_super_counts_once():
    class Twice(BiMambaMixer):
        def forward(self, x, *args, **kwargs):
            return 2 * super().forward(x, *args, **kwargs)

    torch.manual_seed(0)
    mixer, x, grid = Twice(8, d_state=3), torch.randn(1, 12, 8), TokenGrid(3, 2, 2)
    mixer.out_proj.register_forward_hook(lambda module, args, out: out)
    expected = 2 * reference.reduce_tokens(called_mixer(mixer, x), grid, TokenReduction(3))
    torch.testing.assert_close(mixer(x, grid, TokenReduction(3)), expected, atol=1e-6, rtol=1e-5)


def test_a_convolution_that_gives_too_few_tokens_is_named():
    mixer = BiMambaMixer(8, d_state=3)
    mixer.conv1d = nn.Conv1d(16, 16, 4, groups=16)
    with pytest.raises(ValueError, match=r"the convolution Conv1d must give at least the 5 tokens .* got shape \(1, 16, 2\)"):
        mixer(torch.randn(1, 5, 8))


def test_the_report_says_what_is_called_and_what_it_costs():
    model = projector(layers=2)
    assert unfused(model) == ()
    install("adapter", model.layers[1].mixer, "in_proj")
    install("forward hook", model.layers[0].mixer, "conv1d_b")
    model.layers[1].register_forward_hook(lambda *_: None)
    first, second, third = unfused(model)
    assert first.startswith("layers.1 (MixerLayer) is called, not fused: with a token reduction")
    assert second.startswith("layers.0.mixer.conv1d_b (Conv1d) is called, not fused: PyTorch's convolution")
    assert third.startswith("layers.1.mixer.in_proj (Adapter) is called, not fused: with temporal_stride > 1")
    assert unfused(model.layers[1].mixer) == (third.replace("layers.1.mixer.", ""),)
