"""The CUDA kernels' machine code, compiled by NVRTC for GPUs that need not be there: spills,
atomics (tickets only), slots and registers.
"""

import pytest
import torch

from storm_kernels.backends.contract import ConvCall, ConvFilter, ScanCall, ScanInputs
from storm_kernels.backends.cuda import (
    conv,
    conv_backward,
    launcher,
    reduce,
    scan,
    scan_backward,
)
from storm_kernels.tokens import TokenGrid, TokenReduction
from tools import sass

from ..support.parity_random import fuzz_cases
from ..support.stand_in import StandIn

pytest.importorskip("cuda.core", reason="needs cuda-core and nvidia-cuda-nvrtc to compile")

slow = pytest.mark.skipif(fuzz_cases(1) < 2, reason="compiles for minutes: asked for by STORM_KERNELS_FUZZ=2 or more")
TARGETS = ("sm_80", "sm_90", "sm_100")
SM_90_ALWAYS = [
    pytest.param(arch, marks=() if arch == "sm_90" else slow) for arch in TARGETS
]  # an H100; the others where time allows
GRID, REDUCTION = TokenGrid(4, 2, 2), TokenReduction(2, 2, 2)
TICKET = {"scan": ["ATOMG.E.ADD.STRONG.GPU"]}
# Registers a thread: 65,536 a multiprocessor, 128 threads a block. Two blocks of either scan;
# check_states says where three.
REGISTERS = {"scan": 255, "scan_backward": 255, "conv": 128, "conv_backward": 128}


