"""The report and the charts, from rows made up here: escaped, complete, and with figures that follow from the rows."""

import re
import struct

import pytest
import torch
from storm_benchmarks import harness
from storm_benchmarks.e2e import figures, plot, report, summary

CLIP = '<script>alert("x")</script>.mp4'


def rows_of(variant, projector, frames, vision, projector_ms, prefill, noise=(1.0, 1.0, 1.0), **more):
    """The rows of one finished measurement in three rounds; in each all times are multiplied by its noise."""

    def row(stage, ms, **columns):
        what = {
            "preset": "p<i>",
            "clip": CLIP,
            "looped": frames > 100,
            "frames": frames,
            "stage": stage,
            "variant": variant,
            "projector": projector,
        }
        rounds = [ms * factor for factor in noise]
        return harness.row(
            "e2e",
            "cpu",
            "forward",
            f"frames={frames}",
            torch.float32,
            rounds,
            device="cpu",
            rounds_ms=rounds,
            **what,
            **columns,
        )

    shared = {**row("vision", vision), "variant": None, "projector": None}
    decode = {**shared, **row("decode", 3 * frames, wanted_frames=frames, decoded_frames=10 * frames), "variant": None}
    kept = {"tokens": 10, "kept_percent": 12.5}
    rows = [
        decode,
        shared,
        row("projector", projector_ms),
        row("projector/scan", projector_ms / 2),
        row("prefill", prefill),
    ]
    return [*rows, row("total", vision + projector_ms + prefill, **kept, peak_bytes=2**20, held_bytes=2**20, **more)]


CHECK = {"error": 1e-7, "error_plain": 2e-7, "checked_frames": 32, "ran": "scan cpu"}
RUN = {**rows_of("vila", "vila", 128, 1, 1, 1)[0], "stage": "run", "mode": "whole"}
ROWS = [
    *rows_of("vila", "vila", 32, 100, 10, 290),
    *rows_of("storm-tp-ts", "reference", 32, 100, 50, 50),
    *rows_of("storm-tp-ts", "fused", 32, 100, 10, 50, **CHECK),
    *rows_of("vila", "vila", 128, 400, 40, 1560),
    *rows_of("storm-tp-ts", "reference", 128, 400, 200, 200),
    *rows_of("storm-tp-ts", "fused", 128, 400, 250, 200, **CHECK),
    RUN,
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
    assert summary.paper_saved_percent("storm-tp-ts") == pytest.approx(100 * (1 - 1.51 / 4.31))
    fast, slow = summary.kernel_gains(results)
    assert (fast.projector_speedup, fast.saved_percent) == (5.0, pytest.approx(20.0))
    assert slow.projector_speedup == 0.8
    text = text_of(page)
    assert "Fewer tokens 60.0 % less 2,000 → 800 ms 3 rounds: 60.0 % less to 60.0 % less" in text
    assert "Faster kernels 0.8x projector 200 → 250 ms 3 rounds: 0.8x to 0.8x" in text
    assert "Both together 57.5 % less 2,000 → 850 ms" in text
    assert "not reliable:" not in text
    assert "The paper: 65.0 % less" in text


def test_a_run_of_fused_projectors_alone_has_a_headline_too():
    fused = [row for row in ROWS if row["projector"] != "reference"]
    (card,) = figures.cards(summary.outcomes(fused))
    assert (card.name, card.figure, card.not_reliable) == ("Both together", "57.5 % less", None)
    assert "Both together 57.5 % less" in text_of(report.render(fused, {}))


def test_losses_the_loop_and_the_paper_are_shown(page):
    text = text_of(page)
    assert "128 frames: the fused projector costs 6.2 % more in total than the reference" in text
    assert "looped clip" in text
    assert "fewer frames than were asked for (128)" in text
    assert "3,090 (72 %)" in text
    assert all(row["commit"] in text and row["device"] in text for row in ROWS)


def test_decoding_has_its_own_table_with_what_finding_frames_cost(page):
    text = text_of(page)
    assert (
        "frames wanted decoded decoded per wanted ms ms per wanted 32 32 320 10.0 96 3 128 128 1,280 10.0 384 3 "
        in text
    )
    assert "wait" in text and "from decoding to the first token" in text


def test_a_stopped_run_says_so_and_an_empty_one_has_a_page():
    assert "stopped before its end" in report.render(ROWS[:5], {})
    assert "stopped before its end" not in report.render(ROWS, {})
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


def test_titles_lie_inside_the_picture_and_bars_carry_the_total_of_the_tables():
    rows = [row | {"not_reliable": "busy" if row["stage"] == "total" else None} for row in ROWS]
    results = [one for one in summary.outcomes(rows) if one.frames == summary.outcomes(rows)[0].frames]
    for figure in (plot.stage_bars(results), plot.latency_lines(summary.outcomes(rows))):
        figure.draw_without_rendering()
        for text in figure.texts:
            assert figure.bbox.containsx(text.get_window_extent().x0) and figure.bbox.containsx(
                text.get_window_extent().x1
            )
    numbers = [text.get_text() for text in plot.stage_bars(results).axes[0].texts]
    assert numbers == [f"{one.total_ms:,.0f}" for one in results]


def test_unfinished_measurements_are_left_out_and_repeated_ones_counted_once():
    assert summary.outcomes(ROWS[:4]) == []
    again = rows_of("vila", "vila", 32, 100, 10, 90)
    results = summary.outcomes([*ROWS, *again])
    assert len(results) == 6
    assert summary.find(results, 32, "vila", "vila").total_ms == 200


def gains(*noises, **columns):
    """A baseline that takes 400 ms in each round and a reduced variant of 200 ms, each with its
    noise by round -> the one gain."""
    baseline, reduced = (
        rows_of(*names, 32, 100, 10, prefill, noise, **columns)
        for names, prefill, noise in zip((("vila", "vila"), ("storm", "reference")), (290, 90), noises, strict=True)
    )
    (gain,) = summary.token_gains(summary.outcomes(summary.with_reliability([*baseline, *reduced])))
    return gain


@pytest.mark.parametrize(("factor", "reason"), [(1.0, None), (1.05, None), (1.2, "rounds from 40.0 to 50.0 % less")])
def test_rounds_that_disagree_are_not_reliable(factor, reason):
    gain = gains((1, 1, 1), (1, 1, factor))
    assert gain.saved_percent == pytest.approx(50)
    assert (gain.not_reliable, gain.after.row["not_reliable"]) == (reason, reason)


def test_what_disturbs_a_whole_round_leaves_the_ratio_alone():
    """A program that doubles all times of a round: the medians of single times would say 0 % or 75 % less, by luck."""
    gain = gains((1, 2, 2), (1, 2, 2))
    assert gain.saved == [50, 50, 50]
    assert gain.not_reliable is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"waited_percent": 48.0, "cores": 2, "load": 0.1}, "threads waited 48 % of their time for a core"),
        ({"waited_percent": 0.4, "cores": 2, "load": 9.0}, None),
        ({"waited_percent": None, "cores": 2, "load": 4.2}, "load average 4.2 on 2 cores"),
        ({"waited_percent": None, "cores": 2, "load": 2.1}, None),
        ({"waited_percent": None, "cores": 2, "load": None}, None),
    ],
)
def test_a_busy_machine_is_not_reliable(columns, reason):
    """Also where the rounds happen to agree."""
    load = columns.pop("load")
    rows = [
        row | {"load": load}
        for kind in (("vila", "vila"), ("storm", "reference"))
        for row in rows_of(*kind, 32, 100, 10, 90, **columns)
    ]
    assert {one.row["not_reliable"] for one in summary.outcomes(summary.with_reliability(rows))} == {reason}


