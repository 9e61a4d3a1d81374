"""Modules that are more than plain layers act, learn and are seen in fused and patched models as
where each is called (docs/reliability.md, R19).

The truth, `adapters.called_projector` and `called_mixer`, calls every module and fuses nothing.
"""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from storm_kernels import BiMambaMixer, TemporalProjector, TokenGrid, TokenReduction, reference
from storm_kernels.interop.inference import InferenceParams
from storm_kernels.interop.mamba_ssm import Mamba
from storm_kernels.interop.patching import patch
from storm_kernels.plain import unfused

from ..support import original_mixers
from ..support.adapters import (
    FEATURES,
    KINDS,
    MIXER,
    REDUCTIONS,
    agree,
    called_mixer,
    called_projector,
    install,
    louder_class,
    louder_instance,
    projector,
    results,
)

# PyTorch's old weight_norm is deprecated, and in use.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def check(change, layers=1):
    """Patched projector, and for one reduction each the reference and our own one, against the
    truth, in results and gradients.
    """
    truth, patched = projector(layers=layers, change=change), projector(layers=layers, change=change)
    patch(patched)
    others = (None, projector(TemporalProjector, layers, change), projector(layers=layers, change=change))
    for reduction, other in zip(REDUCTIONS, others, strict=True):
        expected = results(truth, lambda *args: called_projector(truth, *args), reduction)
        agree(results(patched, patched, reduction), expected)
        if other is not None:  # as a fresh truth: spectral norms and quantisers change from call to call
            fresh = projector(layers=layers, change=change)
            agree(
                results(other, other, reduction),
                results(fresh, lambda *args, fresh=fresh: called_projector(fresh, *args), reduction),
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", (*MIXER, "proj"))
def test_what_sits_in_a_module_acts_and_learns(name, kind):
    check(
        lambda model: install(kind, model if name == "proj" else model.layers[-1].mixer, name),
        layers=1 + (name == "in_proj"),
    )


@pytest.mark.parametrize("kind", ["adapter", "forward hook", "packed"])
def test_videos_of_different_lengths(kind):
    """Each packed video by itself, so that neither convolution mixes two."""
    for name in ("conv1d", "conv1d_b", "dt_proj_b", "out_proj"):
        truth, patched = (
            projector(layers=2, change=lambda model, name=name: install(kind, model.layers[0].mixer, name))
            for _ in range(2)
        )
        patch(patched)
        args = (TokenReduction(2, 1, 2), [2, 3])
        agree(
            results(patched, patched, *args), results(truth, lambda *a, truth=truth: called_projector(truth, *a), *args)
        )


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_hooks_see_what_the_modules_do(reduction):
    """As often, in the same shapes and with the same values (state-spaces/mamba #59: hooks on
    in_proj and conv1d were never called).
    """
    observed = []
    for fused in (False, True):
        model, seen = projector(layers=2), {}
        modules = {"proj": model.proj} | {f"{i}.norm": layer.norm for i, layer in enumerate(model.layers)}
        modules |= {f"{i}.{name}": getattr(layer.mixer, name) for i, layer in enumerate(model.layers) for name in MIXER}
        for name, module in modules.items():
            module.register_forward_hook(
                lambda m, args, out, name=name, seen=seen: seen.setdefault(name, []).extend([args[0], out])
            )
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
    assert not torch.allclose(
        results(own, own, REDUCTIONS[0])["out"], results(unchanged, unchanged, REDUCTIONS[0])["out"]
    )


MAMBAS = {"none": MIXER[:4] + ("out_proj", "act"), "v1": ("conv1d", "dt_proj", "act"), "v2": (*MIXER, "act")}


def mamba(bimamba_type, name, kind, make=Mamba):
    torch.manual_seed(0)
    mixer = make(8, d_state=3, bimamba_type=bimamba_type)
    if not hasattr(mixer, "act"):
        mixer.act = nn.SiLU()
    torch.manual_seed(1)
    if name == "act":
        kind = {"adapter": "other layer"}.get(kind, kind)
    install(kind, mixer, name)
    return mixer


@pytest.mark.parametrize("kind", ["adapter", "forward hook", "backward hook", "weight_norm", "instance"])
@pytest.mark.parametrize(("bimamba_type", "name"), [(k, name) for k, names in MAMBAS.items() for name in names])
def test_mamba_of_every_kind(bimamba_type, name, kind):
    """compat's own, and one with the attributes of the originals, patched; their activation is a module too."""
    if name == "act" and kind == "weight_norm":
        kind = "class"
    truth, own, patched = (
        mamba(bimamba_type, name, kind, make) for make in (original_mixers.Mamba, Mamba, original_mixers.Mamba)
    )
    patch(patched)
    own.load_state_dict(truth.state_dict())
    x = torch.randn(2, 7, 8)
    expected = results(truth, lambda features: called_mixer(truth, features), x=x)
    for model in (own, patched):
        agree(results(model, model, x=x), expected)


@pytest.mark.parametrize("kind", ["adapter", "forward hook", "pre-hook", "packed", "instance"])
@pytest.mark.parametrize("name", MAMBAS["none"])
def test_decoding_token_by_token(name, kind):
    if name == "act" and kind == "packed":
        kind = "class"
    mixer, x = mamba("none", name, kind), torch.randn(2, 6, 8)
    mixer.layer_idx = 0
    with torch.no_grad():
        expected = called_mixer(mixer, x)
        for prompt in (2, 5):  # shorter and longer than the convolution
            params = InferenceParams(max_seqlen=6, max_batch_size=2)
            outs = [mixer(x[:, :prompt], inference_params=params)]
            for t in range(prompt, 6):
                params.seqlen_offset = t
                outs.append(mixer(x[:, t : t + 1], inference_params=params))
            torch.testing.assert_close(torch.cat(outs, 1), expected, atol=1e-6, rtol=1e-4)


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
    with pytest.raises(
        ValueError, match=r"the convolution Conv1d must give at least the 5 tokens .* got shape \(1, 16, 2\)"
    ):
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
