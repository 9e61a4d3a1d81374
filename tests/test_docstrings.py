"""The public surface explains itself: each object has a docstring that names every argument, and an
example that runs; `help(storm_kernels)` begins with a tour.
"""

import dataclasses
import doctest
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

import storm_kernels

ROOT = Path(__file__).parent.parent
FOLDERS = {"storm_kernels": "storm_kernels", "model": "storm_model", "benchmarks": "storm_benchmarks"}
# Modules whose `__all__` is what they offer.
PUBLIC = [
    "storm_kernels",
    "storm_kernels.interop",
    "storm_kernels.interop.causal_conv1d",
    "storm_kernels.interop.mamba_ssm",
    "storm_kernels.interop.patching",
    "storm_kernels.nn",
    "storm_kernels.ops",
    "storm_kernels.profiling",
    "storm_kernels.reference",
    "storm_kernels.verify",
    "storm_model",
    "storm_model.arithmetic",
    "storm_model.presets",
]
# A docstring that begins so says that the arguments are those of another object.
TWIN = re.compile(r"(?:Plain twin of )?:(?:func|class):`(storm_kernels[\w.]*)`(?=[^.]*same arguments|, |\.)")


def imported(name):
    """The module; a test that needs an extra which is not installed is skipped."""
    if not name.startswith("storm_kernels"):
        for package in ("transformers", "av"):
            pytest.importorskip(package, reason="the extra `model` is not installed")
    return importlib.import_module(name)


def found(dotted):
    """The object of a dotted name."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def offered(name):
    """(name, object) of what a public module offers, without its plain data and its modules."""
    module = imported(name)
    objects = {key: getattr(module, key) for key in module.__all__}
    return {key: value for key, value in objects.items() if inspect.isroutine(value) or inspect.isclass(value)}


@cache
def documented(obj):
    """The names under ``Args:``."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(obj) + "\n", re.MULTILINE)
    entries = re.findall(r"^    (\*{0,2}\w+(?:, \w+)*):", section[1] if section else "", re.MULTILINE)
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def parameters(obj):
    """The arguments of a function or of a class's own constructor; an exception takes its message."""
    if inspect.isclass(obj):
        if issubclass(obj, BaseException):
            return set()
        if dataclasses.is_dataclass(obj) and "__init__" in vars(obj):
            own = [
                field.name for field in dataclasses.fields(obj) if field.name in vars(obj).get("__annotations__", {})
            ]
            return set(own)
    return {name for name in inspect.signature(obj).parameters if name != "self"}


def is_mapping(obj, name):
    """Whether the argument stands for further ones, as ``**options``."""
    return inspect.signature(obj).parameters[name].kind is inspect.Parameter.VAR_KEYWORD


def offences(obj):
    """What the docstring of a public object lacks."""
    text = inspect.getdoc(obj) if obj.__doc__ else None
    if not text:
        yield "no docstring"
        return
    summary, _, rest = text.partition("\n")
    if rest and not rest.startswith("\n"):
        yield "a summary of more than one line"
    twin = TWIN.match(text)
    known = documented(obj) | (documented(found(twin[1])) if twin else set())
    wanted, further = parameters(obj), {name for name in parameters(obj) if is_mapping(obj, name)}
    missing, beyond = wanted - known, documented(obj) - wanted
    if further & missing and beyond:  # the further arguments are named one by one
        missing, beyond = missing - further, set()
    for name in sorted(missing):
        yield f"no argument {name}"
    for name in sorted(beyond):
        yield f"an argument {name} that there is not"
    if not re.search(r"^Example:\n    >>> ", text, re.MULTILINE):
        yield "no example"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_is_explained(name):
    lacking = [f"{name}.{key}: {what}" for key, obj in offered(name).items() for what in offences(obj)]
    assert not lacking, "\n".join(lacking)


def checked():
    """The files whose types mypy checks."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}


def test_types_of_every_public_object_are_checked():
    objects = [obj for name in PUBLIC for obj in offered(name).values()]
    files = {Path(inspect.getsourcefile(inspect.unwrap(obj))).resolve().relative_to(ROOT).as_posix() for obj in objects}
    assert files <= checked(), sorted(files - checked())


def test_the_linter_asks_for_docstrings_and_annotations_in_the_same_files():
    def asks(file):
        command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", file, "--output-format", "concise", "-"]
        said = subprocess.run(command, cwd=ROOT, input="def f(x):\n    pass\n", capture_output=True, text=True).stdout
        return "D103" in said and "ANN001" in said

    sources = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    with ThreadPoolExecutor(4) as pool:
        assert {file for file, strict in zip(sources, pool.map(asks, sources), strict=True) if strict} == checked()


def test_the_check_notices_what_is_missing():
    def partly(x, y):
        """Two lines
        of summary.

        Args:
            x: the first.
            w: is none.
        """

    assert list(offences(partly)) == [
        "a summary of more than one line",
        "no argument y",
        "an argument w that there is not",
        "no example",
    ]


def sources():
    """(module, file) of the sources with an example in them."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if ">>> " in path.read_text():
                yield ".".join((package, *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(sources()))
def test_examples_in_docstrings_run(name):
    failures = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(imported(name), name):
        runner.run(test, out=failures.append)
    assert runner.tries and not runner.failures, "".join(failures)


def test_help_begins_with_a_tour_of_twelve_lines():
    text = pydoc.render_doc(storm_kernels, renderer=pydoc.plaintext)
    head = text.partition("DESCRIPTION\n")[2].splitlines()[:12]
    assert all(re.fullmatch(r"    [\w, ]+?  +\S.*", line) for line in head), "\n".join(head)
    named = {name for line in head for name in re.split(r"  +", line.strip())[0].split(", ")}
    assert named - {"interop", "profiling", "verify"} == set(storm_kernels.__all__)
    assert all(
        isinstance(getattr(storm_kernels, name), types.ModuleType) for name in ("interop", "profiling", "verify")
    )