def test_the_first_card_and_the_charts_say_that_they_are_not_reliable():
    noisy = [
        *rows_of("vila", "vila", 32, 100, 10, 290),
        *rows_of("storm-tp-ts", "reference", 32, 100, 50, 50, (1, 1.3, 1)),
    ]
    rows = summary.with_reliability(noisy)
    text = text_of(report.render(rows, {}))
    assert "Fewer tokens not reliable: rounds from 35.0 to 50.0 % less 50.0 % less" in text
    assert "-50.0 % ±7.5 ?" in text
    assert "Not reliable: rounds from 35.0 to 50.0 % less." in text
    assert plot.stage_bars(summary.outcomes(rows)).get_suptitle().endswith("(not reliable)")
    assert "not reliable" not in plot.stage_bars(summary.outcomes(ROWS)[:3]).get_suptitle()


def test_one_round_and_rounds_of_two_runs_are_not_reliable():
    one = [*rows_of("vila", "vila", 32, 100, 10, 290, (1,)), *rows_of("storm", "reference", 32, 100, 10, 90, (1,))]
    (gain,) = summary.token_gains(summary.outcomes(summary.with_reliability(one)))
    assert gain.not_reliable == "one round says nothing about its spread"
    assert {row["not_reliable"] for row in one if row["stage"] == "total"} == {"one round only"}
    joined = [
        *rows_of("vila", "vila", 32, 100, 10, 290, rounds_from="a"),
        *rows_of("storm", "reference", 32, 100, 10, 90, rounds_from="b"),
    ]
    (gain,) = summary.token_gains(summary.outcomes(joined))
    assert gain.not_reliable == "not measured in the same rounds"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{}",
        b"\xff",
        b'[{"p50_ms": 1}]',
        b'[{"p50_ms": 1, "op": "e2e", "mode": "forward", "stage": "total", "variant": "vila"}]',
    ],
)
def test_a_spoilt_file_is_one_line_that_names_it(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    assert report.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/results.json")
    assert told.count("\n") == 1


def test_it_is_rendered_again_as_it_was(tmp_path, capsys):
    for rows, name in ((ROWS, "whole"), (ROWS[:-1], "stopped")):
        results = harness.Rows(tmp_path / name / "results.json")
        results.append(*rows)
        page = report.write(tmp_path / name, rows).read_bytes()
        assert (b"stopped before its end" in page) == (name == "stopped")
        kept = results.path.read_bytes()
        assert report.main([str(tmp_path / name)]) == 0
        assert (tmp_path / name / "report.html").read_bytes() == page
        assert results.path.read_bytes() == kept
    assert "report.html" in capsys.readouterr().out
