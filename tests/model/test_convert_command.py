"""`storm-kernels convert`: what a VILA folder answers by VILA's own arithmetic, the converted model answers."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("av", reason="the extra `model` is not installed")

from safetensors.torch import load_file
from storm_model import StormForConditionalGeneration
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, SiglipVisionModel

from storm_kernels import cli
from tests.support import ask_model, published
from tests.support.ask_model import greedy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return published.vila(tmp_path_factory.mktemp("vila"))


def convert(source, out, *more):
    return cli.main(["convert", str(source), "--out", str(out), *more])


def downsampled(grid):
    """(h, w, C) -> (h / 2 * w / 2, 4 C): blocks of 2 x 2 by rows, zeros where a side is odd, one element at a time."""
    height, width, channels = grid.shape
    rows = []
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            block = []
            for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                block.append(grid[y, x] if y < height and x < width else torch.zeros(channels))
            rows.append(torch.cat(block))
    return torch.stack(rows)


def projected(source, pixels):
    """VILA's tokens of each frame, (T, tokens, D), by its parts' own weights in float32."""
    tower = SiglipVisionModel.from_pretrained(source / "vision_tower", dtype=torch.float32).eval()
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    side = int(hidden.shape[1] ** 0.5)
    weights = {name: t.float() for name, t in load_file(source / "mm_projector" / "model.safetensors").items()}
    tokens = torch.stack([downsampled(frame.unflatten(0, (side, side))) for frame in hidden])
    centred = tokens - tokens.mean(-1, keepdim=True)
    tokens = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    tokens = tokens * weights["layers.1.weight"] + weights["layers.1.bias"]
    tokens = F.gelu(F.linear(tokens, weights["layers.2.weight"], weights["layers.2.bias"]))
    return F.linear(tokens, weights["layers.4.weight"], weights["layers.4.bias"])


def question(film="", text="What?"):
    return [{"role": "user", "content": [{"type": "video", "path": film}, {"type": "text", "text": text}]}]


def by_vila(source, processor, frames):
    """(embeddings of the prompt, the language model), as VILA has them: a line break after each frame's tokens."""
    language = AutoModelForCausalLM.from_pretrained(source / "llm", dtype=torch.float32).eval()
    words = processor.tokenizer
    before, after = words.apply_chat_template(
        [{"role": "user", "content": "@What?"}], tokenize=False, add_generation_prompt=True
    ).split("@")
    parts = [words(before)["input_ids"]]
    for frame in frames:
        parts += [frame, words("\n")["input_ids"]]
    parts.append(words(after)["input_ids"])
    table = language.get_input_embeddings()
    embedded = [p if isinstance(p, torch.Tensor) else table(torch.tensor(p)) for p in parts]
    return torch.cat(embedded)[None], language


@pytest.mark.parametrize("image_size", [56, 70])  # 4 x 4 patches, and 5 x 5, which the downsample pads
@torch.no_grad()
def test_the_converted_model_answers_what_vila_does(image_size, tmp_path, capsys):
    source = published.vila(tmp_path / "vila", vision={"image_size": image_size})
    assert convert(source, tmp_path / "out", "--dtype", "float32") == 0
    assert "vila projector between 2 layers of vision and qwen2" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.config.random_parts is None
    film = str(ask_model.clip(tmp_path / "clip.mp4"))
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(question(film), **asked)
    pixels = inputs["pixel_values_videos"][0]
    assert len(pixels) == 6  # the folder's num_video_frames
    tokens = projected(source, pixels)
    (features,) = model.get_video_features(pixels).pooler_output
    torch.testing.assert_close(features, tokens.flatten(0, 1), rtol=1e-4, atol=1e-4)
    embeds, language = by_vila(source, processor, tokens)
    assert inputs["input_ids"].shape[1] == embeds.shape[1]
    torch.testing.assert_close(
        model(**inputs).logits[..., :264], language(inputs_embeds=embeds).logits, rtol=1e-3, atol=1e-3
    )
    own = language.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(greedy(model, inputs, 8), own)


def test_the_dtype_of_the_folder_is_kept(source, tmp_path):
    assert convert(source, tmp_path / "out") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in load_file(source / "mm_projector" / "model.safetensors").items():
        assert torch.equal(stored[f"model.projector.{name}"], tensor), name


