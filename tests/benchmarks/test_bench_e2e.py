"""The main job on a small model and a clip made here: what it writes, what it refuses, what a stop leaves."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import warnings

import av
import numpy as np
import pytest
import torch
from storm_benchmarks import environment
from storm_benchmarks.e2e import __main__ as e2e
from storm_benchmarks.e2e import models as models_of_e2e
from storm_benchmarks.e2e import options, pipeline, report, summary
from storm_benchmarks.harness import load_rows
from storm_model import presets as models

import storm_kernels
from storm_kernels.tokens import TokenGrid

from ..support.tiny_model import TINY

CLIP_FRAMES = 6


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Six frames of noise under a name that a page must not take for markup."""
    path = tmp_path_factory.mktemp("clip") / "<b>&'clip'.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (CLIP_FRAMES, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def job(clip, monkeypatch):
    """Runs the command in this process on the small model -> exit status."""
    monkeypatch.setitem(models.PRESETS, "tiny", TINY)

    def run(*arguments, video=clip):
        return e2e.cli(["--preset", "tiny", "--video", str(video), "--device", "cpu", *map(str, arguments)])

    return run


def test_a_whole_run(job, clip, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        job("--frames", "8,4", "--variants", "vila,storm,storm-tp-sp-ts", "--repeat", 2, "--out", out, "--trace") == 0
    )
    rows = load_rows(out / "results.json")
    results = summary.outcomes(rows)
    assert summary.finished(rows)
    kinds = [
        ("vila", "vila"),
        *((name, kind) for name in ("storm", "storm-tp-sp-ts") for kind in ("reference", "fused")),
    ]
    assert [(one.frames, one.variant, one.projector) for one in results] == [
        (frames, *kind) for frames in (4, 8) for kind in kinds
    ]
    for one in results:
        grid = TokenGrid(one.frames, 2, 2)
        assert one.row["tokens"] == models.VARIANTS[one.variant].reduction.reduced(grid).tokens
        assert one.row["looped"] == (one.frames > CLIP_FRAMES)
        assert one.row["samples"] == one.stages["prefill"]["samples"] == one.stages["decode"]["samples"] == 2
        rounds = zip(*(one.rounds(stage) for stage in summary.TO_FIRST_TOKEN), strict=True)
        assert one.rounds() == pytest.approx([sum(stages) for stages in rounds], abs=1e-3)
        assert one.rounds("wait") == pytest.approx(
            [sum(t) for t in zip(one.rounds(), one.rounds("decode"), one.rounds("preprocess"), strict=True)], abs=1e-3
        )
        assert one.row["rounds_from"] and one.row["cores"] >= 1 and "not_reliable" in one.row
        assert sum(one.parts().values()) <= one.ms("projector") * 1.5
        if one.projector == "fused":
            assert one.row["checked_frames"] == one.frames
            assert 0 < one.row["error"] <= 1.25 * one.row["error_plain"]
            assert one.row["backend"] in one.row["ran"]
        if one.projector != "vila":
            assert {"downsample", "norm", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"} <= set(
                one.parts(),
            )
    decoding = {frames: stages["decode"] for frames, stages in summary.clip_rows(rows).items()}
    assert {frames: row["wanted_frames"] for frames, row in decoding.items()} == {4: 4, 8: CLIP_FRAMES}
    assert all(row["decoded_frames"] >= row["wanted_frames"] for row in decoding.values())
    assert {row["stage"] for row in summary.cold_rows(rows)} == {
        "open",
        "build",
        "preprocess",
        "vision",
        "projector",
        "prefill",
        "total",
    }
    assert {row["projector"] for row in summary.cold_rows(rows)} == {None, "vila", "reference", "fused"}
    assert set(os.listdir(out)) - {".lock"} == {
        "results.json",
        "report.html",
        "stages-4.png",
        "stages-8.png",
        "latency.png",
        "trace.json.gz",
    }
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;&#39;clip&#39;.mp4" in page
    assert clip.name not in page
    assert "looped clip" in page
    names = {
        event.get("name") for event in json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert {"vision", "projector", "scan", "prefill"} <= names
    printed = capsys.readouterr().out
    assert "STORM +TP +SP +TS" in printed
    assert "it is looped for 8" in printed
    assert "Fewer tokens: " in printed and "2 rounds: " in printed
    assert "4 frames: decode" in printed  # its progress, in lines, because this is no terminal
    assert (first := report.render(rows, {})) and "Fewer tokens" in first


def test_an_earlier_result_is_kept(job, tmp_path):
    def run():
        return job("--frames", 1, "--variants", "vila", "--repeat", 1, "--out", tmp_path)

    assert run() == 0
    first = (tmp_path / "results.json").read_bytes()
    assert run() == 0
    (kept,) = tmp_path.glob("results-*.json")
    assert kept.read_bytes() == first
    assert (
        run() == 0 or len(list(tmp_path.glob("results-*.json"))) == 1
    )  # twice in one second: refused, nothing replaced
    assert kept.read_bytes() == first


def test_all_means_the_eight_variants_of_the_paper():
    assert options.variants("all") == tuple(models.VARIANTS.values())
    assert len(options.variants("all")) == 8


def stopping_in_round(number, stop, monkeypatch):
    """The run is ended by ``stop()`` when it has made ``number`` timed rounds and begins the next."""
    shared = pipeline.Run._shared_stages

    def stopped(self, found, name):
        if len(found.shared) == number:
            stop()
        return shared(self, found, name)

    monkeypatch.setattr(pipeline.Run, "_shared_stages", stopped)


def raising(error):
    def stop():
        raise error

    return stop


def test_ctrl_c_leaves_the_finished_rounds_and_a_report_that_stays_stopped(job, tmp_path, monkeypatch, capsys):
    stopping_in_round(2, raising(KeyboardInterrupt), monkeypatch)
    assert (
        job("--frames", 2, "--variants", "vila,storm", "--projector", "reference", "--repeat", 3, "--out", tmp_path)
        == 130
    )
    assert [len(one.rounds()) for one in summary.outcomes(load_rows(tmp_path / "results.json"))] == [2, 2]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "stopped before its end" in page
    assert "finished rows are in" in capsys.readouterr().out
    (tmp_path / "report.html").unlink()
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_frames_by_the_second_of_a_part(job, tmp_path):
    arguments = ("--fps", 5, "--start", 0.2, "--verify", "--variants", "vila", "--repeat", 1, "--out", tmp_path / "out")
    assert job(*arguments) == 0
    rows = load_rows(tmp_path / "out" / "results.json")
    (outcome,) = summary.outcomes(rows)
    assert outcome.frames == 2  # of the 0.4 s that are left of six frames, ten a second
    assert next(row for row in rows if row["stage"] == "decode")["decoded_frames"] == CLIP_FRAMES


def test_each_round_has_every_contender_once(job, tmp_path, monkeypatch):
    """They take turns: none has its second time before all had their first."""
    turns = []
    first_token = models_of_e2e.Models.first_token
    monkeypatch.setattr(
        models_of_e2e.Models,
        "first_token",
        lambda self, variant, kind, x: (turns.append((variant.name, kind)), first_token(self, variant, kind, x)),
    )
    assert job("--frames", 2, "--variants", "vila,storm,storm-ts", "--repeat", 2, "--out", tmp_path) == 0
    contenders = [
        ("vila", "vila"),
        *((name, kind) for name in ("storm", "storm-ts") for kind in ("reference", "fused")),
    ]
    assert turns[-3 * len(contenders) :] == contenders * 3


def test_a_run_beside_another_program_says_that_it_is_not_reliable(job, tmp_path, monkeypatch, capsys):
    """The threads' waiting is made up here: half of the time, as beside a program that uses every core."""
    seconds = iter(range(1000))
    monkeypatch.setattr(environment, "core_seconds", lambda: (float(second := next(seconds)), float(second)))
    assert (
        job("--frames", 2, "--variants", "vila,storm", "--projector", "reference", "--repeat", 2, "--out", tmp_path)
        == 0
    )
    reason = "threads waited 50 % of their time for a core"
    totals = [
        row for row in load_rows(tmp_path / "results.json") if row["stage"] == "total" and row["mode"] == "forward"
    ]
    assert [row["not_reliable"] for row in totals] == [reason] * 2
    assert f"not reliable: {reason}" in capsys.readouterr().out
    assert f"not reliable:</strong> {reason}" in (tmp_path / "report.html").read_text(encoding="utf-8")


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


@pytest.mark.parametrize(
    ("size", "shape"),
    [("encoder", (56, 56)), ("file", (48, 64)), ("20x30", (20, 30)), ("24", (24, 24))],
)
def test_frames_are_decoded_at_the_size_that_was_asked_for(job, tmp_path, monkeypatch, size, shape):
    seen = []
    pixels = models_of_e2e.Models.pixels
    monkeypatch.setattr(
        models_of_e2e.Models,
        "pixels",
        lambda self, x: (seen.append(tuple(x.shape)), pixels(self, x))[1],
    )
    assert job("--frames", 2, "--variants", "vila", "--repeat", 1, "--size", size, "--out", tmp_path) == 0
    assert set(seen) == {(2, *shape, 3)}


def test_no_line_about_what_a_library_will_drop(job, tmp_path, monkeypatch):
    begin = pipeline.Run._begin

    def outdated(self, frames):
        warnings.warn("will be removed", FutureWarning, stacklevel=1)
        return begin(self, frames)

    monkeypatch.setattr(pipeline.Run, "_begin", outdated)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert job("--frames", 1, "--variants", "vila", "--repeat", 1, "--out", tmp_path) == 0
    assert not [one for one in seen if issubclass(one.category, (FutureWarning, DeprecationWarning))]


def test_weights_count_as_memory(monkeypatch):
    """storm-7b in float32 on a machine with 21 GiB free: its weights alone are 31."""
    settings = pipeline.Settings(
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
