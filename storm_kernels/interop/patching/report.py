"""What ``patch`` tells: one entry a module."""

from __future__ import annotations

from dataclasses import dataclass


class PatchError(RuntimeError):
    """There is nothing to patch, or to unpatch, and the message says why.

    Example:
        >>> from torch import nn
        >>> from storm_kernels import patch
        >>> try:
        ...     patch(nn.Linear(2, 2))
        ... except PatchError as error:
        ...     print(error)
        patch: this Linear has no Mamba-1 mixer, nothing to patch
    """


@dataclass(frozen=True)
class Entry:
    """One module of the model, and what became of it.

    Args:
        name: its name in the model; "" for the model itself.
        class_name: its class.
        why: why it was skipped; "", the default, for a replaced one.
        note: what of a replaced module is not fused and what that costs, and how far a self-check found it from its
            own forward; "" by default.

    Example:
        >>> Entry("layers.0", "Mamba").why
        ''
    """

    name: str
    class_name: str
    why: str = ""
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did; printing it gives one line a module.

    Args:
        replaced: the modules that run on the kernels now.
        skipped: the mixers that do not, and why.

    Example:
        >>> print(PatchReport(replaced=(Entry("layers.0", "Mamba"),), skipped=()))
        replaced 1, skipped 0
          replaced layers.0: Mamba
    """

    replaced: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    def __str__(self) -> str:
        """One line a module, after one with their numbers."""
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [
            f"  replaced {e.name or '(the model)'}: {e.class_name}{f' ({e.note})' if e.note else ''}"
            for e in self.replaced
        ]
        lines += [f"  skipped {e.name or '(the model)'}: {e.class_name}: {e.why}" for e in self.skipped]
        return "\n".join(lines)
