"""The fused projector, the mixers and patched models under what people do to models: compile,
export, autocast, checkpointing, DDP, copies, meta.
"""

import copy
import io
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from storm_kernels import BiMambaMixer, TemporalProjector, TokenReduction, reference
from storm_kernels.interop.mamba_ssm import Mamba
from storm_kernels.interop.patching import patch, patched

from ..support import original_mixers

REDUCTION = TokenReduction(2, 2, 2)
FEATURES = (2, 5, 4, 3, 6)  # batch, frames, height, width, vision width


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No code compiled by an earlier test."""
    torch._dynamo.reset()


def projector(layers=2, **options):
    torch.manual_seed(0)
    return TemporalProjector(6, 16, layers=layers, d_state=4, **options)


def features(requires_grad=False, seed=0):
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def gradients(model, call):
    model.zero_grad()
    out = call(model)
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(one, other, atol=1e-5):
    (out, grads), (expected, others) = one, other
    torch.testing.assert_close(out, expected, atol=atol, rtol=1e-4)
    assert {name.removeprefix("_orig_mod.").removeprefix("module.") for name in grads} == set(others)
    for name, grad in grads.items():
        reference_grad = others[name.removeprefix("_orig_mod.").removeprefix("module.")]
        assert (grad - reference_grad).abs().max() <= 1e-4 * reference_grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("reduction", [TokenReduction(), REDUCTION], ids=["all tokens", "reduced"])
def test_compile_the_projector(reduction):
    model, x = projector(), features()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(gradients(compiled, lambda m: m(x, reduction)), gradients(model, lambda m: m(x, reduction)))


def test_compile_the_projector_with_inductor():
    model, x = projector(layers=1), features()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x, REDUCTION), model(x, REDUCTION), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("training", [False, True])
def test_no_second_compilation_for_the_third_number_of_frames(training):
    """The first number of frames is taken for a constant, the second makes it a symbol, whatever
    blocks and periods it fills or not.
    """
    model, compilations = projector(), []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.set_grad_enabled(training):
        for frames in (8, 12, 9, 7, 32, 5, 13):
            x = torch.randn(1, frames, 4, 3, 6)
            torch.testing.assert_close(compiled(x, REDUCTION), model(x, REDUCTION), atol=1e-5, rtol=1e-4)
    assert len(compilations) == 2


def test_a_number_of_frames_marked_dynamic():
    model, x = projector(), features()
    torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(gradients(compiled, lambda m: m(x, REDUCTION)), gradients(model, lambda m: m(x, REDUCTION)))


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_compile_a_patched_model(bimamba_type):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.LayerNorm(16), original_mixers.Mamba(16, bimamba_type=bimamba_type)),
        torch.randn(2, 7, 16),
    )
    expected = gradients(model, lambda m: m(x))
    patch(model)
    agree(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), lambda m: m(x)), expected)


def test_patching_a_compiled_model_takes_effect():
    """Code compiled before the patch is not used after it, nor after unpatching."""
    torch.manual_seed(0)
    model, x = nn.Sequential(original_mixers.Mamba(16, bimamba_type="v2")), torch.randn(1, 5, 16)
    traced = []

    def spy(graph, inputs):
        traced.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(model, backend=spy)
    with torch.no_grad():
        expected = compiled(x)
        with patched(compiled):
            torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compiled(x), expected)
    uses_ours = [any("storm_kernels.scan" in target for target in targets) for targets in traced]
    assert uses_ours[:2] == [False, True]


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
def test_compile_a_patched_transformers_model(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    tokens = torch.arange(1, 15).view(2, 7)

    def call(m):
        return m(tokens, use_cache=False).logits

    expected = gradients(model, call)
    patch(model)
    agree(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), call), expected)


@pytest.mark.parametrize("reduction", [TokenReduction(), REDUCTION], ids=["all tokens", "reduced"])
def test_export_the_projector(reduction):
    model, x = projector().eval(), features()
    program = torch.export.export(model, (x, reduction))
    torch.testing.assert_close(program.module()(x, reduction), model(x, reduction), atol=1e-5, rtol=1e-4)


def test_export_a_patched_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(original_mixers.Mamba(16, bimamba_type="v2")).eval(), torch.randn(2, 7, 16)
    patch(model)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Weights stay float32, products run in half precision, the scan's parameters and states do
    not; as accurate as the reference.
    """
    model, x = projector(layers=1), features()
    plain = reference.ReferenceTemporalProjector(6, 16, layers=1, d_state=4)
    plain.load_state_dict(model.state_dict())
    exact = gradients(copy.deepcopy(plain).double(), lambda m: m(x.double(), REDUCTION))

    def call(m):
        with torch.autocast("cpu", dtype=dtype):
            return m(x, REDUCTION)

    found, usual = gradients(model, call), gradients(plain, call)

    def error(one, name=None):
        (value, truth) = (one[0], exact[0]) if name is None else (one[1][name], exact[1][name])
        return (value.double() - truth).square().mean().sqrt().item()

    eps = torch.finfo(dtype).eps
    assert error(found) <= 1.5 * error(usual) + eps * exact[0].square().mean().sqrt()
    for name, grad in found[1].items():
        assert torch.isfinite(grad).all() and grad.dtype == torch.float32
        assert error(found, name) <= 2 * error(usual, name) + eps * exact[1][name].square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_scan_parameters(dtype):
    model = projector(layers=1).to(dtype)
    mixer = model.layers[0].mixer
    kept = (mixer.A_log, mixer.D, mixer.dt_proj.bias, mixer.A_b_log, mixer.D_b, mixer.dt_proj_b.bias)
    assert {p.dtype for p in kept} == {torch.float32}
    out = model(features().to(dtype), REDUCTION)
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_gradient_checkpointing():
    model, x = projector(layers=1), features()
    agree(
        gradients(model, lambda m: checkpoint(m, x, REDUCTION, use_reentrant=False)),
        gradients(model, lambda m: m(x, REDUCTION)),
    )
    leaf = features(requires_grad=True)
    agree(
        gradients(model, lambda m: checkpoint(m, leaf, REDUCTION, use_reentrant=True)),
        gradients(model, lambda m: m(x, REDUCTION)),
    )


