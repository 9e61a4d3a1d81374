"""The versions that the project is built and tested with, as pip's constraints files.

``python -m tools.lock`` resolves the newest releases that go with the locked torch into
``constraints.txt``, and the oldest that pyproject.toml allows into ``constraints-oldest.txt``;
``python -m tools.lock --list`` prints what there is to install. Only the packages' metadata is
downloaded. torch is resolved as PyPI has it, for CUDA, so that its own demands (Triton, NVRTC)
hold; a CPU build of the same version satisfies the file too.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
EXTRAS = ("model", "bench", "test", "triton", "cuda")
HEADS = {
    "constraints.txt": f"The newest releases that go with torch {TORCH} as PyPI has it.",
    "constraints-oldest.txt": (
        "The oldest releases of what pyproject.toml gives a lower bound, the newest of the rest that go with them."
    ),
}


def requirements() -> list[str]:
    """The project's own requirements, those of its extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(
        dict.fromkeys(
            project["dependencies"] + [r for extra in EXTRAS for r in project["optional-dependencies"][extra]]
        )
    )


def lower_bounds() -> list[str]:
    """Each requirement at its lower bound: "torch>=2.12" as "torch===2.12.0"; one without a bound as it is."""
    return [
        re.sub(r">=(\d+)\.(\d+)(\.\d+)?$", lambda m: f"==={m[1]}.{m[2]}{m[3] or '.0'}", one) for one in requirements()
    ]


def resolve(wanted: list[str]) -> dict[str, str]:
    """Name -> version of all that pip would install, in an environment of its own with nothing there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        command = [
            Path(folder, "bin", "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--report",
            Path(folder, "report.json"),
            *wanted,
        ]
        subprocess.run(command, check=True)
        report = json.loads(Path(folder, "report.json").read_text())
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in report["install"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def read(path: Path) -> dict[str, str]:
    """Name -> version of a constraints file."""
    return dict(line.split("==") for line in path.read_text().splitlines() if line and not line.startswith("#"))


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        print("\n".join(requirements()))
        return 0
    wanted = {"constraints.txt": [f"torch==={TORCH}", *requirements()], "constraints-oldest.txt": lower_bounds()}
    for name, head in HEADS.items():
        lines = [f"{package}=={version}" for package, version in resolve(wanted[name]).items()]
        (ROOT / name).write_text("\n".join((f"# Written by `make lock`. {head}", *lines)) + "\n")
        print(f"{name}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
