"""Building the C++ library and loading it, where either fails: what is said, and that nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storm_kernels.backends.cpu import build, loader, structs

ROOT = Path(__file__).resolve().parent.parent.parent


def test_without_a_compiler_the_build_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_the_old_library(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    library = tmp_path / "library.so"
    library.write_text("old")
    with pytest.raises(build.BuildError, match="false"):
        build.build(library)
    assert [p.name for p in tmp_path.iterdir()] == ["library.so"] and library.read_text() == "old"


def test_installation_succeeds_without_a_compiler(tmp_path):
    pytest.importorskip("setuptools", reason="building needs setuptools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(
        ROOT / "storm_kernels" / "backends" / "cpu",
        tmp_path / "storm_kernels" / "backends" / "cpu",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the cpu backend is left out: no C++ compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_missing_library_is_named_with_the_way_to_build_it(tmp_path):
    with pytest.raises(
        loader.LibraryMissing, match=r"absent\.so is not there.*python -m storm_kernels\.backends\.cpu\.build"
    ):
        loader.Library(tmp_path / "absent.so")


def test_a_library_of_other_sources_is_refused(monkeypatch):
    """A structure that has grown by a field here alone: every call would hand over fields at wrong places."""
    if reason := loader.why_missing():
        pytest.skip(reason)

    class Grown(structs.CScan):
        _fields_ = [("more", structs.c_int64)]

    loader.Library(loader.LIBRARY)
    grown = tuple(Grown if one is structs.CScan else one for one in structs.STRUCTURES)
    monkeypatch.setattr(loader, "STRUCTURES", grown)
    with pytest.raises(loader.LibraryMissing, match="was built from other sources: its structures have .* bytes"):
        loader.Library(loader.LIBRARY)


def test_a_broken_library_is_named(tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    with pytest.raises(loader.LibraryMissing, match=r"broken\.so cannot be loaded"):
        loader.Library(tmp_path / "broken.so")
