"""The examples run as written, without mamba_ssm, and docs/compat.md shows the files as they are."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = {"patch_transformers": "transformers", "vim_block": "torch", "projector": "torch"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    if find_spec(EXAMPLES[name]) is None:
        pytest.skip(f"{EXAMPLES[name]} is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = ROOT / "examples" / f"{name}.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_document_shows_the_files():
    text = (ROOT / "docs" / "compat.md").read_text()
    shown = dict(re.findall(r"```python\n# examples/(\w+)\.py\n(.*?)```", text, re.DOTALL))
    assert shown == {name: (ROOT / "examples" / f"{name}.py").read_text() for name in EXAMPLES}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def test_names_of_the_migration_table_exist():
    """Every dotted name of the migration table can be imported."""
    text = (ROOT / "docs" / "compat.md").read_text()
    names = set(re.findall(r"`(storm_kernels(?:\.\w+)+)", text))
    assert len(names) > 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
