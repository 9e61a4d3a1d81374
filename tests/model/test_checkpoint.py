"""model/checkpoint.py: what is saved comes back; what does not fit is refused by name; Hugging Face
folders load into the same numbers.
"""

import dataclasses
import json
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")
pytest.importorskip("safetensors", reason="the extra `model` is not installed")

from safetensors.torch import load_file, save_file
from storm_model.checkpoint import CheckpointError, from_pretrained_parts, load, save
from storm_model.config import LanguageConfig, ModelConfig, Variant, VisionConfig, variant
from storm_model.storm import VideoModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel

from storm_kernels import TokenReduction

VISION = VisionConfig(image_size=56, patch_size=14, width=32, layers=3, heads=2, mlp_width=64)
LANGUAGE = LanguageConfig("qwen2", 2, 48, 4, 2, 96, 100, 1e4, 512, 1e-6, eos_ids=(7, 9))
TINY = ModelConfig("tiny", VISION, LANGUAGE, projector_layers=1)
PROMPT = torch.tensor([3, 1, 4])


def pixels(frames=6, seed=0):
    return torch.rand(frames, 3, 56, 56, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def saved(tmp_path):
    model = VideoModel(TINY, variant("storm-tp"), seed=3)
    return model, save(model, tmp_path / "saved")


@pytest.mark.parametrize("name", ["vila", "storm-tp-sp-ts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, name, dtype, tied):
    config = dataclasses.replace(TINY, language=dataclasses.replace(LANGUAGE, tied_embeddings=tied))
    model = VideoModel(config, variant(name), seed=5, dtype=dtype)
    again = load(save(model, tmp_path / "a" / "b"))
    assert (again.config, again.variant, again.dtype) == (model.config, model.variant, dtype)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    assert torch.equal(again.generate(pixels().to(dtype), PROMPT, 5), model.generate(pixels().to(dtype), PROMPT, 5))
    assert (again.language.lm_head.weight is again.language.model.embed_tokens.weight) is tied


def test_the_fused_form_loads_the_same_file(saved):
    model, folder = saved
    fused = load(folder, projector="fused")
    assert fused.projector.state_dict().keys() == model.projector.state_dict().keys()
    torch.testing.assert_close(fused(pixels(), PROMPT), model(pixels(), PROMPT))


def test_own_reduction_comes_back(tmp_path):
    own = Variant("mine", "3 x 1 x 2", True, TokenReduction(3, 1, 2))
    assert load(save(VideoModel(TINY, own), tmp_path / "m")).variant == own


def test_nothing_is_overwritten(saved, tmp_path):
    model, folder = saved
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="nothing was written"):
        save(model, folder)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="file exists"):
        save(model, file)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and file.read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storm_model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(VideoModel(TINY, variant("vila")), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def drop(tensors):
    del tensors["projector.proj.weight"]


def add(tensors):
    tensors["projector.extra"] = torch.zeros(2)


def reshape(tensors):
    tensors["vision.embeddings.position_embedding.weight"] = torch.zeros(17, 32)


def retype(tensors):
    tensors["language.model.norm.weight"] = tensors["language.model.norm.weight"].double()


def halve(tensors):
    tensors["projector.layers.0.mixer.A_log"] = tensors["projector.layers.0.mixer.A_log"].half()


def nan(tensors):
    tensors["language.lm_head.weight"][3, 4] = float("nan")


def infinite(tensors):
    tensors["projector.layers.0.mixer.D_b"][0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "projector.proj.weight is missing"),
        (add, "projector.extra is not part of the model"),
        (reshape, r"position_embedding.weight has shape \(17, 32\), the model's has \(16, 32\)"),
        (retype, "language.model.norm.weight is of dtype F64"),
        (halve, "mixer.A_log is torch.float16, the model's is torch.float32"),
        (nan, "lm_head.weight holds values that are not finite"),
        (infinite, "mixer.D_b holds values that are not finite"),
    ],
)
def test_wrong_tensors(saved, spoil, message):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_truncated_at_any_byte(saved):
    _, folder = saved
    whole = (folder / "model.safetensors").read_bytes()
    for cut in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="safetensors"):
            load(folder)


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_are_never_opened(saved, tmp_path, name):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format is 'other'"),
        (lambda c: c.pop("variant"), "variant"),
        (lambda c: c["config"].update(surprise=1), "surprise"),
        (lambda c: c["config"]["language"].update(width=-1), "width must be between"),
        (lambda c: c["config"]["language"].update(layers=10**9), "speaks of 1000000003 layers, the weights are only"),
        (lambda c: c["variant"]["reduction"].update(temporal_pool=0), "temporal_pool must be between"),
        (lambda c: c.update(dtype="int8"), "int8"),
    ],
)
def test_wrong_description(saved, change, message):
    _, folder = saved
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_missing_folder_and_broken_json(saved, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
    (saved[1] / "config.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match="config.json"):
        load(saved[1])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Small random models of Hugging Face's own making, saved in their layout: (SigLIP whole, Qwen2
    in shards, Llama).
    """
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(11)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    sizes = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            **sizes,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
            eos_token_id=2,
        )
    ).eval()
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    siglip.save_pretrained(root / "siglip")
    qwen.save_pretrained(root / "qwen", max_shard_size="50KB")
    llama.save_pretrained(root / "llama")
    assert len(list((root / "qwen").glob("*.safetensors"))) > 1
    return root, siglip, {"qwen": qwen, "llama": llama}


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_parts_from_hugging_face_folders(parts, family):
    root, siglip, languages = parts
    model = from_pretrained_parts(root / "siglip", root / family, variant("storm"), projector_layers=2)
    assert model.config.language.tied_embeddings is (family == "qwen")
    features = model.encode(pixels())
    with torch.no_grad():
        hidden = siglip.vision_model(pixel_values=pixels(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(features.flatten(2, 3)[0], hidden[-2])
        logits, _ = model.prefill(torch.zeros(1, 5, 48), PROMPT)
        embeds = torch.cat([torch.zeros(1, 5, 48), languages[family].get_input_embeddings()(PROMPT)[None]], 1)
        torch.testing.assert_close(logits, languages[family](inputs_embeds=embeds).logits[:, -1])


def test_parts_are_converted_to_the_dtype_asked_for(parts):
    root, siglip, _ = parts
    model = from_pretrained_parts(root / "siglip", root / "llama", variant("vila"), dtype=torch.bfloat16)
    weight = siglip.vision_model.embeddings.patch_embedding.weight
    assert torch.equal(model.vision.embeddings.patch_embedding.weight, weight.bfloat16())


def copied(source, target, change_config=None, change_tensors=None):
    """A folder with one thing changed."""
    target.mkdir()
    content = json.loads((source / "config.json").read_text())
    if change_config:
        change_config(content)
    (target / "config.json").write_text(json.dumps(content))
    tensors = load_file(source / "model.safetensors")
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="gpt2"), "model_type is 'gpt2'"),
        (
            lambda c: c.update(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'linear'",
        ),
        (lambda c: c.update(attention_bias=True), "attention_bias = True"),
        (lambda c: c.update(head_dim=24), "head_dim = 24"),
        (lambda c: c.update(hidden_size="many"), "LlamaConfig"),
    ],
)
def test_language_folders_that_do_not_fit(parts, tmp_path, change, message):
    root = parts[0]
    with pytest.raises(CheckpointError, match=message):
        from_pretrained_parts(root / "siglip", copied(root / "llama", tmp_path / "changed", change), variant("vila"))


def test_old_spelling_of_the_rope_base(parts, tmp_path):
    def old(content):
        content.pop("rope_parameters")
        content["rope_theta"] = 123456.0

    root = parts[0]
    model = from_pretrained_parts(root / "siglip", copied(root / "llama", tmp_path / "old", old), variant("vila"))
    assert model.config.language.rope_theta == 123456.0


def test_wrong_vision_tensors(parts, tmp_path):
    root = parts[0]
    folder = copied(
        root / "siglip", tmp_path / "less", change_tensors=lambda t: t.pop("vision_model.encoder.layers.1.mlp.fc1.bias")
    )
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.fc1.bias is missing"):
        from_pretrained_parts(folder, root / "llama", variant("vila"))
    folder = copied(
        root / "siglip",
        tmp_path / "more",
        change_tensors=lambda t: t.update({"vision_model.encoder.layers.3.x": torch.zeros(1)}),
    )
    with pytest.raises(CheckpointError, match=r"layers.3.x is not part of the model"):
        from_pretrained_parts(folder, root / "llama", variant("vila"))


def test_an_index_cannot_leave_its_folder(parts, tmp_path):
    root = parts[0]
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "llama" / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        from_pretrained_parts(root / "siglip", folder, variant("vila"))


def test_remote_code_is_not_run(parts, tmp_path):
    def evil(content):
        content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    root = parts[0]
    folder = copied(root / "llama", tmp_path / "evil", evil)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    from_pretrained_parts(root / "siglip", folder, variant("vila"))
    assert not (tmp_path / "sprung").exists()


def test_loading_makes_no_random_weights(saved, monkeypatch):
    """Nothing of a vision tower or language model is drawn at random only to be overwritten; what
    is drawn on the meta device costs nothing.
    """
    drawn = []
    normal = torch.nn.init.normal_
    monkeypatch.setattr(
        torch.nn.init,
        "normal_",
        lambda tensor, *args, **kwargs: drawn.append(tensor.device.type) or normal(tensor, *args, **kwargs),
    )
    VideoModel(TINY, variant("vila"))
    assert "cpu" in drawn
    drawn.clear()
    load(saved[1])
    assert "cpu" not in drawn
