"""The transformers model itself: reference and fused projector, any language model, save and load."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model import StormForConditionalGeneration
from transformers import AutoProcessor

from tests.support import ask_model, published
from tests.support.ask_model import greedy, inputs, pixels

REDUCTIONS = ([1, 1, 1], [1, 1, 2], [4, 1, 1], [1, 2, 1], [4, 1, 2], [4, 2, 1], [4, 2, 2])


@pytest.mark.parametrize("seed", range(50))
def test_reference_and_fused_projector_write_the_same(seed):
    reduction = REDUCTIONS[seed % len(REDUCTIONS)]
    frames = ([5], [3, 6], [1, 4, 2])[seed % 3]
    model = ask_model.model(seed=seed, projector_implementation="reference")
    fused = ask_model.model(seed=seed, projector_implementation="fused")
    assert type(fused.model.projector) is not type(model.model.projector)
    given = inputs(model.config, *frames, reduction=reduction, seed=seed)
    assert torch.equal(greedy(model, given), greedy(fused, given))


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", {"head_dim": 8}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": published.LLAMA3}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_any_language_model_is_that_model_with_the_video_in_its_embeddings(family, text, tmp_path):
    """Its own class, given the embeddings put together by hand, has the same logits; and the folder comes back."""
    from transformers import AutoModelForCausalLM

    model = ask_model.model(family=family, text=text)
    tied = bool(text.get("tie_word_embeddings"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    given = inputs(model.config, 3, reduction=(1, 1, 2))
    whole = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    whole.base_model.load_state_dict(model.model.language_model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    (features,) = model.get_video_features(given["pixel_values_videos"], given["video_reductions"]).pooler_output
    embeds = torch.cat([features, model.get_input_embeddings()(given["input_ids"][0, len(features) :])])
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, whole(inputs_embeds=embeds[None]).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(greedy(StormForConditionalGeneration.from_pretrained(tmp_path), given), greedy(model, given))


def test_the_tower_is_transformers_last_hidden_state_without_the_final_norm():
    from transformers import SiglipVisionModel

    model = ask_model.model()
    whole = SiglipVisionModel(ask_model.vision_config()).eval()
    getattr(whole, "vision_model", whole).load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    (frames,) = pixels(20)
    with torch.no_grad():
        hidden = whole(frames, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.model.encode(frames).flatten(1, 2), hidden)


@pytest.mark.parametrize("changes", [{}, {"projector_type": "vila"}, {"text": {"tie_word_embeddings": True}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_gives_the_same_bytes(tmp_path, changes, dtype):
    ask_model.model(**changes).to(dtype).save_pretrained(tmp_path / "one")
    StormForConditionalGeneration.from_pretrained(tmp_path / "one", dtype="auto").save_pretrained(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("tied", [False, True])
def test_shards_give_the_same_bytes_too(tmp_path, tied):
    shards = {"max_shard_size": "100KB"}
    model = ask_model.model(text={"tie_word_embeddings": tied}).bfloat16()
    model.save_pretrained(tmp_path / "one", **shards)
    loaded = StormForConditionalGeneration.from_pretrained(tmp_path / "one", dtype="auto")
    loaded.save_pretrained(tmp_path / "two", **shards)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert len([name for name in files[0] if name.endswith(".safetensors")]) > 2
    assert files[0] == files[1]


def test_processor_comes_back(tmp_path):
    ask_model.processor(temporal_pool=4).save_pretrained(tmp_path / "one")
    shutil.copyfile(ask_model.save(tmp_path / "model") / "config.json", tmp_path / "one" / "config.json")
    processor = AutoProcessor.from_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "two")
    assert processor.video_processor.temporal_pool == 4
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_has_to_stay_float32_stays(tmp_path, dtype):
    ask_model.model().save_pretrained(tmp_path)
    model = StormForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    whole = {
        name.removeprefix("model.projector.layers.") for name, p in model.named_parameters() if p.dtype == torch.float32
    }
    names = ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")
    assert whole == {f"{layer}.mixer.{name}" for layer in (0, 1) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_must_not_decay_says_so_after_loading_too(tmp_path, dtype):
    """transformers puts other parameters in the place of those that the mixer marked."""
    made = ask_model.model()
    made.save_pretrained(tmp_path)
    for model in (made, StormForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)):
        for layer in model.model.projector.layers:
            marked = {name for name, p in layer.mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
            assert marked == {"A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"}
            kept = {name for name, p in layer.mixer.named_parameters() if getattr(p, "_no_reinit", False)}
            assert kept == {"dt_proj.bias", "dt_proj_b.bias"}


def test_the_start_of_the_projector_is_the_librarys_own():
    """transformers makes models without values and fills them afterwards."""
    from storm_kernels.reference import ReferenceTemporalProjector

    made = ask_model.model().model.projector
    own = ReferenceTemporalProjector(32, 32, layers=2)
    for name, parameter in own.named_parameters():
        ours = made.get_parameter(name)
        if name.endswith(("A_log", "A_b_log", "D", "D_b", "norm.weight")):
            assert torch.equal(ours, parameter), name
        elif "mixer" in name:
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.5), name
    dt = torch.nn.functional.softplus(made.layers[0].mixer.dt_proj.bias)
    assert (dt > 9e-5).all() and (dt < 0.11).all()


def test_only_the_last_logits_are_made():
    model = ask_model.model()
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    given = inputs(model.config, 4)
    whole = model(**given).logits
    torch.testing.assert_close(model(**given, logits_to_keep=1).logits, whole[:, -1:])
    torch.testing.assert_close(model(**given, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    greedy(model, given, 2)
    assert rows[0] == whole.shape[1] and rows[1:] == [1, 2, 1, 1]


def test_random_parts_are_said_wherever_the_model_is_loaded_until_they_are_trained(tmp_path, caplog):
    model = ask_model.model(random_parts=["projector"])
    model.save_pretrained(tmp_path)
    import transformers

    transformers.utils.logging.enable_propagation()
    loaded = StormForConditionalGeneration.from_pretrained(tmp_path)
    assert "random weights in projector: never trained" in caplog.text
    given = inputs(model.config, 2)
    loaded(**given, labels=given["input_ids"])
    assert loaded.config.random_parts == ["projector"]  # it only evaluates
    loaded.train()(**given, labels=given["input_ids"])
    assert loaded.config.random_parts is None
    assert json.loads((tmp_path / "config.json").read_text())["random_parts"] == ["projector"]
