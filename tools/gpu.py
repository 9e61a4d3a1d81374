"""What `make gpu` runs on the first GPU that turns up, so that none of its minutes is wasted.

``python -m tools.gpu`` runs all steps in order: first `smoke`, which runs each family of kernels once at tiny shapes, in at most 90 seconds, and
prints which work; then tests, sanitizer, benchmarks, without what did not work. A step that is done on this device at this commit is not run again
(``--again`` does), one that fails or takes too long does not stop the others. ``python -m tools.gpu scan`` runs one step, ``compare`` holds the
measured times against the arithmetic of docs/kernels.md. ``--device ptx`` runs `smoke` in the PTX interpreter, where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "build" / "gpu"
RESULTS = "benchmarks/results"
LONGEST = 9 * 60  # seconds of a step
EACH = {"cuda": 18, "ptx": 300}  # seconds of a family in the first step
AT_ONCE = 4  # families: 17 of 18 seconds end within 90 even if each one hangs
SCAN = ["--device", "cuda", "--channels", "7168", "--dtypes", "bfloat16", "--modes", "forward,backward", "--out", f"{RESULTS}/scan.json"]
E2E = ["storm_benchmarks.e2e", "--preset", "storm-7b", "--device", "cuda"]
GPU_TESTS = ["pytest", "tests/backends/test_parity.py", "-m", "gpu"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]


class Step(NamedTuple):
    """Modules with arguments, run one after the other by this interpreter; ``before``: what runs it in turn, ``fuzz``: of STORM_KERNELS_FUZZ."""

    modules: list[list[str]]
    before: tuple[list[str], ...] = ([],)
    fuzz: str = "1"


STEPS = {
    "test": Step([GPU_TESTS]),
    "sanitize": Step([[*GPU_TESTS, "-k", "cuda"]], ([*SANITIZER, "memcheck"], [*SANITIZER, "racecheck"]), "0.02"),
    # With every peer, those that loop over tokens too; then 256 frames, where only mamba-ssm can follow.
    "scan": Step([["storm_benchmarks.scan", *SCAN, "--lengths", "2048"]]),
    "scan-long": Step([["storm_benchmarks.scan", *SCAN, "--lengths", "65536"]]),
    "kernels": Step([[f"storm_benchmarks.{op}", "--device", "cuda", "--out", f"{RESULTS}/{op}.json"] for op in ("conv", "reduce")]),
    "projector": Step([["storm_benchmarks.projector", "--device", "cuda", "--out", f"{RESULTS}/projector.json"]]),
    # The reference projector of storm-7b takes one token after the other: at 50 to 100 us of launches for each, 128 frames (32,768 tokens, 2
    # directions, 4 layers) are 13 to 26 s a pass. Seven passes fit nine minutes beside the rest: the first one, and two variants to warm up and in
    # two rounds. Seven variants, or 256 frames, might not.
    "e2e-128": Step([
        [*E2E, "--frames", "128", "--projector", "fused", "--out", f"{RESULTS}/e2e-128"],
        [*E2E, "--frames", "128", "--projector", "both", "--variants", "vila,storm,storm-tp-ts", "--repeat", "2", "--out", f"{RESULTS}/e2e-128-both"],
    ]),
    "e2e-256": Step([[*E2E, "--frames", "256", "--projector", "fused", "--out", f"{RESULTS}/e2e-256"]]),
}  # fmt: skip


def families() -> dict[str, tuple[str, str, object, bool]]:
    """Of each family its backend, operation, smallest case and whether it is of gradients."""
    from tests.support.parity_cases import ConvCase, NormCase, ReduceCase, ScanCase, simplest

    whole = {"length": 19, "channels_per_group": 8, "states": 16, "D": True, "z": "all", "bias": True, "batch": 1, "dtype": "bfloat16"}
    reduced = whole | {"grid": (4, 2, 8), "reduction": (2, 1, 2), "z": "kept"}
    cases = {
        "scan": ("scan", simplest(ScanCase, **whole), False),
        "scan of both directions": ("scan", simplest(ScanCase, direction="both", **whole), False),
        "scan of many states": ("scan", simplest(ScanCase, **whole | {"states": 64, "direction": "reverse"}), False),
        "scan, reduced": ("scan", simplest(ScanCase, direction="both", **reduced), False),
        "scan, backward": ("scan", simplest(ScanCase, direction="both", **whole), True),
        "convolution": ("conv", simplest(ConvCase, direction="both", length=19, channels=9), False),
        "convolution, backward": ("conv", simplest(ConvCase, direction="both", length=19, channels=9), True),
        "reduction": ("reduce", simplest(ReduceCase, reduction=(2, 2, 1)), True),
    }
    found = {f"{backend}: {name}": (backend, *case) for backend in ("cuda", "triton") for name, case in cases.items()}
    return found | {"triton: norm": ("triton", "norm", simplest(NormCase, channels=70), True)}


@contextlib.contextmanager
def kernels_on(device: str, backend: str):
    """Within it ``backend`` runs: on the GPU, or in the PTX interpreter."""
    if device == "cuda":
        yield
    elif backend == "cuda":
        from storm_kernels.backends.cuda import launcher
        from tests.support.ptx_on_cpu import OnPtx

        with launcher.using(OnPtx()):
            yield
    else:
        from tests.support.ptx_on_cpu.triton import triton_on_ptx

        with triton_on_ptx():
            yield


def try_family(name: str, device: str) -> str:
    """ "" if it keeps the bound; else what went wrong."""
    from tests.support.parity import check

    backend, _, case, gradients = families()[name]
    try:
        with kernels_on(device, backend):
            check(case, backend, device="cuda" if device == "cuda" else "cpu", gradients=gradients)
        return ""
    except BaseException as error:  # whatever it is, the others go on
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _child(name: str, device: str, answer) -> None:
    answer.send(try_family(name, device))


def context():
    """Processes that begin with torch imported: by forks of one that has imported it and never asks for the GPU."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.parity"])
    return found