class Recorder(StandIn):
    """A launcher that runs nothing and remembers what it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def launch(self, run):
        self.asked[run.name, run.kernel, tuple(sorted(run.defines.items()))] = run.shared


def variants(dtype: torch.dtype, reduction: bool, save: bool = True) -> dict:
    """What a gated bidirectional mixer launches, forward and, with ``save``, backward."""
    x = torch.zeros(1, GRID.tokens, 64, dtype=dtype)
    state = torch.zeros(1, GRID.tokens, 1, 16, dtype=dtype)
    row, A = torch.zeros(64), torch.zeros(64, 16)
    both = tuple(ScanInputs(x, x, A, state, state, row, row, reverse) for reverse in (False, True))
    filters = tuple(ConvFilter(torch.zeros(64, 4), row, reverse) for reverse in (False, True))
    options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None}
    options |= {"grid": GRID, "reduction": REDUCTION} if reduction else {"grid": None, "reduction": None}
    with launcher.using(Recorder()) as asked:
        call = ScanCall(both, x, **options)
        found = scan(call, save_checkpoints=save)
        if not save:
            return asked.asked
        needs = frozenset({"u", "delta", "A", "B", "C", "z"})
        scan_backward(found.out, None, call, found.checkpoints, needs=needs)
        if not reduction:
            conv(ConvCall(x, filters, silu=True, initial_state=None, cu_seqlens=None))
            conv_backward(
                (x, x),
                ConvCall(x, filters, silu=True, initial_state=None, cu_seqlens=None),
                needs=frozenset({"x", "weight"}),
            )
        else:
            reduce(x, GRID, REDUCTION)
    return asked.asked


def one_scan(save: bool) -> dict:
    """A single direction that writes its output itself and, with ``save``, y before the gate."""
    x = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
    state = torch.zeros(1, 8, 1, 16, dtype=torch.bfloat16)
    one = ScanInputs(x, x, torch.zeros(64, 16), state, state, torch.zeros(64), torch.zeros(64), False)
    options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None, "grid": None, "reduction": None}
    with launcher.using(Recorder()) as asked:
        scan(ScanCall((one,), x, **options), save_checkpoints=save)
    return asked.asked


def check_code(asked: dict, arch: str) -> None:
    sources = {(name, defines): kernel for name, kernel, defines in asked}
    for name, defines in sources:
        code = launcher.compile_cubin(name, dict(defines), arch)
        for kernel, used in sass.resources(code).items():
            assert used.stack == used.local == 0, f"{kernel} for {arch} spills: {used}"
            assert used.registers <= REGISTERS.get(kernel, 128), f"{kernel} for {arch}: {used}"
        for kernel, instructions in sass.disassemble(code).items():
            assert instructions, kernel
            assert sass.atomics(instructions) == TICKET.get(kernel, []), f"{kernel} for {arch}"
            if kernel in TICKET:
                stale = [i.text for i in instructions if ".CONSTANT" in i.opcode]
                assert not stale, (
                    f"{kernel} for {arch} may read what another block wrote from a cache that is never refreshed: "
                    f"{stale}"
                )


def test_every_kernel_compiles_without_spills_or_atomics():
    check_code(variants(torch.bfloat16, reduction=False), "sm_90")


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", TARGETS)
@slow
def test_every_format_compiles_without_spills_or_atomics(arch, dtype, reduction):
    check_code(variants(dtype, reduction), arch)


def forward_of(states: int, formats: tuple[torch.dtype, ...], reduction: bool) -> dict:
    """A gated forward scan that saves y, of ``formats``: those of u and z, of delta, and of B and
    C; bidirectional under a reduction.
    """
    x, delta = (torch.zeros(1, GRID.tokens, 256, dtype=dtype) for dtype in formats[:2])
    state = torch.zeros(1, GRID.tokens, 1, states, dtype=formats[2])
    row, A = torch.zeros(256), torch.zeros(256, states)
    both = tuple(ScanInputs(x, delta, A, state, state, row, row, reverse) for reverse in (False, True))
    options = {"delta_softplus": True, "initial_state": None, "cu_seqlens": None}
    options |= {"grid": GRID, "reduction": REDUCTION} if reduction else {"grid": None, "reduction": None}
    with launcher.using(Recorder()) as asked:
        scan(ScanCall(both if reduction else both[:1], x, **options), save_checkpoints=True)
    return {key: shared for key, shared in asked.asked.items() if key[1] == "scan"}


def check_states(arch: str, states: int, formats: tuple[torch.dtype, ...], reduction: bool) -> None:
    (((name, kernel, defines), shared),) = forward_of(states, formats, reduction).items()
    blocks = 3 if 8 < states <= 16 and not reduction else 2
    used = sass.resources(launcher.compile_cubin(name, dict(defines), arch))[kernel]
    assert used.stack == used.local == 0, f"{states} states for {arch} spill: {used}"
    assert used.registers * launcher.THREADS * blocks <= 65536
    assert (shared + 1024) * 2 <= (164 if arch == "sm_80" else 228) * 1024


STATES = (1, 4, 8, 16, 32, 64, 128, 256, 512)
FORMATS = {
    "bfloat16": (torch.bfloat16,) * 3,
    "float16": (torch.float16,) * 3,
    "float32": (torch.float32,) * 3,
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
}


@pytest.mark.parametrize("states", (STATES[0], 16, STATES[-1]))
def test_forward_scan_of_few_and_many_states_stays_in_registers(states):
    check_states("sm_90", states, FORMATS["bfloat16"], reduction=False)


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("arch", TARGETS)
@slow
def test_every_forward_scan_stays_in_registers(arch, states, formats, reduction):
    check_states(arch, states, FORMATS[formats], reduction)


def test_reduced_scan_compiles_without_spills_or_atomics():
    check_code(
        {key: shared for key, shared in variants(torch.bfloat16, reduction=True).items() if key[1] != "scan_backward"},
        "sm_90",
    )


def test_two_blocks_of_the_reduced_scan_fit_on_an_h100():
    (shared,) = (shared for key, shared in variants(torch.bfloat16, reduction=True).items() if key[1] == "scan")
    a_grid_of_16_by_16 = shared + (256 - 1) * 64 * 4
    assert 2 * (a_grid_of_16_by_16 + 1024) <= 228 * 1024


def _compiled(asked: dict, kernel: str, arch: str = "sm_90"):
    ((name, _, defines),) = (key for key in asked if key[1] == kernel)
    code = launcher.compile_cubin(name, dict(defines), arch)
    return dict(defines), sass.loops(sass.disassemble(code)[kernel]), sass.resources(code)[kernel]


def _flat(loops: list[sass.Loop]):
    for loop in loops:
        yield loop
        yield from _flat(loop.inner)


def elementwise_slots(kernel: str, defines: dict, code: bytes) -> float:
    """Slots of a kernel of gate.cu per item of a scan of both directions and 16 states: WIDTH
    channels a thread, and what a block's tokens share.
    """
    instructions = sass.disassemble(code)[kernel]
    loops = [len(loop.own) for loop in sass.loops(instructions)]  # over tokens: variants of one
    return (max(loops) + (len(instructions) - sum(loops)) / defines["GATE_TILE"]) / defines["WIDTH"] / (2 * 16)


FORWARD = {
    "whole": lambda: one_scan(save=False),
    "whole, saved for backward": lambda: one_scan(save=True),
    "both directions": lambda: variants(torch.bfloat16, reduction=False),
    "reduced": lambda: variants(torch.bfloat16, reduction=True, save=False),
    "reduced, saved for backward": lambda: variants(torch.bfloat16, reduction=True),
    "float16": lambda: variants(torch.float16, reduction=False),
    "float32": lambda: variants(torch.float32, reduction=False),
}


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("arch", SM_90_ALWAYS)
def test_forward_scan_keeps_its_budget_of_slots(variant, arch):
    """At most 8 issue slots per channel, token and state, gate, softplus, loads, stores and the sum
    of both directions included.

    Counted is the whole loop over full tiles. What runs between two runs of tiles, once an interval
    or a pool, is not in it.
    """
    asked = FORWARD[variant]()
    defines, loops, used = _compiled(asked, "scan", arch)
    items = defines["SCAN_TILE"] * defines["PAIR"] * defines["LANE_STATES"]
    tiles = [loop for loop in _flat(loops) if loop.count("MUFU.EX2") >= items]
    slots = [len(loop.own) / items for loop in tiles]
    merging = [(name, dict(macros)) for name, kernel, macros in asked if kernel == "merge_directions"]
    after = sum(
        elementwise_slots("merge_directions", macros, launcher.compile_cubin(name, macros, arch))
        for name, macros in merging
    )
    print(
        f"forward scan, {variant}, {arch}: {[f'{n:.2f}' for n in slots]} slots per item, {after:.2f} after it, "
        f"{used.registers} registers"
    )
    assert len(tiles) == 1 + defines["REDUCED"], "a reduction has another loop, for the frames that sampling drops"
    assert not any(loop.inner for loop in tiles)
    assert max(slots) + after <= 8
    assert used.stack == used.local == 0