@torch.no_grad()
def test_vilas_pooling_over_time_is_the_folders_reduction(tmp_path):
    """TSPVideoEncoder: mean over 3 frames and 2 x 2 tokens of each."""
    source = published.vila(tmp_path / "vila", pooling=[[3, 2, 2]])
    assert convert(source, tmp_path / "out", "--dtype", "float32") == 0
    model = StormForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    pixels = torch.rand(6, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = projected(source, pixels).unflatten(0, (2, 3)).mean((1, 2))
    (features,) = model.get_video_features(pixels).pooler_output
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    frames = np.zeros((6, 20, 20, 3), np.uint8)
    ids = processor(text="<video>", videos=[frames], return_tensors="pt")["input_ids"][0]
    assert (ids == model.config.video_token_id).sum() == len(expected) == 2
    inputs = processor(text="<image>", images=[frames[0]], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    (image,) = model.get_image_features(inputs["pixel_values"], inputs["image_reductions"]).pooler_output
    torch.testing.assert_close(image, projected(source, inputs["pixel_values"])[0], rtol=1e-4, atol=1e-4)


def test_what_is_done_otherwise_is_said(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "vila")
    published.edit_json(tmp_path / "vila" / "config.json", image_aspect_ratio="dynamic", video_max_tiles=1, fps=2.0)
    assert convert(tmp_path / "vila", tmp_path / "out") == 0
    tiles, rate = capsys.readouterr().err.splitlines()[-2:]
    assert tiles.startswith("images are taken whole") and rate.startswith("VILA takes 2.0 frames a second, at most 6")


def test_an_image_ends_with_a_line_break_too(source, tmp_path):
    assert convert(source, tmp_path / "out") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image", "image": np.zeros((30, 40, 3), np.uint8)}, {"type": "text", "text": "What?"}]
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = processor.apply_chat_template([{"role": "user", "content": content}], **asked)["input_ids"][0]
    text = processor.tokenizer.decode(ids)
    assert text == "<|im_start|>user\n" + 4 * "<image>" + "\nWhat?<|im_end|>\n"


def test_it_answers_the_ask_command_and_nothing_of_it_is_random(source, tmp_path, capfd):
    assert convert(source, tmp_path / "out") == 0
    film = str(ask_model.clip(tmp_path / "clip.mp4"))
    capfd.readouterr()
    assert cli.main(["ask", film, "What?", "--model", str(tmp_path / "out"), "--max-new-tokens", "4"]) == 0
    answer, told = capfd.readouterr()
    assert answer.strip() and told.splitlines()[-1].startswith("6 frames, 24 video tokens")
    assert "random" not in told


def test_a_storm_projector_on_top_of_it_is_random_and_says_so(source, tmp_path, capsys):
    parts = ("--vision", source / "vision_tower", "--language", source / "llm", "--projector", "storm")
    assert cli.main(["build", *map(str, parts), "--projector-layers", "1", "--out", str(tmp_path / "out")]) == 0
    assert "random weights in projector: never trained" in capsys.readouterr().err
    assert StormForConditionalGeneration.from_pretrained(tmp_path / "out").config.random_parts == ["projector"]


def test_a_chat_template_that_is_named_is_read_as_vila_reads_it(source, tmp_path):
    shutil.copytree(source, tmp_path / "vila")
    published.edit_json(tmp_path / "vila" / "config.json", chat_template="own")
    template = "{% for message in messages %}\n    {{ message['role'] + ':\\n' + message['content'] }}\n{% endfor %}\n"
    (tmp_path / "vila" / "own.jinja").write_text(template)
    assert convert(tmp_path / "vila", tmp_path / "out") == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.apply_chat_template(question()) == "user:\n<video>What?"


# --- bad input


def changed(**fields):
    return lambda folder: published.edit_json(folder / "config.json", **fields)


def projector_of(kind):
    return lambda folder: published.edit_json(folder / "mm_projector" / "config.json", mm_projector_type=kind)


def tensors(change):
    return lambda folder: published.edit_tensors(folder / "mm_projector" / "model.safetensors", change)


def without(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def pickled(folder):
    (folder / "mm_projector" / "model.safetensors").unlink()
    torch.save({}, folder / "mm_projector" / "pytorch_model.bin")


def wider(stored):
    stored["layers.2.weight"] = torch.ones(32, 288)


def spoilt(stored):
    stored["layers.4.bias"][0] = torch.inf


def encoder(kind, **fields):
    return changed(**{kind: json.dumps(fields)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), "no config.json"),
        (without("llm"), "no folder llm"),
        (without("mm_projector"), "no folder mm_projector"),
        (without("vision_tower/model.safetensors"), "vision_tower: no model.safetensors"),
        (projector_of("mlp_downsample"), "must be 'mlp_downsample_2x2_fix', got 'mlp_downsample': VILA's releases"),
        (projector_of("mlp_downsample_3x3_fix"), "must be 'mlp_downsample_2x2_fix', got 'mlp_downsample_3x3_fix'"),
        (projector_of("mlp2x_gelu"), "must be 'mlp_downsample_2x2_fix', got 'mlp2x_gelu'"),
        (projector_of(None), "must be 'mlp_downsample_2x2_fix', got None"),
        (tensors(lambda stored: stored.pop("layers.1.bias")), "mm_projector: layers.1.bias is missing"),
        (
            tensors(lambda stored: stored.update({"layers.5.bias": torch.ones(2)})),
            "layers.5.bias is not part of VILA's",
        ),
        (tensors(wider), "layers.2.weight has shape (32, 288), the model's has (32, 128)"),
        (tensors(spoilt), "mm_projector: layers.4.bias holds values that are not finite"),
        (pickled, "mm_projector: no model.safetensors; weights must be in safetensors files; pickles are never opened"),
        (changed(dynamic_s2=True), "dynamic_s2 True has no counterpart here"),
        (changed(s2=True), "s2 True has no counterpart here"),
        (changed(ps3=True), "ps3 True has no counterpart here"),
        (changed(mm_use_im_start_end=True), "mm_use_im_start_end True has no counterpart here"),
        (changed(mm_vision_select_feature="patch"), "mm_vision_select_feature must be 'cls_patch'"),
        (changed(mm_vision_select_layer=-9), "between -3 and -1, got -9"),
        (changed(mm_vision_select_layer="last"), "between -3 and -1, got 'last'"),
        (changed(image_aspect_ratio="pad"), "image_aspect_ratio must be 'resize' or 'dynamic', got 'pad'"),
        (changed(image_aspect_ratio="dynamic", video_max_tiles=8), "video_max_tiles 8 cuts frames to tiles"),
        (changed(chat_template="qwen2"), "chat_template 'qwen2' is named, but there is no qwen2.jinja"),
        (changed(chat_template="../../own"), "is named, but there is no own.jinja"),
        (changed(num_video_frames=0), "num_video_frames must be a positive integer, got 0"),
        (encoder("image_encoder", end_tokens="x"), "must end with the same text, got 'x' and '\\n'"),
        (
            encoder("video_encoder", start_tokens="<s>"),
            "video_encoder has start_tokens '<s>', which has no counterpart",
        ),
        (encoder("video_encoder", _target_="my.Encoder"), "video_encoder must be one of"),
        (
            encoder("video_encoder", _target_="a.TSPVideoEncoder", pool_sizes=[[8, 1, 1], [1, 2, 2]]),
            "[time, side, side]",
        ),
        (encoder("video_encoder", _target_="a.TSPVideoEncoder", pool_sizes=[[8, 1, 2]]), "[time, side, side]"),
        (changed(video_encoder="{"), "video_encoder is not JSON"),
    ],
)
def test_what_cannot_be_converted_is_one_line_that_names_it(source, tmp_path, spoil, message, capsys):
    shutil.copytree(source, tmp_path / "vila")
    spoil(tmp_path / "vila")
    assert convert(tmp_path / "vila", tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'vila'}") and message in last
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]


def test_no_such_folder(tmp_path, capsys):
    assert convert(tmp_path / "none", tmp_path / "out") == 2
    assert "none: no such folder" in capsys.readouterr().err
