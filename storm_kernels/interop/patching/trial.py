"""The self-check: a mixer's own forward beside ours, on a few random tokens.

It runs on copies that share the mixer's weights, so that nothing of the model is disturbed: without
its hooks and in evaluation mode, on buffers of their own, without gradients, with a generator of
its own, and uncounted.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ...backends import dispatch
from ...tokens import TokenReduction
from ..mixer import bidirectional_kind
from .classes import Recipe, patched_class
from .signature import CACHE, MASK, POSITION

# The largest difference that is rounding, as a part of the largest value: both sides round
# activations to their dtype in several places.
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_HOOKS = [name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, OrderedDict)]


@dataclass(frozen=True)
class Verdict:
    """How a trial ended.

    Attributes:
        agrees: whether ours computes what the mixer's own forward does; None if there was nothing to compare with.
        text: one clause for the report, with the figure.
    """

    agrees: bool | None
    text: str


def why_no_trial(module: nn.Module) -> str:
    """Why a trial of this module cannot be run, or would disturb what it must not; empty if it can."""
    if _module._has_any_global_hook():
        return "there are hooks on all modules, which a trial would call"
    for name, child in module.named_modules():
        forward = vars(child).get("_old_forward" if "_hf_hook" in vars(child) else "forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(child).forward:
            return f"the forward of {name or 'the mixer'} is overridden on the instance, and a trial would call it"
    empty = {name for name, p in module.named_parameters() if p.numel() == 0}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta or name in empty or type(tensor).__name__ == "DTensor":
            return f"the weights of {name} are elsewhere (offloaded, sharded, or not loaded yet)"
    if _dtype(module) not in BOUNDS:
        return f"its activations would be {_dtype(module)}"
    return ""


def trial(module: nn.Module, recipe: Recipe) -> Verdict:
    """Whether the forward of ``recipe`` computes what the module's own does."""
    like, dtype = next(module.parameters()), _dtype(module)
    own, ours = _twin(module, {}), _twin(module, {})
    ours.__class__ = patched_class(type(module), recipe, {})
    worst, bound = 0.0, BOUNDS[dtype]
    with ExitStack() as stack:
        for context in _undisturbed(like.device):
            stack.enter_context(context)
        for name, calls in _calls(module, recipe, like.device, dtype):
            try:
                expected = calls(own)
            except Exception as error:  # whatever it raises: there is nothing to compare with
                return Verdict(None, f"its own forward {name} raises {_one_line(error)}")
            if (
                not all(isinstance(t, Tensor) and t.abs().max().item() < float("inf") for t in expected)
                or not expected[0].any()
            ):
                return Verdict(
                    None, f"its own forward {name} gives only zeros, or no finite numbers, which tells nothing"
                )
            try:
                found = calls(ours)
            except Exception as error:
                return Verdict(False, f"ours {name} raises {_one_line(error)}")
            figure, why = _difference(found, expected)
            if why or not figure <= bound:
                return Verdict(
                    False,
                    f"ours {name} differs by {why or f'{figure:.1e} of the largest value, more than {bound:.0e}'}",
                )
            worst = max(worst, figure)
    return Verdict(
        True, f"checked against its own forward: differs by {worst:.1e} of the largest value, {bound:.0e} is allowed"
    )


def _undisturbed(device: torch.device) -> Iterator:
    yield torch.no_grad()
    yield torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    yield torch.autocast(device.type, enabled=False)
    yield dispatch.uncounted()
    yield dispatch.strict(False)
    yield warnings.catch_warnings(action="ignore")


