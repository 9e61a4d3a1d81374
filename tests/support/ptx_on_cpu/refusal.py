"""What the interpreter raises."""

from __future__ import annotations


class Refused(RuntimeError):
    """The kernel did what a GPU may answer with a fault or with another result; the message says
    what, where and which thread.
    """


class Unknown(Refused):
    """An instruction that the interpreter does not have."""
