"""`make gpu` (tools/gpu.py) where there is no GPU: the PTX interpreter is its device."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storm_benchmarks import environment
from storm_benchmarks.harness import load_rows

import storm_kernels as sk
from storm_kernels.backends import dispatch
from tools import gpu, gpu_compare

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings and nvidia-cuda-nvrtc to compile")


def test_the_first_step_tells_what_works(capsys):
    found = gpu.smoke("ptx", ["cuda: reduction", "cuda: convolution"])
    assert found == {"cuda: reduction": "", "cuda: convolution": ""}
    assert capsys.readouterr().out.count("works") == 2


@pytest.mark.ptx
def test_the_whole_script_runs_and_is_not_repeated(tmp_path, capfd):
    """Every step of `make gpu`, the interpreter in place of the GPU; compute-sanitizer needs a GPU's driver."""
    status = gpu.main(["--device", "ptx", "--state", str(tmp_path)])
    printed = capfd.readouterr().out
    outcomes = json.loads((tmp_path / "ptx.json").read_text())["steps"]
    expected = dict.fromkeys(["smoke", *gpu.steps("ptx")], "done")
    assert outcomes == expected | {"sanitize": "compute-sanitizer is not there"}
    assert status == 1 and "look first at" in printed
    for op in ("scan", "conv", "reduce", "projector"):
        rows = load_rows(tmp_path / "ptx" / f"{op}.json")
        assert {row["backend"] for row in rows} >= ({"cuda", "triton"} if op != "projector" else {"fused"})
        assert {(row["device"], row["commit"]) for row in rows} == {(gpu.NAME, environment.commit())}
    assert (tmp_path / "ptx" / "e2e-128-both" / "report.html").exists()
    gpu.main(["--device", "ptx", "--state", str(tmp_path)])
    assert capfd.readouterr().out.count("done before") == len(expected) - 1  # all but the sanitizer


def test_a_step_that_runs_again_leaves_one_row_of_each_measurement(tmp_path):
    row = {"op": "scan", "backend": "cuda", "mode": "forward", "shape": "tokens=1", "dtype": "float32"}
    row |= {"p50_ms": 1.0, "device": "a GPU", "commit": "1"}
    stopped, other, again = row, row | {"commit": "0"}, row | {"p50_ms": 2.0}
    (tmp_path / "scan.json").write_text(json.dumps([other, other, stopped, row | {"op": "conv"}, again]))
    gpu.keep_latest(tmp_path, "a GPU, commit 1")
    assert load_rows(tmp_path / "scan.json") == [other, other, again, row | {"op": "conv"}]


def fails(name, device, answer):
    answer.send("RuntimeError: an illegal memory access was encountered")


def dies(name, device, answer):
    os._exit(9)


def hangs(name, device, answer):
    time.sleep(60)


@pytest.mark.parametrize(
    ("child", "why"), [(fails, "illegal memory access"), (dies, "ended with status 9"), (hangs, "still running after")]
)
def test_a_family_that_fails_dies_or_hangs_takes_no_other_with_it(child, why):
    name, found, _ = gpu.try_apart("cuda: scan", "ptx", 20 if child is not hangs else 2, child)
    assert name == "cuda: scan" and why in found


def test_later_steps_leave_out_what_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu, "smoke", lambda device, names: dict.fromkeys(gpu.families(), "") | {"cuda: scan, backward": "wrong"}
    )
    state = gpu.State(tmp_path / "state.json", "a GPU, commit 1")
    gpu.run_smoke(state, "ptx")
    assert state.broken == ["cuda:scan"]
    monkeypatch.setattr(dispatch, "_why_not", dispatch._why_not)
    gpu.leave_out(state.broken)
    assert sk.why_not("scan", "cuda") == "cuda's scan failed the first step"
    assert "failed the first step" not in str(sk.why_not("conv", "cuda"))


def test_a_step_that_is_done_is_done_once_for_each_device_and_commit(tmp_path):
    state = gpu.State(tmp_path / "state.json", "a GPU, commit 1")
    state.broken = ["cuda:scan"]
    state.note("scan", "done")
    again = gpu.State(tmp_path / "state.json", "a GPU, commit 1")
    assert (again.steps, again.broken) == ({"scan": "done"}, ["cuda:scan"])
    other = gpu.State(tmp_path / "state.json", "a GPU, commit 2")
    assert (other.steps, other.broken) == ({}, [])


def test_steps_run_in_an_interpreter_without_what_is_broken(tmp_path, monkeypatch):
    (tmp_path / "asks.py").write_text(
        "import sys, storm_kernels as sk; sys.exit(7 if 'first step' in sk.why_not('scan', 'cuda') else 0)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.run_step(gpu.Step([["asks"]]), []) == "done"
    assert gpu.run_step(gpu.Step([["asks"]]), ["cuda:scan"]) == "asks ended with status 7"
    assert gpu.run_step(gpu.Step([["asks"]], (["no-such-tool"],)), []) == "no-such-tool is not there"


def test_measured_times_are_held_against_arithmetic(tmp_path):
    row = {
        "op": "bidirectional_scan",
        "backend": "cuda",
        "mode": "forward",
        "shape": "batch=1 tokens=65536 channels=7168 states=16",
        "dtype": "bfloat16",
    }
    row |= {
        "p50_ms": 6.5,
        "work": 2 * 65536 * 7168 * 16,
        "unit": "items",
        "device": "NVIDIA H100 80GB HBM3, 80 GiB",
        "commit": environment.commit(),
    }
    expected, limit = gpu_compare.expected_ms(row, gpu_compare.GPUS["H100"])
    assert limit == "exp2" and abs(expected - 4.06) < 0.01  # docs/kernels.md
    (tmp_path / "scan.json").write_text(
        json.dumps([row, row | {"commit": "another"}, row | {"device": "an unknown one"}])
    )
    lines = gpu_compare.compare(tmp_path)
    assert "1.60x" in lines[0] and "H100" in lines[0] and row["commit"] in lines[0]
    assert "look first at" in lines[1] and "clock" in lines[2]


def test_every_step_names_modules_that_exist():
    for step in gpu.steps("cuda").values():
        for module in step.modules:
            assert importlib.util.find_spec(module[0]), module


def test_the_interpreter_runs_the_modules_and_options_of_the_gpu():
    """Sizes differ; the options with which a step is done on a GPU are given here, too."""
    real, small = gpu.steps("cuda"), gpu.steps("ptx")
    assert list(real) == list(small)
    for name, step in real.items():
        assert step.before == small[name].before
        for module, tiny in zip(step.modules, small[name].modules, strict=True):
            assert module[0] == tiny[0]
            assert {one for one in module if one.startswith("-")} <= {one for one in tiny if one.startswith("-")}


def test_a_program_that_is_stopped_leaves_nothing_running(tmp_path):
    """Also what it started: compute-sanitizer starts the interpreter that holds the GPU's memory."""
    noted = tmp_path / "child"
    starts = (
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        f"pathlib.Path({str(noted)!r}).write_text(str(child.pid))\n"
        "time.sleep(100)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_whole([sys.executable, "-c", starts], dict(os.environ), 4)
    child = int(noted.read_text())
    for _ in range(100):
        if not lives(child):
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} lives on")


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
