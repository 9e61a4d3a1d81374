"""storm-kernels info and verify."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from storm_kernels import __version__, cli, verify
from storm_kernels.backends import dispatch
from storm_kernels.backends import torch as torch_backend


def test_info_has_one_row_for_each_operation_and_backend(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [row for row in found["rows"] if row["device"] == "cpu"]
    assert {(row["op"], row["backend"]) for row in rows} == {
        (op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS
    }
    for op in dispatch.OPS:
        of_op = [row for row in rows if row["op"] == op]
        (chosen,) = (row for row in of_op if row["chosen"])
        assert chosen["available"] and not chosen["reason"]
        assert all(row["reason"] for row in of_op if not row["available"])
    assert found["environment"]["storm_kernels"] == __version__


def test_info_says_which_backend_runs(capsys):
    chosen = {row["op"]: row["backend"] for row in cli.describe()["rows"] if row["chosen"] and row["device"] == "cpu"}
    for op, name in chosen.items():
        assert name == dispatch.choose(op, "", torch.ones(1), d_state=16, d_conv=4).NAME
    cli.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert all(
        any(line.split()[:5] == [op, name, "cpu", "yes", "yes"] for line in lines) for op, name in chosen.items()
    )


def test_verify_passes_within_30_seconds(capsys):
    start = time.process_time()
    code = cli.main(["verify"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert time.process_time() - start < 30
    assert "scan    torch    cpu     ok" in out and out.rstrip().endswith("0 failures")


def test_verify_finds_a_wrong_backend(monkeypatch, capsys):
    right = torch_backend.scan

    def wrong(directions, z, **options):
        result = right(directions, z, **options)
        return result._replace(out=result.out * (1 + 2e-6))

    monkeypatch.setattr(torch_backend, "scan", wrong)
    monkeypatch.setattr(dispatch, "BACKENDS", ("torch",))
    monkeypatch.setattr(verify, "_DTYPES", (torch.float32,))
    assert cli.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "scan    torch    cpu     FAILED" in out and "conv    torch    cpu     ok" in out
    assert "float32, forward: result: rms error" in out


def test_verify_reports_a_backend_that_breaks(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch_backend, "reduce", broken)
    monkeypatch.setattr(dispatch, "BACKENDS", ("torch",))
    monkeypatch.setattr(verify, "_DTYPES", (torch.float32,))
    failures = {check.failure for check in verify.run(("cpu",)) if check.op == "reduce"}
    assert failures == {"RuntimeError: no such instruction"}


def test_verify_tells_of_a_backend_that_cannot_run_as_asked():
    """In a process of its own: the library is looked for once."""
    environment = os.environ | {"STORM_KERNELS_CPU_ISA": "avx9000"}
    code = (
        "from storm_kernels import cli, verify; verify._DTYPES = verify._DTYPES[:1]; "
        "raise SystemExit(cli.main(['verify']))"
    )
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 1, child.stderr
    assert re.search(
        r"^scan +cpu +cpu +FAILED\n +any dtype, asked for by STORM_KERNELS_CPU_ISA=avx9000: ", child.stdout, re.M
    ), child.stdout
    assert "'avx9000' is not available" in child.stdout and child.stdout.endswith(f"{len(dispatch.OPS)} failures\n")


def test_command_line_errors(capsys):
    for arguments in ([], ["bench"], ["bench", "no-such-subject"], ["no-such-command"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    assert "no-such-command" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_traceback():
    """As in `storm-kernels info | head -1`; the reader is gone before the first line, so that the
    result does not depend on who is faster.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "storm_kernels.cli", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    errors = child.stderr.read()
    assert (child.wait(), errors) == (1, "")
