"""The transformers model itself: reference and fused projector, any language model, save and load, what is refused."""

import json
import pickle
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from safetensors.torch import load_file, save_file
from storm_model import CheckpointError, StormConfig, StormForConditionalGeneration, StormModel
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig

from storm_kernels import TokenReduction
from tests.support import ask_model

REDUCTIONS = ([1, 1, 1], [1, 1, 2], [4, 1, 1], [1, 2, 1], [4, 1, 2], [4, 2, 1], [4, 2, 2])


def pixels(*frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, 56, 56, generator=generator) * 2 - 1 for n in frames]


def prompt(config, *frames, reduction=(1, 1, 1), text=5):
    """One text: the placeholders of every video, then letters."""
    tokens = [TokenReduction(*reduction).reduced(config.token_grid(n)).tokens for n in frames]
    return torch.tensor([[config.video_token_id] * sum(tokens) + list(range(40, 40 + text))])


def inputs(config, *frames, reduction=(1, 1, 1), seed=0):
    return {
        "input_ids": prompt(config, *frames, reduction=reduction),
        "pixel_values_videos": pixels(*frames, seed=seed),
        "video_reductions": torch.tensor([reduction] * len(frames)),
    }


def greedy(model, given, n=6):
    return model.generate(**given, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)[
        :, given["input_ids"].shape[1] :
    ]


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
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
        ),
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


# --- what is refused


def test_a_placeholder_needs_its_video_and_the_reverse():
    model = ask_model.model()
    given = inputs(model.config, 4)
    with pytest.raises(
        ValueError, match=r"input_ids have 16 placeholders of videos, but the 0 videos given have 0 tokens"
    ):
        model(input_ids=given["input_ids"])
    with pytest.raises(ValueError, match=r"have 12 placeholders of videos, but the 1 videos given have 16 tokens"):
        model.generate(**given | {"input_ids": given["input_ids"][:, 4:]}, max_new_tokens=1)
    with pytest.raises(
        ValueError, match=r"have 16 placeholders .* given have 8 tokens; the processor has to count with the same"
    ):
        model(**given | {"video_reductions": torch.tensor([[1, 1, 2]])})
    processor = ask_model.processor()
    with pytest.raises(ValueError, match="the text has 1 <video>, but no videos were given"):
        processor(text="<video> What?")
    with pytest.raises(ValueError, match="videos were given, but the text has no <video>"):
        processor(text="What?", videos="missing.mp4")
    with pytest.raises(ValueError, match="number of videos passed"):
        processor(text="<video><video> What?", videos=["missing.mp4"])


def test_a_prompt_longer_than_the_context_is_told_before_anything_is_encoded():
    model = ask_model.model(text={"max_position_embeddings": 40})
    model.model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the video was encoded"))
    given = inputs(model.config, 20)
    message = (
        r"the prompt has 85 tokens, 80 of them of videos, but the language model's context is 40; "
        r"temporal_pool=4 would make it 25"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(**given, max_new_tokens=1)
    with pytest.raises(ValueError, match=message):
        model(**given)
    given = inputs(model.config, 600)
    with pytest.raises(ValueError, match="no reduction of the paper fits; take fewer than the 600 frames"):
        model.generate(**given, max_new_tokens=1)


def test_the_context_counts_rope_scaling():
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 100}
    assert ask_model.config(text={"max_position_embeddings": 100, "rope_parameters": rope}).context_length == 400
    assert ask_model.config(text={"max_position_embeddings": 500, "rope_parameters": rope}).context_length == 500
    assert ask_model.config().context_length == 2048


def drop(tensors):
    del tensors["model.projector.proj.weight"]


def add(tensors):
    tensors["model.projector.extra"] = torch.zeros(2)


def reshape(tensors):
    tensors["model.vision_tower.embeddings.position_embedding.weight"] = torch.zeros(17, 32)


def spoil(tensors):
    tensors["model.language_model.norm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "projector.proj.weight is missing"),
        (add, "projector.extra is not part of the model"),
        (
            reshape,
            r"vision_tower.embeddings.position_embedding.weight has shape \(17, 32\), the model's has \(16, 32\)",
        ),
        (spoil, "language_model.norm.weight holds values that are not finite"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    ask_model.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for kind in (StormForConditionalGeneration, AutoModelForImageTextToText, StormModel):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: (model.)?{message}"):
            kind.from_pretrained(tmp_path)


def test_pickles_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    ask_model.model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_safetensors=False asks for pickles"):
        StormForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors; .* pickles are never opened \(pytorch_model.bin\)"
    ):
        StormForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tokenizer_without_the_placeholders_is_refused(tmp_path):
    from storm_model import StormImageProcessor, StormProcessor, StormVideoProcessor

    words = ask_model.tokenizer(placeholders=False)
    with pytest.raises(ValueError, match="has no token <image>: add it"):
        StormProcessor(StormImageProcessor(), words, StormVideoProcessor())
    ask_model.save(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no token <image>: add it"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_config": CLIPVisionConfig()},
            "vision_config must be of a SigLIP .* got model_type 'clip_vision_model'",
        ),
        (
            {"vision_config": {"model_type": "siglip2_vision_model"}},
            "fixed resolution .* got model_type 'siglip2_vision_model'",
        ),
        ({"vision_config": {"image_size": 7}}, "patch_size must be at most image_size 7, got 16"),
        ({"vision_config": 3}, "vision_config must be a configuration or a dictionary, got 3 of type int"),
        ({"projector_type": "qformer"}, "projector_type must be one of storm, vila, got 'qformer'"),
        ({"projector_implementation": "slow"}, "projector_implementation must be one of fused, reference, got 'slow'"),
        ({"projector_layers": 0}, "projector_layers must be between 1 and"),
        ({"temporal_pool": 0}, "temporal_pool must be between 1 and .* got 0"),
        ({"temporal_stride": 10**6}, "temporal_stride must be at most 65536, got 1000000"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        StormConfig(**changes)


def test_bad_calls():
    model = ask_model.model()
    given = inputs(model.config, 4)
    with pytest.raises(
        ValueError,
        match=r"pixel_values_videos must be videos of shape \(T, 3, 56, 56\), got Tensor of shape \(2, 3, 28, 28\)",
    ):
        model.get_video_features(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"video_reductions must have the shape \(1, 3\), got \(2, 3\)"):
        model.get_video_features(given["pixel_values_videos"], torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model(pixel_values_videos=given["pixel_values_videos"])
    with pytest.raises(ValueError, match="need input_ids, which say where they go"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values_videos=given["pixel_values_videos"])
    with pytest.raises(ValueError, match="pixels or their features, not both"):
        model(**given, mm_encoder_outputs={"video": model.get_video_features(given["pixel_values_videos"])})


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
