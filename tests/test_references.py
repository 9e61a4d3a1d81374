"""What comments and docstrings name exists: documents and their sections, files of the repository,
promises by number.
"""

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE_COMMENT = {".h": "//", ".cpp": "//", ".cu": "//", ".cuh": "//", ".toml": "#", "Makefile": "#", "run": "#"}
FILE = re.compile(r"(?<![\w./<*-])((?:[\w-]+/)*[\w-]+\.(?:py|cu|cuh|h|cpp|toml|md|jinja))\b(?![\w(])")
SECTION = re.compile(r"docs/(\w+)\.md, \"?((?:[A-Z]|the )[\w -]*)")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@cache
def comments(path: Path) -> str:
    """The comments and docstrings of a source file."""
    text = (ROOT / path).read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return "\n".join([*_docstrings(text), *(token.string for token in tokens if token.type == tokenize.COMMENT)])
    mark = LINE_COMMENT.get(path.suffix or path.name)
    return "" if mark is None else "\n".join(line.partition(mark)[2] for line in text.splitlines() if mark in line)


def _docstrings(text: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix != ".md" and path.suffix != ".png"]


def test_files_that_comments_name_exist():
    known = {"/" + path.as_posix() for path in FILES}
    missing = []
    for source in SOURCES:
        for name in FILE.findall(comments(source)):
            if not any(path.endswith("/" + name) for path in known):
                missing.append(f"{source}: {name}")
    assert not missing, "\n".join(missing)


def test_sections_that_comments_name_exist():
    missing = []
    for source in SOURCES:
        for document, named in SECTION.findall(comments(source)):
            text = (ROOT / "docs" / f"{document}.md").read_text()
            titles = [title.lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
            for part in re.split(r" and | to ", named.strip()):
                promise = re.fullmatch(r"R\d+", part) and f"\n| {part} |" in text
                if not promise and not any(part.lower() in title for title in titles):
                    missing.append(f"{source}: docs/{document}.md, {part}")
    assert not missing, "\n".join(missing)


def test_promises_that_comments_name_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = [(source, number) for source in SOURCES for number in re.findall(r"\bR\d{1,2}\b", comments(source))]
    missing = [f"{source}: {number}" for source, number in named if f"\n| {number} |" not in text]
    assert not missing, "\n".join(missing)
