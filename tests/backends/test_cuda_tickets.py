"""Tickets of the forward scan: which launches get them; hand-over between blocks, bit for bit what
a block a chain computes.
"""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storm_kernels as sk
from storm_kernels.backends import cuda
from storm_kernels.backends.contract import ScanCall, ScanInputs
from storm_kernels.backends.cuda import launcher, tickets
from storm_kernels.backends.cuda.scan import geometry

from ..support.cuda_on_cpu import OnCpu
from ..support.parity import Operations, check, evaluate
from ..support.parity_cases import ScanCase, simplest
from ..support.parity_random import CASES, fuzz_cases
from .test_cuda import SCANS

INTERVAL = geometry(16).INTERVAL


@contextmanager
def forced(blocks: int, intervals: int = 1):
    """Every scan gets tickets meanwhile: ``blocks`` blocks, and steps of so many intervals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tickets, "ticketed_blocks", lambda *_: blocks)
        patch.setattr(tickets, "step_tokens", lambda tokens, interval, pool: intervals * interval)
        yield


def results(case: ScanCase, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Outputs and, as the checkpoints they start from show in them, gradients."""
    operands = {name: value.to(device) for name, value in case.operands().items()}
    return evaluate(case, Operations("cuda"), operands, True)


def same(case: ScanCase, at_once: int, blocks: int = 5, shared: int = 227 * 1024) -> None:
    with launcher.using(OnCpu(shared=shared)):
        expected = results(case)
    with launcher.using(OnCpu(at_once=at_once, shared=shared)), forced(blocks):
        got = results(case)
    differing = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not differing


COMMON = {"D": True, "z": "all", "bias": True, "states": 16}
CASES_OF_TICKETS = {
    "plain": {"length": 300, "batch": 2, "initial": True, **COMMON | {"z": "none"}},
    "reverse": {"length": 5 * INTERVAL, "direction": "reverse", "initial": True, **COMMON},
    "both": {"length": 300, "direction": "both", "channels_per_group": 70, **COMMON},
    "asynchronous": {
        "length": 300,
        "direction": "both",
        "channels_per_group": 64,
        **COMMON,
        "dtype": "bfloat16",
        "dtype_delta": "bfloat16",
    },
    "groups": {"length": 150, "direction": "both", "groups": 2, **COMMON | {"states": 5}},
    "packed": {"length": 500, "direction": "both", "packed": True, "seed": 3, **COMMON},
    "packed reverse": {"length": 500, "direction": "reverse", "packed": True, "initial": True, "seed": 3, **COMMON},
    "pooled": {"grid": (9, 4, 5), "reduction": (4, 1, 1), "direction": "both", "channels_per_group": 70, **COMMON},
    "pooled asynchronously": {
        "grid": (10, 4, 8),
        "reduction": (4, 1, 1),
        "direction": "both",
        "channels_per_group": 64,
        **COMMON,
    },
    "pooled in space": {"grid": (7, 3, 16), "reduction": (3, 2, 1), "direction": "reverse", **COMMON},
    "frames dropped": {"grid": (11, 4, 8), "reduction": (2, 1, 3), "direction": "both", **COMMON | {"z": "kept"}},
    "cells of few tokens": {"grid": (23, 3, 5), "reduction": (4, 2, 2), "direction": "both", **COMMON | {"z": "kept"}},
}


@pytest.mark.parametrize("at_once", [1, 6])
@pytest.mark.parametrize("case", CASES_OF_TICKETS)
def test_tickets_change_no_bit(case, at_once):
    same(simplest(ScanCase, **CASES_OF_TICKETS[case]), at_once, blocks=7)


@pytest.mark.parametrize("at_once", [1, 4])
def test_sums_in_global_memory_are_handed_on(at_once):
    grid = {"grid": (4, 23, 23), "reduction": (2, 1, 1), "direction": "both", "batch": 1}
    same(simplest(ScanCase, **grid, **COMMON), at_once, shared=163 * 1024)


def test_a_step_waits_for_the_one_before():
    """A single chain: every item's predecessor is at work in another block."""
    for _ in range(3):
        same(simplest(ScanCase, length=10 * INTERVAL, batch=1, direction="forward", **COMMON), at_once=4)


