"""The Mamba, FalconMamba, Jamba and Zamba of the installed transformers, patched and unpatched:
same logits, greedy tokens, gradients and caches.
"""

import inspect

import pytest
import torch

from storm_kernels import stats
from storm_kernels.interop.patching import PatchError, patch, patched, unpatch

from ..support import transformers_models
from ..support.transformers_models import build, close, kinds, mixer_class, mixers, padding, tokens


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
        # Without padding, a prompt shorter than the convolution; transformers up to 5.4 departs
        # from itself after such a one.
        ids = tokens(
            length=(2 if transformers_models.own_cache(model) is None else 5) if side == "none" else 9, seed=seed
        )
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
            cache = transformers_models.cache_of(transformers_models.with_cache(model, ids[:, :6]))
            second(model)
            for t in range(6, 11):
                logits = transformers_models.with_cache(model, ids[:, t : t + 1], cache, t).logits
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
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (expected, grads), (found, fast) = results
    torch.testing.assert_close(found, expected)
    assert grads.keys() == fast.keys() and any("A_log" in name for name in grads)
    for name, grad in grads.items():
        assert (fast[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name


@kinds
def test_report_weights_and_counters(kind):
    model = build(kind)
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    count = len(mixers(model))
    report = patch(model)
    assert all(entry.class_name == mixer_class(kind).__name__ and not entry.note for entry in report.replaced)
    assert len(report.replaced) == count and not report.skipped
    assert list(model.state_dict()) == state
    assert all(parameters[name] is p for name, p in model.named_parameters())
    stats(reset=True)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    assert {op: sum(by.values()) for op, by in stats().items()} == {"conv": count, "scan": count}
    with pytest.raises(PatchError, match="patched already"):
        patch(model)
    assert len(unpatch(model)) == count


@kinds
def test_copies_and_checkpoints(kind, tmp_path):
    model, ids = build(kind), tokens()
    with torch.no_grad():
        expected = transformers_models.patched_copy_is_equal(model, ids)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        close(loaded(ids, use_cache=False).logits, expected)


@kinds
def test_options_of_the_mixers(kind):
    names = (
        {"conv": "mamba_conv_bias", "projection": "mamba_proj_bias"}
        if kind in ("jamba", "zamba")
        else {"conv": "use_conv_bias", "projection": "use_bias"}
    )
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


@pytest.mark.skipif(
    transformers_models.OLD,
    reason="transformers up to 5.15 reads several tokens after a cached prefix wrongly, or not at all",
)
@kinds
def test_a_prompt_in_pieces_is_what_transformers_makes_of_it(kind):
    model, ids = build(kind), tokens()
    with torch.no_grad():
        results = []
        for change in (lambda m: None, patch):
            change(model)
            cache = transformers_models.cache_of(transformers_models.with_cache(model, ids[:, :5]))
            results.append(transformers_models.with_cache(model, ids[:, 5:], cache, 5).logits)
    close(results[1], results[0])


@kinds
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_other_activations_cost_a_pass_of_their_own(kind, activation):
    model, ids = build(kind, **{"hidden_mamba_act" if kind == "zamba" else "hidden_act": activation}), tokens()
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits, *with_cache_steps(model, ids)]
        report = patch(model, check=True)
        assert len(report.replaced) == len(mixers(model))
        assert all("a pass of its own after the convolution" in entry.note for entry in report.replaced)
        for a, b in zip([model(ids, use_cache=False).logits, *with_cache_steps(model, ids)], expected, strict=True):
            close(a, b)


def with_cache_steps(model, ids):
    """The logits of a prompt of six tokens and of the tokens after it, one by one."""
    out = transformers_models.with_cache(model, ids[:, :6])
    cache = transformers_models.cache_of(out)
    return [
        out.logits,
        *(transformers_models.with_cache(model, ids[:, t : t + 1], cache, t).logits for t in range(6, ids.shape[1])),
    ]


@kinds
def test_packed_sequences_are_refused(kind):
    mixer = mixers(build(kind))[0]
    patch(mixer)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(mixer.forward).parameters.values())
    with pytest.raises(ValueError if takes_more else TypeError, match="seq_idx"):
        mixer(torch.randn(1, 4, 24), seq_idx=torch.zeros(1, 4))


def test_peft_adapters():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        build("falcon"), peft.LoraConfig(target_modules=["in_proj", "x_proj"], init_lora_weights=False)
    )
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert len(patch(model).replaced) == 2
        close(model(ids, use_cache=False).logits, expected)
