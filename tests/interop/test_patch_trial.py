"""A mixer that is not known here proves itself: names that transformers may choose tomorrow, other
classes; and what a trial leaves alone.
"""

import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from storm_kernels import SlowPathWarning, stats
from storm_kernels.backends import dispatch
from storm_kernels.interop.patching import PatchError, patch, patched, unpatch

from ..support import original_mixers
from ..support.transformers_models import (
    CACHE,
    NAMES,
    SMALL,
    build,
    cache_of,
    close,
    kinds,
    mixer_class,
    mixers,
    padding,
    patched_copy_is_equal,
    tokens,
    with_cache,
)


@pytest.fixture(autouse=True)
def told_again(monkeypatch):
    """Slow paths are told of once in a process."""
    monkeypatch.setattr(dispatch, "_warned", set())


def rewritten(kind, path, change_mixer, change_call=lambda text: text):
    """The model ``build(kind)`` on a copy of transformers' file in which the text of the mixer and
    of the calls of it are changed.
    """
    own = sys.modules[mixer_class(kind).__module__]
    text = Path(own.__file__).read_text()
    pattern = re.compile(
        rf"(@use_kernelized_func\([^@]*?\)\n)?class {mixer_class(kind).__name__}\(.*?(?=\n(?:class|def|@|#))", re.DOTALL
    )
    text, times = pattern.subn(lambda found: change_mixer(found[0]), text)
    text, calls = re.subn(r"self\.(mixer|mamba)\([^()]*\)", lambda found: change_call(found[0]), text)
    assert times == 1 and calls >= 1
    file = path / f"modeling_{kind}.py"
    file.write_text(text)
    name = f"{own.__name__}_of_tomorrow"
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = build(kind)
    twin = getattr(module, f"{NAMES[kind]}ForCausalLM")(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def renamed(kind, path, reorder=False):
    """Tomorrow's names for the cache and the mask, without a decorator that takes the old ones;
    perhaps in another order, beside a new argument.
    """

    def mixer(text):
        text = re.sub(
            r"\b(cache|cache_params|past_key_values)\b",
            "layer_memory",
            re.sub(r"@deprecate_kwarg\([^)]*\)\n", "\n", text),
        )
        text = re.sub(r"\battention_mask\b", "keep", text)
        if not reorder:
            return text
        head, forward, rest = re.split(r"(\n    def forward\()", text)
        arguments, body = rest.split("):\n", 1)
        arguments = re.sub(
            r"(layer_memory[^,]*), *\s*(.*?)(keep[^,)]*)", r"\3, temperature=None, \2\1", arguments, flags=re.DOTALL
        )
        # What the forward hands on, it hands on by name.
        body = re.sub(r"slow_forward\(hidden_states, layer_memory, (cache_position, )?keep\)", by_name, body)
        return head + forward + arguments + "):\n" + body

    def by_name(found):
        position = "cache_position=cache_position, " if found[1] else ""
        return f"slow_forward(hidden_states, layer_memory=layer_memory, {position}keep=keep)"

    def call(text):
        return re.sub(
            r"\battention_mask=", "keep=", re.sub(r"\b(cache|cache_params|past_key_values)=", "layer_memory=", text)
        )

    return rewritten(kind, path, mixer, call)


def same_with_cache_and_padding(model, plain):
    """A padded batch, and a prompt with tokens after it."""
    ids, results = tokens(), []
    with torch.no_grad():
        for one in (model, plain):
            out = with_cache(one, ids[:, :6])
            one_more = with_cache(one, ids[:, 6:7], cache_of(out), 6).logits
            results.append(
                (one(ids, attention_mask=padding("left", ids), use_cache=False).logits, out.logits, one_more)
            )
    for a, b in zip(*results, strict=True):
        close(a, b)


@kinds
@pytest.mark.parametrize("reorder", [False, True], ids=["renamed", "in another order"])
def test_names_of_tomorrow(kind, reorder, tmp_path):
    model = renamed(kind, tmp_path, reorder)
    report = patch(model)
    assert len(report.replaced) == len(mixers(model)) and not report.skipped
    assert all("checked against its own forward: differs by" in entry.note for entry in report.replaced)
    stats(reset=True)
    same_with_cache_and_padding(model, build(kind))
    assert sum(stats()["scan"].values()) == 3 * len(report.replaced)  # nothing fell back to the mixers' own forward
    if reorder:
        assert all("a call with temperature runs its own forward" in entry.note for entry in report.replaced)
        mixer, x = mixers(model)[0], torch.randn(1, 5, SMALL["hidden_size"])
        with (
            torch.no_grad(),
            pytest.warns(
                SlowPathWarning, match=f"a call of {mixer_class(kind).__name__} has an argument that is not known here"
            ),
        ):
            close(mixer(x, temperature=2.0), mixer(x))


@kinds
def test_another_meaning_is_refused_with_the_figure(kind, tmp_path):
    model = rewritten(kind, tmp_path, lambda text: text.replace("self.A_log.float()", "1.02 * self.A_log.float()"))
    assert len(patch(model).replaced) == len(
        mixers(model)
    )  # of a known class and generation, which says nothing of its arithmetic
    unpatch(model)
    with pytest.raises(PatchError, match="ours .* differs by [0-9.e-]+ of the largest value, more than 1e-04"):
        patch(model, check=True)
    for mixer in mixers(model):
        mixer.__class__ = type("StateMixer", (nn.Module,), dict(vars(type(mixer))))
    with pytest.raises(
        PatchError, match="what StateMixer computes with them is not known here, and ours .* differs by"
    ):
        patch(model)


class Own(nn.Module):
    """Somebody's copy of a Mamba-1 mixer, from no library."""

    def __init__(self, width=12, states=4, rank=3):
        super().__init__()
        inner = 2 * width
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        self.A_log, self.D = nn.Parameter(torch.rand(inner, states)), nn.Parameter(torch.ones(inner))
        self.rank, self.states = rank, states
        self.norm = nn.BatchNorm1d(inner, track_running_stats=True)  # unused but for its counter

    def forward(self, tokens, scale=1.0):
        x, z = self.in_proj(tokens).mT.chunk(2, 1)
        u = F.silu(self.conv1d(x)[..., : tokens.shape[1]])
        dt, B, C = self.x_proj(u.mT).mT.split([self.rank, self.states, self.states], 1)
        delta = (self.dt_proj.weight @ dt).float()
        y = original_mixers.scan_loop(
            u.float(),
            delta,
            -self.A_log.float().exp(),
            B.float(),
            C.float(),
            self.D,
            z.float(),
            self.dt_proj.bias.float(),
            True,
        )
        return scale * self.out_proj(y[0].mT.to(tokens.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_somebodys_own_class(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(Own()).to(dtype), torch.randn(2, 9, 12, dtype=dtype)
    expected = model(x)
    report = patch(model)
    assert [entry.class_name for entry in report.replaced] == [
        "Own"
    ] and "a call with scale runs its own forward" in report.replaced[0].note
    rounding = {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-5)
    close(model(x), expected, rounding)
    with pytest.warns(SlowPathWarning, match="a call of Own has an argument that is not known here"):
        assert torch.equal(model[0](x, scale=2.0), 2 * expected)
    with pytest.raises(TypeError, match="other"):
        model[0](x, other=1)
    unpatch(model)
    assert torch.equal(model(x), expected)


def test_a_bidirectional_class_of_another_name():
    torch.manual_seed(0)
    mixer, x = original_mixers.Mamba(16, bimamba_type="v2"), torch.randn(2, 9, 16)
    mixer.__class__ = type("Resampler", (nn.Module,), {**vars(original_mixers.Mamba), "__module__": "elsewhere"})
    expected = mixer(x)
    assert len(patch(mixer).replaced) == 1
    close(mixer(x), expected)


class Dropping(Own):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return self.dropout(super().forward(tokens))


def test_a_dropout_of_its_own_would_be_lost():
    with pytest.raises(
        PatchError, match="what Dropping computes with them is not known here, and ours in training mode differs by"
    ):
        patch(nn.Sequential(Dropping()).eval())
    model = nn.Sequential(Own())
    model[0].x_proj = nn.Sequential(nn.Dropout(0.5), model[0].x_proj)  # an adapter's is called, with the layer
    assert len(patch(model).replaced) == 1


def everything(model):
    """All that a trial might change."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    flags = [(module.training, dict(vars(module)).keys()) for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    return tensors, grads, flags, hooks, stats()


def test_a_trial_leaves_no_trace():
    model, seen = nn.Sequential(Own(), nn.Dropout(0.5)).train(), []
    model[0].x_proj = nn.Sequential(model[0].x_proj, nn.Dropout(0.0))
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append(module))
    before, state = everything(model), torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = everything(model)
    assert all(torch.equal(after[0][name], t) for name, t in before[0].items()) and before[0].keys() == after[0].keys()
    assert after[1:] == before[1:]
    assert not seen


@kinds
def test_a_trial_of_known_ones_leaves_no_trace(kind):
    model = build(kind).train()
    before, state = everything(model), torch.get_rng_state()
    patch(model, check=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert everything(model)[1:] == before[1:]


def test_what_cannot_be_tried_says_so():
    with torch.device("meta"):
        model = nn.Sequential(Own())
    with pytest.raises(PatchError, match="it cannot be tried: the weights of .* are elsewhere"):
        patch(model)
    model = nn.Sequential(Own())
    model[0].in_proj.forward = types.MethodType(lambda self, x: F.linear(x, self.weight), model[0].in_proj)
    with pytest.raises(PatchError, match="it cannot be tried: the forward of in_proj is overridden on the instance"):
        patch(model)
    model = nn.Sequential(Own())
    with torch.no_grad():
        model[0].out_proj.weight.zero_()
        model[0].out_proj.bias.zero_()
    with pytest.raises(PatchError, match="gives only zeros, or no finite numbers, which tells nothing"):
        patch(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(PatchError, match="it cannot be tried: there are hooks on all modules"):
            patch(nn.Sequential(Own()))
        report = patch(build("mamba"), check=True)  # a known one is replaced all the same
        assert "not checked: there are hooks on all modules" in report.replaced[0].note
    finally:
        handle.remove()


def test_one_trial_a_class_and_shape(monkeypatch):
    module = sys.modules["storm_kernels.interop.patching"]
    tried, trial = [], module.trial
    monkeypatch.setattr(module, "trial", lambda *args: tried.append(args) or trial(*args))
    model = nn.Sequential(*(Own() for _ in range(4)), Own(states=2))
    assert len(patch(model).replaced) == 5
    assert len({id(mixer) for mixer, _ in tried}) == 2


def test_mixers_take_every_spelling_that_their_own_forward_takes():
    """Until 5.40 transformers takes ``cache_params`` beside ``cache``."""
    model = build("mamba")
    mixer, x = mixers(model)[0], torch.randn(2, 6, SMALL["hidden_size"])
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    accepted = {CACHE, "cache_params"}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for run in (
            lambda: mixer(x, attention_mask=mask),
            lambda: mixer(hidden_states=x),
            lambda: mixer(x, None),
            *(lambda name=name: mixer(x, **{name: None}) for name in accepted),
        ):
            expected = run()
            with patched(model):
                close(run(), expected)
        with patched(model), pytest.raises(TypeError):
            mixer()


@kinds
def test_copies_of_tomorrows_models(kind, tmp_path):
    model, ids = renamed(kind, tmp_path), tokens()
    patched_copy_is_equal(model, ids)
