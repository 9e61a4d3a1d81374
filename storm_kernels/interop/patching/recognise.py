"""Which modules are mixers that we can replace, by their class where it is known here and by their
parameters where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from ...nn import BiMambaMixer, TemporalProjector
from ...reference import ReferenceMixer, ReferenceTemporalProjector
from ..mixer import BIDIRECTIONAL_TYPES, Mamba, MambaForward, bidirectional_kind
from ..transformers import by_head
from .classes import Patched, Recipe, overridden, own_class
from .signature import CACHE, signature_of

ALREADY = "patched already"
_SHAPE = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
_SHAPE_BY_HEAD = ("in_proj", "conv1d", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D", "out_proj")
_MAMBA_PARAMETERS = {*_SHAPE, "conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b", "gamma"}
_TRANSFORMERS_MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer")
# Methods of MambaForward that a mixer of that name must not have: its own forward still serves
# calls that ours does not understand.
_OURS = {name for name in vars(MambaForward) if name.startswith("_") and not name.startswith("__")} - {
    "_get_states_from_cache"
}
_REFERENCES = {ReferenceMixer: ("mixer", BiMambaMixer), ReferenceTemporalProjector: ("projector", TemporalProjector)}


@dataclass(frozen=True)
class Recognition:
    """What a module is.

    Attributes:
        recipes: how it may be replaced, the likeliest first; none if it cannot be, or is no mixer at all.
        doubt: why a recipe has to prove itself before it is used; empty where the class is known.
        why: why a mixer cannot be replaced; empty for what is no mixer.
    """

    recipes: tuple[Recipe, ...] = ()
    doubt: str = ""
    why: str = ""


def recognise(module: nn.Module) -> Recognition:
    """What ``module`` is and how it may be replaced."""
    if isinstance(module, Patched):
        return Recognition(why=ALREADY)
    if isinstance(module, (BiMambaMixer, TemporalProjector, Mamba)):
        return Recognition(why="runs on storm_kernels already")
    if isinstance(module, torch.jit.ScriptModule):
        known = getattr(module, "original_name", "") in (
            *_TRANSFORMERS_MIXERS,
            "Mamba",
            "ReferenceMixer",
            "ReferenceTemporalProjector",
        )
        return Recognition(why="is compiled TorchScript; patch the model before scripting it" if known else "")
    reference = next((cls for cls in _REFERENCES if isinstance(module, cls)), None)
    if reference is not None:
        found = _reference(module, reference)
    elif not _has(module, "A_log"):
        return Recognition()
    else:
        found = _mixer(module)
    if found.recipes and overridden(module):
        return Recognition(why="its forward is overridden on the instance: patch the model before that")
    return found


def _has(module: nn.Module, name: str) -> bool:
    """Whether the module itself has this parameter: registered, parametrized, or put on it as a plain tensor."""
    return (
        name in module._parameters
        or parametrize.is_parametrized(module, name)
        or isinstance(vars(module).get(name), torch.Tensor)
    )


def _reference(module: nn.Module, reference: type[nn.Module]) -> Recognition:
    kind, fast = _REFERENCES[reference]
    own = own_class(type(module))  # what other libraries put on top stays on top
    above = own.__mro__[: own.__mro__.index(reference)]
    ours = {name for cls in (reference, fast) for name in vars(cls) if not name.startswith("__")}
    changed = sorted({name for cls in above for name in vars(cls)} & ours)
    if changed:
        why = (
            f"{type(module).__name__} is a subclass of the reference whose changes a patch would lose: "
            f"{', '.join(changed)}"
        )
        return Recognition(why=why)
    return Recognition((Recipe(kind),))


def _mixer(module: nn.Module) -> Recognition:
    """A module with an A_log of its own."""
    missing = [name for name in (_SHAPE_BY_HEAD if by_head(module) else _SHAPE) if not hasattr(module, name)]
    if missing:
        return Recognition(why=f"is not a Mamba-1 mixer: it has no {', '.join(missing)}")
    names = [cls.__name__ for cls in type(module).__mro__]
    known = next((name for name in names if name in _TRANSFORMERS_MIXERS), None)
    if known is not None:
        return _transformers(module, known)
    if "Mamba" in names:
        return _mamba(module)
    return _unknown(module)


def _transformers(module: nn.Module, known: str) -> Recognition:
    doubt = ""
    owners = {_owner(module, name) for name in ("forward", "slow_forward")} - {None}
    strange = sorted(cls.__name__ for cls in owners if cls.__name__ != known)
    if strange:
        doubt = f"{', '.join(strange)} overrides the forward of {known}"
    old = hasattr(module, "slow_forward")
    signature = signature_of(own_class(type(module)), "transformers")
    if signature is None:
        return Recognition(
            why="its forward needs more than one argument: not a generation of transformers that is known here"
        )
    strangers = [name for name, _ in signature.defaults]
    if strangers and not doubt:
        doubt = f"its forward takes {', '.join(strangers)}, which no generation of transformers known here has"
    elif not doubt and signature.name_of(CACHE) is None:
        doubt = "its forward takes no cache that is known here"
    return Recognition(_recipes(signature, (old,) if not strange else (old, not old)), doubt)


def _recipes(signature, forms: tuple[bool, ...]) -> tuple[Recipe, ...]:
    return tuple(Recipe("transformers", guess, old) for guess in signature.guesses() for old in forms)


def _owner(module: nn.Module, name: str) -> type | None:
    return next((cls for cls in type(module).__mro__ if name in vars(cls)), None)


def _mamba(module: nn.Module) -> Recognition:
    own = {name.split(".")[0] for name, _ in module.named_parameters()} - {"parametrizations"}
    if own - _MAMBA_PARAMETERS:
        return Recognition(
            why=f"has parameters that no supported variant has: {', '.join(sorted(own - _MAMBA_PARAMETERS))}"
        )
    declared = getattr(module, "bimamba_type", None) or "none"
    if declared not in BIDIRECTIONAL_TYPES:
        return Recognition(
            why=f"bimamba_type={declared!r} is not supported; supported are {', '.join(BIDIRECTIONAL_TYPES)}"
        )
    if bidirectional_kind(module) != "none" and not getattr(module, "use_fast_path", True):
        return Recognition(
            why="use_fast_path=False makes its own forward ignore the backward direction; set it to True to have both"
        )
    activation = getattr(module, "activation", "silu")
    if activation not in ("silu", "swish"):
        return Recognition(why=f"its activation is {activation!r}; only silu is fused")
    signature = signature_of(own_class(type(module)), "mamba")
    if signature is None:
        return Recognition(why="its forward needs more than one argument: not a variant that is known here")
    owner = _owner(module, "forward")
    if owner.__name__ != "Mamba":
        return Recognition((Recipe("mamba", signature),), f"{owner.__name__} overrides the forward of Mamba")
    if signature.defaults:
        names = ", ".join(name for name, _ in signature.defaults)
        if any(hasattr(type(module), name) for name in _OURS):
            return Recognition(why=f"its forward takes {names}: not a variant that is known here")
        return Recognition((Recipe("mamba", signature),), f"its forward takes {names}, which no variant known here has")
    return Recognition((Recipe("mamba", signature),))


def _unknown(module: nn.Module) -> Recognition:
    """A class that is not known by its name: every form is tried."""
    doubt = (
        f"has the parameters of a Mamba-1 mixer, but what {type(module).__name__} computes with them is not known here"
    )
    signature = signature_of(own_class(type(module)), "transformers")
    if signature is None:
        return Recognition(why=doubt)
    old = hasattr(module, "slow_forward")
    recipes = _recipes(signature, (old, not old))
    if hasattr(module, "dt_rank") and not by_head(module):
        recipes = (*(recipe for recipe in _mamba(module).recipes if not recipe.signature.defaults), *recipes)
    return Recognition(recipes, doubt)
