"""The operators ``storm_kernels::scan`` and ``storm_kernels::scan_backward``: table of operands, schema,
kernel, fake kernel and autograd. Both directions of a scan are one call of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends import torch as torch_backend
from ..backends.contract import ScanCall, ScanInputs, ScanResult
from ..tokens import TokenGrid, TokenReduction
from . import checks
from .autograd import refuse_forward_mode, register
from .normalise import unit_innermost
from .operands import BACKEND, NEEDS, Operand, Table, pick

_DIRECTION = (
    Operand("u", "(batch, L, E)", gradient=True),
    Operand("delta", "(batch, L, E)", gradient=True),
    Operand("A", "(E, S)", gradient=True),
    Operand("B", "(batch, L, G, S)", gradient=True),
    Operand("C", "(batch, L, G, S)", gradient=True),
    Operand("D", "(E,)", "Tensor?", gradient=True),
    Operand("delta_bias", "(E,)", "Tensor?", gradient=True),
)
_SECOND = tuple(operand.of_second() for operand in _DIRECTION)  # scanned from the last token to the first
_OPERANDS = (
    *_DIRECTION,
    *_SECOND,
    Operand("z", "(batch, L, E) or (batch, kept tokens, E)", "Tensor?", gradient=True),
    Operand("initial_state", "(n, E, S)", "Tensor?", gradient=True),
    Operand("cu_seqlens", "(n + 1,)", "Tensor?"),
)
_OPTIONS = (
    Operand("delta_softplus", type="bool"),
    Operand("reverse", type="bool"),  # of a single direction
    Operand("grid", type="SymInt[]?"),  # frames, height, width
    Operand("reduction", type="SymInt[]?"),  # temporal_pool, spatial_pool, temporal_stride
)
# What the operator hands to its backward; shapes are those of the backend's `checkpoint_shapes`,
# and empty after the last of these.
_CHECKPOINTS = (Operand("first"), Operand("second"), Operand("third"))
_INCOMING = (Operand("grad_out", "(batch, L', E)"), Operand("grad_final_state", "(n, E, S)", "Tensor?"))

SCAN = Table(*_OPERANDS, *_OPTIONS, Operand("save", type="bool"), BACKEND, returns=2 + len(_CHECKPOINTS))
SCAN_BACKWARD = Table(
    *_INCOMING, *_OPERANDS, *_CHECKPOINTS, *_OPTIONS, NEEDS, BACKEND, returns=len(SCAN.differentiable)
)

_first, _second, _operands, _options, _checkpoints = map(pick, (_DIRECTION, _SECOND, _OPERANDS, _OPTIONS, _CHECKPOINTS))


@torch.library.custom_op("storm_kernels::scan", mutates_args=(), schema=SCAN.schema)
def _scan(*args):
    """-> out, final state, three checkpoints; what there is not is an empty tensor."""
    refuse_forward_mode("scan", *args)
    a = SCAN.read(args)
    checks.bounds(a.cu_seqlens, a.u.shape[1])
    call = _call_of(a)
    size = _out_shape(a.u, call.grid, call.reduction).numel()
    checks.memory("the scan's result", a.u.device, size, a.u.element_size())
    module = _choose(call, a.backend)
    dispatch.count("scan", module)
    return _results(module.scan(call, a.save), a.A)


def _results(result: ScanResult, like: Tensor) -> tuple[Tensor, ...]:
    empty = (None,) * (len(_CHECKPOINTS) - len(result.checkpoints))
    present = (result.out, result.final_state, *result.checkpoints, *empty)
    return tuple(like.new_empty(0) if t is None else t for t in present)


def _plain(*args) -> tuple[Tensor, ...]:
    """The operator in differentiable PyTorch."""
    a = SCAN.read(args)
    checks.bounds(a.cu_seqlens, a.u.shape[1])
    return _results(torch_backend.scan(_call_of(a), False), a.A)


@_scan.register_fake
def _(*args):
    a = SCAN.read(args)
    grid, reduction = _placed(a)
    sequences = a.u.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    shapes = ()
    if a.save:
        module = dispatch.choose("scan", a.backend, a.u, a.delta, a.B, a.C, a.z, d_state=a.A.shape[1])
        shapes = module.checkpoint_shapes(
            *a.u.shape,
            a.A.shape[1],
            directions=1 if a.u_b is None else 2,
            sequences=0 if a.cu_seqlens is None else sequences,
            gated=a.z is not None,
            grid=grid,
            reduction=reduction,
        )
    out = a.u.new_empty(_out_shape(a.u, grid, reduction))
    final_state = None if a.u_b is not None else a.A.new_empty((sequences, *a.A.shape))
    return _results(ScanResult(out, final_state, tuple(a.A.new_empty(shape) for shape in shapes)), a.A)


@torch.library.custom_op("storm_kernels::scan_backward", mutates_args=(), schema=SCAN_BACKWARD.schema)
def _scan_backward(*args):
    """-> the gradient of each operand that ``needs`` names; empty tensors for the others."""
    refuse_forward_mode("scan_backward", *args)
    a = SCAN_BACKWARD.read(args)
    call = _call_of(a)
    module = _choose(call, a.backend)
    dispatch.count("scan_backward", module)
    kept = tuple(t for t in _checkpoints(a) if t.numel())
    wanted = frozenset(name.removesuffix("_b") for name in a.needs.split())
    per_direction, grad_z, grad_state = module.scan_backward(a.grad_out, a.grad_final_state, call, kept, wanted)
    found = {"z": grad_z, "initial_state": grad_state}
    for operands, grads in zip((_DIRECTION, _SECOND), per_direction, strict=False):
        found |= {operand.name: grad for operand, grad in zip(operands, grads, strict=True)}
    return SCAN.results(found, a.needs, a.A)


@_scan_backward.register_fake
def _(*args):
    a = SCAN_BACKWARD.read(args)
    return SCAN.fake_results(a, a.A)


def _plain_backward(*args) -> tuple[Tensor, ...]:
    """The gradients in PyTorch that can be differentiated again: those of the plain scan."""
    a = SCAN_BACKWARD.read(args)
    grads = (a.grad_out,) if a.grad_final_state is None else (a.grad_out, a.grad_final_state)
    return SCAN.plain_results(_plain, a, grads, a.A, save=False)


_call_backward = register(_scan_backward, kind="scan", plain=_plain_backward)


def _setup_context(ctx, inputs, output):
    a = SCAN.read(inputs)
    _, _, *checkpoints = output
    ctx.save_for_backward(*_operands(a), *(checkpoints if a.save else ()))
    ctx.options, ctx.backend, ctx.saved = _options(a), a.backend, a.save
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_final_state, *_):
    kept = ctx.saved_tensors  # to be asked for once
    if not ctx.saved:  # the forward pass could not know that gradients would be asked for
        _, _, *checkpoints = run(*kept, *ctx.options, True, ctx.backend)
        kept = (*kept, *checkpoints)
    if grad_final_state is not None and grad_final_state.numel() == 0:  # of the empty tensor that stands for no state
        grad_final_state = None
    needs = SCAN.needed(ctx.needs_input_grad)
    args = SCAN_BACKWARD.read((grad_out, grad_final_state, *kept, *ctx.options, needs, ctx.backend))
    if grad_out is None:
        args = args._replace(grad_out=args.u.new_zeros(_out_shape(args.u, *_placed(args))))
    return SCAN.for_arguments(SCAN.named(_call_backward(*args), needs))


run = register(_scan, kind="scan", plain=_plain, backward=_backward, setup_context=_setup_context)


def _call_of(a) -> ScanCall:
    """The contract's form of the arguments of either operator."""
    pairs = ((_first(a), a.reverse),) if a.u_b is None else ((_first(a), False), (_second(a), True))
    directions = tuple(ScanInputs(*map(unit_innermost, operands), reverse) for operands, reverse in pairs)
    return ScanCall(directions, unit_innermost(a.z), a.delta_softplus, a.initial_state, a.cu_seqlens, *_placed(a))


def _placed(a) -> tuple[TokenGrid | None, TokenReduction | None]:
    return TokenGrid(*a.grid) if a.grid else None, TokenReduction(*a.reduction) if a.reduction else None


def _out_shape(u: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None) -> torch.Size:
    return torch.Size((u.shape[0], u.shape[1] if reduction is None else reduction.reduced(grid).tokens, u.shape[2]))


def _choose(call: ScanCall, backend: str):
    activations = [t for one in call.directions for t in (one.u, one.delta, one.B, one.C)]
    return dispatch.choose("scan", backend, *activations, call.z, d_state=call.directions[0].A.shape[1])
