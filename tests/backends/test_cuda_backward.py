"""The CUDA backend's backward scan: machine code within its budget on every architecture, plans for
GPUs with less shared memory, determinism.
"""

import pytest
import torch

import storm_kernels as sk
from storm_kernels.backends.contract import ScanCall, ScanInputs
from storm_kernels.backends.cuda import launcher, scan, scan_backward
from storm_kernels.backends.cuda.scan import geometry
from storm_kernels.backends.cuda.scan_backward import TWO_BLOCKS, plan_for, plans, shared_bytes
from tools import sass

from ..support.cuda_on_cpu import OnCpu
from ..support.parity import check
from ..support.parity_cases import ScanCase, simplest
from .test_cuda_code import GRID, REDUCTION, SM_90_ALWAYS, TARGETS, Recorder, elementwise_slots, slow

STATES = (1, 4, 8, 16, 32, 64, 128, 256, 512)
A100, RTX_4090 = 163 * 1024, 99 * 1024  # shared memory a block may have


def compiled(
    arch: str, kernel: str = "scan_backward", *, states: int = 16, gated: bool = True, reduced: bool = False
) -> tuple[dict, bytes]:
    """Definitions and machine code of ``kernel``, which the backward of a bidirectional bfloat16 scan runs.

    dL/dy is float32 with a gate or a reduction, else the gradient of the result itself.
    """
    pytest.importorskip("cuda.core", reason="needs cuda-core and nvidia-cuda-nvrtc to compile")
    x = torch.zeros(1, GRID.tokens, 256, dtype=torch.bfloat16)
    state, row = torch.zeros(1, GRID.tokens, 1, states, dtype=torch.bfloat16), torch.zeros(256)
    both = tuple(
        ScanInputs(x, x, torch.zeros(256, states), state, state, row, row, reverse) for reverse in (False, True)
    )
    options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None}
    options |= {"grid": GRID, "reduction": REDUCTION} if reduced else {"grid": None, "reduction": None}
    call = ScanCall(both, x if gated else None, **options)
    with launcher.using(Recorder()) as recorder:
        found = scan(call, save_checkpoints=True)
        needs = frozenset({"u", "delta", "A", "B", "C", "z"})
        scan_backward(found.out, None, call, found.checkpoints, needs=needs)
    ((name, defines),) = ((name, dict(defines)) for name, asked, defines in recorder.asked if asked == kernel)
    return defines, launcher.compile_cubin(name, defines, arch)


def slots(defines: dict, code: bytes) -> dict[str, float]:
    """Instructions a warp issues, per channel, token and state of a thread, in each of the loops
    inside the one over intervals and in all.
    """
    (intervals,) = (loop for loop in sass.loops(sass.disassemble(code)["scan_backward"]) if loop.inner)
    items = defines["INTERVAL"] * defines["PAIR"] * defines["LANE_STATES"]
    segments = defines["INTERVAL"] // defines["SEGMENT"]
    exps = defines["SEGMENT"] * defines["PAIR"] * defines["LANE_STATES"]
    found = {"the interval": len(intervals.own) / items}
    for loop in intervals.inner:
        count = loop.count("MUFU.EX2")
        if count < exps:  # two softplus a pair of channels
            found["delta"] = len(loop.own) * defines["INTERVAL"] // defines["STATE_LANES"] // (count // 2) / items
        elif count == exps:
            found["states saved"] = len(loop.own) * (segments - 1) / items
        else:
            found["adjoint"] = len(loop.own) * segments / items
    assert len(found) == 1 + len(intervals.inner) == 4
    return found | {"all": sum(found.values())}


@pytest.mark.parametrize("arch", SM_90_ALWAYS)
@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gated"])
def test_backward_keeps_its_budget_of_slots(arch, gated, reduced):
    """At most 24 issue slots per channel, token and state, those of the gate and the reduction
    before the scan and every instruction included.
    """
    found = slots(*compiled(arch, gated=gated, reduced=reduced))
    before = (
        elementwise_slots("gate_backward", *compiled(arch, "gate_backward", gated=gated, reduced=reduced))
        if gated or reduced
        else 0.0
    )
    print(
        f"backward for {arch}, slots per item: {before:.2f} before the scan,",
        ", ".join(f"{name} {value:.2f}" for name, value in found.items()),
    )
    assert before + found["all"] <= 24.0


def check_code(arch: str, states: int, gated: bool) -> None:
    _, code = compiled(arch, states=states, gated=gated)
    used = sass.resources(code)["scan_backward"]
    assert used.stack == used.local == 0 and used.registers <= 255, used
    assert not sass.atomics(sass.disassemble(code)["scan_backward"])


def test_16_states_compile_without_spills_or_atomics():
    check_code("sm_90", 16, gated=True)


@pytest.mark.parametrize("gated", [False, True], ids=["bfloat16 gradient", "float32 gradient"])
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("states", STATES)
@slow
def test_every_state_size_compiles_without_spills_or_atomics(states, arch, gated):
    check_code(arch, states, gated)


def test_plans_fit_the_shared_memory_of_every_gpu():
    assert shared_bytes(geometry(16), plan_for(geometry(16), 227 * 1024)) <= TWO_BLOCKS
    assert shared_bytes(geometry(16)) <= RTX_4090
    for states in STATES:
        assert shared_bytes(geometry(states)) <= A100
        assert shared_bytes(geometry(states), plan_for(geometry(states), A100)) <= A100


def test_every_plan_keeps_the_bound():
    for plan in plans(geometry(16)):
        with launcher.using(OnCpu(shared=shared_bytes(geometry(16), plan))):
            check(
                simplest(
                    ScanCase, length=150, batch=1, direction="both", states=16, z="all", D=True, bias=True, initial=True
                ),
                "cuda",
            )


class _Cuda:
    def __getattr__(self, name):
        return lambda *args, **options: getattr(sk, name)(*args, backend="cuda", **options)


@pytest.mark.parametrize(
    "kind",
    [
        {"length": 150, "packed": True, "direction": "reverse"},
        {"grid": (9, 4, 4), "reduction": (2, 2, 2), "direction": "both"},
    ],
)
def test_reruns_with_blocks_side_by_side_change_no_bit(kind):
    case = simplest(
        ScanCase, channels_per_group=130, groups=2, D=True, z="all", bias=True, states=16, dtype="bfloat16", **kind
    )
    leaves = {name: value.requires_grad_() for name, value in case.operands().items()}

    def gradients():
        return torch.autograd.grad(case.call(_Cuda(), leaves)["out"].square().sum(), list(leaves.values()))

    with launcher.using(OnCpu()):
        alone = gradients()
    with launcher.using(OnCpu(at_once=4)):
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(alone, gradients(), strict=True))
