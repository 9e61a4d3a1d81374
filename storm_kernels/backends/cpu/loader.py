"""Finds the C++ library, checks it and picks the widest instruction-set variant that this processor has.

``STORM_KERNELS_CPU_ISA`` (avx512, avx2 or generic) picks a narrower one, for tests and benchmarks.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch  # noqa: F401  its OpenMP runtime must be in the process first: the library then binds to it, and there is one thread pool

from .build import LIBRARY_NAME, variants
from .structs import STRUCTURES

LIBRARY = Path(__file__).resolve().parent / LIBRARY_NAME
ISA_VARIABLE = "STORM_KERNELS_CPU_ISA"
HOW_TO_BUILD = "install g++ or clang++ and run `python -m storm_kernels.backends.cpu.build`"


class LibraryMissing(RuntimeError):
    """The C++ library is absent or unusable; the message says why and what to do."""


class Library:
    """One instruction-set variant of the C++ library."""

    def __init__(self, path: Path, isa: str | None = None):
        if not path.exists():
            raise LibraryMissing(
                f"{path} is not there: no C++ compiler was found when storm_kernels was installed; {HOW_TO_BUILD}"
            )
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryMissing(f"{path} cannot be loaded ({error}); {HOW_TO_BUILD}") from error
        self._check_structures(path)
        self._functions: dict[str, ctypes._CFuncPtr] = {}
        self.isa = isa or self._best()
        self._check(self.isa, path)
        self.checkpoint_interval: int = self._handle.storm_checkpoint_interval()

    def function(self, name: str, *argtypes, restype=ctypes.c_int):
        """The variant's function ``name``, for instance "scan"; its types are those of the first
        call, which no thread changes under another.
        """
        found = self._functions.get(name)
        if found is None:
            found = self._handle[f"storm_{name}_{self.isa}"]  # by item: an object of its own
            found.argtypes, found.restype = argtypes, restype
            found = self._functions.setdefault(name, found)
        return found

    def supported(self) -> list[str]:
        """Variants that the library holds and this processor runs, widest first."""
        return [isa for isa in variants() if self._holds(isa) and getattr(self._handle, f"storm_cpu_supports_{isa}")()]

    def _holds(self, isa: str) -> bool:
        return hasattr(self._handle, f"storm_scan_{isa}")

    def _best(self) -> str:
        supported = self.supported()
        if not supported:
            raise LibraryMissing(f"the library holds no variant for this processor; {HOW_TO_BUILD}")
        return supported[0]

    def _check_structures(self, path: Path) -> None:
        """A library of other sources would read the fields of a call at other places."""
        bytes_of = getattr(self._handle, "storm_structure_bytes", None)
        if bytes_of is not None:
            bytes_of.argtypes, bytes_of.restype = (ctypes.c_int,), ctypes.c_int64
        there = [] if bytes_of is None else [bytes_of(i) for i in range(len(STRUCTURES) + 1)]
        here = [*map(ctypes.sizeof, STRUCTURES), 0]
        if there != here:
            raise LibraryMissing(
                f"{path} was built from other sources: its structures have {there} bytes, this version's {here}; "
                f"{HOW_TO_BUILD}"
            )

    def _check(self, isa: str, path: Path) -> None:
        if isa not in self.supported():
            raise LibraryMissing(
                f"instruction set {isa!r} is not available from {path} on this processor; available: "
                f"{', '.join(self.supported())}"
            )


@functools.cache
def library() -> Library:
    """The library as this process uses it. Raises LibraryMissing."""
    return Library(LIBRARY, os.environ.get(ISA_VARIABLE) or None)


@functools.cache
def why_missing() -> str | None:
    """None if `library` works, else the reason."""
    try:
        library()
    except LibraryMissing as error:
        return str(error)
    return None
