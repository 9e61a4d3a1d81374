"""Random cases under ASan and UBSan on the C++ library: `python -m tests.support.sanitize_cpu
[cases]` (docs/reliability.md, R9).

The library is built instrumented in a temporary folder, as the variant that this processor uses,
and again as the next narrower one or, where there is no AVX-512, with its 16 lanes. The cases run
in a subprocess with libasan loaded first, so that torch's own buffers have guarded ends. Any report
ends the subprocess with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RUN = """
import sys
from pathlib import Path
import storm_kernels.backends.cpu.loader as loader
loader.LIBRARY = Path(sys.argv[1])
from tests.support.sanitize_cpu import run_cases
run_cases(int(sys.argv[2]))
"""


# One element past the end of a buffer: if this is not reported, a clean run means nothing.
FAULT = """
import ctypes, sys
import torch
from pathlib import Path
from storm_kernels.backends.cpu.loader import Library
probe = Library(Path(sys.argv[1])).function(
    "probe_function", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
)
values = torch.zeros(64)
probe(0, values.data_ptr(), values.data_ptr(), 65)
"""


def main(cases: int) -> int:
    """Build, run, and return how many of the two builds had a report or a failure, or did not
    report a planted fault.
    """
    from storm_kernels.backends.cpu import build, loader

    best, *narrower = loader.library().supported()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for isa, lanes in ((best, None), (narrower[0], None) if best == "avx512" else (best, 16)):
            library = Path(folder) / f"{isa}-{lanes}.so"
            build.build(library, flags=(*FLAGS, *([f"-DSTORM_LANES={lanes}"] if lanes else [])), only=(isa,))
            planted = run_in_child(FAULT, library, isa)
            if "heap-buffer-overflow" not in planted.stderr:
                print(f"the planted fault was not reported: {planted.stderr[-2000:]}")
                failed += 1
            done = run_in_child(RUN, library, isa, str(cases))
            print(
                f"{isa}, {lanes or 'native'} lanes, {cases} cases of each op: "
                f"{'clean' if done.returncode == 0 else 'FAILED'}"
            )
            if done.returncode:
                print(done.stdout[-4000:], done.stderr[-8000:], sep="\n")
                failed += 1
    return failed


def run_in_child(code: str, library: Path, isa: str, *arguments: str) -> subprocess.CompletedProcess:
    """``code`` in a process with libasan in front: it wants to be first. Leaks are not judged:
    CPython frees little at exit.
    """
    environment = dict(os.environ, STORM_KERNELS_CPU_ISA=isa, LD_PRELOAD=_runtime("libasan.so"))
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, "-c", code, str(library), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _runtime(name: str) -> str:
    from storm_kernels.backends.cpu import build

    return subprocess.run(
        [*build.find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run_cases(count: int) -> None:
    """Forward and backward of ``count`` random cases of scan, conv and reduce on the "cpu" backend;
    results are checked to be finite.
    """
    from hypothesis import HealthCheck, Phase, given, settings

    from .parity_random import CASES

    for cases in CASES.values():

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def run(case):
            _evaluate(case)

        run()


def _evaluate(case) -> None:
    import torch

    import storm_kernels as sk

    from .parity_cases import lay_out

    leaves = {
        name: lay_out(value, case.layout_of(name)).detach().requires_grad_() for name, value in case.operands().items()
    }
    with sk.use_backend("cpu"):
        results = case.call(sk, leaves)
    total = sum(value.float().sum() for value in results.values())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for value in (*results.values(), *grads):
        assert torch.isfinite(value).all(), f"{case}: not finite"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
