"""The main job on a small model and a clip made here: what it writes, what it refuses, what a stop leaves."""

import gzip
import json
import os

import av
import numpy as np
import pytest
from storm_benchmarks.e2e import __main__ as e2e
from storm_benchmarks.e2e import pipeline, summary
from storm_benchmarks.harness import load_rows
from storm_model import config as models

import storm_kernels
from storm_kernels.tokens import TokenGrid

TINY = models.ModelConfig(
    "tiny",
    models.VisionConfig(image_size=56, patch_size=14, width=32, layers=2, heads=2, mlp_width=64),
    models.LanguageConfig("qwen2", 1, 64, 2, 1, 128, 512, 1e6, 4096, 1e-6),
    projector_layers=1,
)
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
    assert job("--frames", "8,4", "--variants", "vila,storm,storm-tp-sp-ts", "--repeat", 2, "--out", out, "--trace") == 0
    rows = load_rows(out / "results.json")
    results = summary.outcomes(rows)
    kinds = [("vila", "vila"), *((name, kind) for name in ("storm", "storm-tp-sp-ts") for kind in ("reference", "fused"))]
    assert [(one.frames, one.variant, one.projector) for one in results] == [(frames, *kind) for frames in (4, 8) for kind in kinds]
    for one in results:
        grid = TokenGrid(one.frames, 2, 2)
        assert one.row["tokens"] == models.VARIANTS[one.variant].reduction.reduced(grid).tokens
        assert one.row["looped"] == (one.frames > CLIP_FRAMES)
        assert one.row["samples"] == one.stages["prefill"]["samples"] == one.stages["vision"]["samples"] == 2
        assert one.total_ms == pytest.approx(sum(one.ms(stage) for stage in summary.TO_FIRST_TOKEN), rel=0.5)
        assert sum(one.parts().values()) <= one.ms("projector") * 1.5
        if one.projector == "fused":
            assert one.row["checked_frames"] == one.frames
            assert 0 < one.row["error"] <= 1.25 * one.row["error_plain"]
            assert one.row["backend"] in one.row["ran"]
        if one.projector != "vila":
            assert {"downsample", "norm", "in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"} <= set(one.parts())
    assert {row["stage"] for row in summary.cold_rows(rows)} == {"build", "preprocess", "vision", "projector", "prefill", "total"}
    assert {row["projector"] for row in summary.cold_rows(rows)} == {None, "vila", "reference", "fused"}
    assert set(os.listdir(out)) == {"results.json", "report.html", "stages-4.png", "stages-8.png", "latency.png", "trace.json.gz"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;&#39;clip&#39;.mp4" in page
    assert clip.name not in page
    assert "looped clip" in page
    names = {event.get("name") for event in json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]}
    assert {"vision", "projector", "scan", "prefill"} <= names
    printed = capsys.readouterr().out
    assert "STORM +TP +SP +TS" in printed
    assert "it is looped for 8" in printed


def test_an_earlier_result_is_kept(job, tmp_path):
    def run():
        return job("--frames", 1, "--variants", "vila", "--repeat", 1, "--out", tmp_path)

    assert run() == 0
    first = (tmp_path / "results.json").read_bytes()
    assert run() == 0
    (kept,) = tmp_path.glob("results-*.json")
    assert kept.read_bytes() == first
    assert run() == 0 or len(list(tmp_path.glob("results-*.json"))) == 1  # twice in one second: refused, nothing replaced
    assert kept.read_bytes() == first


def test_all_means_the_eight_variants_of_the_paper():
    assert e2e._variants("all") == tuple(models.VARIANTS.values())
    assert len(e2e._variants("all")) == 8


def test_ctrl_c_leaves_the_finished_rows_and_a_report(job, tmp_path, monkeypatch, capsys):
    variant = pipeline.Run._variant

    def stopped_at_the_second(self, which, *arguments):
        if which.name == "storm":
            raise KeyboardInterrupt
        variant(self, which, *arguments)

    monkeypatch.setattr(pipeline.Run, "_variant", stopped_at_the_second)
    assert job("--frames", 2, "--variants", "vila,storm", "--projector", "reference", "--repeat", 1, "--out", tmp_path) == 130
    (done,) = summary.outcomes(load_rows(tmp_path / "results.json"))
    assert done.variant == "vila"
    assert "stopped before its end" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "finished rows are in" in capsys.readouterr().out


def test_a_wrong_projector_is_not_timed(job, tmp_path, monkeypatch, capsys):
    forward = storm_kernels.TemporalProjector.forward
    monkeypatch.setattr(storm_kernels.TemporalProjector, "forward", lambda self, *arguments: forward(self, *arguments) * 1.001)
    assert job("--frames", 2, "--variants", "vila,storm-ts", "--repeat", 1, "--out", tmp_path) == 1
    assert [one.projector for one in summary.outcomes(load_rows(tmp_path / "results.json"))] == ["vila"]
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
    monkeypatch.setattr(e2e.environment, "available_memory", lambda device: 10 * 2**20)
    assert job("--frames", 4096, "--out", tmp_path / "out") == 2
    assert "4096 frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.Run, "measure", lambda self: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    assert job("--out", tmp_path / "file" / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --out: ")
    assert str(tmp_path / "file" / "out") in told
    assert told.count("\n") == 1
