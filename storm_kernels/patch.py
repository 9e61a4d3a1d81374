"""patch(model): the mixers a model already has, on our kernels; unpatch(model): as they were.

A mixer is replaced by changing its class to a subclass that differs in ``forward`` only. Parameters, buffers, hooks, names and
``state_dict`` stay the objects they were, so nothing is copied and a wrapper (``torch.compile``, DDP, DataParallel, PEFT) around it or around
its model keeps working.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from .compat.mixer import BIDIRECTIONAL_TYPES, Mamba, MambaForward, bidirectional_kind
from .compat.transformers import mixer_forward
from .modules import BiMambaMixer, TemporalProjector
from .reference import ReferenceMixer, ReferenceTemporalProjector

_SHAPE = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
_MAMBA_PARAMETERS = {*_SHAPE, "conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b", "gamma"}
_TRANSFORMERS_MIXERS = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")


class PatchError(RuntimeError):
    """There is nothing to patch, or to unpatch, and the message says why."""


@dataclass(frozen=True)
class Entry:
    """One module of the model: its name there, its class, and why it was skipped (empty for a replaced one)."""

    name: str
    class_name: str
    why: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did; printing it gives one line a module."""

    replaced: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [f"  replaced {e.name or '(the model)'}: {e.class_name}" for e in self.replaced]
        lines += [f"  skipped {e.name or '(the model)'}: {e.class_name}: {e.why}" for e in self.skipped]
        return "\n".join(lines)


def patch(model: nn.Module) -> PatchReport:
    """Run the model's mixers on our kernels: reference projectors, ``Mamba`` of mamba_ssm, Vim and VideoMamba, and the Mamba, FalconMamba and Jamba
    mixers of transformers. Results, weights and ``state_dict`` stay the same.

    Raises:
        TypeError: ``model`` is not a module.
        PatchError: nothing was replaced: no such mixer, each was skipped, or all are patched already.
    """
    return _patch(model)[1]


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Give every patched module of ``model`` its own class back; returns their names. Raises :class:`PatchError` if none is patched."""
    _check_module(model)
    names = [name for name, module in model.named_modules() if _restore(module)]
    if not names:
        raise PatchError(f"unpatch: no module of this {type(model).__name__} is patched")
    return tuple(names)


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches on entry and, on exit, restores what it replaced."""
    modules, report = _patch(model)
    try:
        yield report
    finally:
        for module in modules:
            _restore(module)


def _patch(model: nn.Module) -> tuple[list[nn.Module], PatchReport]:
    _check_module(model)
    modules, replaced, skipped = [], [], []
    for name, module in list(model.named_modules()):
        kind, why = _recognise(module)
        if kind:
            replaced.append(Entry(name, type(module).__name__))
            module.__class__ = _fast_class(type(module), kind)
            modules.append(module)
        elif why:
            skipped.append(Entry(name, type(module).__name__, why))
    report = PatchReport(tuple(replaced), tuple(skipped))
    if not replaced:
        raise PatchError(_nothing(model, report))
    return modules, report


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}")


def _nothing(model: nn.Module, report: PatchReport) -> str:
    if not report.skipped:
        return f"patch: this {type(model).__name__} has no Mamba-1 mixer, nothing to patch"
    if all(e.why == _ALREADY for e in report.skipped):
        return f"patch: this {type(model).__name__} is patched already ({len(report.skipped)} modules); unpatch(model) restores it"
    return f"patch: nothing replaced in this {type(model).__name__}\n{report}"


def _restore(module: nn.Module) -> bool:
    if not isinstance(module, _Patched):
        return False
    module.__class__ = module._storm_original
    return True


_ALREADY = "patched already"


def _recognise(module: nn.Module) -> tuple[str | None, str]:
    """(kind, "") of a mixer that can be replaced, (None, reason) of one that cannot, (None, "") of anything else."""
    names = [cls.__name__ for cls in type(module).__mro__]
    if isinstance(module, _Patched):
        return None, _ALREADY
    if isinstance(module, (BiMambaMixer, TemporalProjector, Mamba)):
        return None, "runs on storm_kernels already"
    if isinstance(module, torch.jit.ScriptModule):
        known = getattr(module, "original_name", "") in (*_TRANSFORMERS_MIXERS, "Mamba", "ReferenceMixer", "ReferenceTemporalProjector")
        return None, "is compiled TorchScript; patch the model before scripting it" if known else ""
    if isinstance(module, (ReferenceMixer, ReferenceTemporalProjector)):
        if type(module) not in (ReferenceMixer, ReferenceTemporalProjector):
            return None, f"{type(module).__name__} is a subclass of the reference whose changes a patch would lose"
        return ("mixer" if type(module) is ReferenceMixer else "projector"), _why_not_replace(module)
    if "A_log" not in module._parameters:
        return None, ""
    missing = [name for name in _SHAPE if not hasattr(module, name)]
    if missing:
        return None, f"is not a Mamba-1 mixer: it has no {', '.join(missing)}"
    known = next((name for name in names if name in _TRANSFORMERS_MIXERS), None)
    if known is not None:
        kind, why = _recognise_transformers(module, known)
    elif "Mamba" in names:
        kind, why = "mamba", _why_not_mamba(module)
    else:
        return None, f"has the parameters of a Mamba-1 mixer, but what {type(module).__name__} computes with them is not known here"
    why = why or _why_not_replace(module)
    return (None, why) if why else (kind, "")


