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

    Symbols: batch; L tokens; E channels; S states of a channel; G groups of neighbouring channels
    that share B and C; n sequences; L' tokens after the reduction.

    Args:
        u: (batch, L, E), float32, bfloat16, float16 or float64: what is scanned.
        delta: (batch, L, E), the same dtypes: step sizes in tokens, before bias and softplus.
        A: (E, S), real, per token; negative where a state decays.
        B: (batch, L, S), or (batch, L, G, S) with groups: how a token enters the states.
        C: (batch, L, S) or (batch, L, G, S): how the states are read.
        D: (E,), what of u is added to the result; None for nothing.
        z: (batch, L, E), the gate, or only the tokens of ``reduction.kept(grid)``; None for no gate.
        delta_bias: (E,), added to delta in float32; None for none.
        delta_softplus: whether delta is softplus(delta + delta_bias), the identity above 20.
            Default: as it is.
        reverse: scan from the last token to the first; nothing is copied. Default: from the first.
        initial_state: (n, E, S), the state before the first scanned token of each sequence; None for zeros.
        return_final_state: also return the state after the last scanned token. Default: the result alone.
        cu_seqlens: (n + 1,) int32 or int64 from 0 to L: bounds of sequences packed one after the other in a batch
            of 1. None: each row of the batch is a sequence.
        grid: where the tokens sit, T x H x W; needed only with a reduction.
        reduction: how they are averaged and sampled: only what survives is written. Not with ``cu_seqlens``. None for
            all tokens.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice to :func:`use_backend` and the device.

    Returns:
        (batch, L', E) in u's dtype, with L' = L without a reduction. With ``return_final_state`` also
        the final state (n, E, S), float32 (float64), differentiable.

    Raises:
        TypeError: an operand of the wrong type or dtype, named.
        ValueError: an operand of the wrong shape or device, named with it.
        BackendError: the backend asked for cannot run this.
        MemoryError: the result would not fit the device.

    Source:
        Mamba, arXiv 2312.00752, algorithm 2; the reduction: STORM, arXiv 2503.04130, eqs. 6-8.

    Example:
        >>> u, delta, z = torch.randn(3, 1, 8, 4).unbind()
        >>> A, (B, C) = -torch.ones(4, 2), torch.randn(2, 1, 8, 2)
        >>> out, state = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, return_final_state=True)
        >>> out.shape, state.shape
        (torch.Size([1, 8, 4]), torch.Size([1, 4, 2]))
        >>> halved = TokenReduction(temporal_pool=2)
        >>> selective_scan(u, delta, A, B, C, grid=TokenGrid(4, 2, 1), reduction=halved).shape
        torch.Size([1, 4, 4])
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

    Args:
        forward: :class:`Direction`, the operands of the scan from the first token.
        backward: the same of the scan from the last token, in the sequence's own order too: nothing is flipped.
        z: (batch, L, E), the gate of the sum, or only the tokens of ``reduction.kept(grid)``; None for no gate.
        delta_softplus: whether each delta is softplus(delta + delta_bias). Default: as it is.
        cu_seqlens: (n + 1,) int32 or int64: bounds of sequences packed in a batch of 1; None for one a row.
        grid: where the tokens sit, T x H x W; needed only with a reduction.
        reduction: how they are averaged and sampled: only what survives is written. None for all tokens.
        backend: "torch", "cpu", "triton" or "cuda"; None leaves the choice open.

    Returns:
        (batch, L', E) in the dtype of ``forward.u``, with L' = L without a reduction.

    Raises:
        TypeError: an operand of the wrong type or dtype, named, such as ``backward.B``.
        ValueError: an operand of the wrong shape or device, named with it.
        BackendError: the backend asked for cannot run this.
        MemoryError: the result would not fit the device.

    Source:
        Vim's bimamba v2, arXiv 2401.09417, algorithm 1; the reduction: STORM, arXiv 2503.04130, eqs. 6-8.

    Example:
        >>> u, delta = torch.randn(2, 1, 8, 4).unbind()
        >>> one = Direction(u, delta, A=-torch.ones(4, 2), B=torch.randn(1, 8, 2), C=torch.randn(1, 8, 2))
        >>> bidirectional_selective_scan(one, one, delta_softplus=True).shape
        torch.Size([1, 8, 4])
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
    forward: Direction,
    backward: Direction | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    grid: TokenGrid | None,
    reduction: TokenReduction | None,
    backend: str | None,
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
