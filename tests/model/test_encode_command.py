"""`storm-kernels encode`: the tokens of every video in a folder; shared out, stopped and started again."""

import json

import pytest

pytest.importorskip("av", reason="the extra `model` is not installed")

import torch
from safetensors.torch import load_file
from storm_model import encode
from transformers import AutoModelForImageTextToText, AutoProcessor

from storm_kernels import cli
from tests.support import ask_model

NAMES = ["a.mp4", "a.mkv", "more/b [1].mp4"]


@pytest.fixture(name="model", scope="module")
def a_model(tmp_path_factory):
    return str(ask_model.save(tmp_path_factory.mktemp("storm"), random_parts=["projector"]))


@pytest.fixture(name="videos", scope="module")
def a_folder_of_videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for seed, name in enumerate(NAMES):
        ask_model.clip(folder / name, seed=seed)
    (folder / ".hidden.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(name="run")
def what_runs_it(videos, model, tmp_path):
    def run(*more, folder=videos, out=tmp_path / "out", into=model):
        return cli.main(["encode", str(folder), "--out", str(out), "--model", into, *map(str, more)])

    return run


def written(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.suffix == ".safetensors"}


def test_each_videos_tokens_are_the_models(run, videos, model, tmp_path, capsys):
    assert run("--frames", 6, "--temporal-pool", 2) == 0
    files = written(tmp_path / "out")
    assert sorted(files) == sorted(f"{name}.safetensors" for name in NAMES)
    processor, storm = AutoProcessor.from_pretrained(model), AutoModelForImageTextToText.from_pretrained(model).eval()
    for name in NAMES:
        given = processor.video_processor([str(videos / name)], num_frames=6, temporal_pool=2)
        with torch.no_grad():
            (right,) = storm.get_video_features(given["pixel_values_videos"], given["video_reductions"]).pooler_output
        found = load_file(files[f"{name}.safetensors"])
        torch.testing.assert_close(found["tokens"], right)
        assert found["frames"].tolist() == [0, 3, 7, 11, 15, 19]
    told = capsys.readouterr().err
    assert "3 videos, 3 for this process to do" in told and "3 of 3: more/b [1].mp4: " in told


def test_what_is_there_is_not_done_again(run, tmp_path, capsys):
    assert run("--frames", 2) == 0
    files = written(tmp_path / "out")
    files["a.mp4.safetensors"].unlink()
    before = {name: path.stat().st_mtime_ns for name, path in files.items() if path.exists()}
    capsys.readouterr()
    assert run("--frames", 2) == 0
    assert "3 videos, 1 for this process to do" in capsys.readouterr().err
    again = written(tmp_path / "out")
    assert len(again) == 3 and all(again[name].stat().st_mtime_ns == before[name] for name in before)


def test_processes_share_the_files(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        before = set(written(tmp_path / "out"))
        assert run("--frames", 2) == 0
        shares.append(set(written(tmp_path / "out")) - before)
    assert [len(share) for share in shares] == [2, 1]


def test_a_video_that_cannot_be_read_is_left_out_or_ends_the_run(run, videos, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((videos / "a.mp4").read_bytes()[:900])
    (folder / "b.mp4").write_bytes((videos / "a.mp4").read_bytes())
    assert run("--frames", 2, folder=folder) == 1
    told = capsys.readouterr().err
    assert "a.mp4: left out: " in told and "1 of 2 videos could not be read" in told
    assert list(written(tmp_path / "out")) == ["b.mp4.safetensors"]
    assert run("--frames", 2, "--strict", folder=folder) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_folder_of_other_tokens_is_refused(run, tmp_path, capsys):
    assert run("--frames", 2) == 0
    assert run("--frames", 3) == 2
    assert "were made with num_frames = 2, not 3; name another folder" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / encode.SETTINGS).read_text())["num_frames"] == 2


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(encode, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        encode.write(tmp_path / "x.safetensors", torch.ones(2, 3), [0])
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(run, tmp_path, capsys):
    assert run(folder=tmp_path / "none") == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert run(into=str(tmp_path / "none")) == 2
    assert "--model: " in capsys.readouterr().err
