"""How a module's class changes to one whose forward is ours, and changes back, among other
libraries that change classes too.

Other libraries (``parametrize``, ``fully_shard``) put classes made at run time on top of a module's
own. Ours goes beneath those: they are made again, as they were, on the patched class, and on the
original one when it goes. So each library undoes its own part, in any order.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType

from torch import Tensor, nn

from ...backends.dispatch import slow_path
from ...nn import BiMambaMixer, TemporalProjector
from ..mixer import MambaForward
from ..transformers import mixer_forward
from .report import PatchError
from .signature import CACHE, INPUT, MASK, POSITION, Signature, plain_forward, signature_of

_PACKING = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")


@dataclass(frozen=True)
class Recipe:
    """How a module is replaced.

    Attributes:
        kind: "mixer", "projector" (the references), "mamba" (mamba_ssm, Vim, VideoMamba) or "transformers".
        signature: what the arguments of its own forward mean; None for the references, whose forwards we know.
        old: which of the two forms of transformers' mixers (:mod:`storm_kernels.interop.transformers`).
    """

    kind: str
    signature: Signature | None = None
    old: bool = False


class Patched:
    """Marks a patched module; ``_storm_original`` is its own class, ``_storm_recipe`` how it is replaced."""

    _storm_original: type[nn.Module]
    _storm_recipe: Recipe

    def __reduce_ex__(self, protocol):
        if type(self) is not fast_class(self._storm_original, self._storm_recipe):
            return super().__reduce_ex__(protocol)  # another library's class is on top, and copies as it pleases
        # The class is made at run time, so copies and pickles name the original and make it again.
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return rebuild, (self._storm_original, self._storm_recipe), *state


def rebuild(original: type[nn.Module], recipe: Recipe | str) -> nn.Module:
    """An empty patched module, for copies and pickles; pickles of earlier versions name the kind only."""
    if isinstance(recipe, str):
        kind = recipe.removesuffix(" with positions")
        named = kind in ("mamba", "transformers")
        recipe = Recipe(kind, signature_of(original, kind) if named else None, hasattr(original, "slow_forward"))
    cls = fast_class(original, recipe)
    return cls.__new__(cls)


def install(module: nn.Module, recipe: Recipe, memo: dict) -> None:
    """Give ``module`` our forward. ``memo``: one dict a call of ``patch``, so that modules that
    shared a class share one afterwards.
    """
    original = own_class(type(module))
    module.__class__ = patched_class(type(module), recipe, memo)
    _rebind(module, original, fast_class(original, recipe))


def patched_class(cls: type[nn.Module], recipe: Recipe, memo: dict) -> type[nn.Module]:
    """``cls`` with our forward beneath what other libraries put on top."""
    original = own_class(cls)
    return _rebased(cls, original, fast_class(original, recipe), memo)


def restore(module: nn.Module, memo: dict) -> bool:
    """Undo :func:`install`, and nothing else; whether there was anything to undo."""
    if not isinstance(module, Patched):
        return False
    fast, original = next(cls for cls in type(module).__mro__ if Patched in cls.__bases__), module._storm_original
    module.__class__ = _rebased(type(module), fast, original, memo)
    _rebind(module, fast, original)
    return True


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class beneath those that other libraries made at run time, which cannot be imported and define no forward."""
    while "forward" not in vars(cls) and "<locals>" not in cls.__qualname__:
        if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
            break
        bases = [base for base in cls.__bases__ if issubclass(base, nn.Module) and base is not nn.Module]
        if len(bases) != 1:
            break
        cls = bases[0]
    return cls


def overridden(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs something else than its class's forward, accelerate's hooks aside."""
    own = vars(module)
    if "slow_forward" in own:
        return True
    name = "_old_forward" if "_hf_hook" in own else "forward"
    return name in own and not _is_bound(own[name], module, type(module).forward)


def _rebind(module: nn.Module, before: type, after: type) -> None:
    """Methods that accelerate has put on the instance: those that are the forward of before become the one of after."""
    for name in ("forward", "_old_forward"):
        if _is_bound(vars(module).get(name), module, before.forward):
            vars(module)[name] = MethodType(after.forward, module)


def _is_bound(method: object, module: nn.Module, function: Callable) -> bool:
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is function


def _rebased(cls: type, before: type, after: type, memo: dict) -> type:
    """``cls`` with ``after`` for ``before`` among its bases: itself, or made again."""
    if cls is before:
        return after
    if not issubclass(cls, before):
        return cls
    if (cls, after) not in memo:
        where = f"the class {cls.__name__} was put on top of {before.__name__}"
        bound = [
            name
            for name, value in vars(cls).items()
            if isinstance(value, FunctionType) and "__class__" in value.__code__.co_freevars
        ]
        if bound:
            raise PatchError(f"{where} and its {', '.join(bound)} names it: undo that first")
        names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        bases = tuple(_rebased(base, before, after, memo) for base in cls.__bases__)
        try:
            memo[cls, after] = type(cls)(cls.__name__, bases, names)
        except TypeError as error:
            raise PatchError(f"{where} and cannot be made again ({error}): undo that first") from None
    return memo[cls, after]


@cache
def fast_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """A subclass of ``original`` under its own name whose forward is ours."""
    names = {
        "_storm_original": original,
        "_storm_recipe": recipe,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    fast = {"mixer": BiMambaMixer, "projector": TemporalProjector, "mamba": MambaForward}.get(recipe.kind)
    if fast is None:
        return type(
            original.__name__,
            (Patched, original),
            names | {"forward": _by_roles(original, recipe, _transformers_forward)},
        )
    if recipe.kind == "mamba" and recipe.signature.defaults:
        names["forward"] = _by_roles(original, recipe, _mamba_forward)
    return type(original.__name__, (Patched, fast) if issubclass(fast, original) else (Patched, fast, original), names)


def _by_roles(original: type[nn.Module], recipe: Recipe, compute: Callable) -> Callable:
    """A forward that takes what the original's takes; a call that it does not wholly understand is the original's."""
    read, old = recipe.signature.reader(), recipe.old

    def forward(self, *args, **kwargs):
        values = read(args, kwargs)
        if values is None:
            slow_path(
                f"a call of {original.__name__} has an argument that is not known here: its own forward runs, "
                "not our kernels"
            )
            return original.forward(self, *args, **kwargs)
        return compute(self, values, kwargs, old)

    forward.__signature__ = inspect.signature(plain_forward(original.forward))
    forward.__qualname__, forward.__doc__ = original.forward.__qualname__, original.forward.__doc__
    return forward


def _transformers_forward(mixer: nn.Module, values: dict, kwargs: dict, old: bool) -> Tensor:
    packing = [name for name in _PACKING if kwargs.get(name) is not None]
    if packing:
        raise ValueError(
            f"{type(mixer).__name__} keeps packed sequences apart neither here nor in plain PyTorch, "
            f"got {', '.join(packing)}"
        )
    return mixer_forward(mixer, values[INPUT], values.get(CACHE), values.get(MASK), values.get(POSITION), old=old)


def _mamba_forward(mixer: nn.Module, values: dict, kwargs: dict, old: bool) -> Tensor:
    return MambaForward.forward(mixer, values[INPUT], values.get(CACHE))
