"""Warnings that point at the line of whoever called the library, however deep inside it they arise."""

from __future__ import annotations

import sys
import warnings

# Packages whose lines are no caller's: this project's, and those that stand between a caller and it.
_INSIDE = frozenset({"storm_kernels", "storm_model", "torch", "transformers"})


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of this thread that is outside these packages."""
    level, frame = 1, sys._getframe()
    while _package(frame.f_globals) in _INSIDE and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    """The package of the module that has these global names."""
    return str(names.get("__name__")).partition(".")[0]
