"""What users expect of every model of transformers: training, adapters, compiling, placement, quantising."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model import StormForConditionalGeneration
from torch.nn.functional import cross_entropy
from transformers import CompileConfig, Trainer, TrainingArguments

from tests.support import ask_model
from tests.support.ask_model import greedy, inputs

REDUCTION = (2, 1, 1)
LORA = (
    r"model\.(language_model\..*\.(q_proj|v_proj)"
    r"|projector\.(proj|.*\.(in_proj|x_proj|x_proj_b|dt_proj|dt_proj_b|out_proj)))"
)


@pytest.fixture(scope="module")
def model():
    return ask_model.model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("storm")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(model):
    return inputs(model.config, 3, 5, reduction=REDUCTION)


# --- training


def batch(rows):
    """Prompts with videos of different lengths, padded at the left; the placeholders are not predicted."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    pad = [(longest - row["input_ids"].shape[1], 0) for row in rows]
    ids = [torch.nn.functional.pad(row["input_ids"], own) for row, own in zip(rows, pad, strict=True)]
    mask = [torch.nn.functional.pad(torch.ones_like(row["input_ids"]), own) for row, own in zip(rows, pad, strict=True)]
    ids, mask = torch.cat(ids), torch.cat(mask)
    video = ask_model.config().video_token_id
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (ids == video), -100),
        "pixel_values_videos": [pixels for row in rows for pixels in row["pixel_values_videos"]],
        "video_reductions": torch.cat([row["video_reductions"] for row in rows]),
    }


def train(model, folder, **options):
    """Two steps of the Trainer on two prompts; the loss of each."""
    rows = [inputs(ask_model.config(), frames, reduction=REDUCTION, seed=frames) for frames in (3, 5)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=batch)
    trainer.train()
    return [step["loss"] for step in trainer.state.log_history if "loss" in step]


