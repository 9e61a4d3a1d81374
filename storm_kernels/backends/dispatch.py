"""Which backend runs an operation, why another does not, and what has run so far.

Backends of a device are asked in the order of ``ORDER``; the first without a reason against it
runs. A backend asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import Tensor

from .. import context
from ..callers import warn_caller
from ..tokens import described, integer
from .contract import Backend

logger = logging.getLogger(__name__)

BACKENDS = ("cpu", "cuda", "triton", "torch")
OPS = ("scan", "conv", "reduce")
# The operation that a public function runs.
FUNCTIONS = {
    "selective_scan": "scan",
    "bidirectional_selective_scan": "scan",
    "causal_conv1d": "conv",
    "bidirectional_causal_conv1d": "conv",
    "reduce_tokens": "reduce",
}
# By device type and operation, best first.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"scan": ("cpu", "torch"), "conv": ("cpu", "torch"), "reduce": ("cpu", "torch")},
    "cuda": {
        "scan": ("cuda", "triton", "torch"),
        "conv": ("cuda", "triton", "torch"),
        "reduce": ("cuda", "triton", "torch"),
    },
}

_ran: Counter[tuple[str, str]] = Counter()
_warned: set[str] = set()
_lock = threading.Lock()  # of both
_uncounted = threading.local()


class BackendError(RuntimeError):
    """A backend asked for by name cannot run this, or strict mode forbids the slow path that would.

    Example:
        >>> from storm_kernels import reduce_tokens, TokenGrid, TokenReduction
        >>> x, grid, pairs = torch.ones(1, 4, 2, dtype=torch.float64), TokenGrid(4, 1, 1), TokenReduction(2)
        >>> try:
        ...     reduce_tokens(x, grid, pairs, backend="cuda")
        ... except BackendError as error:
        ...     print(str(error).split(":")[0])
        backend='cuda' cannot run reduce
    """


class SlowPathWarning(UserWarning):
    """A fast backend refused; plain PyTorch runs instead. Said once for each reason.

    Example:
        >>> import warnings
        >>> from storm_kernels import causal_conv1d
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", SlowPathWarning)  # `with strict():` raises instead
        ...     out = causal_conv1d(torch.ones(1, 4, 2, dtype=torch.float64), torch.ones(2, 3))
    """


def use_backend(name: str) -> AbstractContextManager[None]:
    """``with use_backend(name):`` every operation runs on this backend, unless its own ``backend=`` says otherwise.

    Its backward pass runs there too, wherever that is started. A decorator too. It holds for the
    thread or asyncio task that is inside. Threads started within, such as nn.DataParallel's, do not
    see it: :func:`set_default_backend` is for those.

    Args:
        name: "torch", "cpu", "triton" or "cuda".

    Raises:
        ValueError: ``name`` is none of them; at once.

    Example:
        >>> from storm_kernels import causal_conv1d
        >>> with use_backend("torch"):
        ...     out = causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 3))
    """
    return context.Setting("backend", _known(name), f"use_backend({name!r})", f", or set_default_backend({name!r})")


def set_default_backend(name: str | None) -> None:
    """From here on every operation, in every thread, runs on this backend.

    :func:`use_backend` and ``backend=`` say otherwise where they are.

    Args:
        name: "torch", "cpu", "triton" or "cuda"; None undoes it.

    Raises:
        ValueError: ``name`` is no backend.

    Example:
        >>> set_default_backend("torch")
        >>> set_default_backend(None)
    """
    context.defaults["backend"] = "" if name is None else _known(name)


def strict(enabled: bool = True) -> AbstractContextManager[None]:
    """``with strict():`` an operation that would fall back to plain PyTorch raises :class:`BackendError`.

    A thread's own, like :func:`use_backend`. STORM_KERNELS_STRICT=1 does so everywhere. A backward
    pass falls back where its forward pass did, and nowhere else.

    Args:
        enabled: False allows the fall within an outer ``strict()``; True by default.

    Example:
        >>> from storm_kernels import causal_conv1d
        >>> x, weight = torch.ones(1, 4, 2, dtype=torch.float64), torch.ones(2, 3)
        >>> with strict():
        ...     try:
        ...         causal_conv1d(x, weight)
        ...     except BackendError as error:
        ...         print(str(error).split(",")[0])
        strict mode: conv runs on the torch backend
    """
    return context.Setting("strict", bool(enabled), f"strict({enabled!r})")


def requested(backend: str | None) -> str:
    """The backend asked for, by argument or by :func:`use_backend`; "" leaves the choice to :func:`choose`."""
    return context.current("backend") if backend is None else _known(backend)


def _known(backend: str) -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {described(backend)}")
    return backend


@cache
def load(name: str) -> Backend:
    """The module of a backend."""
    return importlib.import_module(f".{name}", __package__)


def why_not(
    op: str,
    backend: str,
    *,
    device: str | torch.device | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    d_state: int = 16,
    d_conv: int = 4,
) -> str | None:
    """None if ``backend`` can run ``op`` on such tensors; else why not and how to fix it.

    Args:
        op: "scan", "conv" or "reduce", or the name of the public function, such as "selective_scan".
        backend: "torch", "cpu", "triton" or "cuda".
        device: where the tensors lie; None, the default, for the device that the backend is made for.
        dtypes: those of the activations; float32 by default.
        d_state: S of a scan; 16 by default.
        d_conv: K of a convolution, taps; 4 by default.

    Raises:
        TypeError: a device, dtypes or a size of the wrong type, named.
        ValueError: there is no such operation, backend or device.

    Example:
        >>> why_not("selective_scan", "torch") is None
        True
        >>> why_not("selective_scan", "cpu", dtypes=(torch.float64,))
        'the cpu backend takes float32, bfloat16 and float16 activations, not torch.float64; the torch backend does'
    """
    op = FUNCTIONS.get(op, op) if isinstance(op, str) else op
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, (*OPS, *FUNCTIONS)))}, got {described(op)}")
    where = None if device is None else _device_type(device)
    sizes = integer("d_state", d_state), integer("d_conv", d_conv)
    return _why_not(op, _known(backend), where, _dtypes(dtypes), *sizes)


def _dtypes(dtypes: object) -> frozenset[torch.dtype]:
    found = tuple(dtypes) if isinstance(dtypes, Iterable) else ()
    if not found or not all(isinstance(dtype, torch.dtype) for dtype in found):
        raise TypeError(f"dtypes must be a sequence of torch.dtype, got {described(dtypes)}")
    return frozenset(found)


def _device_type(device: object) -> str:
    try:
        return torch.device(device).type  # type: ignore[call-overload]  # TypeError is what is asked for
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"device must be a torch.device or name one, such as 'cpu', 'cuda' or 'cuda:1', got {described(device)}"
        ) from None


def _why_not(
    op: str, backend: str, device: str | None, dtypes: frozenset[torch.dtype], d_state: int, d_conv: int
) -> str | None:
    try:
        module = load(backend)
    except ImportError as error:
        return f"the {backend} backend cannot be imported: {error}{_remedy(error)}"
    return module.why_not(op, device=device or module.own_device(), dtypes=dtypes, d_state=d_state, d_conv=d_conv)


def _remedy(error: ImportError) -> str:
    """What to install where the package that a backend stands on is missing."""
    return "; pip install 'storm-kernels[triton]'" if (error.name or "").partition(".")[0] == "triton" else ""


def choose(op: str, backend: str, *activations: Tensor | None, d_state: int = 0, d_conv: int = 0) -> Backend:
    """The backend module that runs ``op`` on these tensors; ``backend`` is a result of
    :func:`requested`. Empty tensors are plain PyTorch's.
    """
    present = [t for t in activations if t is not None]
    if present[0].numel() == 0:
        return load("torch")
    device, dtypes = present[0].device.type, frozenset(t.dtype for t in present)
    if backend:
        reason = _why_not(op, backend, device, dtypes, d_state, d_conv)
        if reason is not None:
            raise BackendError(f"backend={backend!r} cannot run {op}: {reason}")
        return load(backend)
    refused: dict[str, str] = {}
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
    else:
        _first_time(message)


def slow_path(message: str) -> None:
    """Warn, once for each message, that something slow runs; in strict mode raise."""
    if context.current("strict"):
        raise BackendError(f"strict mode: {message}")
    if _first_time(message):
        warn_caller(message, SlowPathWarning)


def _first_time(message: str) -> bool:
    """Log ``message`` if it is told for the first time, and say whether it was; what is uncounted is not told."""
    with _lock:
        if getattr(_uncounted, "here", False) or message in _warned:
            return False
        _warned.add(message)
    logger.info(message)
    return True


def run_plain(op: str, backend: str, reason: str) -> None:
    """Note that plain PyTorch runs ``op`` outside its operator; raise where another backend was
    asked for by name, or in strict mode.
    """
    if backend not in ("", "torch"):
        raise BackendError(
            f"backend={backend!r} cannot run {op}: {reason}; leave the choice open or ask for backend='torch'"
        )
    if torch.compiler.is_compiling():
        return
    if not backend:
        _tell(op, "torch", {"all others": reason})
    count(op, load("torch"))


def count(op: str, backend: Backend) -> None:
    """Note that ``op`` ran."""
    if getattr(_uncounted, "here", False):
        return
    with _lock:
        _ran[op, backend.NAME] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Within it, what this thread runs is not in :func:`stats`, and no slow path is told of."""
    before, _uncounted.here = getattr(_uncounted, "here", False), True
    try:
        yield
    finally:
        _uncounted.here = before


def stats(*, reset: bool = False) -> dict[str, dict[str, int]]:
    """How often each operation has run on each backend, in all threads together.

    Args:
        reset: start again from nothing; not by default.

    Returns:
        Operation -> backend -> calls; a backward pass counts apart, as "scan_backward".

    Example:
        >>> from storm_kernels import causal_conv1d
        >>> _ = stats(reset=True)
        >>> _ = causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 3), backend="torch")
        >>> stats()
        {'conv': {'torch': 1}}
    """
    with _lock:
        ran = sorted(_ran.items())
        if reset:
            _ran.clear()
    table: dict[str, dict[str, int]] = {}
    for (op, backend), times in ran:
        table.setdefault(op, {})[backend] = times
    return table
