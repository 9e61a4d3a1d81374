"""What a wheel brings: installed in a folder far from the checkout, it has the commands, the models
and the benchmarks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storm_kernels import cli

ROOT = Path(__file__).parent.parent
IN_THE_WHEEL = ("storm_kernels", "model", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
LIBRARY = Path("storm_kernels/backends/cpu/libstorm_cpu.so")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout is installed in. Built from a copy, so that the
    checkout stays as it is, and without a compiler: the library that is there already is laid
    beside it, for compiling takes longer than all the rest."""
    sources, wheels, target = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "installed"))
    for name in IN_THE_WHEEL:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(
            ROOT / name,
            sources / name,
            **({"ignore": shutil.ignore_patterns("__pycache__", "*.so")} if copy is shutil.copytree else {}),
        )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment = os.environ | {"CXX": "no-compiler"}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, sources],
        check=True,
        env=environment,
    )
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    if (ROOT / LIBRARY).exists():
        shutil.copyfile(ROOT / LIBRARY, target / LIBRARY)
    return target


def run(installed, *command, without=()):
    """Far from the checkout, with what is installed and this environment's packages, but for those in ``without``."""
    hidden = installed.parent / "hidden"
    shutil.rmtree(hidden, ignore_errors=True)
    for name in without:
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    environment = os.environ | {"PYTHONPATH": f"{hidden}{os.pathsep}{installed}"}
    return subprocess.run([*map(str, command)], cwd=installed.parent, env=environment, capture_output=True, text=True)


def test_models_and_benchmarks_are_imported_from_it(installed):
    names = ("storm_kernels", "storm_model.modeling_storm", "storm_benchmarks.e2e.report", "storm_benchmarks.scan")
    code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {names}), sep='\\n')"
    done = run(installed, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert [Path(line).is_relative_to(installed) for line in done.stdout.splitlines()] == [True] * len(names)
    assert (installed / "storm_benchmarks/e2e/report.html.jinja").exists()


def test_the_command_has_its_subcommands(installed):
    done = run(installed, installed / "bin" / "storm-kernels", "--help")
    assert done.returncode == 0, done.stderr
    assert all(
        name in done.stdout for name in ("info", "verify", "ask", "build", "check", "convert", "profile", "bench")
    )


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("ask", "--temporal-pool"),
        ("build", "--vision"),
        ("check", "--track"),
        ("convert", "--out"),
        ("profile", "--preset"),
        ("bench scan", "--lengths"),
    ],
)
def test_each_subcommand_says_what_it_takes(installed, command, option):
    done = run(installed, installed / "bin" / "storm-kernels", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"storm-kernels {command}" in done.stdout and option in done.stdout


def test_a_model_is_built_and_asked(installed, tmp_path):
    """The chat template's parts are in the wheel too."""
    pytest.importorskip("av", reason="the extra `model` is not installed")
    from tests.support import ask_model, published

    vision, words = published.siglip(tmp_path / "siglip"), published.language(tmp_path / "words")
    script, folder = installed / "bin" / "storm-kernels", tmp_path / "model"
    parts = ("--vision", vision, "--language", words, "--projector", "storm")
    done = run(installed, script, "build", *parts, "--out", folder)
    assert done.returncode == 0, done.stderr
    film = ask_model.clip(tmp_path / "clip.mp4")
    done = run(installed, script, "ask", film, "Why?", "--model", folder, "--frames", 4, "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert "random weights in projector" in done.stderr and done.stderr.splitlines()[-1].startswith(
        "4 frames, 16 video"
    )


def test_a_benchmark_runs(installed):
    """Tiny, and its rows are written."""
    rows = installed.parent / "rows.json"
    rows.unlink(missing_ok=True)
    tiny = (
        "--lengths",
        32,
        "--channels",
        64,
        "--dtypes",
        "float32",
        "--modes",
        "forward",
        "--peer-length",
        1,
        "--out",
        rows,
    )
    done = run(installed, installed / "bin" / "storm-kernels", "bench", "scan", *tiny)
    assert done.returncode == 0, done.stderr
    assert "scan forward, batch=1 tokens=32 channels=64 states=16, float32" in done.stdout
    assert rows.exists()


@pytest.mark.parametrize(
    ("command", "missing"),
    [("profile", "typer"), ("bench scan", "rich"), ("bench decode", "av"), ("build", "transformers")],
)
def test_what_is_not_installed_is_one_line_that_names_the_extra(installed, command, missing):
    done = run(installed, installed / "bin" / "storm-kernels", *command.split(), without=[missing])
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: storm-kernels {command} needs {missing}, which is not installed: pip install '{cli.EXTRAS}'\n"
    )
