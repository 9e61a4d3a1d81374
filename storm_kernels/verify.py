"""Parity of every backend on this machine with the float64 reference, forward and backward, in seconds.

`storm-kernels verify` prints it. A result passes when its rms error is at most 1.25x (gradients
1.5x) that of the plain reference in the same precision plus half an ulp, and its largest error at
most 2x plus 2 ulp: docs/reliability.md's bound, taken over the whole result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .backends import dispatch
from .backends.cpu.loader import ISA_VARIABLE
from .reference import Direction
from .tokens import TokenGrid, TokenReduction

__all__ = ["Check", "available_devices", "exceeds", "run"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRID, _REDUCTION = TokenGrid(11, 3, 2), TokenReduction(4, 2, 2)  # 66 tokens, ragged in every axis
_BATCH, _CHANNELS, _STATES, _TAPS = 2, 37, 16, 4

Operands = dict[str, Tensor]
Call = Callable[[Any, Operands], Operands]  # on a room of functions: the public ones, or the reference's


@dataclass(frozen=True)
class Check:
    """One comparison: what was run, and the first result that is out of bounds.

    Args:
        op: "scan", "conv" or "reduce".
        backend: who ran it: "torch", "cpu", "triton" or "cuda".
        device: where: "cpu" or "cuda".
        dtype: of the activations, such as "float32".
        case: which call, such as "both, reduced".
        failure: what is out of bounds and by how much; "" when nothing is.

    Example:
        >>> Check("scan", "cpu", "cpu", "float32", "forward", failure="").failure == ""
        True
    """

    op: str
    backend: str
    device: str
    dtype: str
    case: str
    failure: str


def run(devices: tuple[str, ...] | None = None) -> Iterator[Check]:
    """Check each operation on each backend that can run it.

    The cpu backend fails each operation where STORM_KERNELS_CPU_ISA asks for a variant of it that
    cannot run.

    Args:
        devices: "cpu", "cuda"; None, the default, for :func:`available_devices`.

    Returns:
        The checks, one after the other as they are made.

    Example:
        >>> next(run(("cpu",))).op
        'scan'
    """
    yield from _refused(devices or available_devices())
    for op, cases in _CASES.items():
        for dtype in _DTYPES:
            able = [
                (device, backend)
                for device in devices or available_devices()
                for backend in dispatch.BACKENDS
                if dispatch.why_not(op, backend, device=device, dtypes=(dtype,), d_state=_STATES, d_conv=_TAPS) is None
            ]
            for name, (make, call) in cases.items():
                operands = make(dtype)
                truth = _evaluate(call, reference, {key: t.double() for key, t in operands.items()})
                plain = _evaluate(call, reference, operands)
                for device, backend in able:
                    failure = _compare(operands, call, truth, plain, backend, device)
                    yield Check(op, backend, device, str(dtype).removeprefix("torch."), name, failure)


def available_devices() -> tuple[str, ...]:
    """The devices that :func:`run` checks: "cpu", and "cuda" where torch sees a GPU.

    Example:
        >>> available_devices()[0]
        'cpu'
    """
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _refused(devices: tuple[str, ...]) -> Iterator[Check]:
    asked = os.environ.get(ISA_VARIABLE)
    for op, order in dispatch.ORDER["cpu"].items():
        if not asked or "cpu" not in devices or "cpu" not in order:
            continue
        reason = dispatch.why_not(op, "cpu", d_state=_STATES, d_conv=_TAPS)
        if reason:
            yield Check(op, "cpu", "cpu", "any dtype", f"asked for by {ISA_VARIABLE}={asked}", reason)


def _compare(operands: Operands, call: Call, truth: Operands, plain: Operands, backend: str, device: str) -> str:
    try:
        with dispatch.use_backend(backend):
            got = _evaluate(call, ops, {name: t.to(device) for name, t in operands.items()})
    except Exception as error:  # a backend that breaks is a finding, not the end of the check
        return f"{type(error).__name__}: {error}"
    for name, value in got.items():
        failure = exceeds(
            value.cpu(), truth[name], plain[name].to(value.dtype), 1.5 if name.startswith("gradient") else 1.25
        )
        if failure:
            return f"{name}: {failure}"
    return ""


def _evaluate(call: Call, room: Any, operands: Operands) -> Operands:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in operands.items()}
    results = call(room, leaves)
    generator = torch.Generator().manual_seed(1)
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    incoming = [torch.randn(r.shape, **drawn).bfloat16().to(r.device, r.dtype) for r in results.values()]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), incoming)
    return {name: r.detach() for name, r in results.items()} | {
        f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)
    }


def exceeds(value: Tensor, truth: Tensor, plain: Tensor, ratio: float) -> str:
    """How a result breaks docs/reliability.md's bound, judged as a whole; "" if it keeps it.

    Args:
        value: the result, any shape and floating-point dtype.
        truth: the right one, of the same shape, float64.
        plain: the reference's, of the same shape, in the precision of ``value``.
        ratio: how many times the rms error of ``plain`` is allowed: 1.25, of gradients 1.5.

    Example:
        >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> exceeds(truth.float(), truth, truth.float(), ratio=1.25)
        ''
        >>> exceeds(1.01 * truth.float(), truth, truth.float(), ratio=1.25)
        'rms error 0.0158, allowed 9.42e-08'
    """
    if not torch.isfinite(value).all():
        return "not finite"
    ulp = torch.finfo(value.dtype).eps
    error, yardstick = (value.double() - truth).abs(), (plain.double() - truth).abs()
    rms, bound = (
        error.square().mean().sqrt(),
        ratio * yardstick.square().mean().sqrt() + 0.5 * ulp * truth.square().mean().sqrt(),
    )
    if rms > bound:
        return f"rms error {rms:.3g}, allowed {bound:.3g}"
    largest, bound = error.max(), 2 * yardstick.max() + 2 * ulp * truth.abs().max()
    return f"largest error {largest:.3g}, allowed {bound:.3g}" if largest > bound else ""


def _draw(**shapes: tuple[int, ...]) -> Operands:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for name, shape in shapes.items()
    }


def _direction_shapes(suffix: str) -> dict[str, tuple[int, ...]]:
    wide, narrow, channels = (_BATCH, _GRID.tokens, _CHANNELS), (_BATCH, _GRID.tokens, _STATES), (_CHANNELS,)
    shapes = {
        "u": wide,
        "delta": wide,
        "A": (_CHANNELS, _STATES),
        "B": narrow,
        "C": narrow,
        "D": channels,
        "delta_bias": channels,
    }
    return {name + suffix: shape for name, shape in shapes.items()}


def _scan_operands(dtype: torch.dtype, suffixes: tuple[str, ...], **more: tuple[int, ...]) -> Operands:
    shapes = {k: v for suffix in suffixes for k, v in _direction_shapes(suffix).items()}
    found = _draw(**shapes, z=(_BATCH, _GRID.tokens, _CHANNELS), **more)
    for suffix in suffixes:
        found[f"A{suffix}"] = -found[f"A{suffix}"].exp()
        found |= {name: found[name].to(dtype) for name in (f"u{suffix}", f"delta{suffix}", f"B{suffix}", f"C{suffix}")}
    found["z"] = found["z"].to(dtype)
    return found


def _direction(t: Operands, suffix: str = "") -> Direction:
    return Direction(*(t[name + suffix] for name in Direction._fields))


def _scan_one(reverse: bool) -> Call:
    def call(room: Any, t: Operands) -> Operands:
        d = _direction(t)
        options = {
            "delta_softplus": True,
            "reverse": reverse,
            "initial_state": t["initial_state"],
            "return_final_state": True,
        }
        out, state = room.selective_scan(*d[:6], z=t["z"], delta_bias=d.delta_bias, **options)
        return {"result": out, "final state": state}

    return call


def _scan_both(reduction: TokenReduction | None) -> Call:
    def call(room: Any, t: Operands) -> Operands:
        options = {"delta_softplus": True, "grid": _GRID, "reduction": reduction}
        return {"result": room.bidirectional_selective_scan(_direction(t), _direction(t, "_b"), t["z"], **options)}

    return call


def _conv_operands(dtype: torch.dtype) -> Operands:
    found = _draw(
        x=(_BATCH, _GRID.tokens, _CHANNELS),
        weight=(_CHANNELS, _TAPS),
        bias=(_CHANNELS,),
        weight_b=(_CHANNELS, _TAPS),
        bias_b=(_CHANNELS,),
    )
    return found | {"x": found["x"].to(dtype)}


def _conv(room: Any, t: Operands) -> Operands:
    outs = room.bidirectional_causal_conv1d(
        t["x"], t["weight"], t["bias"], t["weight_b"], t["bias_b"], activation="silu"
    )
    return dict(zip(("forward", "backward"), outs, strict=True))


def _scan_with_state(dtype: torch.dtype) -> Operands:
    return _scan_operands(dtype, ("",), initial_state=(_BATCH, _CHANNELS, _STATES))


def _scan_pair(dtype: torch.dtype) -> Operands:
    return _scan_operands(dtype, ("", "_b"))


# By operation: case -> (operands from a dtype, the call on a room of functions).
_CASES: dict[str, dict[str, tuple[Callable[[torch.dtype], Operands], Call]]] = {
    "scan": {
        "forward": (_scan_with_state, _scan_one(False)),
        "reverse": (_scan_with_state, _scan_one(True)),
        "both directions": (_scan_pair, _scan_both(None)),
        "both, reduced": (_scan_pair, _scan_both(_REDUCTION)),
    },
    "conv": {"both directions": (_conv_operands, _conv)},
    "reduce": {
        "pooled and sampled": (
            lambda dtype: {"x": _draw(x=(_BATCH, _GRID.tokens, _CHANNELS))["x"].to(dtype)},
            lambda room, t: {"result": room.reduce_tokens(t["x"], _GRID, _REDUCTION)},
        )
    },
}
