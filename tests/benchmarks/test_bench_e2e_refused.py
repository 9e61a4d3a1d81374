"""What the main job refuses, and what it keeps where it cannot go on: folders, disks, options, memory."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from storm_benchmarks import environment
from storm_benchmarks.e2e import options, pipeline, summary, work
from storm_benchmarks.harness import load_rows
from storm_model import presets as models

import storm_kernels

from .test_bench_e2e import stopping_in_round


def test_a_second_run_into_one_folder_is_refused_until_the_first_has_ended(job, tmp_path, monkeypatch, capsys):
    def run():
        return job("--frames", 1, "--variants", "vila", "--repeat", 1, "--out", tmp_path)

    holder = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", holder, tmp_path / ".lock"], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"held\n"
        assert run() == 2
        assert capsys.readouterr().err == f"error: --out: another run is writing to {tmp_path}; name another folder\n"
        assert os.listdir(tmp_path) == [".lock"]
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert run() == 0  # killed, it could not tidy up; its lock ended with it


@pytest.mark.parametrize("name", ["[run1] x", "[/red]", "[bold"])
def test_a_folder_named_like_markup_is_written_and_told_as_typed(job, tmp_path, capsys, name):
    assert job("--frames", 1, "--variants", "vila", "--repeat", 1, "--out", tmp_path / name) == 0
    printed = capsys.readouterr().out
    assert f"output: {tmp_path / name}\n" in printed
    assert f"{tmp_path / name}/report.html\n" in printed
    assert (tmp_path / name / "report.html").exists()


def test_a_full_disk_is_one_line_and_the_rows_before_it_are_kept(job, tmp_path, monkeypatch, capsys):
    """Full from the second round on, as `os.fsync` tells it."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stopping_in_round(1, lambda: monkeypatch.setattr(os, "fsync", full), monkeypatch)
    assert job("--frames", 2, "--variants", "vila", "--repeat", 3, "--out", tmp_path) == 1
    told = capsys.readouterr()
    assert (
        told.err
        == f"error: cannot write {tmp_path}/results.json: No space left on device; what was written before is kept\n"
    )
    assert "VILA" in told.out
    (done,) = summary.outcomes(load_rows(tmp_path / "results.json"))
    assert len(done.rounds()) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_trace_that_finds_the_disk_full_is_one_line_that_names_it(job, tmp_path, monkeypatch, capsys):
    def full(self, path):
        Path(path).write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    arguments = ("--frames", 1, "--variants", "vila", "--repeat", 1, "--trace", "--out", tmp_path)
    assert job(*arguments) == 1
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path}/trace.json.gz: No space left on device; what was written before is kept\n"
    )
    assert summary.finished(load_rows(tmp_path / "results.json"))
    assert not list(tmp_path.glob("partial-*"))


def test_a_full_file_system(job, tmp_path, monkeypatch, capsys):
    """A file system of 64 KiB, filled after the first round."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small file system: {mounted.stderr.strip()}")
    try:
        stopping_in_round(
            1,
            lambda: (tmp_path / "filler").write_bytes(bytes(os.statvfs(tmp_path).f_bavail * 4096)),
            monkeypatch,
        )
        assert job("--frames", 2, "--variants", "vila", "--repeat", 3, "--out", tmp_path) == 1
        told = capsys.readouterr().err
        assert (
            told == f"error: cannot write {tmp_path}/results.json: No space left on device; "
            "what was written before is kept\n"
        )
        (done,) = summary.outcomes(load_rows(tmp_path / "results.json"))
        assert len(done.rounds()) == 1
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_vanishes_is_made_again_with_all_rows(job, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stopping_in_round(1, lambda: shutil.rmtree(out, ignore_errors=True), monkeypatch)
    assert job("--frames", 2, "--variants", "vila", "--repeat", 2, "--out", out) == 0
    (done,) = summary.outcomes(load_rows(out / "results.json"))
    assert len(done.rounds()) == 2
    assert f"{out} was removed while this ran; it is there again, with all rows" in capsys.readouterr().out


def test_a_wrong_projector_is_not_timed(job, tmp_path, monkeypatch, capsys):
    forward = storm_kernels.TemporalProjector.forward
    monkeypatch.setattr(
        storm_kernels.TemporalProjector,
        "forward",
        lambda self, *arguments, **options: forward(self, *arguments, **options) * 1.001,
    )
    assert job("--frames", 2, "--variants", "vila,storm-ts", "--repeat", 1, "--out", tmp_path) == 1
    assert summary.outcomes(load_rows(tmp_path / "results.json")) == []
    assert "fused projector of STORM + T. sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frames", "0"], "'0'"),
        (["--frames", "-4"], "'-4'"),
        (["--frames", "8,2.5"], "'2.5'"),
        (["--frames", ""], "''"),
        (["--frames", "1000000000"], "'1000000000' is not a whole number from 1 to 65536"),
        (["--frames", "9" * 5000], "is not a whole number"),
        (["--frames", "8", "--fps", "5"], "--frames: '8' does not go with --fps"),
        (["--fps", "0"], "--fps must be positive, got 0"),
        (["--fps", "1e9"], "--frames must be at most 65536"),
        (["--start", "99"], "--start must be before the end of the video"),
        (["--start", "0.1", "--end", "0.05"], "--end must be after start = 0.1, got 0.05"),
        (["--size", "0"], "'0' is not encoder, file, a number of pixels or HEIGHTxWIDTH, each up to 8192"),
        (["--size", "3x4x5"], "'3x4x5'"),
        (["--preset", "storm-9b"], "'storm-9b' does not exist; there are: storm-7b, storm-8b"),
        (["--variants", "vila,storm-xx"], "'storm-xx' does not exist; there are: vila, storm, storm-ts"),
        (["--projector", "fast"], "'fast' does not exist; there are: reference, fused, both"),
        (["--dtype", "int8"], "'int8' does not exist; there are: float32, bfloat16, float16"),
        (["--device", "tpu!"], "'tpu!'"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--repeat", "zero"], "'zero'"),
        (["--repeat", "0"], "'0'"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_input_is_one_line_that_names_it(job, tmp_path, capsys, arguments, said):
    assert job("--out", tmp_path / "out", *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_bad_video_is_one_line_that_names_it(job, tmp_path, capsys):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for path in (empty, tmp_path / "missing.mp4", tmp_path):
        assert job("--out", tmp_path / "out", video=path) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: --video: {path}")
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_more_frames_than_memory_holds_are_refused_before_the_work(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environment, "available_memory", lambda device: 10 * 2**20)
    assert job("--frames", 4096, "--out", tmp_path / "out") == 2
    assert "4096 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_count_as_memory(monkeypatch):
    """storm-7b in float32 on a machine with 21 GiB free: its weights alone are 31."""
    settings = work.Settings(
        options.clip(None, None),
        models.preset("storm-7b"),
        (8,),
        options.variants("vila,storm"),
        ("fused",),
        "cpu",
        torch.float32,
        1,
    )
    monkeypatch.setattr(environment, "available_memory", lambda device: 21 * 2**30)
    with pytest.raises(
        options.BadRequest,
        match=r"storm-7b in float32 \(weights 31\.\d GiB\) and 8 frames .* which has 21\.0 GiB free",
    ):
        options.check_memory(settings)
    monkeypatch.setattr(environment, "available_memory", lambda device: 40 * 2**30)
    options.check_memory(settings)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.Run, "measure", lambda self: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    assert job("--out", tmp_path / "file" / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --out: ")
    assert str(tmp_path / "file" / "out") in told
    assert told.count("\n") == 1
