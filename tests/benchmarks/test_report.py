"""The report and the charts, from rows made up here: escaped, complete, and with figures that follow from the rows."""

import re
import struct

import pytest
import torch
from storm_benchmarks import harness
from storm_benchmarks.e2e import plot, report, summary

CLIP = '<script>alert("x")</script>.mp4'


def rows_of(variant, projector, frames, vision, projector_ms, prefill, **more):
    """The rows of one finished measurement, all samples alike."""

    def row(stage, ms, **columns):
        what = {"preset": "p<i>", "clip": CLIP, "looped": frames > 100, "frames": frames, "stage": stage, "variant": variant, "projector": projector}
        return harness.row("e2e", "cpu", "forward", f"frames={frames}", torch.float32, [ms], device="cpu", **what, **columns)

    shared = {**row("vision", vision), "variant": None, "projector": None}
    kept = {"tokens": 10, "kept_percent": 12.5}
    rows = [shared, row("projector", projector_ms), row("projector/scan", projector_ms / 2), row("prefill", prefill)]
    return [*rows, row("total", vision + projector_ms + prefill, **kept, peak_bytes=2**20, held_bytes=2**20, **more)]


CHECK = {"error": 1e-7, "error_plain": 2e-7, "checked_frames": 32, "ran": "scan cpu"}
ROWS = [
    *rows_of("vila", "vila", 32, 100, 10, 290),
    *rows_of("storm-tp-ts", "reference", 32, 100, 50, 50),
    *rows_of("storm-tp-ts", "fused", 32, 100, 10, 50, **CHECK),
    *rows_of("vila", "vila", 128, 400, 40, 1560),
    *rows_of("storm-tp-ts", "reference", 128, 400, 200, 200),
    *rows_of("storm-tp-ts", "fused", 128, 400, 250, 200, **CHECK),
]


@pytest.fixture(scope="module")
def page():
    return report.render(ROWS, plot.charts(summary.outcomes(ROWS)))


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_nothing_from_a_file_name_is_markup(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;.mp4" in page
    assert "p<i>" not in page


def test_the_page_needs_no_other_file_and_fits_a_phone(page):
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page)
    assert "@import" not in page
    assert "url(" not in page
    assert 'name="viewport" content="width=device-width' in page
    tables = page.count("<table>")
    assert tables == page.count('<div class="scroll"><table>') > 5


def test_the_two_gains_are_apart_and_follow_from_the_rows(page):
    results = summary.outcomes(ROWS)
    first, second = summary.token_gains(results)
    assert (first.saved_percent, second.saved_percent) == (50.0, 60.0)
    assert first.paper_saved_percent == pytest.approx(100 * (1 - 1.51 / 4.31))
    fast, slow = summary.kernel_gains(results)
    assert (fast.projector_speedup, fast.saved_percent) == (5.0, pytest.approx(20.0))
    assert slow.projector_speedup == 0.8
    text = text_of(page)
    assert "Fewer tokens 60.0 % less 2,000 → 800 ms" in text
    assert "Faster kernels 0.8x projector 200 → 250 ms" in text
    assert "Both together 57.5 % less 2,000 → 850 ms" in text
    assert "The paper: 65.0 % less" in text


def test_losses_the_loop_and_the_paper_are_shown(page):
    text = text_of(page)
    assert "128 frames: the fused projector costs 6.2 % more in total than the reference" in text
    assert "looped clip" in text
    assert "fewer frames than were asked for (128)" in text
    assert "3,090 (72 %)" in text
    assert all(row["commit"] in text and row["device"] in text for row in ROWS)


def test_a_stopped_run_says_so_and_an_empty_one_has_a_page():
    assert "stopped before its end" in report.render(ROWS[:5], {}, finished=False)
    assert "Not measured" in report.render([], {})


def test_charts_are_pngs_wide_enough_for_a_phone():
    drawn = plot.charts(summary.outcomes(ROWS))
    assert set(drawn) == {"stages-32.png", "stages-128.png", "latency.png"}
    for png in drawn.values():
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">I", png[16:20])[0] >= 800


def test_bars_are_to_scale():
    figure = plot.stage_bars(summary.outcomes(ROWS)[:3])
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [100, 100, 100, 10, 50, 10, 290, 50, 50]


def test_unfinished_measurements_are_left_out_and_repeated_ones_counted_once():
    assert summary.outcomes(ROWS[:4]) == []
    again = rows_of("vila", "vila", 32, 100, 10, 90)
    results = summary.outcomes([*ROWS, *again])
    assert len(results) == 6
    assert summary.find(results, 32, "vila", "vila").total_ms == 200
