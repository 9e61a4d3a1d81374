"""What the CUDA backend announces and refuses: shapes of checkpoints, reasons against, arguments, barriers."""

import pytest
import torch

from storm_kernels.backends import cuda
from storm_kernels.backends.contract import ScanCall, ScanInputs
from storm_kernels.backends.cuda import launcher, source
from storm_kernels.backends.cuda.tokens import sum_terms
from storm_kernels.tokens import TokenGrid, TokenReduction

from ..support.cuda_on_cpu import OnCpu


def test_warmup_runs_what_a_mixer_runs(on_cpu):
    on_cpu.launched.clear()
    cuda.warmup(torch.bfloat16, device="cpu", backward=True)
    kernels = {
        "scan",
        "merge_directions",
        "scan_backward",
        "gate_backward",
        "conv",
        "conv_backward",
        "sum_terms",
        "token_map",
    }
    assert {kernel for _, kernel, _ in on_cpu.launched} == kernels


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("reduction", [None, TokenReduction(2, 1, 2)])
def test_checkpoints_have_the_shapes_that_are_announced(reduction, gated, count, on_cpu):
    grid, states = TokenGrid(6, 2, 3), 16
    x, state, row = torch.zeros(2, grid.tokens, 8), torch.zeros(2, grid.tokens, 1, states), torch.zeros(8)
    directions = tuple(
        ScanInputs(x, x, torch.zeros(8, states), state, state, row, row, reverse) for reverse in (False, True)[:count]
    )
    where = {"grid": grid, "reduction": reduction}
    options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None, **where}
    found = cuda.scan(ScanCall(directions, x if gated else None, **options), save_checkpoints=True).checkpoints
    shapes = cuda.checkpoint_shapes(*x.shape, states, directions=count, sequences=0, gated=gated, **where)
    assert [tuple(t.shape) for t in found] == list(shapes)
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_reasons_against():
    with launcher.using(launcher.Device()):
        reason = cuda.why_not("scan", device="cuda", dtypes=frozenset({torch.float32}), d_state=16, d_conv=0)
        assert torch.cuda.is_available() or "no CUDA device" in reason
        assert "these are on cpu" in cuda.why_not("scan", device="cpu", dtypes=frozenset(), d_state=16, d_conv=0)
    with launcher.using(OnCpu()):

        def why(op, *dtypes, d_state=16, d_conv=4):
            return cuda.why_not(op, device="cpu", dtypes=frozenset(dtypes), d_state=d_state, d_conv=d_conv)

        assert why("scan", torch.float32, torch.bfloat16) is None
        assert "float64" in why("scan", torch.float64)
        assert "513" in why("scan", torch.float32, d_state=513)
        assert "17" in why("conv", torch.float32, d_conv=17)


def test_arguments_must_be_those_of_the_kernel():
    with pytest.raises(TypeError, match="map.*got.*sells"):
        source.pack("tokens.cu", "MapArgs", {"r": {}, "sells": None})


def test_a_barrier_that_not_all_reach_is_an_error(monkeypatch):
    broken = source.text("tokens.cu").replace(
        "    from_float(sum.value, a.out[i]);", "    if (i) __syncthreads();\n    from_float(sum.value, a.out[i]);"
    )
    monkeypatch.setattr(source, "text", lambda name: broken)
    with launcher.using(OnCpu()), pytest.raises(RuntimeError, match="never comes"):
        sum_terms(torch.ones(1, 1, 128), torch.float32)
