"""`storm-kernels ask`: an answer on standard output, everything else beside it, bad input in one line."""

import re

import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

from storm_kernels import cli
from tests.support import ask_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(ask_model.save(tmp_path_factory.mktemp("storm"), random_parts=["projector"]))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(ask_model.clip(tmp_path_factory.mktemp("clips") / "clip.mp4"))


def test_an_answer_and_what_it_took(folder, film, capsys, caplog):
    assert (
        cli.main(
            [
                "ask",
                film,
                "What happens?",
                "--model",
                folder,
                "--frames",
                "8",
                "--temporal-pool",
                "4",
                "--max-new-tokens",
                "6",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out.strip()
    lines = err.splitlines()
    assert any(record.getMessage().startswith("random weights in projector") for record in caplog.records)
    assert "reading the video ..." in lines and "encoding frames ..." in lines
    assert re.fullmatch(
        r"8 frames, 8 video tokens, [\d.]+ s: decode [\d.]+, preprocess .* prefill [\d.]+, token [\d.]+", lines[-1]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.mp4", "Why?"], "no-such.mp4"),
        (["{film}", "Why?", "--frames", "0"], "frames must be"),
        (["{film}", "Why?", "--frames", "4", "--fps", "2"], "num_frames or fps, not both"),
        (["{film}", "Why?", "--temporal-pool", "0"], "temporal_pool must be"),
    ],
)
def test_bad_input_is_one_line(folder, film, arguments, message, capsys):
    assert cli.main(["ask", *(a.format(film=film) for a in arguments), "--model", folder]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_folder_without_a_model(film, tmp_path, capsys):
    assert cli.main(["ask", film, "Why?", "--model", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["ask", film, "Why?", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
