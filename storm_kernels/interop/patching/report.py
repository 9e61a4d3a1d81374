"""What ``patch`` tells: one entry a module."""

from __future__ import annotations

from dataclasses import dataclass


class PatchError(RuntimeError):
    """There is nothing to patch, or to unpatch, and the message says why."""


@dataclass(frozen=True)
class Entry:
    """One module of the model: its name there, its class, and why it was skipped (empty for a replaced one).

    ``note`` says what of a replaced module is not fused and what that costs, and how far a
    self-check found it from its own forward.
    """

    name: str
    class_name: str
    why: str = ""
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did; printing it gives one line a module."""

    replaced: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [
            f"  replaced {e.name or '(the model)'}: {e.class_name}{f' ({e.note})' if e.note else ''}"
            for e in self.replaced
        ]
        lines += [f"  skipped {e.name or '(the model)'}: {e.class_name}: {e.why}" for e in self.skipped]
        return "\n".join(lines)
