"""What libraries and PyTorch itself put into models: PEFT's adapters, compiled, exported, sharded,
checkpointed and copied modules.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from storm_kernels import TemporalProjector, TokenReduction, reference
from storm_kernels.interop.patching import patch
from storm_kernels.plain import unfused

from ..support.adapters import (
    FEATURES,
    MIXER,
    agree,
    called_projector,
    projector,
    results,
)

REDUCTION = TokenReduction(2, 1, 2)
LINEAR = [name for name in (*MIXER, "proj") if not name.startswith("conv1d")]
KINDS = {
    "lora": ("LoraConfig", {"target_modules": LINEAR, "r": 4, "init_lora_weights": False}),
    "lora of the convolutions": (
        "LoraConfig",
        {"target_modules": ["conv1d", "conv1d_b"], "r": 16, "init_lora_weights": False},
    ),
    "dora": ("LoraConfig", {"target_modules": LINEAR, "r": 4, "use_dora": True, "init_lora_weights": False}),
    "lora of a parameter": (
        "LoraConfig",
        {"target_modules": [], "target_parameters": ["A_log"], "r": 2, "init_lora_weights": False},
    ),
    "copies": (
        "LoraConfig",
        {
            "target_modules": ["x_proj"],
            "modules_to_save": ["dt_proj", "out_proj", "conv1d"],
            "init_lora_weights": False,
        },
    ),
    "ia3": ("IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["out_proj"], "init_ia3_weights": False}),
}


def adapted(cls, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config, options = KINDS[kind]
    model = projector(cls)
    torch.manual_seed(1)
    return peft.get_peft_model(model, getattr(peft, config)(**options))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
def test_peft(kind):
    """Its adapters act and learn in every projection (peft #1612, state-spaces/mamba #279: no
    gradient, for the kernel reads the weights).
    """
    truth, own, patched = (
        adapted(cls, kind)
        for cls in (reference.ReferenceTemporalProjector, TemporalProjector, reference.ReferenceTemporalProjector)
    )
    patch(patched)
    expected = (
        results(truth, lambda *args: called_projector(truth.base_model.model, *args), REDUCTION)
        if kind != "lora of a parameter"
        else None
    )
    expected = expected or results(truth, truth, REDUCTION)
    assert all(expected[name].any() for name, p in truth.named_parameters() if p.requires_grad)
    for model in (own, patched):
        agree(results(model, model, REDUCTION), expected)
    if kind in ("lora of the convolutions", "copies"):  # PEFT does not merge them
        return
    merged = patched.merge_and_unload()
    assert unfused(merged) == ()
    torch.testing.assert_close(results(merged, merged, REDUCTION)["out"], expected["out"], atol=2e-6, rtol=1e-4)


def test_peft_in_bfloat16():
    """The bias of an adapted dt_proj is float32 beside weights in bfloat16."""
    model = adapted(TemporalProjector, "lora").to(torch.bfloat16)
    features = torch.randn(FEATURES).bfloat16()
    out = model(features, REDUCTION)
    truth = copy.deepcopy(model).float()
    torch.testing.assert_close(
        out.float(), truth(features.float(), REDUCTION), atol=0.05 * float(out.detach().abs().max()), rtol=0
    )
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def changed():
    """Hooks, an adapter's forward and a parametrization in one projector."""

    def change(model):
        mixer = model.layers[0].mixer
        mixer.conv1d_b.register_forward_hook(lambda module, args, out: out + out.sin())
        parametrizations.weight_norm(mixer.dt_proj)
        mixer.out_proj.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
        mixer.in_proj = nn.Sequential(mixer.in_proj, nn.Tanh())

    return projector(TemporalProjector, change=change)


def test_compile_and_export():
    model = changed()
    torch._dynamo.reset()
    expected = results(model, model, REDUCTION)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(results(model, compiled, REDUCTION), expected)
    features = torch.randn(FEATURES)
    program = torch.export.export(model, (features, REDUCTION))
    torch.testing.assert_close(program.module()(features, REDUCTION), model(features, REDUCTION))


def test_a_hook_after_compilation():
    """PyTorch looks for hooks again only if told to (pytorch #117758); then the fused path gives way."""
    torch._dynamo.reset()
    features, model = torch.randn(FEATURES), projector(TemporalProjector)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        before = compiled(features, REDUCTION)
        model.layers[0].mixer.out_proj.register_forward_hook(lambda module, args, out: out.relu())
        torch.testing.assert_close(compiled(features, REDUCTION), model(features, REDUCTION))
    assert not torch.allclose(before, model(features, REDUCTION))


def test_a_compiled_mixer_still_reduces():
    torch._dynamo.reset()
    model, features = projector(TemporalProjector), torch.randn(FEATURES)
    expected, rows = model(features, REDUCTION), []
    mixer = model.layers[0].mixer
    model.layers[0].mixer = torch.compile(mixer, backend=lambda graph, example: rows.append(graph) or graph.forward)
    torch.testing.assert_close(model(features, REDUCTION), expected)
    assert next(iter(rows[0].graph.output_node().args[0])).meta["example_value"].shape == expected.shape


def test_functional_call_with_other_parameters():
    model = changed()
    state = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    other = changed()
    other.load_state_dict(state)
    features = torch.randn(FEATURES)
    torch.testing.assert_close(
        torch.func.functional_call(model, state, (features, REDUCTION)), other(features, REDUCTION)
    )


@pytest.mark.parametrize("part", ["layers", "mixers", "projections"])
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
def test_fully_sharded(part):
    """FSDP gathers a module's parameters when it is called, which a layer whose children alone are
    called never is (pytorch #125394).
    """
    model, sharded = (projector(TemporalProjector, layers=2) for _ in range(2))
    expected = results(model, model, REDUCTION)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, layers = init_device_mesh("cpu", (1,)), sharded.layers
        parts = {
            "layers": layers,
            "mixers": [layer.mixer for layer in layers],
            "projections": [child for layer in layers for child in layer.mixer.children()],
        }
        for module in (*parts[part], sharded):
            fully_shard(module, mesh=mesh)
        got = results(sharded, sharded, REDUCTION)
        agree({name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in got.items()}, expected)
    finally:
        dist.destroy_process_group()


def test_checkpointed_layers():
    """A wrapper around a layer recomputes it: the layer runs once more in the backward pass."""
    model = changed()
    expected, runs = results(model, model, REDUCTION), []
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, reference.MixerLayer))
    model.layers[0].mixer.x_proj.register_forward_hook(lambda *_: runs.append(1) and None)
    got = results(model, model, REDUCTION)
    agree({name.replace("_checkpoint_wrapped_module.", ""): t for name, t in got.items()}, expected)
    assert len(runs) == 2


def test_copies():
    model, features = changed(), torch.randn(FEATURES)
    expected = model(features, REDUCTION)
    torch.testing.assert_close(copy.deepcopy(model)(features, REDUCTION), expected)
