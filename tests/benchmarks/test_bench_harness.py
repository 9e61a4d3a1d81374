"""The benchmarks' harness: rows that survive a kill, timings of what was timed, memory that was
used, a check that can fail.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from storm_benchmarks import environment, harness
from storm_benchmarks.e2e.stages import StageClock
from storm_benchmarks.harness import (
    CheckFailed,
    MemoryMeter,
    Rows,
    load_rows,
    percentiles,
    time_rounds,
    verify,
    write_atomically,
)

from storm_kernels.profiling import recording, stage

ROOT = Path(__file__).resolve().parent.parent.parent


def one_row(**more):
    return harness.row("scan", "cpu", "forward", "batch=1", torch.bfloat16, [3.0, 1.0, 2.0], device="cpu", **more)


def test_a_row_has_every_column_and_is_json():
    row = one_row(peak_bytes=5, unit="items")
    columns = (
        "op backend mode shape dtype p20_ms p50_ms p80_ms samples peak_bytes held_bytes device versions commit time "
        "load unit"
    )
    assert set(row) == set(columns.split())
    assert (row["dtype"], row["p50_ms"], row["samples"], row["peak_bytes"]) == ("bfloat16", 2.0, 3, 5)
    assert f"torch {torch.__version__.partition('+')[0]}" in row["versions"]
    assert json.loads(json.dumps(row)) == row


def test_percentiles_are_those_of_an_even_ladder():
    assert percentiles(range(101)) == (20, 50, 80)
    assert percentiles([7.0]) == (7, 7, 7)
    with pytest.raises(ValueError, match="no samples"):
        percentiles([])


def test_rows_are_on_disk_after_each_append_and_earlier_ones_stay(tmp_path):
    path = tmp_path / "new" / "rows.json"
    rows = Rows(path)
    assert load_rows(path) == []
    rows.append(one_row())
    assert len(load_rows(path)) == 1
    Rows(path).append(one_row(), one_row())
    assert len(load_rows(path)) == 3
    assert len(path.read_text().splitlines()) == 5  # one row a line
    assert os.listdir(path.parent) == ["rows.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"rows": []}', b"\xff\xfe", b'[{"op": "scan"}]'])
def test_a_file_that_holds_something_else_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.json is not a results file"):
        Rows(path)
    assert path.read_bytes() == content


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["rows.json"]


def test_a_kill_at_any_moment_leaves_whole_rows(tmp_path):
    """R14: a process that only writes is killed at random moments; what it leaves can always be read."""
    path = tmp_path / "rows.json"
    code = (
        "import sys, types; from pathlib import Path\n"
        # A quick start; writing needs no torch.
        "sys.modules['torch'] = types.SimpleNamespace(Tensor=object, dtype=object)\n"
        "from storm_benchmarks.harness import Rows\n"
        f"rows = Rows(Path({str(path)!r})); print('ready', flush=True)\n"
        "while True: rows.append({'p50_ms': len(rows.rows), 'filler': 'x' * 20000})\n"
    )
    counts = []
    for kill_after in (0.01, 0.03, 0.05, 0.08, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(kill_after)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        rows = load_rows(path)
        assert [row["p50_ms"] for row in rows] == list(range(len(rows)))
        counts.append(len(rows))
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_timings_tell_a_slow_call_from_a_quick_one():
    samples = time_rounds(
        {"slow": lambda: time.sleep(0.02), "quick": lambda: time.sleep(0.002)}, "cpu", rounds=2, slice_ms=10
    )
    assert len(samples["slow"]) == 2
    assert len(samples["quick"]) >= 4
    assert 20 <= min(samples["slow"]) < 200
    assert 2 <= min(samples["quick"]) < 20


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process is read from Linux's /proc"
)
def test_peak_memory_is_what_was_used_and_given_back():
    def use(megabytes):
        torch.ones(megabytes * 2**20 // 4).sum()

    use(1)
    for megabytes in (200, 50):  # the smaller one second: a high-water mark that is not reset would repeat the larger
        columns = harness.peak_memory(lambda size=megabytes: use(size), "cpu")
        assert megabytes * 2**20 <= columns["peak_bytes"] + 2**20
        assert columns["peak_bytes"] < (megabytes + 40) * 2**20
    idle = MemoryMeter("cpu", measures=False)
    with idle:
        use(1)
    assert idle.columns() == {"peak_bytes": None, "held_bytes": None}


def test_verify_passes_what_is_as_good_as_plain_and_fails_what_is_not():
    truth = torch.randn(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = truth.float()
    assert verify("x", truth.float(), plain, truth)["error"] > 0
    wrong = plain.clone()
    wrong[2, 7] += 1e-3
    for bad in (wrong, plain * (1 + 1e-5), plain.masked_fill(plain == plain[0, 0], float("nan")), plain[:, :-1]):
        with pytest.raises(CheckFailed, match="^scan"):
            verify("scan", bad, plain, truth)


def test_verify_allows_the_rounding_of_the_result():
    """Half a unit in the last place, as docs/reliability.md says: a plain reference that is exact leaves that much."""
    truth = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    unit = 2.0**-23 * truth
    verify("x", (truth + unit * torch.tensor([1, 1, 0, 0])).float(), truth.float(), truth)
    with pytest.raises(CheckFailed, match="^x: rms error"):
        verify("x", (truth + unit).float(), truth.float(), truth)


def test_stage_clock_names_nested_stages_and_sums_repeated_ones():
    clock = StageClock("cpu")
    with recording(clock), stage("projector"):
        for _ in range(2):
            with stage("scan"):
                time.sleep(0.01)
        with stage("conv"):
            pass
    taken = clock.take()
    assert set(taken) == {"projector", "projector/scan", "projector/conv"}
    assert 20 <= taken["projector/scan"] <= taken["projector"] < 500
    assert clock.take() == {}


def test_stage_clock_closes_a_stage_that_fails():
    clock = StageClock("cpu")
    with pytest.raises(RuntimeError), recording(clock), stage("outer"), stage("inner"):
        raise RuntimeError
    with recording(clock), stage("next"):
        pass
    assert set(clock.take()) == {"outer", "outer/inner", "next"}


def test_environment_is_told_without_a_checkout(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    environment.commit.cache_clear()
    monkeypatch.setattr(environment.subprocess, "run", no_git)
    assert environment.commit() == "unknown"
    environment.commit.cache_clear()
    assert environment.available_memory("cpu") is None or environment.available_memory("cpu") > 0
    assert environment.device_name("cpu")
