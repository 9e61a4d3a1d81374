"""What users reported of these mixers elsewhere, with a patched model: it does what the unpatched
one of the installed generation does, or better.

Each test names the report. Where the unpatched model of a generation cannot do it at all, the test
says so and compares with what it can.
"""

import copy

import pytest
import torch

from storm_kernels.interop.patching import patch, patched, unpatch

from ..support.transformers_models import (
    OLD,
    POSITIONS,
    build,
    cache_of,
    close,
    in_float64,
    kinds,
    mixer_cache,
    mixer_steps,
    mixers,
    padding,
    tokens,
    transformers,
    with_cache,
)


@kinds
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}], ids=str
)
def test_beams_and_samples(kind, options):
    """transformers issue 29730: more beams, worse text. Beams are reordered in the cache, samples
    need the same random numbers.
    """
    model, ids = build(kind), tokens(length=6)
    options = {"attention_mask": padding("left", ids), "max_new_tokens": 5, "do_sample": False} | options
    found = []
    for change in (lambda model: None, patch):
        change(model)
        torch.manual_seed(3)
        found.append(model.generate(ids, **options))
    assert torch.equal(*found)


@kinds
def test_a_padded_batch_is_its_sequences(kind):
    """transformers issue 31540: a sequence padded on the left gave other tokens than alone."""
    model, ids = build(kind), tokens(length=9)
    mask = padding("left", ids)
    patch(model)
    together = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=4, do_sample=False)
    alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], max_new_tokens=4, do_sample=False)
    assert torch.equal(together[0, 9:], alone[0, 5:])


@kinds
def test_padding_on_the_right_leaves_the_same_cache(kind):
    """transformers issue 48256: a prompt padded on the right leaves zeros of the padding in the
    cache. So it does patched: nothing is hidden.
    """
    model, x = build(kind), torch.randn(2, 8, 24)
    mixer, mask = mixers(model)[0], padding("right", torch.ones(2, 6, dtype=torch.long))
    with torch.no_grad():
        expected = mixer_steps(mixer, mixer_cache(model, 2), x, mask)
        patch(mixer)
        for a, b in zip(mixer_steps(mixer, mixer_cache(model, 2), x, mask), expected, strict=True):
            close(a, b)


@kinds
@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_adapters_on_every_layer_merge_and_unload(kind, first):
    """PEFT issue 2556, transformers issue 30316, Falcon-H1 issue 13: adapters that the mixer goes
    around, and merging them.

    PEFT itself refuses conv1d and out_proj of these models since; other layers in their place:
    ``test_patch_modules``.
    """
    peft = pytest.importorskip("peft", reason="peft is not installed")
    names = [name for name in ("in_proj", "x_proj", "dt_proj") if hasattr(mixers(build(kind))[0], name)]
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False, lora_dropout=0.0)
    base, ids = build(kind), tokens()

    def adapted(model):
        torch.manual_seed(5)
        return peft.get_peft_model(model, config)

    plain = adapted(copy.deepcopy(base))
    model = copy.deepcopy(base)
    if first == "patch":
        patch(model)
        model = adapted(model)
    else:
        model = adapted(model)
        patch(model)
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        with model.disable_adapter(), plain.disable_adapter():
            close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    for one in (plain, model):
        one.zero_grad()
        one(ids, labels=ids).loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert learned.keys() == expected.keys() and any("lora_A" in name for name in learned)
    for name, grad in expected.items():
        assert (learned[name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-7, name
    # Random adapters make the merged model so steep that the plain one, too, is twice the tolerance
    # from the truth.
    model, truth = model.merge_and_unload(), in_float64(plain.merge_and_unload())
    with torch.no_grad():
        close(model(ids, use_cache=False).logits.double(), truth(ids, use_cache=False).logits.double())
    assert len(unpatch(model)) == len(mixers(base))


@kinds
def test_a_loss_with_the_cache_on(kind):
    """transformers issues 29514 and 29526: writing the state in place broke the backward pass."""
    model, ids = build(kind).train(), tokens()
    losses = []
    for change in (lambda model: None, patch):
        change(model)
        model.zero_grad()
        out = model(
            ids, labels=ids, use_cache=True, **({"cache_params": None} if kind in ("mamba", "falcon") and OLD else {})
        )
        out.loss.backward()
        losses.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*losses, strict=True):
        assert (a - b).abs().max() <= 2e-4 * a.abs().max() + 1e-7


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(kind, dtype):
    """transformers issues 32690 and 33409: formats that meet under autocast, with float32 weights
    and a float32 cache.
    """
    model, ids = build(kind).train(), tokens()
    results = []
    for change in (lambda model: None, patch):
        change(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(ids, labels=ids, use_cache=False).loss
            with torch.no_grad():
                out = with_cache(model.eval(), ids[:, :6])
                later = with_cache(model, ids[:, 6:7], cache_of(out), 6).logits.float()
        model.train()
        loss.backward()
        results.append(
            (
                loss.detach(),
                out.logits.float(),
                later,
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    rounding = {torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for a, b in zip(results[1][:3], results[0][:3], strict=True):
        close(a, b, rounding)
    assert results[0][3].keys() == results[1][3].keys() and all(
        grad.isfinite().all() for grad in results[1][3].values()
    )


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_decode(kind, dtype):
    model, ids = build(kind).to(dtype), tokens()
    with torch.no_grad():
        results = []
        for change in (lambda model: None, patch):
            change(model)
            results.append(
                model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
                .logits[0]
                .float()
            )
    close(results[1], results[0], {torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype])


@pytest.mark.skipif(OLD, reason="before 5.16 a compiled mixer has no static cache of layers")
@pytest.mark.parametrize("kind", ["mamba"])
def test_compiled_decoding(kind):
    """transformers pull request 31247: a compiled decoding step with a cache whose tensors stay where they are."""
    model, ids = build(kind), tokens(length=7)
    patch(model)
    with torch.no_grad():
        expected = with_cache(model, ids[:, :6])
        cache = cache_of(expected)
        expected = [with_cache(model, ids[:, 6:7], copy.deepcopy(cache), 6).logits for _ in range(2)][1]
        step = torch.compile(lambda ids, cache: with_cache(model, ids, cache, 6).logits, backend="eager")
        close(step(ids[:, 6:7], copy.deepcopy(cache)), expected)


@pytest.mark.skipif(POSITIONS, reason="up to 5.3 these models have no static cache")
@kinds
def test_generation_with_a_static_cache(kind):
    model, ids = build(kind), tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    try:
        expected = model.generate(ids, **options)
    except Exception as error:
        pytest.skip(f"the unpatched model of transformers {transformers.__version__} cannot: {type(error).__name__}")
    # Another model of the same weights: in transformers 5.6 one that has a static cache cannot
    # generate again, patched or not.
    with patched(again := build(kind)):
        assert torch.equal(again.generate(ids, **options), expected)


@kinds
def test_saved_patched_loads_plain_and_moves(kind, tmp_path):
    """A patched model saves what the plain one does, and is cast and moved as it is."""
    model, ids = build(kind), tokens()
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(module.__class__.__mro__[1].__name__ == "Patched" for module in loaded.modules())
    with torch.no_grad():
        close(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        moved = model.to("cpu", torch.bfloat16)(ids, use_cache=False).logits
        close(moved.float(), loaded.bfloat16()(ids, use_cache=False).logits.float(), 6e-2)
