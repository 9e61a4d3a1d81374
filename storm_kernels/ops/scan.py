"""selective_scan and bidirectional_selective_scan: checks and normal form (docs/spec.md, Mixer). The
operator that they call is in scan_operator.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..reference import Direction
from ..tokens import TokenGrid, TokenReduction, placed
from . import checks, scan_operator
from .autograd import transformed
from .normalise import accumulator, parameter


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
    one = _normal(forward, acc)
    two = tuple(None for _ in one) if backward is None else _normal(backward, acc)
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
    out, final_state, *_ = scan_operator.run(
        *differentiable, cu_seqlens, delta_softplus, reverse, where, how, save, dispatch.requested(backend)
    )
    return out.to(out_dtype), final_state


def _normal(direction: Direction, acc: torch.dtype) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, delta_bias = direction
    B, C = (t.unsqueeze(2) if t.dim() == 3 else t for t in (B, C))
    if acc == torch.float64:
        u, delta, B, C = (t.double() for t in (u, delta, B, C))
    return u, delta, parameter(A, acc), B, C, parameter(D, acc), parameter(delta_bias, acc)
