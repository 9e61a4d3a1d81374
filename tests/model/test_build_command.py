"""`storm-kernels build`: the folder holds the parts' own weights, answers, and is whole or not there."""

import json
import shutil

import pytest
import torch

pytest.importorskip("av", reason="the extra `model` is not installed")

from safetensors.torch import load_file
from storm_model import StormForConditionalGeneration, assembling
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Siglip2VisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from storm_kernels import cli
from tests.support import ask_model, published
from tests.support.ask_model import greedy

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return published.siglip(tmp_path_factory.mktemp("siglip"), text_half=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return published.language(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(ask_model.clip(tmp_path_factory.mktemp("clips") / "clip.mp4"))


def build(vision, language, out, *more, projector="storm"):
    parts = ("--vision", vision, "--language", language, "--projector", projector, "--out", out)
    return cli.main(["build", *map(str, (*parts, *more))])


def asked(folder, film, **options):
    """The inputs of a question by the folder's own processor, and its model."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "video", "path": film}, {"type": "text", "text": "What happens?"}]
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **asked, num_frames=4, **options)
    return inputs, AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("projector", ["storm", "vila"])
def test_the_parts_are_in_it_and_it_answers(vision, words, film, tmp_path, projector, capsys):
    out = tmp_path / "made" / "model"
    assert build(vision, words, out, "--projector-layers", 2, projector=projector) == 0
    printed, told = capsys.readouterr()
    assert printed.splitlines()[-1].startswith(f"{out}: {projector} projector between 2 layers of vision and qwen2")
    assert "bfloat16" in printed and f"reading {words} ..." in told and "writing" in told
    assert told.splitlines()[-1].startswith("random weights in projector: never trained")
    inputs, model = asked(out, film)
    assert type(model) is StormForConditionalGeneration and model.dtype == torch.bfloat16
    assert model.config.random_parts == ["projector"] and model.config.projector_type == projector
    language = AutoModelForCausalLM.from_pretrained(words)
    for name, tensor in language.model.state_dict().items():
        ours = model.model.language_model.state_dict()[name]
        assert torch.equal(ours[: len(tensor)], tensor), name
    assert torch.equal(model.lm_head.weight[:264], language.lm_head.weight)
    tower = AutoModel.from_pretrained(vision).vision_model
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, getattr(tower, "vision_model", tower).state_dict()[name].bfloat16()), name
    assert not [path for path in out.parent.iterdir() if path != out]
    assert model.generation_config.eos_token_id == 3
    assert greedy(model, inputs).shape == (1, 6)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 4 * 4


def test_what_the_projector_reads_is_the_chosen_layer_of_the_published_tower(vision, words, tmp_path):
    pixels = torch.rand(2, 3, 56, 56)
    (tmp_path / "alone").mkdir()
    published.siglip(tmp_path / "alone")
    tower = SiglipVisionModel.from_pretrained(tmp_path / "alone").eval()
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states
    for layer in (-1, -2, -3):
        out = tmp_path / f"model{layer}"
        assert build(tmp_path / "alone", words, out, "--vision-layer", layer, "--dtype", "float32") == 0
        model = StormForConditionalGeneration.from_pretrained(out, dtype="auto").eval()
        assert model.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(model.model.encode(pixels).flatten(1, 2), hidden[layer])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "tower", [{"text_half": False}, {"text_half": True, "image_size": 64, "patch_size": 16}], ids=["siglip", "siglip2"]
)
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2", {"rope_parameters": YARN, "use_sliding_window": False, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 16}),
        ("llama", {"rope_parameters": published.LLAMA3}),
    ],
    ids=["qwen2", "qwen2.5", "qwen3", "llama3"],
)
def test_families_tied_and_untied_sharded_with_extra_keys_come_back_and_write_the_same(
    family, text, tower, tied, film, tmp_path
):
    """Build -> load -> save -> load -> generate; the second folder has the first one's bytes."""
    vision = published.siglip(tmp_path / "siglip", torch.bfloat16, **tower)
    words = published.language(tmp_path / "words", family, shards="30KB", tie_word_embeddings=tied, **text)
    shard = sorted(words.glob("*.safetensors"))[0]
    assert len(list(words.glob("*.safetensors"))) > 1

    def older(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    published.edit_tensors(shard, older)
    assert build(vision, words, tmp_path / "one", "--projector-layers", 1) == 0
    inputs, model = asked(tmp_path / "one", film)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    stored = load_file(tmp_path / "one" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    again = StormForConditionalGeneration.from_pretrained(tmp_path / "two", dtype="auto")
    assert torch.equal(greedy(again, inputs), greedy(model, inputs))


def test_names_and_extra_keys_of_older_checkpoints(tmp_path):
    """A tower by itself with the whole model's prefix, buffers that were saved once, a tied head that is stored too."""
    vision = published.siglip(tmp_path / "siglip")
    words = published.language(tmp_path / "words", tie_word_embeddings=True)
    assert build(vision, words, tmp_path / "new") == 0

    def older(tensors):
        for name in list(tensors):
            tensors[f"vision_model.{name.removeprefix('vision_model.')}"] = tensors.pop(name)
        tensors["vision_model.embeddings.position_ids"] = torch.arange(16)[None]

    def whole(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    published.edit_tensors(vision / "model.safetensors", older)
    published.edit_tensors(words / "model.safetensors", whole)
    assert build(vision, words, tmp_path / "old") == 0
    old, new = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new"))
    assert old == new


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048, "bos_token_id": 1, "eos_token_id": 2}),
        ("gemma", {"head_dim": 8}),
        ("qwen3_moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("mamba", {}),
    ],
)
def test_other_kinds_of_language_models_write_what_they_wrote_alone(family, text, vision, film, tmp_path):
    """Learned positions, scaled embeddings, experts, states in the place of attention."""
    if family == "mamba" and "cache" not in CausalLMOutputWithPast.__dataclass_fields__:
        pytest.skip("this transformers calls the states of a Mamba otherwise than a cache")
    words = published.language(tmp_path / "words", family, dtype=torch.float32, **text)
    assert build(vision, words, tmp_path / "model", "--projector-layers", 1) == 0
    inputs, model = asked(tmp_path / "model", film)
    question = {"input_ids": inputs["input_ids"][:, -20:].masked_fill(inputs["input_ids"][:, -20:] > 255, 7)}
    alone = AutoModelForCausalLM.from_pretrained(words).eval()
    assert torch.equal(greedy(model, question), greedy(alone, question))
    assert greedy(model, inputs).shape == (1, 6)


def test_new_tokens_get_rows_that_no_answer_prefers(words, vision, tmp_path):
    """The tokenizer's new tokens have numbers that the embeddings do not: rows are added, the mean of the others."""
    small = tmp_path / "small"
    published.language(small, vocab_size=len(ask_model.tokenizer(placeholders=False)), dtype=torch.float32)
    assert build(vision, small, tmp_path / "model") == 0
    model = StormForConditionalGeneration.from_pretrained(tmp_path / "model")
    config, before = model.config, len(AutoTokenizer.from_pretrained(small))
    assert (config.image_token_id, config.video_token_id) == (before, before + 1)
    assert config.text_config.vocab_size == len(model.lm_head.weight) == 320  # the next multiple of 64
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        torch.testing.assert_close(table[before:], table[:before].mean(0).expand(320 - before, -1))


def test_the_random_projector_follows_the_seed(vision, words, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert build(vision, words, tmp_path / name, "--seed", seed, "--temporal-pool", 4) == 0
    one, two, three = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two", "three"))
    assert one == two != three
    model = StormForConditionalGeneration.from_pretrained(tmp_path / "one")
    assert model.config.temporal_pool == AutoProcessor.from_pretrained(tmp_path / "one").video_processor.temporal_pool
    assert model.config.temporal_pool == 4


def test_the_parts_are_held_once(vision, words):
    """What is assembled is the parts, not copies of them."""
    tokenizer = assembling.load_tokenizer(words)
    language = assembling.load_language(words)
    tower = assembling.load_tower(vision, -2)
    model = assembling.assemble(tower, language, tokenizer, projector_type="vila")
    assert model.model.vision_tower is tower and model.model.language_model is language.base_model
    assert model.lm_head is language.lm_head and not [p for p in model.parameters() if p.is_meta]


# --- bad input


def test_weights_that_are_too_large_for_the_dtype_are_named(words, tmp_path, capsys):
    vision = published.siglip(tmp_path / "siglip")

    def grow(tensors):
        tensors[sorted(tensors)[0]].view(-1)[:1] = 1e6

    published.edit_tensors(vision / "model.safetensors", grow)
    assert build(vision, words, tmp_path / "out", "--dtype", "float16") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the vision tower in torch.float16: ") and "not finite" in last


def clip_tower(folder):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)


def no_config(folder):
    (folder / "config.json").unlink()


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def missing(folder):
    published.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(sorted(tensors)[0]))


def extra(folder):
    published.edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(stray=torch.ones(1)))


