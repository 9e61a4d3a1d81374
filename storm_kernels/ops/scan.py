"""selective_scan and bidirectional_selective_scan: checks, schema, fake kernel and autograd
(docs/spec.md, Mixer and Token reduction).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends import torch as torch_backend
from ..backends.contract import ScanCall, ScanInputs, ScanResult
from ..reference import Direction
from ..tokens import TokenGrid, TokenReduction, placed
from . import checks
from .autograd import refuse_forward_mode, register, transformed, vjp
from .normalise import accumulator, parameter, unit_innermost

# The operands of one direction, in the order of the schema; the backward direction's follow with
# "_b".
_ONE = ("u", "delta", "A", "B", "C", "D", "delta_bias")
_DIFFERENTIABLE = (*_ONE, *(f"{name}_b" for name in _ONE), "z", "initial_state")
_CHECKPOINTS = 3  # tensors that the operator hands to its backward
_Gradients = tuple[(Tensor,) * len(_DIFFERENTIABLE)]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    grid: TokenGrid | None = None,
    reduction: TokenReduction | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1's selective scan, gated and reduced (docs/spec.md, Mixer; arXiv 2312.00752, algorithm 2).

    ``h_l = exp(delta_l A) h_{l-1} + delta_l u_l B_l``, ``y_l = C_l h_l + D u_l``, result ``reduce(y
    * SiLU(z))``. States and sums are float32. Activations may be float32, bfloat16 or float16, each
    its own; float64 in any of them moves the whole to float64 and plain PyTorch.

    Args:
        u, delta: (batch, L, E). ``delta`` comes before bias and softplus.
        A: (E, S), real.
        B, C: (batch, L, S), or (batch, L, G, S) with G groups of neighbouring channels.
        D, delta_bias: (E,).
        z: (batch, L, E), or only the tokens of ``reduction.kept(grid)``.
        delta_softplus: whether delta is softplus(delta + delta_bias), the identity above 20.
        reverse: scan from the last token to the first; nothing is copied.
        initial_state: (n, E, S), the state before the first scanned token of each of the n sequences.
        return_final_state: also return the state after the last scanned token, (n, E, S), float32, differentiable.
        cu_seqlens: (n + 1,) integers from 0 to L: bounds of sequences packed one after the other in a batch of 1.
        grid, reduction: where the tokens sit and how they are averaged and sampled;
            only what survives is written. Not with ``cu_seqlens``.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice to
            :func:`storm_kernels.backends.dispatch.choose`.

    Returns:
        (batch, L', E) in u's dtype, with L' = L without a reduction; and the final state where asked for.

    Raises:
        TypeError, ValueError: an operand of the wrong type, dtype, shape or device, named with its value.
        BackendError: the backend asked for cannot run this.
        MemoryError: the result would not fit the device.
    """
    checks.scan_operands("", u, delta, A, B, C, D, delta_bias)
    grid, reduction = placed(u.shape[1], grid, reduction, cu_seqlens)
    checks.gate(z, u, grid, reduction)
    sequences = checks.packed(cu_seqlens, u)
    checks.state("initial_state", initial_state, (sequences, *A.shape), "(sequences, E, S)", u)
    only = Direction(u, delta, A, B, C, D, delta_bias)
    out, final_state = _run(only, None, z, initial_state, cu_seqlens, delta_softplus, reverse, grid, reduction, backend)
    return (out, final_state) if return_final_state else out


def bidirectional_selective_scan(
    forward: Direction,
    backward: Direction,
    z: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    grid: TokenGrid | None = None,
    reduction: TokenReduction | None = None,
    backend: str | None = None,
) -> Tensor:
    """Both directions of a scan in one launch: ``reduce((y_forward + y_backward) * SiLU(z))`` (docs/spec.md, Mixer).

    ``forward`` and ``backward`` are :class:`Direction` tuples in the sequence's own order; the
    second is scanned from the end, without a flip. The other arguments, the result (batch, L', E)
    and the errors are those of :func:`selective_scan`.
    """
    forward, backward = checks.direction("forward", forward), checks.direction("backward", backward)
    checks.scan_operands("forward.", *forward)
    checks.scan_operands("backward.", *backward, like=forward.u)
    checks.shape("backward.u", backward.u, tuple(forward.u.shape), "forward.u's")
    checks.shape("backward.A", backward.A, tuple(forward.A.shape), "forward.A's")
    grid, reduction = placed(forward.u.shape[1], grid, reduction, cu_seqlens)
    checks.gate(z, forward.u, grid, reduction)
    checks.packed(cu_seqlens, forward.u)
    return _run(forward, backward, z, None, cu_seqlens, delta_softplus, False, grid, reduction, backend)[0]


