"""``import mamba_ssm``, ``import causal_conv1d`` and their compiled modules where the originals are
absent, or on request in their place.

What is offered stands in :mod:`storm_kernels.interop.packages`; anything else is an ImportError
that names it, as for any module.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

from ..callers import warn_caller
from .packages import PACKAGES, Absent

# Per installed package, the modules that it displaced.
_displaced: dict[str, dict[str, ModuleType]] = {}


@dataclass(frozen=True)
class InstallReport:
    """Which packages now resolve to storm_kernels, and which do not; printing it gives one line each.

    Args:
        installed: names of those that do.
        skipped: name -> why not.

    Example:
        >>> print(InstallReport(installed=("mamba_ssm",), skipped={}))
        mamba_ssm: resolves to storm_kernels
    """

    installed: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        """One line a package."""
        lines = [f"{name}: resolves to storm_kernels" for name in self.installed]
        return "\n".join(lines + [f"{name}: left alone, {why}" for name, why in self.skipped.items()])


def install(*, replace: bool = False) -> InstallReport:
    """Make ``import mamba_ssm`` and ``import causal_conv1d`` resolve to storm_kernels.

    In this process, until :func:`uninstall`. So do the compiled modules behind them, which some models
    import themselves:
    ``selective_scan_cuda``, VMamba's ``selective_scan_cuda_core`` and
    ``selective_scan_cuda_oflex``, and ``causal_conv1d_cuda``. A package that is really there is
    left alone, and the report says so; ``replace=True`` puts ours in its place and warns. What was
    imported from it before keeps what it has.

    Args:
        replace: take the place of a package that is really there; not by default.

    Returns:
        Which packages resolve to storm_kernels now, and which were left alone and why.

    Example:
        >>> report = install()
        >>> from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        >>> selective_scan_fn.__module__
        'storm_kernels.interop.mamba_ssm'
        >>> _ = uninstall()
    """
    installed, skipped = [], {}
    for package, modules in PACKAGES.items():
        if package in _displaced:
            skipped[package] = "it resolves to storm_kernels already"
            continue
        origin = _original(package)
        if origin and not replace:
            skipped[package] = f"the original is there ({origin}); install(replace=True) takes its place"
            continue
        if origin:
            warn_caller(f"storm_kernels takes the place of {package} at {origin}")
        _displaced[package] = {
            name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == package
        }
        _add(modules)
        installed.append(package)
    return InstallReport(tuple(installed), skipped)


def uninstall() -> tuple[str, ...]:
    """Undo :func:`install`.

    Returns:
        The packages that no longer resolve to storm_kernels.

    Raises:
        RuntimeError: none did.

    Example:
        >>> _ = install()
        >>> "mamba_ssm" in uninstall()
        True
    """
    if not _displaced:
        raise RuntimeError("uninstall: neither mamba_ssm nor causal_conv1d resolves to storm_kernels")
    names = tuple(_displaced)
    for package in names:
        for name in PACKAGES[package]:
            sys.modules.pop(name, None)
        sys.modules.update(_displaced.pop(package))
    return names


def _original(package: str) -> str:
    """Where the original package is, or "" if there is none."""
    if package in sys.modules:
        return getattr(sys.modules[package], "__file__", None) or "imported already"
    spec = importlib.util.find_spec(package)
    return "" if spec is None else spec.origin or str(spec.submodule_search_locations)


def _add(modules: dict[str, dict[str, object]]) -> None:
    for name, names in modules.items():
        module = ModuleType(name, f"{name}, provided by storm_kernels.interop.")
        is_package = any(other.startswith(f"{name}.") for other in modules)
        module.__spec__ = importlib.machinery.ModuleSpec(
            name, loader=None, origin="storm_kernels.interop", is_package=is_package
        )
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        looked_up = {
            key: value
            for key, value in names.items()
            if key == "mamba_inner_fn" or isinstance(value, Absent) or _is_absent_class(value)
        }
        vars(module).update({key: value for key, value in names.items() if key not in looked_up})
        if looked_up:
            vars(module)["__all__"] = [key for key in names if not key.startswith("_")]
            vars(module)["__getattr__"] = _lookup(name, looked_up)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def _is_absent_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Absent)


def _lookup(module: str, names: dict[str, object]) -> Callable[[str], object]:
    """The ``__getattr__`` of a module for the names whose value depends on who asks.

    transformers, which has plain code beside each kernel, is not shown what would raise. In place
    of mamba_inner_fn it gets back the function that it holds beside it, which tells a mixer to run
    its steps one by one, on our convolution and scan: mamba_inner_fn knows neither the activation
    and the padding of the mixer, nor adapters and hooks on its projections, and it norms delta
    after the projection of delta where FalconMamba norms it before. So training computes what
    inference does.
    """

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        asks = sys._getframe(1)
        if name != "mamba_inner_fn":
            if _of_transformers(asks):
                raise AttributeError(f"{module}.{name} is not supported by storm_kernels")
            return names[name]
        fallback = _fallback_of(asks)
        return names[name] if fallback is None else _stand_in(fallback)

    return __getattr__


def _of_transformers(frame: FrameType | None) -> bool:
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "transformers"


def _fallback_of(frame: FrameType | None) -> Callable[..., Any] | None:
    """The function of one of transformers' models that it is about to replace by ours, or None.

    Its decorator holds it in a local variable. A module's own frame is not asked: its locals are
    all that the module has.
    """
    while frame is not None and _of_transformers(frame) and frame.f_code.co_name != "<module>":
        for value in frame.f_locals.values():
            if inspect.isfunction(value) and str(value.__module__).startswith("transformers.models."):
                return value
        frame = frame.f_back
    return None


def _stand_in(fallback: Callable[..., Any]) -> Callable[..., Any]:
    """``fallback`` under another identity, for transformers takes the same function as "nothing is
    installed" and says so.
    """

    @functools.wraps(fallback)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fallback(*args, **kwargs)

    return call