@pytest.mark.parametrize("kind", ["storm", "vila"])
def test_two_steps_of_the_trainer_change_every_part_and_the_checkpoint_comes_back(tmp_path, kind):
    model = ask_model.model(projector_type=kind, random_parts=["projector"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = train(model, tmp_path)
    assert second < first
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    back = StormForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    assert back.config.random_parts is None
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_part_that_is_frozen_stays(tmp_path):
    model = ask_model.model()
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("model.projector.")}


def test_labels_give_the_loss_of_the_next_token(model, given):
    labels = given["input_ids"].clone()
    labels[:, :-4] = -100
    out = model(**given, labels=labels)
    expected = cross_entropy(out.logits[0, -5:-1], labels[0, -4:])
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("kind", ["storm", "vila"])
def test_gradient_checkpointing_runs_every_part_twice_and_has_the_same_gradients(given, kind):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = ask_model.model(projector_type=kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        layers = (model.model.vision_tower.encoder.layers[0], model.model.language_model.layers[0])
        parts = (model.model.projector.layers[1], *(layer.mlp for layer in layers))
        counts = [0, 0, 0]
        for i, part in enumerate(parts):
            part.register_forward_pre_hook(lambda *_, counts=counts, i=i: counts.__setitem__(i, counts[i] + 1))
        model(**given, labels=given["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        runs.append(counts)
    assert runs == [[1, 1, 1], [2, 2, 2]]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# --- adapters


def test_two_steps_by_peft_teach_adapters_that_act_alone_and_come_back(tmp_path, folder, given):
    """LoRA on the language model and on every product of the projector, by the Trainer, with gradient checkpointing."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip(
        "peft.utils.transformers_weight_conversion", reason="transformers loads adapters by a later peft"
    )
    base = StormForConditionalGeneration.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=LORA, task_type="CAUSAL_LM"))
    first, second = train(model, tmp_path / "run", gradient_checkpointing=True)
    assert second < first
    ups = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(ups) == 2 * 2 + 1 + 2 * 6 and all(p.abs().max() > 0 for p in ups.values())
    model.eval()
    with torch.no_grad():
        taught = model(**given).logits
        with model.disable_adapter():
            alone = model(**given).logits
        torch.testing.assert_close(alone, ask_model.model()(**given).logits)
        for part in ("projector", "language_model"):
            kept = {name: p.clone() for name, p in ups.items() if part in name}
            for name in kept:
                ups[name].zero_()
            assert (model(**given).logits - taught).abs().max() > 1e-3, part
            for name, value in kept.items():
                ups[name].copy_(value)
        model.save_pretrained(tmp_path / "adapter")
        for back in (
            peft.PeftModel.from_pretrained(StormForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter"),
            StormForConditionalGeneration.from_pretrained(tmp_path / "adapter"),  # its base is named in it
        ):
            torch.testing.assert_close(back.eval()(**given).logits, taught)
        tokens = greedy(model, given)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**given).logits, taught, rtol=1e-4, atol=1e-4)
        assert torch.equal(greedy(merged, given), tokens)
    assert {name for name, p in before.items() if torch.equal(p, ask_model.model().get_parameter(name))} == set(before)


# --- compiling


def test_generate_compiles_a_token_with_a_static_cache_as_one_graph(model, given):
    import torch._dynamo as dynamo

    expected = greedy(model, given)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    assert torch.equal(greedy(model, given, cache_implementation="static", compile_config=compiled), expected)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_writes_the_same(given):
    """The whole of it, prefill included: what reads a number off the device stays outside the graphs."""
    model = ask_model.model()
    expected = greedy(model, given)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(greedy(model, given), expected)


# --- placement


def test_device_map_auto_spills_to_the_disk_and_writes_the_same(model, folder, given, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for part in (0.7, 0.4):
        room = {"cpu": int(part * size)}
        placed = StormForConditionalGeneration.from_pretrained(
            folder, device_map="auto", max_memory=room, offload_folder=tmp_path
        )
        assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
        assert torch.equal(greedy(placed, given), greedy(model, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_may_lie_on_the_disk(model, folder, given, tmp_path, dtype):
    """Modules with accelerate's hooks are called, not fused: in half precision they round elsewhere, but no more."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = ("model.vision_tower", "model.projector", "model.language_model", "lm_head")
    whole = StormForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    for moved in names:
        places = {name: "disk" if name == moved else "cpu" for name in names}
        placed = StormForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, device_map=places, offload_folder=tmp_path / moved
        )
        assert next(placed.get_submodule(moved).parameters()).is_meta
        with torch.no_grad():
            exact, fused, logits = (m(**given).logits.float() for m in (model, whole, placed))
        assert (logits - exact).norm() <= 2 * (fused - exact).norm() + 1e-6 * exact.norm(), moved


def test_weights_wait_on_the_cpu_and_each_is_moved_when_it_is_called(model, given):
    """CPU offload with the CPU as the device that computes: every weight is away until its module is called."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    placed = ask_model.model()
    accelerate.cpu_offload(placed, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in placed.parameters())
    assert torch.equal(greedy(placed, given), greedy(model, given))


@pytest.mark.parametrize("kind", ["storm", "vila"])
def test_placing_never_splits_a_layer(kind):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = ask_model.model(projector_type=kind)
    whole = {"MixerLayer", "VilaProjector", "SiglipEncoderLayer", "Qwen2DecoderLayer"}
    assert whole <= set(model._no_split_modules)
    places = accelerate.infer_auto_device_map(
        model, {"cpu": 60_000, "disk": 10**9}, no_split_module_classes=list(model._no_split_modules)
    )
    inside = [name for name, part in model.named_modules() if type(part).__name__ in whole for _ in [part]]
    assert not [place for place in places for layer in inside if place.startswith(f"{layer}.")]


def test_the_language_model_is_split_over_devices_by_its_own_plan_and_the_head_by_ours(model):
    text = "model.language_model."
    for name, way in model.model.language_model.tp_plan.items():
        assert model.tp_plan[text + name] == way
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert model.tp_plan[f"{text}layers.*.self_attn.q_proj"] == "colwise"


@pytest.mark.parametrize("attention", ["eager", {"text_config": "eager", "vision_config": "sdpa"}])
def test_attention_may_be_chosen_for_each_part(model, folder, given, attention):
    chosen = StormForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    wanted = attention if isinstance(attention, dict) else dict.fromkeys(("text_config", "vision_config"), attention)
    assert chosen.model.vision_tower.config._attn_implementation == wanted["vision_config"]
    assert chosen.model.language_model.config._attn_implementation == wanted["text_config"]
    with torch.no_grad():
        torch.testing.assert_close(chosen(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


# --- quantising


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_by_torchao(folder, given, tmp_path, dtype):
    """Every product of the three parts; what has to stay float32 stays, and the folder comes back."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    options = {"dtype": dtype, "device_map": "cpu"}
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = StormForConditionalGeneration.from_pretrained(folder, **options, quantization_config=settings)
    kinds = {name: type(p.data).__name__ for name, p in small.named_parameters()}
    for name in ("proj", "layers.0.mixer.in_proj", "layers.1.mixer.dt_proj_b", "layers.1.mixer.out_proj"):
        assert kinds[f"model.projector.{name}.weight"] == "Int8Tensor", name
    assert kinds["model.projector.layers.0.mixer.A_log"] == "Tensor"
    whole = StormForConditionalGeneration.from_pretrained(folder, **options)
    with torch.no_grad():
        logits, expected = small(**given).logits.float(), whole(**given).logits.float()
        assert (logits - expected).norm() < 0.1 * expected.norm()
        small.save_pretrained(tmp_path)
        back = StormForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
        assert torch.equal(back(**given).logits.float(), logits)
