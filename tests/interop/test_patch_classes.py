"""Other libraries change classes too: what they did before or after ``patch`` stays when we come
and go, and they can undo it themselves.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from storm_kernels import BiMambaMixer, reference
from storm_kernels.interop.patching import PatchError, patch, patched, unpatch

from ..support import original_mixers


class Scaled(nn.Module):
    def __init__(self, factor=1.1):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, w):
        return self.factor * w


MAKE = {
    "reference": lambda: reference.ReferenceMixer(16, d_state=4),
    "mamba": lambda: original_mixers.Mamba(16, bimamba_type="v2"),
    "transformers": lambda: original_mixers.MambaMixer(16),
}
makes = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def grads(mixer, x):
    mixer.zero_grad()
    mixer(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in mixer.named_parameters()}


@makes
@pytest.mark.parametrize("first", ["patch", "parametrize"])
@pytest.mark.parametrize("last", ["unpatch", "remove"])
def test_parametrizations(make, first, last):
    """Two of them, one before and one after, and every order of coming and going."""
    torch.manual_seed(0)
    mixer, x = make(), torch.randn(2, 7, 16)
    own = type(mixer)
    plain = mixer(x)
    twin = copy.deepcopy(mixer)
    for name in ("A_log", "D"):
        parametrize.register_parametrization(twin, name, Scaled())
    expected, learned = twin(x), grads(twin, x)
    steps = [lambda: patch(mixer), lambda: parametrize.register_parametrization(mixer, "A_log", Scaled())]
    for step in steps if first == "patch" else reversed(steps):
        step()
    parametrize.register_parametrization(mixer, "D", Scaled())
    assert type(mixer).__name__ == f"Parametrized{own.__name__}" and isinstance(mixer, own)
    close(mixer(x), expected)
    found = grads(mixer, x)
    assert all((found[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6 for name, grad in learned.items())

    def remove():
        for name in ("A_log", "D"):
            parametrize.remove_parametrizations(mixer, name, leave_parametrized=False)

    if last == "unpatch":
        remove()
        assert "kernels" in str(type(mixer).__mro__)
        close(mixer(x), plain)
        unpatch(mixer)
    else:
        unpatch(mixer)
        assert torch.equal(mixer(x), expected)
        remove()
    assert type(mixer) is own
    assert torch.equal(mixer(x), plain)


def test_a_parametrized_subclass_of_the_reference_is_ours():
    mixer = reference.ReferenceMixer(16)
    parametrize.register_parametrization(mixer, "D_b", Scaled())
    with patched(mixer):
        assert isinstance(mixer, BiMambaMixer)
    assert not isinstance(mixer, BiMambaMixer) and parametrize.is_parametrized(mixer, "D_b")


class Sharded:
    """What fully_shard puts beside a class, in one of its own that all modules of the class share."""

    def gathered(self):
        return f"gathered {type(self).__name__}"


@makes
def test_a_class_with_two_bases_that_modules_share(make):
    mixers, x = nn.ModuleList([make(), make()]), torch.randn(1, 5, 16)
    expected = [mixer(x) for mixer in mixers]
    own = type(mixers[0])
    patch(mixers)
    shared = type(f"FSDP{own.__name__}", (Sharded, type(mixers[0])), {"__deepcopy__": lambda self, memo: 1 / 0})
    for mixer in mixers:
        mixer.__class__ = shared
    assert unpatch(mixers) == ("0", "1")
    assert type(mixers[0]) is type(mixers[1]) and type(mixers[0]).__mro__[2] is own
    for mixer, right in zip(mixers, expected, strict=True):
        assert torch.equal(mixer(x), right) and mixer.gathered() == f"gathered FSDP{own.__name__}"
        with pytest.raises(ZeroDivisionError):
            copy.deepcopy(mixer)
    with patched(mixers):
        assert type(mixers[0]).__mro__[2] is not own
        close(mixers[0](x), expected[0])
    assert type(mixers[0]).__mro__[2] is own


def test_fully_shard():
    """PyTorch's own, where a process group of one can be had."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, x = init_device_mesh("cpu", (1,)), torch.randn(1, 5, 16)
        for order in ((patch, lambda m: fully_shard(m, mesh=mesh)), (lambda m: fully_shard(m, mesh=mesh), patch)):
            torch.manual_seed(0)
            mixer = reference.ReferenceMixer(16)
            expected = mixer(x)
            for step in order:
                step(mixer)
            close(mixer(x), expected)
            unpatch(mixer)
            assert isinstance(mixer, FSDPModule) and type(mixer).__mro__[2] is reference.ReferenceMixer
            close(mixer(x), expected)
    finally:
        distributed.destroy_process_group()


def test_a_class_that_cannot_be_made_again_is_an_error():
    mixer = reference.ReferenceMixer(16)
    patch(mixer)
    fast = type(mixer)

    class Logged(fast):
        def forward(self, x, **options):
            return super().forward(x, **options)

    mixer.__class__ = Logged
    with pytest.raises(
        PatchError, match="the class Logged was put on top of ReferenceMixer and its forward names it: undo that first"
    ):
        unpatch(mixer)
    assert type(mixer) is Logged and mixer(torch.randn(1, 3, 16)).shape == (1, 3, 16)
    mixer.__class__ = fast
    unpatch(mixer)
    assert type(mixer) is reference.ReferenceMixer


def test_pickles_of_earlier_versions_name_a_kind():
    """Whole models that were saved patched: the class, and a word for how it was replaced."""
    from storm_kernels.interop.patching import _rebuild

    for cls, kind in (
        (reference.ReferenceMixer, "mixer"),
        (original_mixers.Mamba, "mamba"),
        (original_mixers.MambaMixer, "transformers with positions"),
        (original_mixers.MambaMixer, "transformers"),
    ):
        torch.manual_seed(0)
        mixer, x = MAKE["reference"]() if cls is reference.ReferenceMixer else cls(16), torch.randn(1, 4, 16)
        again = _rebuild(cls, kind)
        again.__dict__.update(mixer.__dict__)
        close(again(x), mixer(x))
        unpatch(again)
        assert type(again) is cls
