"""Modules within transformers' mixers that are more than their weights act, learn and count,
patched, as they did (docs/reliability.md, R17, R19).

What counts is what the mixer of the installed generation does: the old ones call conv1d, dt_proj
and act, the present ones take their weights.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from storm_kernels import stats
from storm_kernels.interop.patching import patch

from ..support.transformers_models import (
    OLD,
    build,
    close,
    kinds,
    mixer_cache,
    mixer_steps,
    mixers,
    padding,
)

CHILDREN = ("in_proj", "conv1d", "x_proj", "dt_proj", "act", "dt_layernorm", "b_layernorm", "c_layernorm", "out_proj")


def hook(parent, name, calls):
    getattr(parent, name).register_forward_hook(
        lambda module, inputs, out: calls.append((name, out.shape)) or 1.5 * out
    )


def pre_hook(parent, name, calls):
    getattr(parent, name).register_forward_pre_hook(lambda module, inputs: calls.append(name) or (1.5 * inputs[0],))


def backward_hook(parent, name, calls):
    getattr(parent, name).register_full_backward_hook(
        lambda module, grads, _: calls.append(name) or (None if grads[0] is None else (1.5 * grads[0],))
    )


def own_forward(parent, name, calls):
    module = getattr(parent, name)
    forward = module.forward
    module.forward = types.MethodType(lambda self, x: calls.append(name) or 1.5 * forward(x), module)


class LowRank(nn.Module):
    """An adapter: the layer, a path beside it, and the layer's weight as if it were its own."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(torch.tensor(0.3))

    weight, bias = property(lambda self: self.base_layer.weight), property(lambda self: self.base_layer.bias)

    def forward(self, x):
        y = self.base_layer(x)
        return y + self.scale * y.tanh()


def adapter(parent, name, calls):
    setattr(parent, name, LowRank(getattr(parent, name)))


def subclass(parent, name, calls):
    module = getattr(parent, name)

    def forward(self, x):
        calls.append(name)
        return 2 * super(module.__class__, self).forward(x)

    module.__class__ = type("Doubled", (type(module),), {"forward": forward})


class Packed(nn.Module):
    """A quantised layer: a packed weight of another shape and dtype."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.abs().amax() / 127
        self.register_buffer("weight", (layer.weight / self.scale).round().to(torch.int8).flatten())
        self.shape, self.bias = layer.weight.shape, layer.bias

    def forward(self, x):
        return F.linear(x, self.weight.view(self.shape) * self.scale.detach(), self.bias)


def quantised(parent, name, calls):
    if isinstance(getattr(parent, name), nn.Linear):
        parent.config = copy.copy(parent.config)
        parent.config._is_quantized = True
        # The present Mamba multiplies with dt_proj's weight whatever it is.
        if OLD or name != "dt_proj" or hasattr(parent, "dt_layernorm"):
            setattr(parent, name, Packed(getattr(parent, name)))


class Half(nn.Module):
    def forward(self, w):
        return w / 2


def weighted(function):
    def change(parent, name, calls):
        if getattr(getattr(parent, name), "weight", None) is not None and isinstance(
            getattr(parent, name), (nn.Linear, nn.Conv1d)
        ):
            function(getattr(parent, name))

    return change


CHANGES = {
    "forward hook": hook,
    "forward pre-hook": pre_hook,
    "backward hook": backward_hook,
    "forward on the instance": own_forward,
    "adapter": adapter,
    "subclass": subclass,
    "quantised": quantised,
    "weight_norm": weighted(weight_norm),
    "parametrized weight_norm": weighted(parametrizations.weight_norm),
    "pruned": weighted(lambda module: prune.l1_unstructured(module, "weight", amount=0.3)),
    "parametrized": weighted(lambda module: parametrize.register_parametrization(module, "weight", Half())),
}


def run(model, mixer, calls):
    """Results, gradients and calls: a padded batch with its gradients, then a prompt and three tokens with a cache."""
    calls.clear()
    mixer.zero_grad()
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    mask = padding("left", torch.ones(2, 9, dtype=torch.long))
    out = mixer(x, attention_mask=mask)
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    with torch.no_grad():
        outs = mixer_steps(mixer, mixer_cache(model, 2), x)
    return [out.detach(), *outs], grads, list(calls)


def same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        close(a, b, 5e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-6, name
    assert found[2] == expected[2]


@kinds
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_module(kind, change):
    """The change is made before ``patch``, or after it; either way the mixer does what the unpatched one does."""
    model = build(kind).train()
    own = mixers(model)[0]
    for name in (name for name in CHILDREN if hasattr(own, name)):
        results = []
        for steps in ((CHANGES[change],), (CHANGES[change], patched), (patched, CHANGES[change])):
            mixer, calls = copy.deepcopy(own), []
            for step in steps:
                step(mixer, name, calls)
            results.append(run(model, mixer, calls))
        same(results[1], results[0])
        same(results[2], results[0])


def patched(mixer, name, calls):
    patch(mixer)


@kinds
def test_hooks_on_all_modules_see_the_same(kind):
    model = build(kind).train()
    mixer, calls = mixers(model)[0], []
    names = {module: name for name, module in mixer.named_modules()}
    handle = register_module_forward_hook(
        lambda module, inputs, out: module in names and calls.append(names[module]) or None
    )
    try:
        expected = run(model, mixer, calls)
        patch(mixer)
        same(run(model, mixer, calls), expected)
    finally:
        handle.remove()


@kinds
def test_the_report_says_what_is_not_fused(kind):
    model = build(kind)
    mixer = mixers(model)[0]
    mixer.conv1d.register_forward_hook(lambda *_: None)
    mixer.act.register_forward_hook(lambda *_: None)
    report = patch(model)
    note = report.replaced[0].note
    assert ("conv1d is more than its weights" in note) == ("act is called" in note) == OLD
    assert not report.replaced[1].note
    stats(reset=True)
    with torch.no_grad():
        mixer(torch.randn(1, 5, 24))
    assert stats().get("conv", {}) == ({} if OLD else {"cpu": 1})
