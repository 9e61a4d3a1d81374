"""Compiles the kernels with NVRTC at first use, keeps them on disk, and launches them on torch's
current stream. Wheels suffice.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from . import cache, source

THREADS = 128
PIP = 'pip install "cuda-core" "cuda-bindings" "nvidia-cuda-nvrtc"'

# Macros of the sources that are 0 or 1 and stand in conditions only: what runs the sources
# elsewhere may hold them in variables.
FLAGS = ("ALIGNED", "ASYNC", "GATED", "PACKED", "PAIRED", "PARTIAL", "REDUCED", "SAVE_Y", "SOFTPLUS")

_log = logging.getLogger("storm_kernels.backends.cuda")


class Launch(NamedTuple):
    """One run of a kernel."""

    name: str  # of the source
    kernel: str
    defines: Mapping[str, object]  # the source's macros
    struct: str  # the type of the kernel's argument
    values: Mapping  # its fields
    blocks: int  # of 128 threads
    shared: int = 0  # bytes of shared memory of a block, beside what the source declares


class Launcher(Protocol):
    """What runs kernels: `Device` on a GPU; the tests have one that runs the same sources on a CPU."""

    device_type: str

    def why_not(self) -> str | None: ...

    def launch(self, run: Launch) -> None: ...

    def shared_limit(self) -> int:
        """Bytes of shared memory that a block can have."""

    def multiprocessors(self) -> int: ...

    def resident(self, name: str, kernel: str, defines: Mapping[str, object], shared: int) -> int:
        """Blocks of a kernel with ``shared`` bytes of shared memory that fit on a multiprocessor together."""


def compile_cubin(name: str, defines: Mapping[str, object], arch: str) -> bytes:
    """Machine code of source ``name`` for ``arch`` ("sm_90"), by NVRTC, GPU or not. Raises
    RuntimeError with NVRTC's log if it cannot.
    """
    from cuda.core import Program, ProgramOptions

    macros = [(key, str(value)) for key, value in {"THREADS": THREADS, **defines}.items()]
    options = ProgramOptions(name=name, arch=arch, std="c++17", define_macro=macros)
    try:
        return bytes(Program(source.text(name), code_type="c++", options=options).compile("cubin").code)
    except Exception as error:
        raise RuntimeError(f"NVRTC could not compile {name} for {arch} with {dict(defines)}: {error}") from error


def _cubin(name: str, defines: Mapping[str, object], arch: str) -> bytes:
    from cuda.bindings import nvrtc

    def build() -> bytes:
        _log.info("compiling %s for %s with %s (once; kept in %s)", name, arch, dict(defines), cache.default_folder())
        start = time.perf_counter()
        code = compile_cubin(name, defines, arch)
        _log.info("compiled %s in %.1f s", name, time.perf_counter() - start)
        return code

    key = cache.key_of(
        source.text(name), repr(sorted(defines.items())), str(THREADS), repr(nvrtc.nvrtcVersion()[1:]), arch
    )
    try:
        return cache.cached(key, build)
    except cache.CacheError as error:
        _log.warning("the kernel cache is not used: %s", error)
    except OSError as error:
        _log.warning("the kernel cache cannot be used: %s", error)
    return build()


class Device:
    """Runs kernels on the current CUDA device."""

    device_type = "cuda"

    def __init__(self):
        self._kernels: dict[tuple, object] = {}
        self._contexts: dict[int, object] = {}
        self._resident: dict[tuple, int] = {}
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._asked = False

    def why_not(self) -> str | None:
        if not self._asked:
            self._reason, self._asked = self._find_reason(), True
        return self._reason

    @staticmethod
    def _find_reason() -> str | None:
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "no CUDA device is available to torch"
        for module in ("cuda.core", "cuda.bindings"):
            try:
                missing = importlib.util.find_spec(module) is None
            except ModuleNotFoundError:
                missing = True
            if missing:
                return f"{module} is not installed, which compiles the kernels: {PIP}"
        try:
            from cuda.bindings import nvrtc

            nvrtc.nvrtcVersion()
        except Exception as error:
            return f"NVRTC cannot be loaded ({error}): {PIP}"
        major, minor = torch.cuda.get_device_capability()
        return (
            None if major >= 8 else f"the kernels need compute capability 8.0 or more, this device has {major}.{minor}"
        )

    def launch(self, run: Launch) -> None:
        if run.blocks == 0:
            return
        import ctypes

        from cuda.bindings import driver

        function = self._function(run.name, run.kernel, run.defines, run.shared)
        packed = source.pack(run.name, run.struct, run.values)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        stream = torch.cuda.current_stream().cuda_stream
        _check(
            driver.cuLaunchKernel(
                function, run.blocks, 1, 1, THREADS, 1, 1, run.shared, stream, ctypes.addressof(arguments), 0
            ),
            run.kernel,
        )

    def shared_limit(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin

    def multiprocessors(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def resident(self, name: str, kernel: str, defines: Mapping[str, object], shared: int) -> int:
        from cuda.bindings import driver

        key = (torch.cuda.current_device(), name, kernel, shared, *sorted(defines.items()))
        if key not in self._resident:
            function = self._function(name, kernel, defines, shared)
            self._resident[key] = _check(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, shared), kernel
            )
        return self._resident[key]

    def _function(self, name: str, kernel: str, defines: Mapping[str, object], shared: int):
        from cuda.bindings import driver

        device = torch.cuda.current_device()
        self._enter_context(driver, device)
        key = (device, name, kernel, shared, *sorted(defines.items()))
        with self._lock:
            if key not in self._kernels:
                major, minor = torch.cuda.get_device_capability(device)
                module = _check(driver.cuModuleLoadData(_cubin(name, defines, f"sm_{major}{minor}")), name)
                function = _check(driver.cuModuleGetFunction(module, kernel.encode()), kernel)
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(driver.cuFuncSetAttribute(function, attribute, shared), kernel)
                self._kernels[key] = function
            return self._kernels[key]

    def _enter_context(self, driver, device: int) -> None:
        """torch's context of ``device``, made this thread's: a thread of autograd may not have touched CUDA yet."""
        with self._lock:
            if device not in self._contexts:
                self._contexts[device] = _check(
                    driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device), "device")), "context"
                )
        _check(driver.cuCtxSetCurrent(self._contexts[device]), "context")


def _check(result: tuple, what: str):
    """The value of a driver call; RuntimeError naming ``what`` if it failed."""
    error, *values = result
    if error.value:
        raise RuntimeError(f"CUDA driver error at {what}: {error.name}")
    return values[0] if values else None


_current: Launcher = Device()


def current() -> Launcher:
    return _current


@contextmanager
def using(launcher: Launcher) -> Iterator[Launcher]:
    """Run kernels through ``launcher`` meanwhile."""
    global _current
    before, _current = _current, launcher
    try:
        yield launcher
    finally:
        _current = before
