"""What vLLM's transformers backend, which loads the model by transformers, counts on; and transformers' pipelines."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="the extra `model` is not installed")

from PIL import Image
from transformers import AutoProcessor, pipeline

from tests.support import ask_model
from tests.support.ask_model import greedy

REDUCTION = {"temporal_pool": 2, "temporal_stride": 2}
LENGTHS = (7, 4)


@pytest.fixture(scope="module")
def model():
    return ask_model.model()


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, 30, 40, 3), dtype=np.uint8) for n in LENGTHS]


def asked(processor, videos, **options):
    text = "".join(f"{processor.video_token}\n" for _ in videos) + "What?"
    return processor(text=text, videos=videos, return_tensors="pt", **REDUCTION, **options)


@pytest.mark.parametrize("separator", ["", "\n"])
def test_tokens_are_counted_as_they_are_written_and_made(model, videos, separator):
    """The count by sizes, the placeholders that replace a video's token, and the features: one number."""
    processor = ask_model.processor(frame_separator=separator)
    inputs = asked(processor, videos)
    sizes = [video.shape[:3] for video in videos]
    counted = processor._get_num_multimodal_tokens(video_sizes=sizes, **REDUCTION)["num_video_tokens"]
    features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_reductions"]).pooler_output
    assert [len(video) for video in features] == counted == [2 * 4, 1 * 4]
    for i, tokens in enumerate(counted):
        ids = processor.tokenizer(processor.replace_video_token(inputs, i), add_special_tokens=False)["input_ids"]
        assert ids.count(processor.video_token_id) == tokens and ids.count(model.config.video_token_id) == tokens
        assert max(set(ids), key=ids.count) == processor.video_token_id
    assert (inputs["input_ids"] == processor.video_token_id).sum() == sum(counted)


def test_images_are_counted_too():
    processor = ask_model.processor()
    inputs = processor(text="<image><image>", images=[Image.new("RGB", (40, 30))] * 2, return_tensors="pt")
    counted = processor._get_num_multimodal_tokens(image_sizes=[(30, 40)] * 2)
    assert counted["num_image_tokens"] == [4, 4] and counted["num_image_patches"] == [1, 1]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 8
    assert len(inputs["pixel_values"]) == len(inputs["image_reductions"]) == 2


@pytest.mark.parametrize("alike", [True, False])
def test_every_input_of_a_video_has_one_row_for_each_video(videos, alike):
    """An engine hands the rows out, one request each, and keeps what the video processor says is the model's."""
    processor = ask_model.processor()
    videos = [videos[0], videos[0]] if alike else videos
    inputs = asked(processor, videos, return_text_replacement_offsets=True)
    (offsets,) = inputs.pop("text_replacement_offsets")
    assert [entry["type"] for entry in offsets] == ["video"] * len(videos)
    for i, entry in enumerate(offsets):
        assert entry["replacement"] == processor.replace_video_token(inputs, i)
    own = set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert own == set(processor.video_processor.model_input_names)
    for name in own:
        assert len(inputs[name]) == len(videos), name
        assert isinstance(inputs[name], torch.Tensor) or (name == "pixel_values_videos" and not alike)


def test_an_engine_that_encodes_each_video_by_itself_and_fills_the_embeddings_writes_the_same(model, videos):
    processor = ask_model.processor()
    inputs = asked(processor, videos)
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).clone()
    parts = []
    for pixels, reduction in zip(inputs["pixel_values_videos"], inputs["video_reductions"], strict=True):
        output = model.model.get_video_features(pixels[None], return_dict=True, video_reductions=reduction[None])
        parts += output.pooler_output
    embeds[ids == model.config.video_token_id] = torch.cat(parts)
    written = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=6, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(written, greedy(model, inputs))


def test_what_an_engine_hands_the_language_model_arrives(model):
    seen = {}
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, a, k: seen.update(k), with_kwargs=True
    )
    model.model(input_ids=torch.tensor([[1, 2]]), attention_instances="an engine's own", use_cache=False)
    hook.remove()
    assert seen["attention_instances"] == "an engine's own"
    assert model._supports_attention_backend and model.get_encoder(modality="video") is model.model.vision_tower


class Replaced(torch.nn.Module):
    """A linear layer as an engine puts it in the place of ours: its weight is packed elsewhere, and empty here."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0, device="cpu", dtype=torch.float32), requires_grad=False)
        self.bias, self._packed = linear.bias, [linear.weight]

    def forward(self, x):
        return torch.nn.functional.linear(x, self._packed[0], self.bias)


@pytest.mark.parametrize("kind", ["storm", "vila"])
def test_every_linear_layer_may_be_replaced_by_one_whose_weight_is_empty(model, videos, kind):
    inputs = asked(ask_model.processor(), videos)
    pixels = (inputs["pixel_values_videos"], inputs["video_reductions"])
    model = ask_model.model(projector_type=kind)
    with torch.no_grad():
        expected = model.get_video_features(*pixels).pooler_output
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(parent, name, Replaced(child))
        torch.testing.assert_close(model.get_video_features(*pixels).pooler_output, expected)


@pytest.mark.parametrize("kind", ["storm", "vila"])
def test_weights_may_be_made_without_values_and_filled_later(model, kind):
    """Nothing of the projector is computed at its making but what the checkpoint brings."""
    whole = ask_model.model(projector_type=kind)
    with torch.device("meta"):
        empty = type(whole)(whole.config)
    assert all(p.is_meta for p in empty.parameters()) and not list(empty.model.projector.buffers())
    projector = empty.model.projector.to_empty(device="cpu")
    projector.load_state_dict(whole.model.projector.state_dict())
    features = torch.randn(1, 3, 4, 4, 32, device="cpu", dtype=torch.float32)
    assert torch.equal(projector(features), whole.model.projector(features))


# --- pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ask_model.save(tmp_path_factory.mktemp("storm"))


def test_the_folder_brings_no_code(folder):
    """So nobody has to trust any: what AutoModel makes of it is the installed package's."""
    for path in folder.glob("*.json"):
        assert "auto_map" not in json.loads(path.read_text()), path.name
    assert not list(folder.glob("*.py"))


def test_pipeline_answers_about_an_image(folder):
    ask = pipeline("image-text-to-text", model=str(folder))
    content = [{"type": "image", "image": Image.new("RGB", (30, 40))}, {"type": "text", "text": "What?"}]
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)


def test_pipeline_answers_about_a_video(folder, tmp_path):
    pytest.importorskip("torchvision", reason="transformers' any-to-any pipeline asks for torchvision")
    ask = pipeline("any-to-any", model=str(folder))
    content = [
        {"type": "video", "path": str(ask_model.clip(tmp_path / "clip.mp4"))},
        {"type": "text", "text": "What?"},
    ]
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    processor = AutoProcessor.from_pretrained(folder)
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **asked)
    tokens = ask.model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(tokens, skip_special_tokens=True)
