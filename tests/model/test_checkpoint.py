"""A folder of weights that is broken is refused by name, before anything of it is believed; no code of it runs."""

import json
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model import CheckpointError, StormForConditionalGeneration

from tests.support import ask_model


@pytest.fixture
def saved(tmp_path):
    ask_model.model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder):
    return StormForConditionalGeneration.from_pretrained(folder)


def test_truncated_at_any_byte(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for cut in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        (saved / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="model.safetensors: not a whole safetensors file"):
            load(saved)


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_never_opened(saved, tmp_path, name):
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="safetensors"):
        load(saved)
    assert not (tmp_path / "sprung").exists()


def test_missing_folder_and_broken_json(saved, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    (saved / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match="config.json"):
        load(saved)


@pytest.mark.parametrize("content", ['{"weight_map": ', "[]", '{"weight_map": 3}'])
def test_a_broken_index(saved, content):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json: not an index of safetensors files"):
        load(saved)


def test_an_index_cannot_leave_its_folder_nor_name_what_is_not_there(saved):
    (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="names files outside its folder: ../secret.safetensors"):
        load(saved)
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(
        CheckpointError, match="model-00002-of-00002.safetensors, which model.safetensors.index.json names, is missing"
    ):
        load(saved)


def test_shards_come_back(saved):
    model = load(saved)
    model.save_pretrained(saved.parent / "shards", max_shard_size="50KB")
    assert len(list((saved.parent / "shards").glob("*.safetensors"))) > 2
    again = load(saved.parent / "shards").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_remote_code_is_not_run(saved, tmp_path):
    content = json.loads((saved / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(content))
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    load(saved)
    assert not (tmp_path / "sprung").exists()
