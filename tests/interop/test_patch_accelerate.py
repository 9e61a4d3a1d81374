"""accelerate's hooks and offloading, put on before ``patch`` or after it: the same results, with a
cache too; and all of it undone.
"""

import copy

import pytest
import torch

from storm_kernels import stats
from storm_kernels.interop.patching import patch, unpatch

from ..support.transformers_models import (
    build,
    cache_of,
    close,
    kinds,
    mixers,
    padding,
    tokens,
    with_cache,
)

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def offload(model, tmp_path):
    accelerate.cpu_offload(model, execution_device="cpu")


def dispatch(model, tmp_path):
    """The first mixers stay, the others wait on the disk."""
    names = [name for name, _ in model.named_children()]
    blocks = next(n for n, m in model.named_modules() if n.endswith("layers"))
    devices = {name: "cpu" for name in names if name != blocks.split(".")[0]}
    inner = model.get_submodule(blocks.split(".")[0])
    for name, _ in inner.named_children():
        if name != "layers":
            devices[f"{blocks.split('.')[0]}.{name}"] = "cpu"
    for index, _ in enumerate(inner.layers):
        devices[f"{blocks}.{index}"] = "disk" if index == 1 else "cpu"
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


def hooks(model, tmp_path):
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(
            module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True), append=True
        )


def results(model):
    ids = tokens()
    with torch.no_grad():
        whole = model(ids, attention_mask=padding("left", ids), use_cache=False).logits
        out = with_cache(model, ids[:, :6])
        cache = cache_of(out)
        return [whole, out.logits, *(with_cache(model, ids[:, t : t + 1], cache, t).logits for t in (6, 7))]


@kinds
@pytest.mark.parametrize("place", [offload, dispatch, hooks])
@pytest.mark.parametrize("first", ["patch", "accelerate"])
def test_offloaded_models(kind, place, first, tmp_path):
    model = build(kind)
    expected = results(model)
    mixer = mixers(model)[0]
    cls = type(mixer)
    steps = [patch, lambda model: place(model, tmp_path)]
    for step in steps if first == "patch" else reversed(steps):
        step(model)
    stats(reset=True)
    for a, b in zip(results(model), expected, strict=True):
        close(a, b)
    assert sum(stats()["scan"].values()) == 4 * len(mixers(model))
    if place is hooks:
        undo = [unpatch, lambda model: accelerate.hooks.remove_hook_from_module(model, recurse=True)]
        for step in undo if first == "patch" else reversed(undo):
            step(model)
        stats(reset=True)
        for a, b in zip(results(model), expected, strict=True):
            assert torch.equal(a, b)
        assert "scan" not in stats() and type(mixer) is cls
        assert len(patch(model).replaced) == len(
            mixers(model)
        )  # the forward that accelerate leaves on the instance is the class's own


def test_an_offloaded_model_learns():
    model, ids = build("mamba").train(), tokens()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hooks(model, None)
    patch(model)
    model(ids, labels=ids).loss.backward()
    for name, grad in expected.items():
        assert (model.get_parameter(name).grad - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name


def test_what_is_offloaded_is_patched_untried_and_says_so():
    model = build("mamba")
    accelerate.cpu_offload(model, execution_device="cpu")
    report = patch(model, check=True)
    assert all("not checked: the weights of" in entry.note for entry in report.replaced)


def test_a_copy_of_a_hooked_mixer():
    mixer = mixers(build("mamba"))[0]
    accelerate.hooks.add_hook_to_module(mixer, accelerate.hooks.ModelHook())
    patch(mixer)
    twin, x = copy.deepcopy(mixer), torch.randn(1, 5, 24)
    with torch.no_grad():
        assert torch.equal(twin(x), mixer(x))
