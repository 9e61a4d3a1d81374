"""Runs the .cu sources of storm_kernels/backends/cuda on a CPU: g++ compiles them behind
cuda_on_cpu.h, `OnCpu` launches them on CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from storm_kernels.backends.cuda import source
from storm_kernels.backends.cuda.launcher import FLAGS, THREADS, Launch

from ..stand_in import StandIn
from .guarded import Guarded

_HERE = Path(__file__).parent
_BUILD = _HERE.parents[2] / "build" / "cuda_on_cpu"
_KERNEL = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\(.*?\)\s)?(\w+)\(const __grid_constant__ (\w+) \w+\)'
)
_ENTRY = """
extern "C" int run_{kernel}(const void* args, unsigned blocks, size_t shared, unsigned at_once) {{
    auto kernel = [](const void* a) {{ {kernel}(*(const {struct}*)a); }};
    return cuda_on_cpu::run(blocks, THREADS, shared, at_once, kernel, args);
}}
"""
_OUTCOMES = {1: "threads of a block wait for something that never comes",
             2: "a copy meets another on its way to the same place",
             3: "a thread reaches past shared or global memory"}  # fmt: skip


class OnCpu(StandIn):
    """A `Launcher`. ``at_once`` blocks run side by side; ``flags`` are for g++, as sanitizers want them;
    ``figures`` are those of `StandIn`.
    """

    def __init__(self, at_once: int = 1, flags: tuple[str, ...] = ("-O1",), **figures: int):
        super().__init__(**figures)
        self.at_once, self.flags = at_once, flags
        self._libraries: dict[tuple, ctypes.CDLL] = {}
        self.launched: set[tuple] = set()

    def launch(self, run: Launch) -> None:
        name, kernel, defines, struct, values, blocks, shared = run
        self.launched.add((name, kernel, tuple(sorted(defines.items()))))
        fixed = {key: value for key, value in defines.items() if key not in FLAGS}
        library = self._library(name, fixed)
        for flag in defines.keys() & set(FLAGS):
            ctypes.c_int.in_dll(library, f"flag_{flag}").value = defines[flag]
        enter = getattr(library, f"run_{kernel}")
        enter.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint)
        guarded = Guarded()
        outcome = enter(source.pack(name, struct, guarded.replace(values)), blocks, shared, self.at_once)
        guarded.take_back()
        if outcome:
            raise RuntimeError(f"{kernel}: {_OUTCOMES[outcome]}")

    def _library(self, name: str, defines: Mapping[str, object]) -> ctypes.CDLL:
        key = (name, *sorted(defines.items()))
        if key not in self._libraries:
            self._libraries[key] = ctypes.CDLL(str(build(name, defines, self.flags)))
        return self._libraries[key]


def build(name: str, defines: Mapping[str, object], flags: tuple[str, ...]) -> Path:
    """The shared library of source ``name``; made once for each source, definitions and flags."""
    kernels = source.text(name)
    entries = "".join(_ENTRY.format(kernel=kernel, struct=struct) for kernel, struct in _KERNEL.findall(kernels))
    flags_held = "".join(f'extern "C" {{ int flag_{flag}; }}\n#define {flag} flag_{flag}\n' for flag in FLAGS)
    macros = tuple(f"-D{key}={value}" for key, value in {"THREADS": THREADS, **defines}.items())
    machinery = _compile((_HERE / "cuda_on_cpu.cpp").read_text(), flags)
    return _compile(
        f'#include "cuda_on_cpu.h"\n{flags_held}#line 1 "{name}"\n{kernels}\n{entries}',
        (*flags, *macros),
        str(machinery),
        f"-Wl,-rpath,{_BUILD}",
    )


def _compile(code: str, flags: tuple[str, ...], *libraries: str) -> Path:
    headers = "".join((_HERE / f).read_text() for f in ("cuda_on_cpu.h", "cuda_on_cpu_twins.h"))
    library = (
        _BUILD / f"{hashlib.sha256(chr(0).join((headers, code, *flags, *libraries)).encode()).hexdigest()[:32]}.so"
    )
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        file = library.with_suffix(f".{os.getpid()}.cpp")
        file.write_text(code)
        made = file.with_suffix(".made.so")
        command = [
            "g++",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unknown-pragmas",
            f"-I{_HERE}",
            *flags,
        ]
        done = subprocess.run(
            [*command, str(file), *libraries, "-o", str(made), "-pthread"], capture_output=True, text=True
        )
        file.unlink()
        if done.returncode:
            raise RuntimeError(f"g++ could not compile with {flags}:\n{done.stderr}")
        sys.stderr.write(done.stderr)
        made.rename(library)
    return library