def _twin(module: nn.Module, memo: dict) -> nn.Module:
    """A copy of the modules without their hooks, in evaluation mode, on the same parameters and on
    copies of the buffers.
    """
    if id(module) not in memo:
        twin = memo[id(module)] = object.__new__(type(module))
        state = dict(vars(module))
        # accelerate's, or the class's own: why_no_trial has looked.
        for name in ("forward", "_old_forward", "_hf_hook"):
            state.pop(name, None)
        state |= {name: OrderedDict() for name in _HOOKS if name in state} | {"training": False}
        state["_parameters"] = dict(module._parameters)
        state["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        state["_modules"] = {
            name: None if child is None else _twin(child, memo) for name, child in module._modules.items()
        }
        vars(twin).update(state)
    return memo[id(module)]


def _calls(
    module: nn.Module, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable]]:
    """(what is tried, a function that makes the calls on a module and returns the tensors to compare)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    if recipe.kind == "projector":
        features = draw(1, 2, 2, 2, module.proj.in_features // 4)
        yield "on a video", lambda m: [m.forward(features, TokenReduction(temporal_pool=2))]
        return
    x = draw(2, max(12, module.conv1d.weight.shape[-1] + 2), _width(module))  # longer than the convolution
    yield f"on {x.shape[1]} tokens", lambda m: [m.forward(x)]
    yield "on one token", lambda m: [m.forward(x[:, :1])]
    yield "in training mode", lambda m: [_training(m).forward(x)]
    if "D" in module._parameters:  # beside what D adds, the state's part may be too small to be told
        yield "without D", lambda m: [m.forward(x), _without_skip(m).forward(x)]
    keeps_states = hasattr(module, "allocate_inference_cache") and getattr(module, "layer_idx", None) is not None
    if recipe.kind == "mamba" and keeps_states and bidirectional_kind(module) == "none":
        yield "with inference_params", lambda m: _mamba_steps(m, x)
    if recipe.kind != "transformers":
        return
    mask_name, cache_name = recipe.signature.name_of(MASK), recipe.signature.name_of(CACHE)
    masks = []
    if mask_name is not None:
        for side in (slice(0, 2), slice(-2, None)):
            mask = torch.ones(x.shape[:2], device=device, dtype=torch.long)
            mask[0, side] = 0
            masks.append(mask)
            yield "with padding", lambda m, mask=mask: [m.forward(x, **{mask_name: mask})]
    if cache_name is not None:
        yield "with a cache", lambda m: _steps(m, recipe, x, {})
        if masks:
            yield "with a cache and padding", lambda m: _steps(m, recipe, x, {mask_name: masks[0]})


def _training(module: nn.Module) -> nn.Module:
    """The twin in training mode: a dropout of the mixer's own would be lost. Those within its
    layers, adapters' say, are the layers' affair.
    """
    twin = _twin(module, {}).train()
    for layer in twin.children():
        for child in layer.modules():
            if isinstance(child, nn.modules.dropout._DropoutNd) and child is not layer:
                child.p = 0.0
    return twin


def _without_skip(module: nn.Module) -> nn.Module:
    twin = _twin(module, {})
    twin._parameters |= {
        name: torch.zeros_like(twin._parameters[name])
        for name in ("D", "D_b")
        if twin._parameters.get(name) is not None
    }
    return twin


def _steps(module: nn.Module, recipe: Recipe, x: Tensor, mask: dict) -> list[Tensor]:
    """A prompt, two single tokens, and in the present form two at once; then what the cache holds."""
    cache = _new_cache(module, x)
    cache_name, position_name = recipe.signature.name_of(CACHE), recipe.signature.name_of(POSITION)

    def call(tokens: Tensor, positions: range, **options) -> Tensor:
        where = (
            {}
            if position_name is None
            else {position_name: torch.tensor(list(positions), dtype=torch.int64, device=x.device)}
        )
        out = module.forward(tokens, **{cache_name: cache}, **where, **options)
        if isinstance(getattr(cache, "has_previous_state", None), bool):
            cache.has_previous_state = True  # the model does so after its last layer
        return out

    length = x.shape[1]

    outs = [call(x, range(module.conv1d.weight.shape[-1]), **mask)]
    outs += [call(x[:, t : t + 1], range(length + t, length + t + 1)) for t in range(2)]
    if not recipe.old:
        outs.append(call(x[:, 2:4], range(length + 2, length + 4)))
    return [*outs, *_states(cache, module.layer_idx)]


def _mamba_steps(module: nn.Module, x: Tensor) -> list[Tensor]:
    params = SimpleNamespace(
        seqlen_offset=0, key_value_memory_dict={}, max_seqlen=2 * x.shape[1], max_batch_size=x.shape[0]
    )
    outs = [module.forward(x, inference_params=params)]
    for t in range(2):
        params.seqlen_offset = x.shape[1] + t
        outs.append(module.forward(x[:, t : t + 1], inference_params=params))
    return [*outs, *params.key_value_memory_dict[module.layer_idx]]


def _new_cache(module: nn.Module, x: Tensor):
    """An empty cache, of a class that the mixer's own file uses."""
    values = {
        "config": module.config,
        "batch_size": x.shape[0],
        "max_batch_size": x.shape[0],
        "dtype": x.dtype,
        "device": x.device,
    }
    for cls in _cache_classes(module):
        parameters = inspect.signature(cls).parameters
        needed = {
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        if "config" in parameters and needed <= set(values):
            return cls(**{name: value for name, value in values.items() if name in parameters})
    raise RuntimeError("there is no class of caches that could be made for it")


def _cache_classes(module: nn.Module) -> list[type]:
    """Those with Cache in their names that the mixer's file has, its own before transformers' general ones."""
    files = [
        vars(sys.modules[cls.__module__])
        for cls in type(module).__mro__
        if cls.__module__ in sys.modules and issubclass(cls, nn.Module)
    ]
    files += [
        inspect.unwrap(cls.forward).__globals__
        for cls in type(module).__mro__
        if "forward" in vars(cls) and cls is not nn.Module
    ]
    files.append({"DynamicCache": getattr(sys.modules.get("transformers"), "DynamicCache", None)})
    found = {
        value: None
        for file in files
        for name, value in list(file.items())
        if isinstance(value, type) and "Cache" in name
    }
    return sorted(found, key=lambda cls: cls.__name__ in ("Cache", "DynamicCache"))


def _states(cache, layer_idx: int) -> list[Tensor]:
    """The convolution's inputs and the state that a cache holds for one layer."""
    if hasattr(cache, "ssm_states"):
        return [cache.conv_states[layer_idx], cache.ssm_states[layer_idx]]
    layer = cache.layers[layer_idx]
    held = [
        states.values() if isinstance(states, dict) else [states]
        for states in (layer.conv_states, layer.recurrent_states)
    ]
    return [t for states in held for t in states if isinstance(t, Tensor)]


def _dtype(module: nn.Module) -> torch.dtype:
    """Of the activations."""
    return module.conv1d.weight.dtype if hasattr(module, "conv1d") else next(module.parameters()).dtype


def _width(module: nn.Module) -> int:
    for owner, name in ((module, "d_model"), (module, "hidden_size"), (module.in_proj, "in_features")):
        if isinstance(getattr(owner, name, None), int):
            return getattr(owner, name)
    return module.in_proj.weight.shape[-1]


def _difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, str]:
    """The largest difference as a part of the largest value, over all pairs; and in words what cannot be a figure."""
    figures = [0.0]
    if len(found) != len(expected):
        return 0.0, f"{len(found)} tensors where there are {len(expected)}"
    for a, b in zip(found, expected, strict=True):
        if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return 0.0, f"a result {_shown(a)} where its own is {_shown(b)}"
        largest = b.double().abs().max().item()
        figures.append((a.double() - b.double()).abs().max().item() / (largest or 1.0))
    return max(figures, key=lambda figure: (figure != figure, figure)), ""  # NaN above all


def _shown(value: object) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"of type {type(value).__name__}"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
