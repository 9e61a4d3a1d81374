"""The Mamba, FalconMamba and Jamba of the installed transformers, patched and unpatched: same logits, greedy tokens, gradients and caches."""

import copy

import pytest
import torch

from storm_kernels import stats
from storm_kernels.patch import PatchError, patch, patched, unpatch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 24, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}


def build(kind, seed=0, **options):
    torch.manual_seed(seed)
    if kind == "jamba":
        config = transformers.JambaConfig(
            **SMALL, num_hidden_layers=3, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
            num_attention_heads=2, num_key_value_heads=1, intermediate_size=32, mamba_d_state=4, mamba_dt_rank=3, **options,
        )  # fmt: skip
        model = transformers.JambaForCausalLM(config)
    else:
        name = {"mamba": "Mamba", "falcon": "FalconMamba"}[kind]
        config = getattr(transformers, f"{name}Config")(**SMALL, num_hidden_layers=2, state_size=4, **options)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # untrained logits are nearly level: spread them, so that a wrong token would show
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tokens(batch=2, length=11, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, ids):
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return None if side == "none" else mask


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5 * b.abs().max().item(), rtol=0)


kinds = pytest.mark.parametrize("kind", ["mamba", "falcon", "jamba"])


@kinds
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 3, 11])
def test_prefill(kind, side, length):
    model, ids = build(kind), tokens(length=length)
    mask = padding(side, ids)
    for use_cache in (False, True):
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=use_cache).logits
            with patched(model):
                close(model(ids, attention_mask=mask, use_cache=use_cache).logits, expected)


@kinds
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(kind, side, use_cache):
    for seed in range(2):
        model = build(kind, seed)
        ids = tokens(length=2 if side == "none" else 9, seed=seed)  # without padding, a prompt shorter than the convolution
        mask = torch.ones_like(ids) if side == "none" else padding(side, ids)
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(ids, **options)
        with patched(model):
            found = model.generate(ids, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            close(a, b)


@kinds
def test_a_cache_may_change_hands(kind):
    """Prefill by one and decoding by the other, both ways: the cache holds the same."""
    model, ids = build(kind), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for first, second in ((patch, unpatch), (lambda m: None, patch)):
            first(model)
            out = model(ids[:, :6], use_cache=True)
            cache = getattr(out, "cache_params", None) or out.past_key_values
            name = "past_key_values" if kind == "jamba" else "cache_params"
            second(model)
            for t in range(6, 11):
                logits = model(ids[:, t : t + 1], **{name: cache}, use_cache=True).logits
                close(logits[:, 0], whole[:, t])


@kinds
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_training(kind, side):
    model, ids = build(kind).train(), tokens()
    results = []
    for change in (lambda m: None, patch):
        change(model)
        model.zero_grad()
        loss = model(ids, attention_mask=padding(side, ids), labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (expected, grads), (found, fast) = results
    torch.testing.assert_close(found, expected)
    assert grads.keys() == fast.keys() and any("A_log" in name for name in grads)
    for name, grad in grads.items():
        assert (fast[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name


@kinds
def test_report_weights_and_counters(kind):
    model = build(kind)
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    report = patch(model)
    assert all(entry.class_name in ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer") for entry in report.replaced)
    assert len(report.replaced) == 2 and not report.skipped
    assert list(model.state_dict()) == state
    assert all(parameters[name] is p for name, p in model.named_parameters())
    stats(reset=True)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    assert {op: sum(by.values()) for op, by in stats().items()} == {"conv": 2, "scan": 2}
    with pytest.raises(PatchError, match="patched already"):
        patch(model)
    assert len(unpatch(model)) == 2


@kinds
def test_copies_and_checkpoints(kind, tmp_path):
    model, ids = build(kind), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        patch(model)
        twin = copy.deepcopy(model)
        close(twin(ids, use_cache=False).logits, expected)
        assert len(unpatch(twin)) == 2
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        close(loaded(ids, use_cache=False).logits, expected)


@kinds
def test_options_of_the_mixers(kind):
    names = {"conv": "mamba_conv_bias", "projection": "mamba_proj_bias"} if kind == "jamba" else {"conv": "use_conv_bias", "projection": "use_bias"}
    model, ids = build(kind, **{names["conv"]: False, names["projection"]: True}), tokens()
    with torch.no_grad():
        mask = padding("left", ids)
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        with patched(model):
            close(model(ids, attention_mask=mask, use_cache=False).logits, expected)


@kinds
def test_gradient_checkpointing(kind):
    model, ids = build(kind).train(), tokens()
    patch(model)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_a_prompt_in_pieces_is_what_transformers_makes_of_it():
    model, ids = build("mamba"), tokens()
    with torch.no_grad():
        results = []
        for change in (lambda m: None, patch):
            change(model)
            cache = model(ids[:, :5], use_cache=True).cache_params
            results.append(model(ids[:, 5:], cache_params=cache, use_cache=True).logits)
    close(results[1], results[0])


def test_other_activations_are_refused():
    with pytest.raises(PatchError, match="its activation is 'gelu'; only silu is fused"):
        patch(build("mamba", hidden_act="gelu"))


def test_accelerate_hooks_are_refused():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build("mamba")
    accelerate.hooks.add_hook_to_module(model.backbone.layers[0].mixer, accelerate.hooks.ModelHook())
    report = patch(model)
    assert [entry.name for entry in report.replaced] == ["backbone.layers.1.mixer"]
    assert "accelerate" in report.skipped[0].why


def test_packed_sequences_are_refused():
    model = build("mamba")
    mixer = model.backbone.layers[0].mixer
    patch(model)
    with pytest.raises(ValueError, match="packed sequences.*seq_idx"):
        mixer(torch.randn(1, 4, 24), seq_idx=torch.zeros(1, 4))


def test_peft_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(build("falcon"), peft.LoraConfig(target_modules=["in_proj", "x_proj"], init_lora_weights=False))
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert len(patch(model).replaced) == 2
        close(model(ids, use_cache=False).logits, expected)
