"""The CUDA kernels on a CPU where a thread reaches past memory: guard pages, and the sanitizers of g++."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storm_kernels.backends.cuda import launcher, source

from ..support.cuda_on_cpu import OnCpu
from ..support.parity import Operations
from ..support.parity_cases import ConvCase, ScanCase, simplest

BEYOND = {
    "shared memory": ("threadIdx.x % WORKERS / QUADS", "threadIdx.x / QUADS", simplest(ScanCase, states=32)),
    "global memory": (
        "return token >= 0 && token < a.length ?",
        "return token >= 0 ?",
        simplest(ConvCase, length=700, direction="reverse"),
    ),
}


@pytest.mark.parametrize("what", BEYOND)
def test_a_thread_that_reaches_past_memory_is_an_error(what, monkeypatch):
    """Pages that nobody may touch lie behind it: a read a few bytes past a small array may not get
    there (tests/support/ptx_on_cpu).
    """
    old, new, case = BEYOND[what]
    original = source.text
    monkeypatch.setattr(source, "text", lambda name: original(name).replace(old, new))
    assert any(original(name) != source.text(name) for name in ("scan.cu", "conv.cu"))
    with launcher.using(OnCpu()), pytest.raises(RuntimeError, match="reaches past shared or global memory"):
        case.call(Operations("cuda"), case.operands())


_SANITIZED = """
import torch
from storm_kernels.backends.cuda import launcher, tickets
from tests.support.cuda_on_cpu import OnCpu
from tests.support.parity import check
from tests.support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest
flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
with launcher.using(OnCpu(flags=flags)):
    common = dict(channels_per_group=35, groups=2, states=16, D=True, z="kept", bias=True, batch=2)
    check(simplest(ScanCase, grid=(7, 3, 5), reduction=(3, 2, 2), direction="both", **common), "cuda")
    for z in ("all", "none"):
        check(simplest(ScanCase, length=43, direction="both", **common | dict(z=z)), "cuda")
    common |= dict(layout="sliced", layout_state="sliced", initial=True)
    check(simplest(ScanCase, seed=3, length=139, packed=True, direction="reverse", **common), "cuda")
    check(simplest(ConvCase, seed=3, length=270, channels=130, direction="both", packed=True, layout="sliced"), "cuda")
    check(simplest(ConvCase, length=67, channels=5, direction="reverse", initial=True), "cuda")
    check(simplest(ReduceCase, grid=(7, 3, 5), reduction=(3, 2, 2), layout="sliced"), "cuda")
    check(simplest(ScanCase, states=17, channels_per_group=35, z="all", batch=1), "cuda")
tickets.ticketed_blocks, tickets.step_tokens = lambda *_: 5, lambda tokens, interval, pool: interval
with launcher.using(OnCpu(at_once=3, flags=flags)):
    reduced = dict(grid=(7, 4, 5), reduction=(3, 1, 1))
    check(simplest(ScanCase, **reduced, direction="both", states=16, z="all", batch=1), "cuda")
    check(simplest(ScanCase, seed=3, length=139, packed=True, direction="reverse", **common), "cuda")
print("clean")
"""


# Channels that are whole blocks, and that are not.
_SANITIZED_STATES = """
import sys
from storm_kernels.backends.cuda import launcher
from storm_kernels.backends.cuda.scan import geometry
from tests.support.cuda_on_cpu import OnCpu
from tests.support.parity import check
from tests.support.parity_cases import ScanCase, simplest
states = int(sys.argv[1])
block = geometry(states).block_channels
with launcher.using(OnCpu(flags=("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))):
    for channels, direction in ((max(8, block), "both"), (block + 3, "reverse")):
        rest = dict(channels_per_group=channels, direction=direction, z="all", batch=1)
        check(simplest(ScanCase, states=states, length=2 * geometry(states).SCAN_TILE + 3, **rest), "cuda")
print("clean")
"""


@pytest.mark.ptx
@pytest.mark.parametrize("states", [1, 5, 16, 17, 32, 64, 200, 512])
def test_states_under_the_sanitizers(states):
    sanitized(_SANITIZED_STATES, str(states))


def test_under_address_and_undefined_behaviour_sanitizers():
    sanitized(_SANITIZED)


def sanitized(code: str, *arguments: str) -> None:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).parent.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("clean\n") and "Sanitizer" not in done.stderr, done.stderr[-4000:]
