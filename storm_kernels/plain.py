"""One question, asked wherever a fused path would go around a module: may its parameters be used in its place?

Adapters, hooks, quantised and offloaded layers, parametrizations, pruning and replaced forwards all
act when a module is *called*. A kernel that reads the module's weight instead would leave them out
in silence. So whoever reads a weight asks :func:`is_plain` first, and calls the module where the
answer is no.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

# A tensor of any other class (quantised, sharded) multiplies in its own way. The last two stand for
# plain ones while a program is traced.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
Kind = TypeVar("Kind", bound=nn.Module)


@overload
def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]: ...
@overload
def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]: ...


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling ``module`` does what class ``kind`` does with its parameters, and nothing else.

    No: another class (a subclass too: adapters and quantised layers are such), a forward replaced
    on the instance, a hook on it or on all modules, a weight that is no plain tensor, has another
    shape than the class gives it, or lies on the meta device (offloaded).

    Args:
        module: the module that a fused path would go around.
        kind: the class it has to be, exactly.

    Example:
        >>> is_plain(nn.Linear(2, 3))
        True
    """
    if type(module) is not kind or not runs_its_forward_only(module):
        return False
    for parameter in module._parameters.values():
        if parameter is not None and (type(parameter) not in _PLAIN_TENSORS or parameter.is_meta):
            return False
    return _has_its_shape(module)


def runs_its_forward_only(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward, and no hook."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs a hook: one of its own, or one on all modules."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _module._has_any_global_hook())


def is_plain_convolution(conv: nn.Module) -> TypeGuard[nn.Conv1d]:
    """Whether ``conv`` is a plain ``nn.Conv1d`` whose result, cut to the length, is the causal
    depthwise convolution with its weight (E, 1, K).
    """
    if not is_plain(conv, nn.Conv1d) or conv.weight.shape[1] != 1 or conv.weight.shape[0] != conv.in_channels:
        return False
    taps = conv.weight.shape[2]
    return (
        conv.stride == conv.dilation == (1,)
        and conv.padding in ((taps - 1,), taps - 1)
        and conv.padding_mode == "zeros"
    )


def is_silu(act: object) -> bool:
    """Whether the activation ``act`` is SiLU and nothing else; None stands for it. transformers has
    a class of its own for it.
    """
    if not isinstance(act, nn.Module):
        return act is None or act is F.silu
    return type(act).__name__ in ("SiLU", "SiLUActivation") and runs_its_forward_only(act)


def call_convolution(
    conv: nn.Module,
    x: Tensor,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The convolution as a module: x (batch, L, E) -> (batch, L, E), before the activation.

    ``conv`` takes (batch, E, L) and pads the beginning with zeros, as ``nn.Conv1d`` with padding K
    - 1 does; with ``reverse`` it is handed the flipped sequence, with ``cu_seqlens`` each packed
    sequence by itself, with ``initial_state`` (n, E, K - 1) those inputs first.
    """
    if cu_seqlens is None:
        return _call_convolution(conv, x, reverse, initial_state)
    bounds = cu_seqlens.tolist()
    states = [None] * (len(bounds) - 1) if initial_state is None else initial_state.split(1)
    parts = zip(bounds, bounds[1:], states, strict=False)
    return torch.cat([_call_convolution(conv, x[:, start:end], reverse, state) for start, end, state in parts], 1)


def _call_convolution(conv: nn.Module, x: Tensor, reverse: bool, state: Tensor | None) -> Tensor:
    if x.shape[1] == 0:
        return x
    inputs = (x.flip(1) if reverse else x).transpose(1, 2)
    before = 0 if state is None else state.shape[-1]
    out = conv(inputs if state is None else torch.cat([state.to(x.dtype), inputs], -1))
    if out.shape[-1] < before + x.shape[1]:
        raise ValueError(
            f"the convolution {type(conv).__name__} must give at least the {before + x.shape[1]} tokens it takes, "
            "with the padding before them, "
            f"got shape {tuple(out.shape)}"
        )
    out = out[..., before : before + x.shape[1]].transpose(1, 2)
    return out.flip(1) if reverse else out


def call_dt_proj(dt_proj: nn.Module, dt_raw: Tensor) -> Tensor:
    """``dt_proj(dt_raw)``, bias included: dt_raw (batch, L, R) -> (batch, L, E).

    A bias that is kept in float32 beside weights in half precision is rounded to theirs, for a
    product takes one format.
    """
    bias = getattr(dt_proj, "bias", None)
    half = dt_raw.dtype in (torch.bfloat16, torch.float16)
    if (
        not half
        or not isinstance(bias, Tensor)
        or bias.dtype == dt_raw.dtype
        or torch.is_autocast_enabled(dt_raw.device.type)
    ):
        return dt_proj(dt_raw)
    with torch.autocast(dt_raw.device.type, dt_raw.dtype):
        return dt_proj(dt_raw)


def _has_its_shape(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        return weight is not None and weight.shape == (module.out_features, module.in_features)
    if isinstance(module, nn.Conv1d):
        return weight is not None and weight.shape == (
            module.out_channels,
            module.in_channels // module.groups,
            *module.kernel_size,
        )
    return True


# What is lost where one of these is called as a module instead of fused.
_COSTS = {
    "in_proj": "with temporal_stride > 1 the gate is computed for every token",
    "conv1d": "PyTorch's convolution on a transposed copy, activation apart, each packed sequence by itself",
    "x_proj": "half precision on the CPU goes without our product",
    "dt_proj": "in half precision its bias is added in that precision, not in float32",
    "out_proj": "with a token reduction it runs on every token, and the reduction after it",
    "act": "the convolution's activation is a pass of its own",
    "proj": "half precision on the CPU goes without our product",
    "layer": "with a token reduction the last layer runs on every token, and the reduction after it",
}


def unfused(module: nn.Module) -> tuple[str, ...]:
    """One line for each module in ``module`` that is called instead of fused, with what that costs;
    empty if all are fused. Results are the same.

    Example:
        >>> from storm_kernels import BiMambaMixer
        >>> mixer = BiMambaMixer(4)
        >>> unfused(mixer)
        ()
        >>> _ = mixer.x_proj.register_forward_hook(print)
        >>> unfused(mixer)
        ('x_proj (Linear) is called, not fused: half precision on the CPU goes without our product',)
    """
    found = []
    for parent_name, parent in module.named_modules():
        prefix = f"{parent_name}." if parent_name else ""
        if hasattr(parent, "mixer_class"):  # a projector
            layers = [(f"{prefix}layers.{i}", layer) for i, layer in enumerate(parent.layers)]
            called = [*layers, *((f"{name}.mixer", layer.mixer) for name, layer in layers if hasattr(layer, "mixer"))]
            found += [(name, child, "layer") for name, child in called if not runs_its_forward_only(child)]
        elif not hasattr(parent, "A_log"):
            continue
        children = ((prefix + name, child, name.removesuffix("_b")) for name, child in parent.named_children())
        found += [
            (name, child, role) for name, child, role in children if role in _COSTS and not _is_fused(role, child)
        ]
    return tuple(f"{name} ({type(child).__name__}) is called, not fused: {_COSTS[role]}" for name, child, role in found)


def _is_fused(role: str, module: nn.Module) -> bool:
    checks: dict[str, Callable[[nn.Module], bool]] = {"act": is_silu, "conv1d": is_plain_convolution}
    return checks.get(role, is_plain)(module)
