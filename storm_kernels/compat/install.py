"""``import mamba_ssm`` and ``import causal_conv1d`` where the originals are absent, or on request in their place.

The module paths are those that Vim, VideoMamba, BIMBA and transformers import. Only names that exist here are offered; anything else is an
ImportError that names it, as for any module.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType

from . import causal_conv1d, inference, mamba_ssm, norms, vim

_SCAN_NAMES = {
    "selective_scan_fn": mamba_ssm.selective_scan_fn,
    "selective_scan_ref": mamba_ssm.selective_scan_ref,
    "mamba_inner_fn": mamba_ssm.mamba_inner_fn,
    "bimamba_inner_fn": vim.bimamba_inner_fn,
    "mamba_inner_fn_no_out_proj": vim.mamba_inner_fn_no_out_proj,
}
_NORM_NAMES = {name: getattr(norms, name) for name in ("RMSNorm", "layer_norm_fn", "rms_norm_fn")}
_CONV_NAMES = {name: getattr(causal_conv1d, name) for name in causal_conv1d.__all__}

# The version is that of the interface: below 2.0.4, at which transformers takes Mamba-2 to be there.
_PACKAGES = {
    "mamba_ssm": {
        "mamba_ssm": {
            "__version__": "1.2.2+storm.kernels",
            "Mamba": mamba_ssm.Mamba,
            "selective_state_update": mamba_ssm.selective_state_update,
            **_SCAN_NAMES,
        },
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": _SCAN_NAMES,
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm": _NORM_NAMES,
        "mamba_ssm.ops.triton.layer_norm": _NORM_NAMES,
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": mamba_ssm.selective_state_update},
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": {"Mamba": mamba_ssm.Mamba},
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {name: getattr(inference, name) for name in ("GenerationMixin", "InferenceParams")},
        "mamba_ssm.utils.hf": {name: getattr(inference, name) for name in ("load_config_hf", "load_state_dict_hf")},
    },
    "causal_conv1d": {
        "causal_conv1d": {"__version__": "1.4.0+storm.kernels", **_CONV_NAMES},
        "causal_conv1d.causal_conv1d_interface": _CONV_NAMES,
    },
}

# Per installed package, the modules that it displaced.
_displaced: dict[str, dict[str, ModuleType]] = {}


@dataclass(frozen=True)
class InstallReport:
    """Which packages now resolve to storm_kernels, and which do not and why; printing it gives one line each."""

    installed: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: resolves to storm_kernels" for name in self.installed]
        return "\n".join(lines + [f"{name}: left alone, {why}" for name, why in self.skipped.items()])


def install(*, replace: bool = False) -> InstallReport:
    """Make ``import mamba_ssm`` and ``import causal_conv1d`` resolve to storm_kernels, in this process, until :func:`uninstall`.

    A package that is really there is left alone, and the report says so; ``replace=True`` puts ours in its place and warns. What was imported
    from it before keeps what it has.
    """
    installed, skipped = [], {}
    for package, modules in _PACKAGES.items():
        if package in _displaced:
            skipped[package] = "it resolves to storm_kernels already"
            continue
        origin = _original(package)
        if origin and not replace:
            skipped[package] = f"the original is there ({origin}); install(replace=True) takes its place"
            continue
        if origin:
            warnings.warn(f"storm_kernels takes the place of {package} at {origin}", stacklevel=2)
        _displaced[package] = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == package}
        _add(modules)
        installed.append(package)
    return InstallReport(tuple(installed), skipped)


def uninstall() -> tuple[str, ...]:
    """Undo :func:`install`; returns the packages that no longer resolve to storm_kernels. Raises RuntimeError if none did."""
    if not _displaced:
        raise RuntimeError("uninstall: neither mamba_ssm nor causal_conv1d resolves to storm_kernels")
    names = tuple(_displaced)
    for package in names:
        for name in _PACKAGES[package]:
            sys.modules.pop(name, None)
        sys.modules.update(_displaced.pop(package))
    return names


def _original(package: str) -> str:
    """Where the original package is, or "" if there is none."""
    if package in sys.modules:
        return getattr(sys.modules[package], "__file__", None) or "imported already"
    spec = importlib.util.find_spec(package)
    return "" if spec is None else spec.origin or str(spec.submodule_search_locations)


def _add(modules: dict[str, dict]) -> None:
    for name, names in modules.items():
        module = ModuleType(name, f"{name}, provided by storm_kernels.compat.")
        is_package = any(other.startswith(f"{name}.") for other in modules)
        module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin="storm_kernels.compat", is_package=is_package)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
