"""How often luck alone breaks the bound of parity.py, by the size of the groups that its rms rule
judges: ``python -m tests.support.parity_luck scan 400``.

Where a backend's errors are taken against those of the reference on the same and NEIGHBOURS other
inputs, the reference's own errors on one input are taken against those on as many others: it is as
exact as itself, so what fails is luck. A backend that fails no more often is no less exact; groups
in which luck fails are too small to judge by their rms.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .parity import FEW, NEIGHBOURS, Operations, evaluate, exceeds, find_truth, neighbour, reference_errors
from .parity_cases import lay_out
from .parity_random import CASES

SIZES = (1, 4, 8, 16, 32, 64, FEW)
JUDGED = (0, 5, 11)  # inputs on which the reference is judged, each against all others


def count(case, backend: str, failures: Counter) -> None:
    """Add this case's results over the bound, ``backend``'s and the reference's own, to
    ``failures[who, group size]``.
    """
    inputs = [case.operands()]
    inputs += [neighbour(case, inputs[0], i) for i in range(1, NEIGHBOURS + 2)]
    laid_out = {name: lay_out(value, case.layout_of(name)) for name, value in inputs[0].items()}
    got = evaluate(case, Operations(backend), laid_out, True)
    truths = [find_truth(case, one, True) for one in inputs]
    plain = [reference_errors(case, one, truth, got, True) for one, truth in zip(inputs, truths, strict=True)]
    for name, value in got.items():
        ratio = 1.5 if name.startswith("grad_") else 1.25
        failures["results"] += 1
        for size in SIZES:
            error = (value.double() - truths[0][name]).abs()
            yardsticks = [one[name] for one in plain[: NEIGHBOURS + 1]]
            failures[backend, size] += exceeds(error, truths[0][name], yardsticks, ratio, value.dtype, size) is not None
            for i in JUDGED:
                yardsticks = [one[name] for j, one in enumerate(plain) if j != i]
                lost = exceeds(plain[i][name], truths[i][name], yardsticks, ratio, value.dtype, size) is not None
                failures["reference", size] += lost / len(JUDGED)


def main(op: str, cases: int, backend: str = "cpu", first: int = 0) -> None:
    torch.set_num_threads(1)
    failures: Counter = Counter()
    done = 0

    @seed(first)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(CASES[op])
    def run(case):
        nonlocal done
        count(case, backend, failures)
        done += 1
        print(f"\r{done} of {cases} cases", end="", file=sys.stderr, flush=True)

    run()
    print(
        f"\n{failures['results']} results of {done} cases of {op}; over the bound, "
        "by the least size of the groups judged by their rms:"
    )
    print("least size", *(f"{size:>7}" for size in SIZES))
    for who in (backend, "reference"):
        print(f"{who:<10}", *(f"{failures[who, size]:7.1f}" for size in SIZES))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5]))
