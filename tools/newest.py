"""``make test-newest`` for continuous integration: what fails is told in a block of its own, with
the versions that differ from the locked ones.

``python -m tools.newest`` exits with 0 whatever it finds: a release of another project must not
keep this one's changes back, but it is the next thing to be mended. Where the newest releases
cannot be installed (no network, no room on the disk), the block says so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from . import lock

ENVIRONMENT, REPORT = lock.ROOT / ".venv-newest", lock.ROOT / "out" / "newest.xml"
ROOM = 12  # GB: torch for CUDA, once packed and once unpacked
LIMIT_S = 2400  # everything else takes CI under 30 minutes, and its limit is 90
_VERSIONS = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


def run(command: list[str], seconds: int, **environment: str) -> tuple[int | None, str]:
    """-> exit code, None if it took longer than ``seconds``; what it printed. Its children are ended with it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=lock.ROOT, env=os.environ | environment, **pipes) as child:
        try:
            out = child.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None, child.communicate()[0]
    return child.returncode, out


def changed(locked: dict[str, str], installed: dict[str, str]) -> list[str]:
    """ "torch 2.13.0 -> 2.14.1" for each locked package that another version of is installed."""
    names = {name.lower().replace("_", "-"): version for name, version in installed.items()}
    found = ((name, version, names.get(name.lower().replace("_", "-"))) for name, version in locked.items())
    return [f"{name} {version} -> {newer}" for name, version, newer in found if newer not in (None, version)]


def failures(report: str) -> list[str]:
    """The tests of a JUnit report that failed, and the files that were left out for want of a
    package, each with its reason in a line.
    """
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        for outcome in case:
            message = (outcome.get("message") or "").splitlines() or [""]
            if outcome.tag in ("failure", "error") or (outcome.tag == "skipped" and "not installed" in message[0]):
                found.append(f"{case.get('classname')}::{case.get('name')}: {message[0][:200]}")
    return found


def block() -> list[str]:
    """Install and run; what there is to tell, a line each."""
    free = shutil.disk_usage(lock.ROOT).free / 1e9
    if free < ROOM and not ENVIRONMENT.exists():
        return [f"not run: installing it takes {ROOM} GB, {free:.0f} are free"]
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    code, out = run(["make", "--keep-going", "test-newest"], LIMIT_S, PYTEST_ADDOPTS=f"--junit-xml={REPORT}")
    found = failures(REPORT.read_text()) if REPORT.exists() else []
    found += [line for line in out.splitlines() if "FAULT" in line]
    if code is None:
        found.append(f"not finished within {LIMIT_S // 60} minutes")
    if code != 0 and not REPORT.exists():
        found = [
            "the installation or the start of the tests failed; the last lines are",
            *out.splitlines()[-8:],
            *found,
        ]
    elif code and not found:
        found = ["`make test-newest` failed; its last lines are", *out.splitlines()[-20:]]
    verdict = f"{len(found)} lines to be mended next:" if found else "everything passes"
    return [f"versions that differ from the locked ones: {', '.join(differences()) or 'none'}", verdict, *found]


def differences() -> list[str]:
    """What is installed now against what is locked."""
    code, out = run([str(ENVIRONMENT / "bin" / "python"), "-c", _VERSIONS], 60) if ENVIRONMENT.exists() else (1, "")
    return changed(lock.read(lock.ROOT / "constraints.txt"), json.loads(out)) if code == 0 else []


def main() -> int:
    lines = block()
    print(
        "\n".join(("=" * 30 + " newest releases; failures here do not fail the run " + "=" * 30, *lines, "=" * 112)),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
