"""Other projects' call signatures on our kernels, and :func:`install`, which lets ``import
mamba_ssm`` and ``import causal_conv1d`` find them.
"""

from .install import InstallReport, install, uninstall

__all__ = ["InstallReport", "install", "uninstall"]
