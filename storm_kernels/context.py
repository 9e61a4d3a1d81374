"""What ``with use_backend``, ``with strict`` and ``with recording`` have set: for the thread or
asyncio task that is inside, and for no other.

torch.compile cannot trace a ContextVar (as of PyTorch 2.13). But it takes a module's attribute for
a constant and, before it runs what it has compiled, asks for the attribute again, in the thread and
context of that call: so a setting is also an attribute of this module, ``context.backend``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any
from warnings import warn

import torch

_VARIABLES = {name: ContextVar(f"storm_kernels.{name}", default=None) for name in ("backend", "strict", "recorder")}
# What holds where no context is entered, in every thread.
defaults: dict[str, Any] = {
    "backend": "",
    "strict": os.environ.get("STORM_KERNELS_STRICT", "") not in ("", "0"),
    "recorder": None,
}
# Settings entered inside a function while it is compiled: the compiler follows a dictionary's
# items, and undoes them with the `with`.
_traced: dict[str, Any] = dict.fromkeys(_VARIABLES)
_this = sys.modules[__name__]
# Whether this thread is one of autograd's own (a GPU's; activation checkpointing runs forward
# passes there), and so has the context of its caller. PyTorch keeps that for its compiled code,
# under a private name: without it there is none.
_has_caller = getattr(torch._C, "_is_key_in_tls", lambda key: False)


def __getattr__(name: str) -> Any:
    variable = _VARIABLES.get(name)
    if variable is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = variable.get()
    if found is None and _has_caller("context"):
        caller = torch._C._get_obj_in_tls("context")
        found = None if caller is None else caller.get(variable)
    return defaults[name] if found is None else found


def current(name: str) -> Any:
    """The setting "backend", "strict" or "recorder" as it holds here."""
    found = _traced[name]
    return getattr(_this, name) if found is None else found


class Setting:
    """Context manager, or decorator of a function, within which a setting has a value; warns when
    it is thrown away without having been entered.
    """

    _idle = False

    def __init__(self, name: str, value: Any, call: str, instead: str = "") -> None:
        self._name, self._value, self._call, self._instead = name, value, call, instead
        self._before: list[tuple[bool, Any]] = []  # (whether while compiling, what held) of each time it was entered
        self._idle = True

    def __enter__(self) -> None:
        self._idle = False
        if torch.compiler.is_dynamo_compiling():
            self._before.append((True, _traced[self._name]))
            _traced[self._name] = self._value
        else:
            self._before.append((False, _VARIABLES[self._name].get()))
            _VARIABLES[self._name].set(self._value)

    def __exit__(self, *error: object) -> None:
        compiling, before = self._before.pop()
        if compiling:
            _traced[self._name] = before
        else:  # not ContextVar.reset, which refuses where a generator is left in another context than it was entered in
            _VARIABLES[self._name].set(before)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run within the setting."""
        self._idle = False

        @wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with Setting(self._name, self._value, self._call):
                return function(*args, **kwargs)

        return within

    def __del__(self) -> None:
        if self._idle:
            warn(
                f"{self._call} does nothing by itself: write `with {self._call}:`{self._instead}",
                UserWarning,
                stacklevel=2,
            )
