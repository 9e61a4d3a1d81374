"""What `make gpu` runs on the first GPU that turns up, so that none of its minutes is wasted.

``python -m tools.gpu`` runs all steps in order: first `smoke`, which runs each family of kernels
once at tiny shapes, in at most 90 seconds, and prints which work; then tests, sanitizer,
benchmarks, without what did not work. A step that is done on this device at this commit is not run
again (``--again`` does), one that fails or takes too long does not stop the others. ``python -m
tools.gpu scan`` runs one step, ``compare`` holds the measured times against the arithmetic of
docs/kernels.md.

``--device ptx`` runs the same script where there is no GPU, at tiny sizes: the PTX interpreter runs
the kernels. It cannot run compute-sanitizer, which attaches to a GPU's driver, nor what only a
GPU's clock and memory serve: CUDA events, streams, counts of GPU memory, mamba-ssm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .gpu_ptx import NAME, in_place_of_a_gpu, kernels_on
from .gpu_steps import ROOT, STATE, Step, results, steps

LONGEST = 9 * 60  # seconds of a step
EACH = {"cuda": 18, "ptx": 300}  # seconds of a family in the first step
SUBJECT = ("op", "backend", "mode", "shape", "dtype")  # what a row measures
AT_ONCE = 4  # families: 17 of 18 seconds end within 90 even if each one hangs


def families() -> dict[str, tuple[str, str, object, bool]]:
    """Of each family its backend, operation, smallest case and whether it is of gradients."""
    from tests.support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest

    whole = {
        "length": 19,
        "channels_per_group": 8,
        "states": 16,
        "D": True,
        "z": "all",
        "bias": True,
        "batch": 1,
        "dtype": "bfloat16",
    }
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
    return {f"{backend}: {name}": (backend, *case) for backend in ("cuda", "triton") for name, case in cases.items()}


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
    """(name, what went wrong, seconds) in a process of its own: a fault of one kernel ends the CUDA
    context of its process.
    """
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

    return f"{environment.device_name('cuda') if device == 'cuda' else NAME}, commit {environment.commit()}"


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


def run_step(step: Step, broken: list[str], device: str = "cuda", longest: float = LONGEST) -> str:
    """ "done", or what went wrong."""
    environment = os.environ | {"STORM_KERNELS_FUZZ": step.fuzz}
    for before in step.before:
        for module in step.modules:
            command = [*before, sys.executable, "-m", "tools.gpu", "exec", device, ",".join(broken), *module]
            try:
                status = run_whole(command, environment, longest)
            except subprocess.TimeoutExpired:
                return f"stopped after {longest:.0f} s"
            except FileNotFoundError:
                return f"{before[0]} is not there"
            if status:
                return f"{module[0]} ended with status {status}"
    return "done"


def run_whole(command: list[str], environment: dict[str, str], longest: float) -> int:
    """The exit status of ``command``. However this call ends, nothing that the command started goes
    on: it would hold the GPU's memory.

    Raises subprocess.TimeoutExpired after ``longest`` seconds, FileNotFoundError where the program
    is missing.
    """
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as child:
        try:
            return child.wait(longest)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def keep_latest(folder: Path, who: str) -> None:
    """Of rows that measure the same on this device at this commit, keep the last: a step that was
    stopped and runs again measures what it had measured before.
    """
    from storm_benchmarks.harness import Rows

    for path in folder.glob("*.json"):
        stored, latest = Rows(path), {}
        for number, row in enumerate(stored.rows):
            subject = tuple(row[name] for name in SUBJECT)
            latest[subject if f"{row['device']}, commit {row['commit']}" == who else number] = row
        if len(latest) < len(stored.rows):
            stored.put(0, *latest.values())


def leave_out(broken: list[str]) -> None:
    """Backends answer from now on that they cannot run the operations of ``broken`` ("cuda:scan")."""
    from storm_kernels.backends import dispatch

    original = dispatch._why_not

    def why_not(op: str, backend: str, *rest):
        return (
            f"{backend}'s {op} failed the first step" if f"{backend}:{op}" in broken else original(op, backend, *rest)
        )

    dispatch._why_not = why_not


def execute(device: str, broken: list[str], module: list[str]) -> None:
    """Run ``module`` with its arguments in this process, on ``device``, without what is ``broken``."""
    leave_out(broken)
    sys.argv = module
    sys.path.insert(0, str(ROOT))
    with in_place_of_a_gpu() if device == "ptx" else contextlib.nullcontext():
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)


def run(names: list[str], state: State, device: str, again: bool) -> None:
    """Run the steps ``names``; where they are all, without those that are done before."""
    known, rows = steps(device, state.path.parent), results(device, state.path.parent)
    for name in names or ["smoke", *known, "compare"]:
        if name == "compare":
            from .gpu_compare import compare

            compare(rows)
        elif state.steps.get(name) == "done" and not again and not names:
            print(f"{name}: done before", flush=True)
        elif name == "smoke":
            run_smoke(state, device)
        else:
            state.note(name, run_step(known[name], state.broken, device))
            keep_latest(rows, state.who)
            print(f"{name}: {state.steps[name]}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["exec"]:
        execute(arguments[1], [one for one in arguments[2].split(",") if one], arguments[3:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("steps", nargs="*", choices=["smoke", *steps("cuda"), "compare", []], help="default: all")
    parser.add_argument("--device", choices=["cuda", "ptx"], default="cuda")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument(
        "--state", type=Path, default=STATE, help="the folder that notes what is done (default: build/gpu)"
    )
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the step that runs, too
    who = identity(args.device)
    state = State(args.state / f"{args.device}.json", who)
    print(who, flush=True)
    run(args.steps, state, args.device, args.again)
    failed = {name: why for name, why in state.steps.items() if why != "done"}
    for name, why in failed.items():
        print(f"{name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