def reshaped(folder):
    def change(tensors):
        tensors[sorted(tensors)[0]] = torch.ones(3, 5)

    published.edit_tensors(folder / "model.safetensors", change)


def spoilt(folder):
    published.edit_tensors(
        folder / "model.safetensors", lambda tensors: tensors[sorted(tensors)[0]].view(-1)[:1].fill_(torch.nan)
    )


def naflex(folder):
    published.edit_json(folder / "config.json", model_type="siglip2", vision_config=Siglip2VisionConfig().to_dict())


def other_pixels(folder):
    published.edit_json(folder / "preprocessor_config.json", image_mean=[0.48, 0.45, 0.4])


def with_eyes(folder):
    (folder / "config.json").write_text(json.dumps(Gemma3Config().to_dict()))


def quantised(folder):
    published.edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def unknown(folder):
    published.edit_json(folder / "config.json", model_type="no-such-model")


def own_code(folder):
    published.edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def encoder(folder):
    published.edit_json(folder / "config.json", model_type="siglip_vision_model")


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("vision", no_config, "no config.json"),
        ("vision", clip_tower, "must be of a SigLIP or SigLIP2 tower of fixed resolution"),
        ("vision", naflex, "got model_type 'siglip2'"),
        ("vision", pickled, "pickles are never opened (pytorch_model.bin)"),
        ("vision", missing, "is missing"),
        ("vision", extra, "stray is not part of the model"),
        ("vision", reshaped, "has shape (3, 5), the model's has"),
        ("vision", spoilt, "holds values that are not finite"),
        ("vision", other_pixels, "image_mean must be SigLIP's, [0.5, 0.5, 0.5], got [0.48, 0.45, 0.4]"),
        ("language", no_config, "no config.json"),
        ("language", pickled, "pickles are never opened (pytorch_model.bin)"),
        ("language", missing, "lm_head.weight is missing"),
        ("language", extra, "stray is not part of the model"),
        ("language", reshaped, "lm_head.weight has shape (3, 5), the model's has (264, 32)"),
        ("language", spoilt, "lm_head.weight holds values that are not finite"),
        ("language", quantised, "its weights are quantised"),
        ("language", with_eyes, "a gemma3 is more than a language model"),
        ("language", unknown, "does not name a model of transformers"),
        ("language", own_code, "does not name a model of transformers"),
        ("language", encoder, "not a causal language model"),
        ("language", no_tokenizer, "no tokenizer that can be read"),
    ],
)
def test_bad_parts_are_one_line_that_names_the_folder(vision, words, tmp_path, part, spoil, message, capsys):
    parts = {"vision": tmp_path / "vision", "language": tmp_path / "language"}
    published.siglip(parts["vision"])
    shutil.copytree(words, parts["language"])
    spoil(parts[part])
    assert build(parts["vision"], parts["language"], tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {parts[part]}") and message in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "vision"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vision-layer", 0), "between -3 and -1, got 0"),
        (("--vision-layer", -4), "between -3 and -1, got -4"),
        (("--projector-layers", 0), "projector_layers must be between 1"),
        (("--temporal-pool", 0), "temporal_pool must be between 1"),
    ],
)
def test_bad_options_are_one_line(vision, words, tmp_path, options, message, capsys):
    assert build(vision, words, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"head_dim": 8}),
        ("cohere", {}),
        ("phi", {"num_key_value_heads": 4}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_a_model_whose_logits_are_more_than_a_product_is_refused(family, changes, vision, tmp_path, capsys):
    published.language(tmp_path / "words", family, **changes)
    assert build(vision, tmp_path / "words", tmp_path / "out") == 2
    assert "cannot be taken apart" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("part", [0, 1])
def test_a_name_that_is_no_folder_is_looked_for_nowhere_else(vision, words, tmp_path, part, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [vision, words]
    parts[part] = "google/siglip"
    assert build(*parts, tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: google/siglip: no such folder"


def test_what_is_there_already_is_not_written_over(vision, words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert build(vision, words, tmp_path / "out") == 2
    assert f"--out: {tmp_path / 'out'} exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("stopped", [OSError("no space left"), KeyboardInterrupt()])
def test_a_folder_half_written_is_not_left(vision, words, tmp_path, monkeypatch, stopped, capsys):
    """The weights are on the disk when it stops; nothing of it stays, under any name."""

    def stop(self, folder):
        assert (folder / "model.safetensors").is_file() and not (tmp_path / "out").exists()
        raise stopped

    monkeypatch.setattr("storm_model.StormProcessor.save_pretrained", stop)
    assert build(vision, words, tmp_path / "out") == (130 if isinstance(stopped, KeyboardInterrupt) else 2)
    assert not list(tmp_path.iterdir())
