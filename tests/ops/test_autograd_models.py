"""Autograd's other doors to whole models: per-sample gradients, ensembles, penalties, Hessians; and
what people lay around a model that learns.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import storm_kernels as sk
from storm_kernels import TokenReduction, reference
from storm_kernels.interop.patching import patch

from .test_autograd import flat

REDUCTION = TokenReduction(2, 2, 2)
pytestmark = pytest.mark.filterwarnings("ignore::storm_kernels.SlowPathWarning")


def pair(make, ours):
    """The reference in float64, and the same model on the kernels."""
    torch.manual_seed(0)
    model = make().double()
    fast = ours(copy.deepcopy(model).float())
    return model, fast


def as_projector(plain):
    fast = sk.TemporalProjector(6, 16, layers=2, d_state=4)
    fast.load_state_dict(plain.state_dict())
    return fast


def projector():
    return reference.ReferenceTemporalProjector(6, 16, layers=2, d_state=4)


def features(dtype):
    return torch.randn(3, 5, 4, 3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def per_sample_gradients(model, x):
    def loss(parameters, one):
        return functional_call(model, parameters, (one[None], REDUCTION)).square().sum()

    return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)


def an_ensemble(model, x):
    parameters = {name: torch.stack([p, p * 1.01]) for name, p in model.named_parameters()}
    return vmap(lambda parameters: functional_call(model, parameters, (x, REDUCTION)))(parameters)


def a_gradient_penalty(model, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x, REDUCTION).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), list(model.parameters()), allow_unused=True)


def a_hessian_vector_product(model, x):
    return jvp(grad(lambda v: model(v, REDUCTION).square().sum()), (x,), (x.flip(1),))


def a_tangent(model, x):
    return jvp(lambda v: model(v, REDUCTION, lengths=[5, 3, 4]), (x,), (x.flip(1),))


@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize(
    "use", [per_sample_gradients, an_ensemble, a_gradient_penalty, a_hessian_vector_product, a_tangent]
)
@pytest.mark.parametrize("ours", [as_projector, lambda model: (patch(model), model)[1]], ids=["fused", "patched"])
def test_a_projector_in_use(use, ours, backend, monkeypatch):
    plain, fast = pair(projector, ours)
    truth = use(plain, features(torch.float64))
    with sk.use_backend(backend) if backend else nullcontext():
        found = use(fast, features(torch.float32))
    for one, true in zip(flat(found), flat(truth), strict=True):
        assert (one.double() - true).abs().max() <= 1e-3 * true.abs().max() + 1e-6


def selectively_checkpointed(run):
    def policy(ctx, op, *args, **options):
        return (
            CheckpointPolicy.MUST_SAVE
            if op == torch.ops.storm_kernels.scan.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return lambda x: checkpoint(
        run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


def compiled_with_checkpointing(run):
    return torch.compile(lambda x: checkpoint(run, x, use_reentrant=False), backend="aot_eager", fullgraph=True)


def under(context):
    def wrapped(run):
        def call(x):
            with context():
                return run(x)

        return call

    return wrapped


def after_inference(run):
    with torch.inference_mode():
        run(torch.ones(2, 9, 16))
    return run


SURROUNDINGS = {
    "selective checkpointing": selectively_checkpointed,
    "checkpointing, compiled": compiled_with_checkpointing,
    "saved on the CPU": under(torch.autograd.graph.save_on_cpu),
    "anomaly detection": under(lambda: torch.autograd.detect_anomaly(check_nan=True)),
    "functionalize": torch.func.functionalize,
    "traced": lambda run: make_fx(run)(torch.ones(2, 9, 16)),
    "a tensor of another class": lambda run: (
        lambda x: run(x.as_subclass(type("Another", (torch.Tensor,), {}))).as_subclass(torch.Tensor)
    ),
    "after inference": after_inference,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_gradients_in_surroundings(surroundings):
    """Of the parameters and the input, unchanged by what is laid around a model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, x = sk.BiMambaMixer(16, d_state=4), torch.randn(2, 9, 16, requires_grad=True)
    expected = torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])
    found = torch.autograd.grad(
        SURROUNDINGS[surroundings](mixer)(x).square().sum(),
        [x, *mixer.parameters()],
        allow_unused=surroundings == "traced",
    )
    for one, true in zip(found, expected, strict=True):
        assert one is None or (one - true).abs().max() <= 1e-5 * true.abs().max()


def test_compiled_autograd():
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, x = sk.BiMambaMixer(16, d_state=4), torch.randn(2, 9, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(mixer(x).square().sum(), x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: mixer(x).square().sum().backward(), backend="aot_eager")()
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}, {}], ids=str)
def test_autograd_functional(options):
    torch.manual_seed(0)
    plain, mixer = reference.ReferenceMixer(8, d_state=4), sk.BiMambaMixer(8, d_state=4)
    mixer.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 8)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(jacobian(mixer, x, **options), jacobian(plain, x), atol=1e-6, rtol=1e-4)
    if "strategy" not in options:
        found, expected = (hessian(lambda v, m=m: m(v).square().sum(), x[:, :2], **options) for m in (mixer, plain))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_tangents_under_autocast_are_as_accurate_as_the_references():
    torch.manual_seed(0)
    plain, mixer, x = reference.ReferenceMixer(16, d_state=4), sk.BiMambaMixer(16, d_state=4), torch.randn(2, 9, 16)
    mixer.load_state_dict(plain.state_dict())
    exact = jvp(copy.deepcopy(plain).double(), (x.double(),), (x.double(),))[1]
    with torch.autocast("cpu", torch.bfloat16):
        found, usual = (jvp(m, (x,), (x,))[1] for m in (mixer, plain))
    assert (found - exact).square().mean() <= 1.5 * (usual - exact).square().mean()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_inside_a_compiled_function(transform):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, x, t = sk.BiMambaMixer(8, d_state=4), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    function = {
        "grad": lambda x, t: grad(lambda v: mixer(v).square().sum())(x),
        "vmap": lambda x, t: vmap(mixer)(torch.stack([x, t])),
        "jvp": lambda x, t: jvp(mixer, (x,), (t,))[1],
    }[transform]
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x, t), function(x, t), atol=1e-5, rtol=1e-4)
