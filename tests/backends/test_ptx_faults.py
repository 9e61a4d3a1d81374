"""Faults in the CUDA and Triton kernels that only the machine code's own accesses and order show:
each is seeded, and the PTX interpreter refuses it.

Those found were real. They run always, with their smallest cases; the others with `make test-ptx`.
tools/mutants.py has those that change results.
"""

import re
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from storm_kernels.backends.cuda import launcher, source, tickets

from ..support.parity import Operations, check, evaluate
from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest
from ..support.ptx_on_cpu import OnPtx, Options, Refused

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings and nvidia-cuda-nvrtc to compile")


@dataclass(frozen=True)
class Fault:
    """``old``, which stands ``times`` times in the source, becomes ``new``; then ``case`` is
    refused with ``message``.
    """

    name: str
    old: str
    new: str
    case: str
    message: str
    gradients: bool = False
    ticketed: bool = False
    times: int = 1


POOLED = {"reduction": (2, 1, 1), "states": 16, "batch": 1}
CASES = {
    "many states": simplest(ScanCase, states=32),  # fewer threads own a quad than there are
    "reverse, three tiles": simplest(
        ScanCase, length=33, states=16, channels_per_group=8, batch=1, direction="reverse"
    ),
    "tiles": simplest(ScanCase, length=40, states=16, channels_per_group=64, batch=1),
    "few tokens": simplest(ScanCase, states=16, batch=1),
    "few channels": simplest(ScanCase, channels_per_group=3, states=16, D=True, batch=1),
    "merged": simplest(ScanCase, direction="both", z="all", states=16, channels_per_group=5),
    "pooled": simplest(ScanCase, grid=(5, 4, 8), direction="both", channels_per_group=64, z="all", **POOLED),
    "pooled, many states": simplest(ScanCase, grid=(4, 2, 8), channels_per_group=32, **POOLED | {"states": 32}),
    "pooled, unaligned": simplest(ScanCase, grid=(4, 2, 3), direction="both", channels_per_group=5, z="kept", **POOLED),
    "handed on": simplest(ScanCase, length=130, states=16, channels_per_group=8, batch=1),
    "past the end": simplest(
        ScanCase, seed=3, length=150, states=16, packed=True
    ),  # some steps are past their sequence's end
    "convolution": simplest(ConvCase, length=9, channels=3, direction="both"),
    "reduction": simplest(ReduceCase, reduction=(2, 2, 1)),
}


def load() -> dict[str, list]:
    table = tomllib.loads((Path(__file__).parent.parent / "support" / "ptx_faults.toml").read_text())
    return {group: [pytest.param(Fault(**one), id=one["name"]) for one in faults] for group, faults in table.items()}


FAULTS = load()


def seed(fault: Fault, monkeypatch) -> None:
    original = source.text

    def text(name: str) -> str:
        found = original(name)
        count = found.count(fault.old)
        assert count in (0, fault.times), f"{name} has the text {count} times"
        seeded.add(count)
        return found.replace(fault.old, fault.new)

    seeded: set[int] = set()
    if fault.ticketed:
        monkeypatch.setattr(tickets, "ticketed_blocks", lambda *_: 3)
        monkeypatch.setattr(tickets, "step_tokens", lambda tokens, interval, pool: interval)
    monkeypatch.setattr(source, "text", text)


def refused(fault: Fault, monkeypatch) -> None:
    seed(fault, monkeypatch)
    with launcher.using(OnPtx(options=Options(patience=30_000))), pytest.raises(Refused, match=fault.message):
        evaluate(CASES[fault.case], Operations("cuda"), CASES[fault.case].operands(), fault.gradients)


@pytest.mark.parametrize("fault", FAULTS["found"])
def test_a_fault_that_was_there_is_refused(fault, monkeypatch):
    with launcher.using(OnPtx()):
        check(CASES[fault.case], "cuda", gradients=False)
    refused(fault, monkeypatch)


@pytest.mark.ptx
@pytest.mark.parametrize("fault", FAULTS["seeded"])
def test_a_seeded_fault_is_refused(fault, monkeypatch):
    refused(fault, monkeypatch)


SUMS = {
    # name of the kernel: its file, a case
    "conv_backward_kernel": (
        "conv_backward",
        simplest(ConvCase, channels=32, length=33, batch=1, dtype="bfloat16"),
    ),
}


def fused_with_another_lane(ptx: str) -> list[str]:
    """The multiply-adds whose addend comes from another lane: there each lane rounds its own product differently."""
    shuffled = set(re.findall(r"shfl\.sync\.\S+\s+(%\w+)", ptx))
    shuffled |= {to for to, of in re.findall(r"mov\.b32\s+(%\w+), (%\w+);", ptx) if of in shuffled}
    return [line for line, addend in re.findall(r"(fma\.rn\.f32\s+[^;]*, (%\w+);)", ptx) if addend in shuffled]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_that_differs_from_lane_to_lane_is_refused(name, monkeypatch):
    """A product that is fused with the first addition of a sum over lanes: found once, seeded in one kernel at a time.

    Before 3.8 Triton lets one lane store such a sum; then no two values meet, and only the
    instruction tells.
    """
    triton = pytest.importorskip("triton")
    from ..support.ptx_on_cpu.plain_product import plain_product
    from ..support.ptx_on_cpu.triton import triton_on_ptx

    (file, case), texts = SUMS[name], []

    def keep(ptx: str) -> str:
        texts.append(ptx)
        return ptx

    def found() -> list[str]:
        return [line for text in texts if f".entry {name}" in text for line in fused_with_another_lane(text)]

    with triton_on_ptx(edit=keep) as runner:
        check(case, "triton")
    assert name in runner.launched and not found()
    module = sys.modules[f"storm_kernels.backends.triton.{file}"]
    monkeypatch.setattr(module, "product", plain_product)
    called = [
        f
        for f in vars(module).values()
        if isinstance(f, triton.JITFunction) and (f.__name__ == name or not f.__name__.endswith("kernel"))
    ]
    for function in called:
        monkeypatch.setattr(function, "hash", None)  # of its source and what it calls
    stores_once = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    refusal = pytest.raises(Refused, match=f"{name}.*and another thread write different values to one address")
    with triton_on_ptx(edit=keep), nullcontext() if stores_once else refusal:
        evaluate(case, Operations("triton"), case.operands(), True)
    assert found()