def _run(
    forward, backward, z, initial_state, cu_seqlens, delta_softplus, reverse, grid, reduction, backend
) -> tuple[Tensor, Tensor]:
    """Bring the operands to the forms of `contract.py` and call the operator."""
    out_dtype = forward.u.dtype
    others = () if backward is None else (backward.u, backward.delta, backward.B, backward.C)
    acc = accumulator(forward.u, forward.delta, forward.B, forward.C, z, *others)
    one, two = _normal(forward, acc), (None,) * 7 if backward is None else _normal(backward, acc)
    if acc == torch.float64 and z is not None:
        z = z.double()
    initial_state = parameter(initial_state, acc)
    differentiable = (*one, *two, z, initial_state)
    # An exported program is for inference; were it differentiated, the backward pass would compute
    # the checkpoints.
    save = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    save = save and (any(t is not None and t.requires_grad for t in differentiable) or transformed())
    where = None if grid is None else [grid.frames, grid.height, grid.width]
    how = None if reduction is None else [reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride]
    out, final_state, *_ = _call(
        *differentiable, cu_seqlens, delta_softplus, reverse, where, how, save, dispatch.requested(backend)
    )
    return out.to(out_dtype), final_state


def _normal(direction: Direction, acc: torch.dtype) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, delta_bias = direction
    B, C = (t.unsqueeze(2) if t.dim() == 3 else t for t in (B, C))
    if acc == torch.float64:
        u, delta, B, C = (t.double() for t in (u, delta, B, C))
    return u, delta, parameter(A, acc), B, C, parameter(D, acc), parameter(delta_bias, acc)