def try_apart(name: str, device: str, longest: float, child: Callable = _child) -> tuple[str, str, float]:
    """(name, what went wrong, seconds) in a process of its own: a fault of one kernel ends the CUDA context of its process."""
    start = time.perf_counter()
    receive, send = multiprocessing.Pipe(False)
    process = context().Process(target=child, args=(name, device, send))
    process.start()
    send.close()
    try:
        why = receive.recv() if receive.poll(longest) else f"still running after {longest:.0f} s"
    except EOFError:
        process.join(5)
        why = f"its process ended with status {process.exitcode}"
    process.kill()
    process.join()
    return name, why, time.perf_counter() - start


def smoke(device: str, names: list[str] | None = None) -> dict[str, str]:
    """Run each family, print and return what went wrong with each ("" : it works)."""
    found = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, why, seconds in pool.map(lambda one: try_apart(one, device, EACH[device]), names or families()):
            found[name] = why
            print(f"{'works ' if not why else 'FAILS '} {seconds:5.1f} s  {name}{': ' if why else ''}{why}", flush=True)
    return found


def identity(device: str) -> str:
    """Device and commit, as rows carry them."""
    from storm_benchmarks import environment

    return f"{environment.device_name('cuda') if device == 'cuda' else device}, commit {environment.commit()}"


class State:
    """What is done on this device at this commit, in a file that each step replaces."""

    def __init__(self, path: Path, who: str):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.steps: dict[str, str] = stored.get("steps", {}) if stored.get("who") == who else {}
        self.broken: list[str] = stored.get("broken", []) if stored.get("who") == who else []
        self.who = who

    def note(self, step: str, outcome: str) -> None:
        self.steps[step] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"who": self.who, "steps": self.steps, "broken": self.broken}, indent=1))
        beside.replace(self.path)


def run_smoke(state: State, device: str, names: list[str] | None = None) -> None:
    found = smoke(device, names)
    known = families()
    state.broken = sorted({"{}:{}".format(*known[name][:2]) for name, why in found.items() if why})
    state.note("smoke", "done" if not state.broken else f"without {', '.join(state.broken)}")


def run_step(step: Step, broken: list[str], longest: float = LONGEST) -> str:
    """ "done", or what went wrong."""
    environment = os.environ | {"STORM_KERNELS_FUZZ": step.fuzz}
    for before in step.before:
        for module in step.modules:
            command = [*before, sys.executable, "-m", "tools.gpu", "exec", ",".join(broken), *module]
            try:
                done = subprocess.run(command, cwd=ROOT, env=environment, timeout=longest)
            except subprocess.TimeoutExpired:
                return f"stopped after {longest:.0f} s"
            except FileNotFoundError:
                return f"{before[0]} is not there"
            if done.returncode:
                return f"{module[0]} ended with status {done.returncode}"
    return "done"


def leave_out(broken: list[str]) -> None:
    """Backends answer from now on that they cannot run the operations of ``broken`` ("cuda:scan")."""
    from storm_kernels.backends import dispatch

    original = dispatch._why_not

    def why_not(op: str, backend: str, *rest):
        return f"{backend}'s {op} failed the first step" if f"{backend}:{op}" in broken else original(op, backend, *rest)

    dispatch._why_not = why_not


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["exec"]:  # a module in this process, without what is broken
        leave_out([one for one in arguments[1].split(",") if one])
        sys.argv = arguments[2:]
        sys.path.insert(0, str(ROOT))
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
        return 0
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("steps", nargs="*", choices=["smoke", *STEPS, "compare", []], help="default: all")
    parser.add_argument("--device", choices=["cuda", "ptx"], default="cuda")
    parser.add_argument("--again", action="store_true", help="also what is done")
    args = parser.parse_args(arguments)
    who = identity(args.device)
    state = State(STATE / f"{args.device}.json", who)
    print(who)
    for name in args.steps or ["smoke", *STEPS, "compare"]:
        if name == "compare":
            from .gpu_compare import compare

            compare(ROOT / RESULTS)
        elif state.steps.get(name) == "done" and not args.again and not args.steps:
            print(f"{name}: done before")
        elif name == "smoke":
            run_smoke(state, args.device)
        else:
            state.note(name, run_step(STEPS[name], state.broken))
            print(f"{name}: {state.steps[name]}", flush=True)
    failed = {name: why for name, why in state.steps.items() if why != "done"}
    for name, why in failed.items():
        print(f"{name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
