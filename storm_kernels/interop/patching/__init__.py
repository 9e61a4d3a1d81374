"""patch(model): the mixers a model already has, on our kernels; unpatch(model): as they were.

A mixer is replaced by changing its class to a subclass that differs in ``forward`` only.
Parameters, buffers, hooks, names and ``state_dict`` stay the objects they were, so nothing is
copied and a wrapper (``torch.compile``, DDP, DataParallel, PEFT) around it or around its model
keeps working. How: :mod:`storm_kernels.interop.patching`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...plain import unfused
from ...tokens import described
from ..transformers import not_fused
from .classes import Recipe, install, restore
from .classes import rebuild as _rebuild  # noqa: F401  pickles of earlier versions name it here
from .recognise import ALREADY, Recognition, recognise
from .report import Entry, PatchError, PatchReport
from .trial import Verdict, trial, why_no_trial

__all__ = ["Entry", "PatchError", "PatchReport", "patch", "patched", "unpatch"]

Verdicts = dict[object, tuple[Recipe, Verdict]]  # by class and shape of a module


def patch(model: nn.Module, *, check: bool = False) -> PatchReport:
    """Run the model's mixers on our kernels; results, weights and ``state_dict`` stay the same.

    Known are reference projectors, ``Mamba`` of mamba_ssm, Vim and VideoMamba, and the Mamba,
    FalconMamba, Jamba and Zamba mixers of transformers.

    A mixer of a class or a generation that is not known here is tried: its own forward and ours run
    on a few random tokens, with its weights, on its device, with and without padding and cache; it
    is replaced if they agree, and skipped with the figure if not. The bound is 1e-4 of the largest
    value in float32 and float64, 1e-2 in float16, 5e-2 in bfloat16. The trial leaves no trace: no
    hook fires, no gradient, buffer, random number or counter changes.

    Args:
        model: what has the mixers, or is one.
        check: try those that are known, too, one of each class and shape; the report's notes have the figures. Not by
            default.

    Returns:
        What was replaced, what was skipped and why.

    Raises:
        TypeError: ``model`` is not a module.
        PatchError: nothing was replaced: no such mixer, each was skipped, or all are patched already.

    Example:
        >>> from storm_kernels.reference import ReferenceMixer
        >>> model = nn.Sequential(ReferenceMixer(d_model=8, d_state=4))
        >>> print(patch(model))
        replaced 1, skipped 0
          replaced 0: ReferenceMixer
    """
    return _patch(model, check)[1]


def unpatch(model: nn.Module) -> tuple[str, ...]:
    """Give every patched module of a model its own forward back.

    What other libraries did to their classes in between stays.

    Args:
        model: what was patched, or holds it.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: ``model`` is not a module.
        PatchError: no module is patched, or a class that was put on top of ours cannot be made again without it.

    Example:
        >>> from storm_kernels.reference import ReferenceMixer
        >>> model = nn.Sequential(ReferenceMixer(d_model=8, d_state=4))
        >>> _ = patch(model)
        >>> unpatch(model)
        ('0',)
    """
    _check_module(model)
    memo: dict[Any, Any] = {}
    names = [name for name, module in model.named_modules() if restore(module, memo)]
    if not names:
        raise PatchError(f"unpatch: no module of this {type(model).__name__} is patched")
    return tuple(names)


@contextmanager
def patched(model: nn.Module, *, check: bool = False) -> Iterator[PatchReport]:
    """``with patched(model) as report:`` patches on entry and, on exit, restores what it replaced.

    Args:
        model: what has the mixers, or is one.
        check: as :func:`patch` takes it; not by default.

    Raises:
        TypeError: ``model`` is not a module.
        PatchError: nothing was replaced.

    Example:
        >>> from storm_kernels.reference import ReferenceMixer
        >>> model = nn.Sequential(ReferenceMixer(d_model=8, d_state=4))
        >>> import torch
        >>> with patched(model) as report:
        ...     len(report.replaced), model(torch.ones(1, 6, 8)).shape
        (1, torch.Size([1, 6, 8]))
    """
    modules, report = _patch(model, check)
    try:
        yield report
    finally:
        memo: dict[Any, Any] = {}
        for module in modules:
            restore(module, memo)


def _patch(model: nn.Module, check: bool) -> tuple[list[nn.Module], PatchReport]:
    _check_module(model)
    modules, replaced, skipped = [], [], []
    verdicts: Verdicts = {}
    memo: dict[Any, Any] = {}
    for name, module in list(model.named_modules()):
        class_name, found = type(module).__name__, recognise(module)
        recipe, text = _settle(module, found, check, verdicts)
        if recipe is not None:
            try:
                install(module, recipe, memo)
            except PatchError as error:
                recipe, text = None, str(error)
        if recipe is not None:
            replaced.append(Entry(name, class_name, note=text))
            modules.append(module)
        elif text:
            skipped.append(Entry(name, class_name, text))
    report = PatchReport(tuple(replaced), tuple(skipped))
    if not replaced:
        raise PatchError(_nothing(model, report))
    return modules, report


def _settle(module: nn.Module, found: Recognition, check: bool, verdicts: Verdicts) -> tuple[Recipe | None, str]:
    """How to replace the module and the note on it; or None and why not."""
    if not found.recipes:
        return None, found.why
    if not found.doubt and not check:
        return found.recipes[0], _note(module, found.recipes[0])
    untried = why_no_trial(module)
    recipe, verdict = (found.recipes[0], Verdict(None, untried)) if untried else _tried(module, found, verdicts)
    if verdict.agrees:
        return recipe, _note(module, recipe, verdict.text)
    if found.doubt:
        return (
            None,
            f"{found.doubt}, and {verdict.text}"
            if not untried
            else f"{found.doubt}, and it cannot be tried: {untried}",
        )
    return (
        (None, verdict.text)
        if verdict.agrees is False
        else (recipe, _note(module, recipe, f"not checked: {verdict.text}"))
    )


def _tried(module: nn.Module, found: Recognition, verdicts: Verdicts) -> tuple[Recipe, Verdict]:
    """The first recipe that agrees, else the likeliest; modules of one class and one shape share a verdict."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    key = (
        tuple((name, type(child)) for name, child in module.named_modules()),
        tuple((name, t.shape, t.dtype, t.device) for name, t in tensors),
        tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, float, str))),
    )
    if key not in verdicts:
        results = [(found.recipes[0], trial(module, found.recipes[0]))]
        for recipe in found.recipes[1:]:
            if not results[-1][1].agrees:
                results.append((recipe, trial(module, recipe)))
        verdicts[key] = results[-1] if results[-1][1].agrees else results[0]
    return verdicts[key]


def _note(module: nn.Module, recipe: Recipe, checked: str = "") -> str:
    notes = [checked] if checked else []
    notes += [not_fused(module, recipe.old)] if recipe.kind == "transformers" else unfused(module)
    if recipe.signature is not None and recipe.signature.defaults:
        notes.append(f"a call with {', '.join(name for name, _ in recipe.signature.defaults)} runs its own forward")
    return "; ".join(note for note in notes if note)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {described(model)}")


def _nothing(model: nn.Module, report: PatchReport) -> str:
    if not report.skipped:
        return f"patch: this {type(model).__name__} has no Mamba-1 mixer, nothing to patch"
    if all(e.why == ALREADY for e in report.skipped):
        return (
            f"patch: this {type(model).__name__} is patched already ({len(report.skipped)} modules); "
            "unpatch(model) restores it"
        )
    return f"patch: nothing replaced in this {type(model).__name__}\n{report}"