def test_data_parallel_on_a_cpu_is_the_module():
    model, x = projector(layers=1), features()
    agree(gradients(nn.DataParallel(model), lambda m: m(x, REDUCTION)), gradients(model, lambda m: m(x, REDUCTION)))


def _ddp_worker(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(original_mixers.Mamba(16, bimamba_type="v2"), BiMambaMixer(16, d_state=4))
    )
    report = patch(model)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7))
    model(x[rank : rank + 1]).square().mean().backward()
    results.put(
        (rank, [e.name for e in report.replaced], {name: p.grad.numpy() for name, p in model.named_parameters()})
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_on_two_processes():
    """A patched model wrapped in DDP: both processes have the gradient of the whole batch."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_ddp_worker, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: rest for rank, *rest in (results.get() for _ in workers)}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    torch.manual_seed(0)
    model = nn.Sequential(original_mixers.Mamba(16, bimamba_type="v2"), reference.ReferenceMixer(16, d_state=4))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(7))
    model(x).square().mean().backward()
    for replaced, grads in found.values():
        assert replaced == ["module.0"]
        for name, p in model.named_parameters():
            grad = torch.from_numpy(grads[f"module.{name}"])
            assert (grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name


@pytest.mark.parametrize(
    "make", [projector, lambda: BiMambaMixer(16, d_state=4), lambda: Mamba(16, d_state=4, bimamba_type="v1")]
)
def test_copies_and_pickles(make):
    model = make()
    x = features() if isinstance(model, TemporalProjector) else torch.randn(1, 5, 16)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make()
    with torch.no_grad():
        for p in loaded.parameters():
            p.add_(1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), model(x))


def test_meta_device():
    """Shapes without memory: built and run on meta, then materialised and loaded."""
    with torch.device("meta"):
        model = projector(layers=1)
    assert all(p.is_meta for p in model.parameters())
    assert model(features().to("meta"), REDUCTION).shape == projector(layers=1)(features(), REDUCTION).shape
    source = projector(layers=1)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(features(), REDUCTION), source(features(), REDUCTION))
    with torch.device("meta"):
        patched_model = nn.Sequential(original_mixers.Mamba(16, bimamba_type="v2"))
        patch(patched_model)
        assert patched_model(torch.empty(2, 5, 16)).shape == (2, 5, 16)