@torch.library.custom_op("storm_kernels::scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    u_b: Tensor | None,
    delta_b: Tensor | None,
    A_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    grid: Sequence[int] | None,
    reduction: Sequence[int] | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out, final state, three checkpoints; what there is not is an empty tensor."""
    one, two = (u, delta, A, B, C, D, delta_bias), (u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b)
    refuse_forward_mode("scan", *one, *two, z, initial_state)
    checks.bounds(cu_seqlens, u.shape[1])
    directions = _directions(one, two, reverse)
    options = _options(initial_state, cu_seqlens, delta_softplus, grid, reduction)
    checks.memory("the scan's result", u.device, _out_shape(u, options).numel(), u.element_size())
    module = _choose(directions, z, backend)
    dispatch.count("scan", module)
    return _results(module.scan(ScanCall(directions, unit_innermost(z), **options), save), A)


def _results(result: ScanResult, like: Tensor) -> tuple[Tensor, ...]:
    checkpoints = (*result.checkpoints, *(None,) * _CHECKPOINTS)[:_CHECKPOINTS]
    return tuple(like.new_empty(0) if t is None else t for t in (result.out, result.final_state, *checkpoints))


def _plain(*args) -> tuple[Tensor, ...]:
    """The operator in differentiable PyTorch."""
    operands, (cu_seqlens, delta_softplus, reverse, grid, reduction, _, _) = args[:16], args[16:]
    checks.bounds(cu_seqlens, operands[0].shape[1])
    options = _options(operands[15], cu_seqlens, delta_softplus, grid, reduction)
    directions = _directions(operands[:7], operands[7:14], reverse)
    return _results(torch_backend.scan(ScanCall(directions, operands[14], **options), False), operands[2])


@_scan.register_fake
def _(u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, *rest):
    *_, z, initial_state, cu_seqlens, delta_softplus, reverse, grid, reduction, save, backend = rest
    options = _options(initial_state, cu_seqlens, delta_softplus, grid, reduction)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = u.new_empty(_out_shape(u, options))
    final_state = A.new_empty((sequences, *A.shape) if u_b is None else (0,))
    shapes = ()
    if save:
        module = dispatch.choose("scan", backend, u, delta, B, C, z, d_state=A.shape[1])
        packed, where = 0 if cu_seqlens is None else sequences, {name: options[name] for name in ("grid", "reduction")}
        shapes = module.checkpoint_shapes(
            *u.shape, A.shape[1], directions=1 if u_b is None else 2, sequences=packed, gated=z is not None, **where
        )
    return (out, final_state, *(A.new_empty(shape) for shape in (*shapes, *((0,),) * _CHECKPOINTS)[:_CHECKPOINTS]))


@torch.library.custom_op("storm_kernels::scan_backward", mutates_args=())
def _scan_backward(
    grad_out: Tensor,
    grad_final_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    u_b: Tensor | None,
    delta_b: Tensor | None,
    A_b: Tensor | None,
    B_b: Tensor | None,
    C_b: Tensor | None,
    D_b: Tensor | None,
    delta_bias_b: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    delta_softplus: bool,
    reverse: bool,
    grid: Sequence[int] | None,
    reduction: Sequence[int] | None,
    needs: str,
    backend: str,
) -> _Gradients:
    """-> the gradient of each operand that ``needs`` names, separated by spaces; empty tensors for the others.

    ``first`` to ``third`` are the checkpoints.
    """
    one, two = (u, delta, A, B, C, D, delta_bias), (u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b)
    refuse_forward_mode("scan_backward", grad_out, grad_final_state, *one, *two, z, initial_state)
    names = needs.split()
    directions = _directions(one, two, reverse)
    options = _options(initial_state, cu_seqlens, delta_softplus, grid, reduction)
    module = _choose(directions, z, backend)
    dispatch.count("scan_backward", module)
    kept = tuple(t for t in (first, second, third) if t.numel())
    wanted = frozenset(name.removesuffix("_b") for name in names)
    call = ScanCall(directions, unit_innermost(z), **options)
    per_direction, grad_z, grad_state = module.scan_backward(grad_out, grad_final_state, call, kept, wanted)
    found = {"z": grad_z, "initial_state": grad_state}
    for suffix, grads in zip(("", "_b"), per_direction, strict=False):
        found |= {f"{name}{suffix}": grad for name, grad in zip(_ONE, grads, strict=True)}
    return tuple(found[name] if name in names else A.new_empty(0) for name in _DIFFERENTIABLE)


@_scan_backward.register_fake
def _(grad_out, grad_final_state, *rest):
    operands, names, A = rest[:16], rest[-2].split(), rest[2]
    return tuple(
        torch.empty_like(operand, memory_format=torch.contiguous_format) if name in names else A.new_empty(0)
        for name, operand in zip(_DIFFERENTIABLE, operands, strict=True)
    )


def _plain_backward(grad_out, grad_final_state, *rest):
    """The gradients in PyTorch that can be differentiated again: those of the plain scan."""
    operands, cu_seqlens, options, names = rest[:16], rest[16], rest[20:24], rest[24].split()
    positions = [_DIFFERENTIABLE.index(name) for name in names]
    grads = (grad_out,) if grad_final_state is None else (grad_out, grad_final_state)
    found = vjp(
        lambda *values: _plain(*values, cu_seqlens, *options, False, "torch")[: len(grads)], operands, positions, grads
    )
    by_name = dict(zip(names, found, strict=True))
    return tuple(by_name[name] if name in by_name else operands[2].new_empty(0) for name in _DIFFERENTIABLE)


_call_backward = register(_scan_backward, kind="scan", plain=_plain_backward)


def _setup_context(ctx, inputs, output):
    operands, (cu_seqlens, delta_softplus, reverse, grid, reduction, save, backend) = inputs[:16], inputs[16:]
    checkpoints = output[2:] if save else ()
    ctx.save_for_backward(*operands, cu_seqlens, *checkpoints)
    ctx.options = (delta_softplus, reverse, grid, reduction)
    ctx.backend, ctx.saved = backend, save
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_final_state, *_):
    saved = ctx.saved_tensors  # to be asked for once
    operands, cu_seqlens, checkpoints = saved[:16], saved[16], saved[17:]
    if not ctx.saved:  # the forward pass could not know that gradients would be asked for
        checkpoints = _call(*operands, cu_seqlens, *ctx.options, True, ctx.backend)[2:]
    if grad_out is None:
        grid, reduction = ctx.options[2:]
        options = _options(None, None, False, grid, reduction)
        grad_out = operands[0].new_zeros(_out_shape(operands[0], options))
    if grad_final_state is not None and grad_final_state.numel() == 0:  # of the empty tensor that stands for no state
        grad_final_state = None
    needs = [name for name, wanted in zip(_DIFFERENTIABLE, ctx.needs_input_grad, strict=False) if wanted]
    found = _call_backward(
        grad_out, grad_final_state, *operands, cu_seqlens, *checkpoints, *ctx.options, " ".join(needs), ctx.backend
    )
    return (*(grad if name in needs else None for name, grad in zip(_DIFFERENTIABLE, found, strict=True)), *(None,) * 7)


_call = register(_scan, kind="scan", plain=_plain, backward=_backward, setup_context=_setup_context)


def _directions(one: tuple, two: tuple, reverse: bool) -> tuple[ScanInputs, ...]:
    pairs = ((one, reverse),) if two[0] is None else ((one, False), (two, True))
    return tuple(ScanInputs(*map(unit_innermost, operands), backwards) for operands, backwards in pairs)


def _options(initial_state, cu_seqlens, delta_softplus, grid, reduction) -> dict:
    return {
        "delta_softplus": delta_softplus,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "grid": TokenGrid(*grid) if grid else None,
        "reduction": TokenReduction(*reduction) if reduction else None,
    }


def _out_shape(u: Tensor, options: dict) -> torch.Size:
    grid, reduction = options["grid"], options["reduction"]
    return torch.Size((u.shape[0], u.shape[1] if reduction is None else reduction.reduced(grid).tokens, u.shape[2]))


def _choose(directions: tuple[ScanInputs, ...], z: Tensor | None, backend: str):
    activations = [t for one in directions for t in (one.u, one.delta, one.B, one.C)]
    return dispatch.choose("scan", backend, *activations, z, d_state=directions[0].A.shape[1])
