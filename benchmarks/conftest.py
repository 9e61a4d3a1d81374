"""`pytest benchmarks --benchmark-only` collects one quick benchmark of each subject, which its file holds."""

import pytest

SUBJECTS = ("scan.py", "conv.py", "reduce.py", "projector.py", "prefill.py")


def pytest_collect_file(file_path, parent):
    return (
        pytest.Module.from_parent(parent, path=file_path)
        if file_path.name in SUBJECTS and file_path.parent.name == "benchmarks"
        else None
    )
