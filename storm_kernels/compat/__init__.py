"""``storm_kernels.compat``: the modules of :mod:`storm_kernels.interop` under the names by which
code and pickles of earlier releases know them.
"""

import sys
from importlib import import_module

from ..interop import InstallReport, install, uninstall

__all__ = ["InstallReport", "install", "uninstall"]

for _name in (
    "causal_conv1d",
    "inference",
    "install",
    "layout",
    "mamba_ssm",
    "mixer",
    "norms",
    "transformers",
    "vim",
    "vmamba",
):
    sys.modules[f"{__name__}.{_name}"] = import_module(f"..interop.{_name}", __package__)
