"""Seeded faults in the kernels: does the suite notice each one? (docs/reliability.md, R8)

``python -m tools.mutants [word ...] [--jobs N]`` applies every fault of ``mutants_*.toml`` beside
this file, or those whose backend or name holds one of the words, each to a copy of its own of the
tree in a temporary folder, builds it there and runs the tests named beside it. They have to fail.
Exits with 1 if a mutant survives, if its text is no longer in the source exactly once, if it does
not build, or if its tests fail without any fault.

A list names the sources' folder, whether the C++ library is to be built, the environment of the
tests, selections of tests (arguments of pytest), and the faults: file, the text that stands there
once, what replaces it, and a selection.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("storm_kernels", "tests", "tools", "pyproject.toml")
LONGEST = 600  # seconds that tests may take: a fault can make a loop endless


@dataclass(frozen=True)
class Tests:
    """A selection of tests and what they need."""

    backend: str
    arguments: str  # of pytest
    environment: tuple[tuple[str, str], ...]
    builds: bool  # the C++ library


@dataclass(frozen=True)
class Mutant:
    """One fault: ``old``, which stands once in ``file`` (from the root), becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: Tests


@dataclass(frozen=True)
class Verdict:
    what: str  # "killed" is good
    why: str  # the test that noticed, or what went wrong
    seconds: float


class Broken(Exception):
    """The mutant cannot be judged; the message says why."""


def load(folder: Path = Path(__file__).parent) -> list[Mutant]:
    """All lists. Raises KeyError on a selection that is not defined, TypeError on a field that does not exist."""
    found = []
    for path in sorted(folder.glob("mutants_*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        environment = tuple(table.get("environment", {}).items())
        backend = path.stem.removeprefix("mutants_")
        selections = {
            name: Tests(backend, arguments, environment, table["builds"]) for name, arguments in table["tests"].items()
        }
        for one in table["mutant"]:
            found.append(
                Mutant(**one | {"file": f"{table['folder']}/{one['file']}", "tests": selections[one["tests"]]})
            )
    return found


def mutate(root: Path, mutant: Mutant) -> None:
    """Apply ``mutant`` to the tree at ``root``; raises Broken if its text does not stand there once."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    times = text.count(mutant.old)
    if times != 1:
        raise Broken(f"{mutant.file} has the text {times} times: {mutant.old.strip().splitlines()[0]}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def judge(tests: Tests, mutant: Mutant | None, built: Path) -> Verdict:
    """Run ``tests`` on a copy of the tree with the fault in it. ``built`` is where copies share
    what tests build, which is named by its source.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            take(
                ROOT / name,
                copy / name,
                **({"ignore": shutil.ignore_patterns("__pycache__", "*.so")} if take is shutil.copytree else {}),
            )
        (copy / "build").symlink_to(built)
        try:
            if mutant:
                mutate(copy, mutant)
            if tests.builds:
                build_library(copy)
            what, why = run(tests, copy)
        except Broken as error:
            what, why = "broken", str(error)
    return Verdict(what, why, time.perf_counter() - start)


def build_library(root: Path) -> None:
    """The "cpu" backend's library of the tree at ``root``, for this processor only."""
    from storm_kernels.backends.cpu.loader import library

    spec = importlib.util.spec_from_file_location("build_of_mutant", root / "storm_kernels/backends/cpu/build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    try:
        builder.build(root / "storm_kernels/backends/cpu" / builder.LIBRARY_NAME, only=(library().isa,))
    except builder.BuildError as error:
        raise Broken(f"does not build: {error}") from error


def run(tests: Tests, root: Path) -> tuple[str, str]:
    """("killed" or "survived", the first test that failed); raises Broken if the tests did not run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile",
        "first-failure",
    ]
    environment = os.environ | dict(tests.environment) | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    try:
        done = subprocess.run(
            [*command, *shlex.split(tests.arguments)],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return "killed", f"still running after {LONGEST} s"
    if done.returncode < 0:
        return "killed", f"the process ended with signal {-done.returncode}"
    if "could not compile" in done.stdout or done.returncode not in (0, 1):
        raise Broken("\n".join(done.stdout.strip().splitlines()[-5:]) + done.stderr[-500:])
    if done.returncode == 0:
        return "survived", f"{shlex.join(shlex.split(tests.arguments))}: {done.stdout.strip().splitlines()[-1]}"
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))), "")
    return "killed", failed.partition(" ")[2].removeprefix("tests/")


def judge_all(mutants: Sequence[Mutant], jobs: int, say: Callable[[str], None]) -> list[tuple[str, str, Verdict]]:
    """(backend, name, verdict) of every selection of tests without a fault, then of every mutant."""
    plain = list(dict.fromkeys(mutant.tests for mutant in mutants))
    work = [(f"no fault: {tests.arguments}", tests, None) for tests in plain]
    work += [(mutant.name, mutant.tests, mutant) for mutant in mutants]
    done = 0

    def one(item: tuple[str, Tests, Mutant | None]) -> tuple[str, str, Verdict]:
        nonlocal done
        name, tests, mutant = item
        verdict = judge(tests, mutant, Path(built))
        done += 1
        say(f"[{done}/{len(work)}] {verdict.what:<8} {verdict.seconds:5.0f} s  {tests.backend}: {name}")
        return tests.backend, name, verdict

    with tempfile.TemporaryDirectory(prefix="mutants-build-") as built, ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, work))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description="Seeded faults in the kernels: does the suite notice each one?"
    )
    parser.add_argument("words", nargs="*", help="only mutants whose backend or name holds one of these")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="side by side (default: one per processor)"
    )
    options = parser.parse_args(arguments)
    mutants = [
        m for m in load() if not options.words or any(word in f"{m.tests.backend}: {m.name}" for word in options.words)
    ]
    if not mutants:
        parser.error(f"no mutant is named {' or '.join(options.words)}")
    verdicts = judge_all(mutants, options.jobs, lambda line: print(line, file=sys.stderr, flush=True))
    bad = 0
    for backend, name, verdict in verdicts:
        fine = verdict.what == ("survived" if name.startswith("no fault: ") else "killed")
        bad += not fine
        print(
            f"{'' if fine else 'WRONG: '}{verdict.what:<9}{backend:<8}{name:<58} "
            f"{verdict.why if not fine else verdict.why[:110]}"
        )
    print(f"{len(mutants)} mutants, {sum(verdict.what == 'killed' for _, _, verdict in verdicts)} killed, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
