"""The ten lines that a user of any video-language model of transformers types, and each variation of them."""

import threading

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("av", reason="the extra `model` is not installed")

import storm_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    TextIteratorStreamer,
)

from tests.support import ask_model
from tests.support.ask_model import greedy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ask_model.save(tmp_path_factory.mktemp("storm"))


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(ask_model.clip(tmp_path_factory.mktemp("clips") / "clip.mp4"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return str(ask_model.clip(tmp_path_factory.mktemp("clips") / "other.mp4", frames=7, seed=1))


def question(*parts, text="What happens?"):
    """A conversation of one message: videos by path, images as arrays, then the text."""
    kinds = [{"type": "video", "path": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": [*kinds, {"type": "text", "text": text}]}]


def inputs_of(processor, conversation, **options):
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversation, **asked, **options)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_ten_lines(folder, film):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    messages = [
        {"role": "user", "content": [{"type": "video", "path": film}, {"type": "text", "text": "What happens?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", num_frames=16
    )
    ids = model.generate(**inputs.to(model.device), max_new_tokens=6)
    answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert isinstance(answer, str) and answer
    assert inputs["pixel_values_videos"].shape == (1, 16, 3, 56, 56)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 16 * 4
    text = processor.batch_decode(inputs["input_ids"])[0].replace("<video>", "")
    assert text == "<|im_start|>user\n\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"


def test_every_auto_class_knows_the_model(folder):
    assert type(AutoConfig.from_pretrained(folder)) is storm_model.StormConfig
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is storm_model.StormForConditionalGeneration
    assert type(transformers.AutoModel.from_pretrained(folder)) is storm_model.StormModel
    assert type(transformers.AutoImageProcessor.from_pretrained(folder)) is storm_model.StormImageProcessor
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    assert type(AutoVideoProcessor.from_pretrained(folder)) is storm_model.StormVideoProcessor


def test_the_answer_depends_on_the_video(loaded, film, other):
    processor, model = loaded
    logits = [model(**inputs_of(processor, question(path), num_frames=7)).logits[:, -1] for path in (film, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"num_frames": 3}, [0, 10, 19]),
        ({"fps": 1}, [0, 10]),
        ({"fps": 5, "start": 0.5, "end": 1.0}, [5, 7, 9]),
        ({"num_frames": 2, "start": 0.5, "end": 1.0}, [5, 9]),
        ({"fps": 10, "max_frames": 2}, [0, 19]),
        ({"num_frames": 1000}, list(range(20))),
        ({}, list(range(20))),
    ],
)
def test_frames_are_chosen_as_asked(loaded, film, options, indices):
    processor, model = loaded
    inputs = inputs_of(processor, question(film), processor_kwargs=options | {"return_metadata": True})
    (metadata,) = inputs.pop("video_metadata")
    assert metadata.frames_indices == indices or (len(indices) == 3 and metadata.frames_indices[::2] == indices[::2])
    assert inputs["pixel_values_videos"].shape[1] == len(indices)
    assert greedy(model, inputs, 2).shape == (1, 2)


def test_several_videos_and_images_in_one_prompt(loaded, film, other):
    """Each of them is where its placeholder is: the embeddings the language model sees are put together by hand."""
    processor, model = loaded
    inputs = inputs_of(processor, question(film, picture(), other), fps=5)
    assert [len(video) for video in inputs["pixel_values_videos"]] == [10, 4]
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    greedy(model, inputs, 1)
    hook.remove()
    ids = inputs["input_ids"][0]
    expected = model.get_input_embeddings()(ids).clone()
    first, second = (model.get_video_features(video).pooler_output[0] for video in inputs["pixel_values_videos"])
    expected[ids == model.config.video_token_id] = torch.cat([first, second])
    expected[ids == model.config.image_token_id] = model.get_video_features(inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(seen[0][0], expected)


def test_an_image_is_a_video_of_one_frame(loaded):
    processor, _ = loaded
    image = processor.image_processor(picture())["pixel_values"]
    video = processor.video_processor(picture()[None])["pixel_values_videos"]
    assert torch.equal(image, video[0])


def test_a_batch_of_prompts_with_videos_of_different_lengths(loaded, film, other):
    """Left padding; every answer as if its prompt were alone."""
    processor, model = loaded
    conversations = [question(film), question(other, text="Why?"), question(text="No video here.")]
    inputs = inputs_of(processor, conversations, fps=10)
    assert (inputs["attention_mask"][1:, 0] == 0).all()
    together = greedy(model, inputs)
    for i, conversation in enumerate(conversations):
        alone = greedy(model, inputs_of(processor, conversation, fps=10))
        assert torch.equal(together[i], alone[0])


def test_packed_videos_are_as_if_each_were_alone(loaded, film, other):
    processor, model = loaded
    reduction = {"temporal_pool": 2, "temporal_stride": 2}
    videos = [film, other, film]
    together = processor.video_processor(videos, fps=10, **reduction)
    calls = []
    hook = model.model.projector.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        packed = model.get_video_features(**together).pooler_output
    hook.remove()
    assert len(calls) == 1
    for video, tokens in zip(videos, packed, strict=True):
        with torch.no_grad():
            (alone,) = model.get_video_features(**processor.video_processor(video, fps=10, **reduction)).pooler_output
        torch.testing.assert_close(tokens, alone)


def test_videos_of_different_reductions_in_one_call(loaded, film, other):
    processor, model = loaded
    videos = processor.video_processor([film, other], fps=10)["pixel_values_videos"]
    reductions = torch.tensor([[4, 2, 2], [1, 1, 1]])
    tokens = model.get_video_features(videos, reductions).pooler_output
    assert [len(video) for video in tokens] == [3, 28]
    for video, reduction, own in zip(videos, reductions, tokens, strict=True):
        torch.testing.assert_close(own, model.get_video_features(video, reduction[None]).pooler_output[0])


@pytest.mark.parametrize(
    ("reduction", "left"),
    [
        ({"temporal_stride": 2}, 10 * 4),
        ({"temporal_pool": 4}, 5 * 4),
        ({"spatial_pool": 2}, 20),
        ({"temporal_pool": 3, "temporal_stride": 2}, 4 * 4),
    ],
)
def test_a_call_chooses_the_reduction(loaded, film, reduction, left):
    """The processor counts placeholders, the model reduces: without reloading either."""
    processor, model = loaded
    inputs = inputs_of(processor, question(film), num_frames=20, **reduction)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == left
    assert greedy(model, inputs, 3).shape == (1, 3)
    assert processor._get_num_multimodal_tokens(video_sizes=[(20, 48, 64)], **reduction)["num_video_tokens"] == [left]


def test_sampling_follows_the_seed(loaded, film):
    processor, model = loaded
    inputs = inputs_of(processor, question(film), num_frames=4)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(greedy(model, inputs, do_sample=True, temperature=2.0))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_one_beam_of_many_is_greedy_search_and_beams_find_no_less(loaded, film, other):
    """Two prompts, one with two videos: each beam sees its own prompt's."""
    processor, model = loaded
    inputs = inputs_of(processor, [question(film, other), question(film, text="And?")], fps=5)
    options = {"num_beams": 3, "num_return_sequences": 1, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    beams = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert (likelihood(model, inputs, beams) >= likelihood(model, inputs, greedy(model, inputs, 5)) - 1e-4).all()
    torch.testing.assert_close(likelihood(model, inputs, beams) / 5, out.sequences_scores, rtol=1e-4, atol=1e-4)


def likelihood(model, inputs, answer):
    """Log probability of an answer (batch, n), token after token in one pass."""
    ids = torch.cat([inputs["input_ids"], answer], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **rest).logits
    n = answer.shape[1]
    return logits[:, -n - 1 : -1].log_softmax(-1).gather(-1, answer[..., None]).sum((1, 2))


def test_streaming_gives_the_same_words(loaded, film):
    processor, model = loaded
    inputs = inputs_of(processor, question(film), num_frames=4)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": 6, "do_sample": False, "streamer": streamer, "eos_token_id": None, "pad_token_id": 0}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.batch_decode(greedy(model, inputs), skip_special_tokens=True)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_second_question_does_not_encode_again(loaded, film, beams):
    processor, model = loaded
    first, second = (inputs_of(processor, question(film, text=text), num_frames=6) for text in ("What?", "Who is it?"))
    features = model.get_video_features(first["pixel_values_videos"], first["video_reductions"])
    encoded = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    for inputs in (first, second):
        expected = greedy(model, inputs, num_beams=beams)
        assert encoded
        encoded.clear()
        words = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        assert torch.equal(greedy(model, words, mm_encoder_outputs={"video": features}, num_beams=beams), expected)
        assert not encoded
    hook.remove()


def test_the_conversation_goes_on_with_the_template_of_the_language_model(loaded, film):
    processor, _ = loaded
    conversation = [
        {"role": "system", "content": "Be brief."},
        *question(film),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