def _why_not_replace(module: nn.Module) -> str:
    """Reasons that hold for every kind of mixer."""
    if "forward" in vars(module) or any(hasattr(child, "_hf_hook") for child in module.modules()):
        return "its forward is overridden on the instance (accelerate does so for offloading); patch before that, or load without device_map"
    return ""


def _recognise_transformers(module: nn.Module, known: str) -> tuple[str, str]:
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    # Some versions wrap forward and hide its signature; the plain path of the old generation has the same one.
    parameters = list(inspect.signature(getattr(owner, "slow_forward", owner.forward)).parameters)
    kind = "transformers with positions" if "cache_position" in parameters else "transformers"
    expected = ["cache_params", "attention_mask"] if kind == "transformers" else ["cache_params", "cache_position", "attention_mask"]
    if owner.__name__ != known:
        return kind, f"{owner.__name__} overrides the forward of {known}"
    if parameters[2 : 2 + len(expected)] != expected:
        return kind, f"its forward takes {', '.join(parameters[1:])}: not a generation of transformers that is known here"
    return kind, _why_not_activation(getattr(module, "activation", None))


def _why_not_activation(activation: object) -> str:
    return "" if activation in ("silu", "swish") else f"its activation is {activation!r}; only silu is fused"


def _why_not_mamba(module: nn.Module) -> str:
    own = {name.split(".")[0] for name, _ in module.named_parameters()}
    if own - _MAMBA_PARAMETERS:
        return f"has parameters that no supported variant has: {', '.join(sorted(own - _MAMBA_PARAMETERS))}"
    declared = getattr(module, "bimamba_type", None) or "none"
    if declared not in BIDIRECTIONAL_TYPES:
        return f"bimamba_type={declared!r} is not supported; supported are {', '.join(BIDIRECTIONAL_TYPES)}"
    if bidirectional_kind(module) != "none" and not getattr(module, "use_fast_path", True):
        return "use_fast_path=False makes its own forward ignore the backward direction; set it to True to have both"
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if parameters[:2] != ["hidden_states", "inference_params"] or set(parameters[2:]) - {"T"}:
        return f"its forward takes {', '.join(parameters)}: not a variant that is known here"
    return _why_not_activation(getattr(module, "activation", "silu"))


class _Patched:
    """Marks a patched module; ``_storm_original`` is its own class, ``_storm_kind`` how it is replaced."""

    _storm_original: type[nn.Module]
    _storm_kind: str

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so copies and pickles name the original and make it again.
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return _rebuild, (self._storm_original, self._storm_kind), *state


def _rebuild(original: type[nn.Module], kind: str) -> nn.Module:
    cls = _fast_class(original, kind)
    return cls.__new__(cls)


class _TransformersForward(nn.Module):
    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        packing = [name for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q") if kwargs.get(name) is not None]
        if packing:
            raise ValueError(f"{type(self).__name__} keeps packed sequences apart neither here nor in plain PyTorch, got {', '.join(packing)}")
        return mixer_forward(self, hidden_states, cache_params, attention_mask)


class _TransformersForwardWithPositions(nn.Module):
    def forward(self, hidden_states: Tensor, cache_params=None, cache_position: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        return mixer_forward(self, hidden_states, cache_params, attention_mask, cache_position)


_FORWARDS = {
    "mixer": BiMambaMixer,
    "projector": TemporalProjector,
    "mamba": MambaForward,
    "transformers": _TransformersForward,
    "transformers with positions": _TransformersForwardWithPositions,
}


@cache
def _fast_class(original: type[nn.Module], kind: str) -> type[nn.Module]:
    """A subclass of ``original`` under its own name whose forward is ours."""
    fast = _FORWARDS[kind]
    bases = (_Patched, fast) if issubclass(fast, original) else (_Patched, fast, original)
    names = {"_storm_original": original, "_storm_kind": kind, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, bases, names)
