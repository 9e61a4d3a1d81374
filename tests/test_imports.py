"""Imports point one way (docs/architecture.md): a room imports from the rooms below it, and no two
modules need each other.

Imports inside functions count as well: they too make one room need another.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from .test_references import FILES, ROOT

# From the ground up. Rooms of one row do not know one another.
FLOORS = (
    ("storm_kernels.tokens", "storm_kernels.callers", "storm_kernels.context", "storm_kernels.plain"),
    ("storm_kernels.profiling",),
    ("storm_kernels.reference",),
    ("storm_kernels.backends.contract", "storm_kernels.backends.pages"),
    tuple(f"storm_kernels.backends.{name}" for name in ("torch", "cpu", "triton", "cuda")),
    ("storm_kernels.backends.dispatch",),
    ("storm_kernels.ops",),
    ("storm_kernels.nn",),
    ("storm_kernels.interop",),
    ("storm_kernels.compat", "storm_kernels.patch"),
    ("storm_kernels",),  # what `import storm_kernels` brings
    ("storm_kernels.verify",),
    ("storm_kernels.cli",),
    ("storm_kernels.__main__",),
    ("model",),
    ("benchmarks", "examples"),
    ("tools",),
    ("tests",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
INSTALLED = {"storm_model": "model", "storm_benchmarks": "benchmarks"}  # the folders' names once installed
# Imports that point up, and why. Each stands inside a function.
UP = {
    ("tools/gpu.py", "tests"): "the first step on a GPU runs the smallest of the tests' cases",
    ("tools/gpu_ptx.py", "tests"): "without a GPU the tests' PTX interpreter takes its place",
}


def name_of(path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES if path.suffix == ".py"}


@cache
def imports(module: str) -> frozenset[str]:
    """The repository's modules that ``module`` imports, wherever the statement stands."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            # a name is a module of the package, or else something in the package itself
            found |= {inner if (inner := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    plain = {".".join((INSTALLED.get(first := name.split(".")[0], first), *name.split(".")[1:])) for name in found}
    return frozenset(plain & MODULES.keys() - {module})


def room_of(module: str) -> str:
    """The longest of the rooms' names that ``module`` stands under, "" for none."""
    return max((room for room in FLOOR if f"{module}.".startswith(f"{room}.")), key=len, default="")


def upward() -> set[tuple[str, str]]:
    """(file, room) of each import from another room that is not below."""
    found = set()
    for module in MODULES.keys() - {"setup"}:  # which imports none of them
        own = room_of(module)
        for other in map(room_of, imports(module)):
            if other != own and FLOOR[other] >= FLOOR[own]:
                found.add((MODULES[module].as_posix(), other))
    return found


def test_every_module_stands_in_a_room():
    """One that stands directly in the library would pass for `storm_kernels` itself."""
    loose = {module for module in MODULES if room_of(module) in ("storm_kernels", "")}
    assert loose == {"storm_kernels", "storm_kernels.backends", "setup"}


def test_imports_point_down():
    assert upward() == UP.keys()


def test_no_modules_import_each_other():
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
