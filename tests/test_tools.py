"""tools/: the locked versions are those of the project's own requirements, and what `make
test-newest` finds is told in full.
"""

import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from tools import lock, newest

LOCKED = {name: lock.read(lock.ROOT / name) for name in lock.HEADS}


def plain(requirement):
    return re.split(r"[<>=]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("name", lock.HEADS)
def test_every_requirement_is_locked(name):
    locked = {plain(package) for package in LOCKED[name]}
    assert not {plain(one) for one in lock.requirements()} - locked
    assert "storm-kernels" not in locked
    text = (lock.ROOT / name).read_text()
    assert not re.search(r"[+@/]", text)  # no CPU or local build, no path, no host
    assert re.search(r"^torch==\d+\.\d+\.\d+$", text, re.M)


def test_the_oldest_are_the_lower_bounds():
    for one in lock.lower_bounds():
        name, _, version = one.partition("===")
        assert not version or LOCKED["constraints-oldest.txt"][name] == version


def test_no_upper_bounds():
    assert not [one for one in lock.requirements() if "<" in one or "~" in one or "==" in one]


def test_what_changed():
    locked = {"torch": "2.13.0", "huggingface_hub": "2.4.0", "rich": "15.0.0", "absent": "1"}
    installed = {"torch": "2.14.1", "huggingface-hub": "2.4.1", "rich": "15.0.0", "new": "1"}
    assert newest.changed(locked, installed) == ["torch 2.13.0 -> 2.14.1", "huggingface_hub 2.4.0 -> 2.4.1"]


def test_failures_of_a_report():
    report = """<testsuites><testsuite><testcase classname="tests.a" name="good"/>
    <testcase classname="tests.a" name="bad"><failure message="AssertionError: 1 is 2&#10;more">x</failure></testcase>
    <testcase classname="" name="tests.b"><skipped message="the extra `model` is not installed"/></testcase>
    <testcase classname="tests.a" name="elsewhere"><skipped message="needs a GPU"/></testcase>
    </testsuite></testsuites>"""
    assert newest.failures(report) == [
        "tests.a::bad: AssertionError: 1 is 2",
        "::tests.b: the extra `model` is not installed",
    ]


def told(monkeypatch, capsys, tmp_path, *, free=100e9, outcome=(1, "no such host"), report=None):
    """What CI prints where `make` ends with ``outcome`` and leaves ``report``."""

    def run(command, seconds, **environment):
        if report is not None and command[0] == "make":
            newest.REPORT.write_text(report)
        return outcome

    monkeypatch.setattr(newest, "run", run)
    monkeypatch.setattr(newest, "ENVIRONMENT", tmp_path / "none")
    monkeypatch.setattr(newest, "REPORT", tmp_path / "newest.xml")
    monkeypatch.setattr(newest.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert newest.main() == 0
    return capsys.readouterr().out


def test_what_continuous_integration_tells(monkeypatch, capsys, tmp_path):
    tell = partial(told, monkeypatch, capsys, tmp_path)
    assert "12 GB, 3 are free" in tell(free=3e9)
    assert "the last lines are\nno such host" in tell()
    assert "not finished within 40 minutes" in tell(outcome=(None, ""))
    passing = "<testsuite><testcase classname='a' name='b'/></testsuite>"
    assert "everything passes" in tell(outcome=(0, ""), report=passing)
    assert "1 lines to be mended next:\nsm_90 scan; FAULT: spills" in tell(
        outcome=(2, "sm_90 scan; FAULT: spills"), report=passing
    )
    failing = "<testsuite><testcase classname='a' name='b'><error message='no'/></testcase></testsuite>"
    assert "a::b: no" in tell(outcome=(2, ""), report=failing)


def test_a_command_that_takes_too_long_is_ended():
    assert newest.run([sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"], 2) == (
        None,
        "started\n",
    )
    assert newest.run([sys.executable, "-c", "raise SystemExit(3)"], 20) == (3, "")


def test_listing_needs_no_torch():
    """`make` asks before there is an environment."""
    out = subprocess.run(
        [sys.executable, "-I", "-S", "tools/lock.py", "--list"],
        cwd=lock.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == lock.requirements()
