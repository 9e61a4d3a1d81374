"""README's commands, and those of docs/model.md, are run; what takes minutes is run small."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storm_kernels import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(
    r"^(?:pip|make|storm-kernels|python) [^#\n]+|`((?:pip|make|storm-kernels|python) [^`\n]+)`", re.MULTILINE
)
COMMANDS = sorted({(found[1] or found[0]).strip() for found in COMMAND.finditer(README)})
WHEEL = "pip install storm_kernels-*.whl"  # tests/test_wheel.py makes one and installs it
NIGHTLY = "make nightly"  # hours, of tests that run with fewer cases every time
ASK = "storm-kernels ask"  # docs/model.md has it with its arguments


def test_every_command_of_the_readme_is_run():
    run = {command for commands in (INSTALLED, TYPED, MADE) for command in commands}
    assert set(COMMANDS) == run | {WHEEL, NIGHTLY, ASK}


INSTALLED = ["pip install .", "pip install '.[triton]'", "pip install '.[cuda]'"]
TYPED = ["storm-kernels info", "storm-kernels verify"]
MADE = ["make demo", "make test"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, so that building leaves the checkout as it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("storm_kernels", "model", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("command", INSTALLED)
def test_install(command, checkout):
    """All but the last step: what else it brings comes from the network, and nothing is overwritten here."""
    _, install, what = shlex.split(command)
    trial = ["--dry-run", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", install, *trial, what],
        cwd=checkout,
        env=os.environ | {"CXX": "no-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Would install storm-kernels" in done.stdout and "does not provide the extra" not in done.stderr


@pytest.mark.parametrize("command", TYPED)
def test_command_line(command, capsys):
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "cpu" in capsys.readouterr().out


def recipe(target):
    """The commands of a target of the Makefile, without those that only install."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", target]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if " -m pip " not in line]


def test_make_demo(tmp_path):
    """Its last command with one variant, and fewer frames and rounds; it writes the report that README names."""
    command, *arguments = shlex.split(recipe("demo")[-1])
    assert command == ".venv/bin/python" and arguments[-2:] == ["--out", "out/demo"]
    small = ["--frames", "2", "--variants", "storm-tp-ts", "--repeat", "1", "--out", str(tmp_path)]
    pytest.importorskip("av", reason="the extra `model` is not installed")
    done = subprocess.run([sys.executable, *arguments, *small], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`out/demo/report.html`" in README and (tmp_path / "report.html").exists()


def test_make_test():
    """These tests are what it runs; the linter is run before them."""
    steps = "\n".join(recipe("test"))
    assert re.search(r"ruff check \.\n.*ruff format --check \.\n.*python -m mypy\n", steps)
    assert "-m pytest tests --numprocesses 2" in steps and "TRITON_INTERPRET=1" in steps


def test_storm_kernels_ask(tmp_path, capsys):
    """docs/model.md's line, of a small model and a short clip."""
    pytest.importorskip("av", reason="the extra `model` is not installed")
    from tests.support import ask_model

    ask_model.save(tmp_path / "folder")
    ask_model.clip(tmp_path / "film.mp4")
    (command,) = re.findall(r"^(storm-kernels ask .*)$", (ROOT / "docs" / "model.md").read_text(), re.MULTILINE)
    with contextlib.chdir(tmp_path):
        assert cli.main([*shlex.split(command)[1:], "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.strip()
