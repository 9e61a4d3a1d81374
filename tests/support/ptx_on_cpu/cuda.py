"""Runs the CUDA backend on CPU tensors: NVRTC's PTX for a GPU that need not be there, interpreted."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from storm_kernels.backends.cuda import source
from storm_kernels.backends.cuda.launcher import THREADS, Launch

from ..stand_in import StandIn
from .machine import Machine, Options
from .memory import Global
from .parser import Kernel, parse
from .shared import Shared

_BUILD = Path(__file__).parents[3] / "build" / "ptx_on_cpu"
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^    (const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;", re.MULTILINE)


def compile_both(name: str, defines: Mapping[str, object], arch: str, *, cubin: bool = True) -> tuple[str, bytes]:
    """PTX and, from the same compilation, machine code of source ``name`` for ``arch`` ("sm_90");
    without ``cubin`` only the PTX, in half the time.

    Lines of the PTX's `.loc` are those of `storm_kernels.backends.cuda.source.text`. Raises
    RuntimeError with NVRTC's log.
    """
    from cuda.bindings import nvrtc

    def ask(function, *arguments):
        error, *values = function(*arguments)
        if error.value:
            raise RuntimeError(f"NVRTC could not compile {name} for {arch} with {dict(defines)}: {error.name}")
        return values[0] if values else None

    def take(size: Callable, content: Callable) -> bytes:
        room = b" " * ask(size, program)
        ask(content, program, room)
        return room

    macros = {"THREADS": THREADS, **defines}
    target = arch if cubin else arch.replace("sm", "compute")
    options = [
        f"--gpu-architecture={target}",
        "--std=c++17",
        "-lineinfo",
        *(f"-D{key}={value}" for key, value in macros.items()),
    ]
    program = ask(nvrtc.nvrtcCreateProgram, source.text(name).encode(), name.encode(), 0, [], [])
    try:
        ask(nvrtc.nvrtcCompileProgram, program, len(options), [one.encode() for one in options])
        code = take(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if cubin else b""
        return take(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).decode().rstrip("\0"), code
    except RuntimeError as error:
        log = take(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace").rstrip("\0")
        raise RuntimeError(f"{error}\n{log}") from error
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def ptx_of(name: str, defines: Mapping[str, object], arch: str) -> str:
    """PTX alone, kept in build/ptx_on_cpu."""
    key = hashlib.sha256(
        "\0".join((source.text(name), repr(sorted(defines.items())), arch, _nvrtc())).encode()
    ).hexdigest()[:32]
    path = _BUILD / f"{key}.ptx"
    if not path.exists():
        text, _ = compile_both(name, defines, arch, cubin=False)
        _BUILD.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        own.rename(path)
    return path.read_text()


@cache
def _nvrtc() -> str:
    from cuda.bindings import nvrtc

    return repr(nvrtc.nvrtcVersion()[1:])


@cache
def _constants(name: str) -> dict[str, dict[str, tuple[str, bool]]]:
    """Of each structure in source ``name``, of each field: the structure nested there or "", and
    whether it points to what is constant.
    """
    structs = _STRUCT.findall(source.text(name))
    return {struct: {f: ("" if star or kind == "int64" else kind, bool(const and star))
                     for const, kind, star, f, _ in _FIELD.findall(body)}
            for struct, body in structs}  # fmt: skip


def _addresses(memory: Global, fields: dict, struct: str, values: Mapping, path: str = "") -> dict:
    """``values`` with each tensor put into ``memory`` and replaced by its address there."""

    def one(field: str, value, label: str):
        nested, constant = fields[struct][field]
        if isinstance(value, Tensor):
            return memory.put(label, value, not constant)
        if isinstance(value, Mapping):
            return _addresses(memory, fields, nested, value, f"{label}.")
        if isinstance(value, (list, tuple)):
            return [one(field, item, f"{label}[{i}]") for i, item in enumerate(value)]
        return value

    return {field: one(field, value, f"{path}{field}") for field, value in values.items()}


class OnPtx(StandIn):
    """A `Launcher` (storm_kernels.backends.cuda.launcher): kernels compiled for ``arch`` and interpreted.

    ``figures`` are those of `StandIn`. ``edit`` changes the PTX before it is read: for tests that
    seed faults. ``watch`` is called with each `Machine` before it runs.
    """

    def __init__(self, arch: str = "sm_90", options: Options = Options(), *,  # noqa: B008
                 edit: Callable[[str], str] | None = None, watch: Callable[[Machine], None] | None = None,
                 **figures: int):  # fmt: skip
        super().__init__(**figures)
        self.arch, self.options, self.edit, self.watch = arch, options, edit, watch
        self._kernels: dict[tuple, Kernel] = {}
        self.launched: set[tuple] = set()

    def launch(self, run: Launch) -> None:
        name, kernel, defines, struct, values, blocks, shared = run
        if blocks == 0:
            return
        self.launched.add((name, kernel, tuple(sorted(defines.items()))))
        memory = Global()
        packed = source.pack(name, struct, _addresses(memory, _constants(name), struct, values))
        memory.fill()
        program = self._kernel(name, kernel, defines)
        parameters = np.frombuffer(packed, np.uint8).copy()
        machine = Machine(
            program, THREADS, blocks, parameters, memory, Shared(program, program.static_shared + shared), self.options
        )
        if self.watch:
            self.watch(machine)
        machine.run()
        memory.take_back()

    def _kernel(self, name: str, kernel: str, defines: Mapping[str, object]) -> Kernel:
        key = (source.text(name), kernel, *sorted(defines.items()))
        if key not in self._kernels:
            text = ptx_of(name, defines, self.arch)
            self._kernels[key] = parse(self.edit(text) if self.edit else text, kernel)
        return self._kernels[key]
