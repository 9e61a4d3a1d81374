"""The documents: short enough, linked right, up to date with code, results and Makefile, and every
example in them runs.
"""

import contextlib
import doctest
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import storm_kernels
from storm_kernels import cli
from tools import doc_tables

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text)


def code(path: Path, language: str) -> list[str]:
    return [block for kind, block in FENCE.findall(path.read_text()) if kind == language]


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_document
def test_lines_of_prose_are_at_most_100_wide(path):
    """Tables have no line breaks; links and all, prose has."""
    long = [line for line in prose(path.read_text()).splitlines() if len(line) > 100 and not line.startswith("|")]
    assert not long


@each_document
def test_links_lead_somewhere(path):
    for link in LINK.findall(prose(path.read_text())):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in headings(target), f"{path.name} links to {link}, whose heading is not there"


@pytest.mark.parametrize("path", doc_tables.documents(), ids=lambda path: path.name)
def test_made_tables_are_up_to_date(path):
    pytest.importorskip("triton", reason="the table of backends asks the triton backend")
    text = path.read_text()
    assert doc_tables.renewed(text) == text, "python -m tools.doc_tables writes the tables anew"


@each_document
def test_examples_run(path, tmp_path):
    """One program a document; those that show a file of examples/ are run as files, in test_patch_examples.py.

    ``folder`` is a small model's, "film.mp4" a short clip.
    """
    blocks = [block for block in code(path, "python") if not block.startswith("# examples/")]
    names: dict = {"folder": tmp_path / "model"}
    if any("film.mp4" in block for block in blocks):
        pytest.importorskip("av", reason="the extra `model` is not installed")
        from tests.support import ask_model

        ask_model.save(names["folder"])
        ask_model.clip(tmp_path / "film.mp4")
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(compile(block, str(path), "exec"), names)


@each_document
def test_sessions_print_what_they_say(path):
    runner = doctest.DocTestRunner(verbose=False)
    for block in code(path, "pycon"):
        test = doctest.DocTestParser().get_doctest(block, {}, path.name, str(path), 0)
        assert runner.run(test).failed == 0, f"a session in {path.name} prints something else: run it"


@each_document
def test_commands_exist(path):
    text = path.read_text()
    named = re.findall(r"^([\w-][\w -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for line in named for target in line.split()}
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)) <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {
        name for names in re.findall(r"pip install '\.\[([\w,]+)\]'", text) for name in names.split(",")
    } <= extras.keys()
    for module, arguments in re.findall(r"python -m ([\w.]+)([^`\n]*)", text):
        found = importlib.util.find_spec(module)
        assert found, f"python -m {module}"
        if module.startswith("storm_benchmarks."):
            main = importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module).main
            options = {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", arguments)} - {"help"}
            assert options <= inspect.signature(main).parameters.keys(), f"python -m {module}{arguments}"
    for command in set(re.findall(r"storm-kernels (\w+)", text)):
        try:
            code = cli.main([command, "--help"])
        except SystemExit as ended:
            code = ended.code
        assert code == 0, f"storm-kernels {command}"


def test_variables_of_the_environment_are_documented_and_read():
    """docs/environment.md names what the code reads, and nothing else."""
    text = (ROOT / "docs" / "environment.md").read_text()
    documented = {
        name for row in re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    folders = ("storm_kernels", "model", "benchmarks", "tests", "tools")
    sources = {
        path: path.read_text()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if path.name != Path(__file__).name
    }
    makefile = (ROOT / "Makefile").read_text()
    everything = "\n".join([*sources.values(), makefile])
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", everything)) | set(
        re.findall(r"\bSTORM_KERNELS_[A-Z_]+\b", everything)
    )
    assert read - documented == set()
    unknown = {name for name in documented if not re.search(rf"\b{name}\b", everything)}
    assert not unknown


def test_every_promise_names_a_test_that_exists_or_says_not_yet():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = dict(re.findall(r"^\| (R\d+) \|(.*)\|$", text, re.MULTILINE))
    assert list(rows) == [f"R{i}" for i in range(1, len(rows) + 1)] and len(rows) >= 25
    for name, row in rows.items():
        assert "`tests/" in row or "`make " in row or "not yet" in row or "the same tests" in row, (
            f"{name} names no test"
        )
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).exists(), file
        assert not test or re.search(rf"^(?:    )?def {test}\(", (ROOT / file).read_text(), re.MULTILINE), (
            f"{file}::{test}"
        )


def test_metadata_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "license: Apache-2.0" in citation
    assert f"version: {storm_kernels.__version__}\n" in citation
