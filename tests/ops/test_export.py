"""Leaving Python: torch.export for any number of frames, programs of PyTorch's operators only,
AOTInductor, ONNX; and FlopCounterMode's counts.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import storm_kernels as sk
from storm_kernels import BiMambaMixer, TemporalProjector, TokenReduction
from storm_kernels.ops.flops import FORMULAS, SCAN_PER_STATE

REDUCTION = TokenReduction(2, 2, 2)


class Reduced(nn.Module):
    """A projector that always reduces alike: a deployed program takes tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projector = TemporalProjector(6, 16, layers=2, d_state=4)

    def forward(self, features):
        return self.projector(features, REDUCTION)


def features(frames, batch=1):
    return torch.randn(batch, frames, 4, 3, 6, generator=torch.Generator().manual_seed(frames))


def mixer():
    torch.manual_seed(0)
    return BiMambaMixer(8, d_state=4).eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(("backend", "strict"), [(None, False), (None, True), ("torch", False)])
@torch.no_grad()
def test_one_program_for_any_number_of_frames(backend, strict):
    """With "torch" asked for, of PyTorch's own operators, the loop over tokens one of them: it
    needs no storm_kernels where it runs.
    """
    model = Reduced().eval()
    with sk.use_backend(backend) if backend else warnings.catch_warnings():
        program = torch.export.export(model, (features(8),), dynamic_shapes=({1: Dim.DYNAMIC},), strict=strict)
    module = program.module()
    for frames in (8, 12, 9, 5, 40):
        if torch.__version__ < (2, 13) and backend == "torch" and frames % 2:
            # torch 2.12 traces avg_pool3d for counts that leave the same rest: others are refused.
            with pytest.raises(AssertionError, match="Guard failed"):
                module(features(frames))
            continue
        close(module(features(frames)), model(features(frames)))
    ours = {name for name in operators(program) if "storm_kernels" in name}
    assert bool(ours) == (backend is None)
    assert len(program.graph.nodes) < 600


@torch.no_grad()
def test_a_mixer_for_any_batch_and_length():
    model = mixer()
    program = torch.export.export(model, (torch.randn(2, 9, 8),), dynamic_shapes=({0: Dim("batch"), 1: Dim("tokens")},))
    for shape in ((1, 1, 8), (3, 40, 8)):
        x = torch.randn(shape)
        close(program.module()(x), model(x))


def test_a_program_can_be_differentiated():
    """It keeps no checkpoints for a backward pass, which then computes them itself."""
    model, x = mixer(), torch.randn(2, 9, 8, requires_grad=True)
    program = torch.export.export(model, (x,)).module()
    (found,), (expected,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (program, model))
    close(found, expected)


@torch.no_grad()
def test_traced_by_torchscript():
    model = Reduced().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants: said by the tracer
        traced = torch.jit.trace(model, features(8))
    close(traced(features(8).flip(1)), model(features(8).flip(1)))


@torch.no_grad()
def test_packaged_by_aot_inductor(tmp_path):
    """Two mixers: the first knows neither grid nor reduction, the second both."""
    model, x = Reduced().eval(), features(8)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    close(torch._inductor.aoti_load_package(package)(x), model(x))


@torch.no_grad()
def test_onnx_for_any_number_of_frames(tmp_path):
    """Of ONNX's own operators, the scan its Scan."""
    pytest.importorskip("onnxscript", reason="ONNX export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, path = Reduced().eval(), str(tmp_path / "projector.onnx")
    torch.onnx.export(model, (features(8),), path, dynamo=True, verbose=False, dynamic_shapes=({1: Dim.DYNAMIC},))
    session = runtime.InferenceSession(path)
    for frames in (8, 12, 9, 5, 40):
        (found,) = session.run(None, {session.get_inputs()[0].name: features(frames).numpy()})
        close(torch.from_numpy(found), model(features(frames)))


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return {
        str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items() if "storm_kernels" in str(op)
    }


def test_flops_are_counted():
    model, x = BiMambaMixer(8, d_state=4), torch.randn(2, 9, 8, requires_grad=True)
    inner = 2 * 9 * 16  # batch, tokens, channels
    scan, conv = 2 * SCAN_PER_STATE * inner * 4, 2 * 2 * inner * 4  # directions; states; multiply and add, taps
    # The counter hooks every module, so a mixer calls its convolutions: PyTorch counts those.
    assert counted(lambda: model(x).sum().backward()) == {"scan": scan, "scan_backward": 2 * scan}
    one = BiMambaMixer(8, d_state=4, bidirectional=False)
    assert counted(lambda: one(x)) == {"scan": scan // 2}
    u, taps = torch.randn(2, 9, 16, requires_grad=True), torch.randn(16, 4)
    found = counted(lambda: sum(t.sum() for t in sk.bidirectional_causal_conv1d(u, taps, None, taps, None)).backward())
    assert found == {"conv": conv, "conv_backward": 2 * conv}
    assert counted(lambda: sk.causal_conv1d(u, taps)) == {"conv": conv // 2}
    grid = sk.TokenGrid(3, 3, 1)
    assert counted(lambda: sk.reduce_tokens(x, grid, REDUCTION).sum().backward()) == {
        "reduce": x.numel(),
        "reduce_backward": 2 * 1 * 2 * 8,
    }


@pytest.mark.parametrize("first", ["storm_kernels", "torch.utils.flop_counter"])
def test_formulas_are_there_whatever_is_imported_first(first):
    """And importing us imports no Triton."""
    code = f"""
import importlib, sys
importlib.import_module({first!r})
import storm_kernels
assert {first!r} != "storm_kernels" or "triton" not in sys.modules
from torch.utils.flop_counter import flop_registry
print(sum("storm_kernels" in str(op) for op in flop_registry))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(FORMULAS)