@pytest.mark.parametrize("at_once", [1, 4])
def test_random_cases_keep_the_bound_with_tickets(at_once):
    longer = st.builds(
        lambda case, changes: dataclasses.replace(case, length=3 * case.length, **changes),
        CASES["scan"],
        st.sampled_from(SCANS),
    )

    @settings(max_examples=fuzz_cases(15), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(longer)
    def run(case):
        check(case, "cuda")

    with launcher.using(OnCpu(at_once=at_once)), forced(blocks=6):
        run()


class Watched(OnCpu):
    """Remembers of each ticketed scan the counters before and after."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def launch(self, run):
        t = run.values.get("tickets")
        before = [t[name].clone() for name in ("next", "done")] if t and t["next"] is not None else None
        super().launch(run)
        if before:
            self.seen.append((*before, t["next"], t["done"], t["chains"] * t["steps"] + run.blocks))


def test_each_launch_counts_from_zero():
    case = simplest(ScanCase, length=500, packed=True, seed=3, **COMMON)
    lengths = torch.tensor(case.bounds(500)).diff()
    assert lengths.min() < INTERVAL < lengths.max() - INTERVAL, "some steps are past their sequence's end"
    operands = case.operands()
    with launcher.using(Watched(at_once=3)) as watched, forced(blocks=4):
        for _ in range(2):
            case.call(Operations("cuda"), operands)
    assert len(watched.seen) == 2
    for next_before, done_before, next_after, done_after, taken in watched.seen:
        assert not next_before.any() and not done_before.any()
        assert next_after.item() == taken, "every item and, for each block, one that does not exist"
        assert done_after.tolist() == [max(1, -(-n // INTERVAL)) for n in lengths.tolist()]


class Asked(OnCpu):
    """Runs nothing; `found` is the last scan's blocks, chains and steps."""

    def launch(self, run):
        if run.name == "scan.cu":
            tickets = run.values["tickets"]
            assert tickets["next"] is None or run.values["states"] is not None
            self.found = run.blocks, tickets["chains"], tickets["steps"], tickets["step_tokens"]


def asked(
    gpu: dict, tokens: int, channels: int, batch: int = 1, grid=None, reduction=None, cu_seqlens=None
) -> tuple[int, ...]:
    x = torch.empty(batch, tokens, channels, dtype=torch.bfloat16, device="meta")
    state = torch.empty(batch, tokens, 1, 16, dtype=torch.bfloat16, device="meta")
    row, A = torch.empty(channels, device="meta"), torch.empty(channels, 16, device="meta")
    both = tuple(ScanInputs(x, x, A, state, state, row, row, reverse) for reverse in (False, True))
    options = {"initial_state": None, "cu_seqlens": cu_seqlens, "grid": grid, "reduction": reduction}
    with launcher.using(Asked(**gpu)) as found:
        cuda.scan(ScanCall(both, x, delta_softplus=True, **options), save_checkpoints=False)
    return found.found


A100, H100 = {"multiprocessors": 108, "resident": 3}, {"multiprocessors": 132, "resident": 3}


@pytest.mark.parametrize(
    "gpu, tokens, channels, batch, blocks",
    [
        (A100, 65536, 7168, 1, 216),  # 224 chains: 8 more than two on each
        (H100, 65536, 7168, 1, 264),  # 92 multiprocessors have two, 40 one
        (H100, 2048, 7168, 1, 0),  # too short to be worth the hand-overs
        (H100, 65536, 1536, 1, 0),  # 48 chains
        (H100, 65536, 8448, 1, 0),  # 264: two on each
        (H100, 65536, 7168, 2, 396),  # 448: 52 are left over when three on each are done
        (H100, 65536, 7168, 32, 0),  # 7,168: what is left over is little
        ({"multiprocessors": 132, "resident": 1}, 65536, 7168, 1, 132),
    ],
)
def test_launches_with_tickets(gpu, tokens, channels, batch, blocks):
    launched, chains, steps, step_tokens = asked(gpu, tokens, channels, batch)
    assert chains == 2 * batch * channels // 64
    assert launched == (blocks or chains)
    assert (steps, step_tokens) == ((32, 2048) if blocks else (1, tokens))


@pytest.mark.parametrize(
    "frames, side, pool, expected",
    [
        (256, 16, 4, 2048),  # two pools of 1,024
        (256, 24, 4, 2304),  # a pool
        (256, 14, 4, 3136),  # four pools: whole intervals too
        (64, 32, 8, 2048),  # pools of 8,192: a step is part of one
    ],
)
def test_steps_of_whole_pools(frames, side, pool, expected):
    grid = sk.TokenGrid(frames, side, side)
    _, _, steps, step_tokens = asked(
        {"multiprocessors": 108, "resident": 2}, grid.tokens, 7168, grid=grid, reduction=sk.TokenReduction(pool)
    )
    assert step_tokens == expected
    assert steps == -(-grid.tokens // expected)


def test_packed_sequences_have_the_steps_of_the_longest_they_may_be():
    bounds = torch.empty(3, dtype=torch.int64, device="meta")
    blocks, chains, steps, step_tokens = asked(A100, 65536, 3584, cu_seqlens=bounds)
    assert (blocks, chains, step_tokens, steps) == (216, 224, 1472, 45)


@pytest.mark.gpu
def test_tickets_change_no_bit_on_a_gpu(gpu):
    for name in ("both", "packed reverse", "asynchronous", "pooled asynchronously", "frames dropped"):
        case = simplest(ScanCase, **CASES_OF_TICKETS[name])
        expected = results(case, "cuda")
        for blocks in (1, 7, 500):
            with forced(blocks):
                got = results(case, "cuda")
            assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.gpu
def test_replays_of_a_graph_start_from_zero(gpu):
    case = simplest(ScanCase, length=40 * INTERVAL, direction="both", channels_per_group=512, batch=1, **COMMON)
    operands = {name: value.to(gpu) for name, value in case.operands().items()}
    with forced(blocks=300):
        expected = case.call(Operations("cuda"), operands)["out"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.call(Operations("cuda"), operands)["out"]
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
