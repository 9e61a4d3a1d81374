"""Autograd's doors to a registered operator: reverse mode, batched and second derivatives, forward
mode, the transforms of torch.func.

Kernels compute values and first derivatives in reverse mode. So under ``vmap``, and for batched
gradients, they run once a slice; what no kernel computes (forward mode, derivatives of gradients)
runs as plain PyTorch, which PyTorch then differentiates as it does every function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import dispatch

# Why plain PyTorch runs in the place of kernels.
_FORWARD_MODE = "no kernel computes forward-mode derivatives"
_HIGHER = "no kernel computes derivatives of gradients"
_FUNCTIONALIZED = "no kernel runs under torch.func.functionalize"
_IN_A_COMPILED_TRANSFORM = "no kernel runs under a transform of torch.func inside a compiled function"
_EXPORT = "an ONNX model holds none but PyTorch's own operators"
_ASKED_FOR = "plain PyTorch was asked for"


def register(
    op, *, kind: str, plain: Callable, backward: Callable | None = None, setup_context: Callable | None = None
) -> Callable:
    """Give an operator all derivatives; return the function through which the library calls it.

    Args:
        op: result of ``torch.library.custom_op``; its last argument is the backend asked for, its
            results are a tensor or a tuple of tensors.
        kind: the operation in the terms of :mod:`storm_kernels.backends.dispatch`: "scan", "conv" or "reduce".
        plain: the same function of the same arguments in differentiable PyTorch.
        backward, setup_context: as in ``op.register_autograd``; without them the operator is
            differentiated through ``plain``.
    """
    overload = op._opoverload
    if backward is None:
        backward, setup_context = _through_plain(plain, kind), _keep_everything
    op.register_autograd(backward, setup_context=setup_context)
    op.register_vmap(_slice_by_slice(overload))
    # Under torch.func an operator's own autograd formula is not found: it takes a Function with the
    # same formula.
    formula = {"forward": overload.__call__, "setup_context": setup_context, "backward": backward}
    function = type(
        f"{kind}_under_transforms", (torch.autograd.Function,), {name: staticmethod(f) for name, f in formula.items()}
    )
    function.generate_vmap_rule = True

    def call(*args):
        under_transforms = transformed()
        reason = _why_plain(args, under_transforms)
        if reason is not None:
            dispatch.run_plain(kind, args[-1], reason)
            return without_autocast(plain, args)
        return function.apply(*args) if under_transforms else overload(*args)

    return call


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is in progress."""
    return torch._C._are_functorch_transforms_active()


def forward_mode(*tensors: object) -> bool:
    """Whether forward-mode derivatives are taken with respect to one of the tensors, by torch.func
    or by ``torch.autograd.forward_ad``.
    """
    if forward_ad._current_level < 0:
        return False
    if _under("Jvp"):
        return True
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _under(kind: str) -> bool:
    """Whether one of the transforms in progress is a ``kind`` ("Jvp", "Functionalize", ...)."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key().name == kind for level in stack)


def refuse_forward_mode(name: str, *tensors: object) -> None:
    """Raise where an operator itself meets forward mode (a traced program was differentiated): it
    would drop the tangents in silence.
    """
    if forward_ad._current_level >= 0 and forward_mode(*tensors):
        raise NotImplementedError(
            f"storm_kernels.{name}: {_FORWARD_MODE}; differentiate the model before it is traced, "
            "or trace it within use_backend('torch')"
        )


def without_autocast(function: Callable, args: tuple):
    """``function(*args)``, each operation in its operands' own dtype."""
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    if not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def vjp(
    function: Callable, args: tuple, positions: list[int], grads: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*args)`` with respect to the arguments at ``positions``; they can
    be differentiated again.
    """

    def of_those(*values):
        filled = list(args)
        for position, value in zip(positions, values, strict=True):
            filled[position] = value
        return function(*filled)

    _, pull = torch.func.vjp(of_those, *(args[position] for position in positions))
    return pull(grads)


def _why_plain(args: tuple, under_transforms: bool) -> str | None:
    """Why this call has to be plain PyTorch, or None."""
    plain_asked_for = args[-1] == "torch"
    if torch.compiler.is_compiling():
        if under_transforms:
            return _IN_A_COMPILED_TRANSFORM
        if not torch.compiler.is_exporting():
            return None
        return _ASKED_FOR if plain_asked_for else _EXPORT if torch.onnx.is_in_onnx_export() else None
    if under_transforms and plain_asked_for:
        return _ASKED_FOR
    if under_transforms and _under("Functionalize"):
        return _FUNCTIONALIZED
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        return _EXPORT
    return _FORWARD_MODE if forward_mode(*args) else None


def _slice_by_slice(overload) -> Callable:
    """A batching rule: the operator once for each slice."""

    def rule(info, in_dims, *args):
        def slice_of(i):
            return (
                a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a
                for a, dim in zip(args, in_dims, strict=True)
            )

        results = [overload(*slice_of(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _keep_everything(ctx, inputs, output):
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]


def _through_plain(plain: Callable, kind: str) -> Callable:
    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        args = tuple(next(tensors) if other is None else other[0] for other in ctx.others)
        dispatch.run_plain(kind, args[-1], _HIGHER)
        positions = [i for i, wanted in enumerate(ctx.needs_input_grad) if wanted]
        found = dict(
            zip(
                positions,
                without_autocast(lambda *a: vjp(plain, a, positions, grads if len(grads) > 1 else grads[0]), args),
                strict=True,
            )
        )
        return tuple(found.get(i) for i in range(len(args)))

    return backward
