"""One question, asked wherever a fused path would go around a module: may its parameters be used in its place?

Adapters, hooks, quantised and offloaded layers, parametrizations, pruning and replaced forwards all act when a module is *called*. A kernel that
reads the module's weight instead would leave them out in silence. So whoever reads a weight asks :func:`is_plain` first, and calls the
module where the answer is no.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A tensor of any other class (quantised, sharded) multiplies in its own way. The last two stand for plain ones while a program is traced.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling ``module`` does what class ``kind`` does with its parameters, and nothing else.

    No: another class (a subclass too: adapters and quantised layers are such), a forward replaced on the instance, a hook on it or on all
    modules, a weight that is no plain tensor, has another shape than the class gives it, or lies on the meta device (offloaded).

    Args:
        module: the module that a fused path would go around.
        kind: the class it has to be, exactly.

    Example:
        >>> is_plain(nn.Linear(2, 3))
        True
    """
    if type(module) is not kind or "forward" in vars(module) or _module._has_any_global_hook():
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    if any(type(p) not in _PLAIN_TENSORS or p.is_meta for p in module._parameters.values() if p is not None):
        return False
    return _has_its_shape(module)


def _has_its_shape(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module._parameters.get("weight") is not None and module.weight.shape == (module.out_features, module.in_features)
    if isinstance(module, nn.Conv1d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        return module._parameters.get("weight") is not None and module.weight.shape == shape
    return True
