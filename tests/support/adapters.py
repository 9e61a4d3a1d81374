"""Kinds of modules that are more than plain layers, how they get into a model, and the truth: each
module called, nothing fused.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from storm_kernels import TemporalProjector, TokenGrid, TokenReduction, reference
from storm_kernels.reference.projector import downsample, run_padded

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
        return mixer.out_proj(
            reference.bidirectional_selective_scan(one, called_direction(mixer, inner, "_b", bounds), **options)
        )
    if hasattr(mixer, "A_b_log"):
        return mixer.out_proj(
            reference.bidirectional_selective_scan(one, one._replace(A=-mixer.A_b_log.exp()), **options)
        )
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
    """What adapter libraries put in a layer's place: the layer, a second path, and the layer's
    weight and bias as if they were its own.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.extra = (
            nn.Linear(base.in_features, base.out_features, bias=False)
            if isinstance(base, nn.Linear)
            else type(base)(**same_shape(base))
        )

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + 0.5 * torch.tanh(self.extra(x))


def same_shape(module):
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": module.normalized_shape}
    names = ("in_channels", "out_channels", "kernel_size", "groups", "padding")
    return {name: getattr(module, name) for name in names}


class Packed(nn.Module):
    """A layer whose weight sits elsewhere, in a format of its own, and is empty in its place: a
    serving engine's, or one of four bits.
    """

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
    module.__class__ = type(
        "Louder" + kind.__name__,
        (kind,),
        {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs) + 0.1},
    )


def louder_instance(module):
    module.forward = types.MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs) * 1.5, module
    )


def shaken(module):
    """A weight that differs between calls is as wrong as one that a hook forgot: the norms below
    are of the trained kind.
    """
    with torch.no_grad():
        module.weight.add_(0.3 * torch.randn_like(module.weight))
    return module


# Each changes a module in place, or returns what takes its place.
KINDS = {
    "adapter": Adapter,
    "packed": Packed,
    "forward hook": lambda m: m.register_forward_hook(lambda module, args, out: out + torch.tanh(out)) and None,
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: (1.5 * args[0],)) and None,
    "backward hook": lambda m: (
        m.register_full_backward_hook(lambda module, grads_in, grads_out: tuple(2 * g for g in grads_in)) and None
    ),
    "backward pre-hook": lambda m: (
        m.register_full_backward_pre_hook(lambda module, grads_out: tuple(2 * g for g in grads_out)) and None
    ),
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


def results(model, call, *args, x=None):
    model.zero_grad()
    x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(0)) if x is None else x
    features = x.detach().requires_grad_()
    out = call(features, *args)
    out.square().sum().backward()
    return {"out": out.detach(), "features": features.grad} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def agree(got, truth):
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        worst, scale = (got[name] - value).abs().max(), value.abs().max()
        assert worst <= 2e-5 * scale + 1e-7, f"{name}: {worst:.3g} at scale {scale:.3g}"
