"""Builds the C++ library with the system's compiler: `setup.py` runs it on installation, `python -m
storm_kernels.backends.cpu.build` afterwards.

Needs the standard library only. Every source in VARIANT_SOURCES is compiled once per
instruction-set variant, each with its own flags.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY_NAME = "libstorm_cpu.so"
COMMON_SOURCES = ("common.cpp", "fits.cpp")
VARIANT_SOURCES = ("scan_forward.cpp", "scan_backward.cpp", "conv.cpp", "reduce.cpp", "probe.cpp")

# Not -ffast-math: it would fold away the rounding in vmath.h. The last three change no result, only
# let selects become blends.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)
_X86_VARIANTS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma"),
    "generic": (),
}


class BuildError(RuntimeError):
    """The library could not be built; the message holds the command and what the compiler said."""


def variants() -> dict[str, tuple[str, ...]]:
    """Name -> compiler flags of the instruction-set variants for this machine's architecture, widest first."""
    return _X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {"generic": ()}


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: looked for {named or 'c++, g++, clang++'}; install g++ or clang++, or set CXX")


def build(library: Path, *, flags: tuple[str, ...] = (), only: tuple[str, ...] | None = None) -> None:
    """Compile and link ``library``, replacing it only when all went well. ``flags`` come after
    FLAGS; ``only`` names the variants wanted.
    """
    compiler = find_compiler()
    wanted = {name: v for name, v in variants().items() if only is None or name in only}
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        base = [*compiler, *FLAGS, *_openmp(compiler, folder), *flags]
        jobs = [(source, "common", ()) for source in COMMON_SOURCES]
        jobs += [
            (source, name, (f"-DSTORM_ISA={name}", *v)) for source in VARIANT_SOURCES for name, v in wanted.items()
        ]
        objects = [f"{folder}/{Path(source).stem}.{name}.o" for source, name, _ in jobs]
        commands = [
            [*base, *extra, "-c", str(SOURCES / source), "-o", target]
            for (source, _, extra), target in zip(jobs, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = f"{folder}/{LIBRARY_NAME}"
        _run([*base, "-shared", *objects, "-o", linked])
        os.replace(linked, library)


def _openmp(compiler: list[str], folder: str) -> list[str]:
    """-fopenmp where the compiler has it; without it the kernels run on one thread."""
    try:
        _run([*compiler, "-fopenmp", "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", f"{folder}/openmp.so"])
    except BuildError:
        return ["-Wno-unknown-pragmas"]
    return ["-fopenmp"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / LIBRARY_NAME
    try:
        build(target)
    except BuildError as error:
        sys.exit(f"storm_kernels: {error}")
    print(f"built {target}")
