"""Which backend runs an operation, why another does not, and what has run so far.

Backends of a device are asked in the order of ``ORDER``; the first without a reason against it runs. A backend asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .contract import Backend

logger = logging.getLogger(__name__)

MODULES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton", "torch": "torch_backend"}
OPS = ("scan", "conv", "reduce", "norm")
# By device type and operation, best first. LayerNorm on a CPU is torch's own: memory-bound, vectorised there already.
ORDER = {
    "cpu": {"scan": ("cpu", "torch"), "conv": ("cpu", "torch"), "reduce": ("cpu", "torch"), "norm": ("torch",)},
    "cuda": {
        "scan": ("cuda", "triton", "torch"),
        "conv": ("cuda", "triton", "torch"),
        "reduce": ("cuda", "triton", "torch"),
        "norm": ("triton", "torch"),
    },
}

_requested = ""
_strict = os.environ.get("STORM_KERNELS_STRICT", "") not in ("", "0")
_ran: Counter[tuple[str, str]] = Counter()
_warned: set[str] = set()


class BackendError(RuntimeError):
    """A backend asked for by name cannot run this, or strict mode forbids the slow path that would."""


class SlowPathWarning(UserWarning):
    """A fast backend refused; plain PyTorch runs instead. Said once for each reason."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, every operation runs on backend ``name`` ("torch", "cpu", "triton", "cuda") unless its own ``backend=`` says otherwise."""
    global _requested
    before, _requested = _requested, requested(name)
    try:
        yield
    finally:
        _requested = before


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Within it, an operation that would fall back to plain PyTorch raises :class:`BackendError`. STORM_KERNELS_STRICT=1 does so everywhere."""
    global _strict
    before, _strict = _strict, enabled
    try:
        yield
    finally:
        _strict = before


def requested(backend: str | None) -> str:
    """The backend asked for, by argument or by :func:`use_backend`; "" leaves the choice to :func:`choose`."""
    if backend is None:
        return _requested
    if backend not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, MODULES))}, got {backend!r}")
    return backend


@cache
def load(name: str) -> Backend:
    """The module of a backend."""
    return importlib.import_module(f".{MODULES[name]}", __package__)


def why_not(
    op: str, backend: str, *, device: str | torch.device = "cpu", dtypes: Iterable[torch.dtype] = (torch.float32,), d_state: int = 16, d_conv: int = 4
) -> str | None:
    """None if ``backend`` can run ``op`` ("scan", "conv", "reduce", "norm") on such tensors; else why not and how to fix it."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, OPS))}, got {op!r}")
    requested(backend)
    return _why_not(op, backend, torch.device(device).type, frozenset(dtypes), d_state, d_conv)


def _why_not(op: str, backend: str, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    try:
        module = load(backend)
    except ImportError as error:
        return f"the {backend} backend cannot be imported: {error}"
    return module.why_not(op, device=device, dtypes=dtypes, d_state=d_state, d_conv=d_conv)


def choose(op: str, backend: str, *activations: Tensor | None, d_state: int = 0, d_conv: int = 0) -> Backend:
    """The backend module that runs ``op`` on these tensors; ``backend`` is a result of :func:`requested`. Empty tensors are plain PyTorch's."""
    present = [t for t in activations if t is not None]
    if present[0].numel() == 0:
        return load("torch")
    device, dtypes = present[0].device.type, frozenset(t.dtype for t in present)
    if backend:
        reason = _why_not(op, backend, device, dtypes, d_state, d_conv)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run {op}: {reason}")
        return load(backend)
    refused = {}
    for name in ORDER.get(device, {}).get(op, ("torch",)):
        reason = _why_not(op, name, device, dtypes, d_state, d_conv)
        if reason is None:
            if refused:
                _tell(op, name, refused)
            return load(name)
        refused[name] = reason
    raise BackendError(f"no backend can run {op} on {device}: {refused}")


def _tell(op: str, chosen: str, refused: dict[str, str]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    message = f"{op} runs on the {chosen} backend, because {reasons}"
    if chosen == "torch":
        slow_path(message)
    elif message not in _warned:
        _warned.add(message)
        logger.info(message)


def slow_path(message: str) -> None:
    """Warn, once for each message, that something slow runs; in strict mode raise."""
    if _strict:
        raise BackendError(f"strict mode: {message}")
    if message not in _warned:
        _warned.add(message)
        logger.info(message)
        warnings.warn(message, SlowPathWarning, stacklevel=3)


def count(op: str, backend: Backend) -> None:
    """Note that ``op`` ran."""
    _ran[op, backend.NAME] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Within it, what runs is not in :func:`stats`, and a slow path told of in vain is told again."""
    ran, warned = _ran.copy(), _warned.copy()
    try:
        yield
    finally:
        for now, before in ((_ran, ran), (_warned, warned)):
            now.clear()
            now.update(before)


def stats(*, reset: bool = False) -> dict[str, dict[str, int]]:
    """How often each operation has run on each backend, for example ``{"scan": {"cpu": 12}}``."""
    table: dict[str, dict[str, int]] = {}
    for (op, backend), times in sorted(_ran.items()):
        table.setdefault(op, {})[backend] = times
    if reset:
        _ran.clear()
    return table
