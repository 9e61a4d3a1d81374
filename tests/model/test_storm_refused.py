"""What the transformers model refuses by name: placeholders without videos, long prompts, folders, sizes, calls."""

import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from safetensors.torch import load_file, save_file
from storm_model import CheckpointError, StormConfig, StormForConditionalGeneration, StormModel
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, MambaConfig

from tests.support import ask_model
from tests.support.ask_model import inputs


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
    with pytest.raises(ValueError, match="the text has 2 <video>, but 1 videos were given"):
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


def test_the_reduction_that_would_fit_is_that_of_one_prompt_of_a_batch():
    """Each row has its own videos: those of its neighbour cost it nothing."""
    model = ask_model.model(text={"max_position_embeddings": 40})
    one = inputs(model.config, 10)
    rows = {"input_ids": one["input_ids"].repeat(2, 1), "pixel_values_videos": one["pixel_values_videos"] * 2}
    for given in (one, rows):
        with pytest.raises(ValueError, match="the prompt has 45 tokens, 40 .*; temporal_stride=2 would make it 25"):
            model.generate(**given, max_new_tokens=1)
    short = inputs(model.config, 1)["input_ids"]
    padded = torch.nn.functional.pad(short, (45 - short.shape[1], 0), value=1)
    rows = {"input_ids": torch.cat([padded, one["input_ids"]])}
    rows["pixel_values_videos"] = [torch.zeros(1, 3, 56, 56), *one["pixel_values_videos"]]
    with pytest.raises(ValueError, match="temporal_stride=2 would make it 25"):
        model(**rows)


def test_each_text_of_a_batch_has_its_own_videos():
    """Lists of videos, one a text: as many as its placeholders, or an answer would be about the neighbour's video."""
    processor = ask_model.processor()
    videos = [torch.zeros(n, 20, 20, 3, dtype=torch.uint8) for n in (3, 5)]
    texts = ["<video><video>", "x"]
    with pytest.raises(ValueError, match="text 0 has 2 <video>, but 1 videos were given for it"):
        processor(text=texts, videos=[[videos[0]], [videos[1]]])
    assert len(processor(text=texts, videos=[videos, []], return_tensors="pt")["pixel_values_videos"]) == 2
    assert len(processor(text=texts, videos=videos, return_tensors="pt")["pixel_values_videos"]) == 2


def test_the_context_counts_rope_scaling():
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 100}
    assert ask_model.config(text={"max_position_embeddings": 100, "rope_parameters": rope}).context_length == 400
    assert ask_model.config(text={"max_position_embeddings": 500, "rope_parameters": rope}).context_length == 500
    assert ask_model.config().context_length == 2048
    endless = StormConfig(text_config=MambaConfig(), image_token_id=1, video_token_id=2)
    assert endless.context_length > 10**9


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


def test_what_is_not_finite_is_found_on_the_disk_too(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ask_model.model().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    places = dict.fromkeys(("model.vision_tower", "model.projector", "lm_head"), "cpu")
    for device in ("cpu", "disk"):
        with pytest.raises(CheckpointError, match="language_model.norm.weight holds values that are not finite"):
            StormForConditionalGeneration.from_pretrained(
                tmp_path / "model", device_map=places | {"model.language_model": device}, offload_folder=tmp_path
            )


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ("config.json", "no config.json, which says what model it is"),
        ("model-00002-of-", r"model-00002-of-\d+.safetensors, which model.safetensors.index.json names, is missing"),
        ("cut", r"model-00001-of-\d+.safetensors: not a whole safetensors file: .*header"),
        ("text", r"model-00001-of-\d+.safetensors: not a whole safetensors file: .*header"),
    ],
)
def test_a_folder_with_a_missing_or_damaged_file_is_refused_by_name(tmp_path, spoilt, message):
    """Without its configuration transformers would make the default one's billions of random weights."""
    ask_model.model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert StormForConditionalGeneration.from_pretrained(tmp_path).num_parameters()
    first = next(tmp_path.glob("model-00001-of-*"))
    if spoilt in ("cut", "text"):
        first.write_bytes(first.read_bytes()[:1000] if spoilt == "cut" else b"hello")
    else:
        next(tmp_path.glob(f"{spoilt}*")).unlink()
    with pytest.raises(CheckpointError, match=message):
        StormForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_need_not_hold_what_the_caller_brings(tmp_path):
    model = ask_model.model()
    model.save_pretrained(tmp_path / "inner")
    for given, options in (
        ((tmp_path,), {"subfolder": "inner"}),
        ((None,), {"config": model.config, "state_dict": model.state_dict()}),
    ):
        back = StormForConditionalGeneration.from_pretrained(*given, **options)
        assert torch.equal(back.lm_head.weight, model.lm_head.weight)


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
        ({"image_token_id": 3, "video_token_id": 3}, "image_token_id and video_token_id must be two tokens, got 3"),
        ({"video_token_id": 10**6}, "video_token_id must be a token of text_config, 0 to .*, got 1000000"),
        ({"image_token_id": "<image>"}, "image_token_id must be an integer, got '<image>'"),
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
