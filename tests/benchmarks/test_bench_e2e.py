"""The main job on a small model and a clip made here: what it writes, what it refuses, what a stop leaves."""

import gzip
import json
import os
import warnings
from pathlib import Path

import pytest
from storm_benchmarks import environment
from storm_benchmarks.e2e import models as models_of_e2e
from storm_benchmarks.e2e import options, pipeline, report, summary
from storm_benchmarks.harness import load_rows
from storm_model import presets as models

from storm_kernels.tokens import TokenGrid

from .conftest import CLIP_FRAMES


def check_outcome(one: summary.Outcome) -> None:
    """Tokens, rounds, parts and the check of one measurement fit together."""
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


def check_files(out: Path, clip: Path) -> None:
    """Rows, a page without markup of others, charts and a trace."""
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
        check_outcome(one)
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
    check_files(out, clip)
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
    assert next(row for row in rows if row["stage"] == "decode")["decoded_frames"] >= CLIP_FRAMES


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
