"""What every fast mixer does between in_proj and out_proj: convolution, x_proj, dt_proj, scan.

The mixers differ in where their layers and parameters lie, and in what stands between the steps;
so :func:`mixer_core` is also there in its parts, :func:`operands` and :func:`scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops import bidirectional_selective_scan, selective_scan
from ..profiling import stage
from ..reference import Direction
from .linear import convolve, convolve_both, project, project_dt


class Branch(NamedTuple):
    """The layers and parameters of one direction of a mixer."""

    conv1d: nn.Module
    x_proj: nn.Module  # E -> R + 2S
    dt_proj: nn.Module  # R -> E
    A: Tensor  # (E, S)
    D: Tensor  # (E,)


def mixer_core(
    x: Tensor,
    z: Tensor,
    branches: Sequence[Branch],
    act: object = None,
    *,
    history: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """Convolved, scanned in each direction, gated: x (batch, L, E) -> (batch, L', E).

    Args:
        x: (batch, L, E), what in_proj gives for the scan.
        z: the gate, as :func:`storm_kernels.selective_scan` takes it.
        branches: one, or the forward and the backward one.
        act: the convolution's activation, as in :func:`storm_kernels.nn.linear.convolve`.
        history: (n, E, K - 1), the inputs before the first; with one branch.
        cu_seqlens, options: further arguments of the scan: grid, reduction, initial_state, return_final_state.

    Returns:
        The scan's result; with ``return_final_state`` also its final state.
    """
    with stage("conv"):
        if len(branches) == 1:
            convolved = (convolve(x, branches[0].conv1d, act, initial_state=history, cu_seqlens=cu_seqlens),)
        else:
            convolved = convolve_both(x, *(branch.conv1d for branch in branches), act, cu_seqlens=cu_seqlens)
    directions = [operands(u, *branch[1:]) for u, branch in zip(convolved, branches, strict=True)]
    return scan(directions, z, cu_seqlens=cu_seqlens, **options)


def operands(
    u: Tensor,
    x_proj: nn.Module,
    dt_proj: nn.Module,
    A: Tensor,
    D: Tensor,
    *,
    norms: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    project_dt: Callable[[Tensor, nn.Module], tuple[Tensor, Tensor | None]] = project_dt,
) -> Direction:
    """The scan's operands of one direction from its convolved input u (batch, L, E).

    ``norms`` takes dt_raw (batch, L, R), B and C (batch, L, S) and gives them back;
    ``project_dt`` takes dt_raw and dt_proj and gives delta and the bias that the scan has to add.
    """
    states = A.shape[-1]
    with stage("x_proj"):
        projected = project(u, x_proj)
        dt_raw, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
    if norms is not None:
        dt_raw, B, C = norms(dt_raw, B, C)
    with stage("dt_proj"):
        delta, delta_bias = project_dt(dt_raw, dt_proj)
    return Direction(u, delta, A, B, C, D, delta_bias)


def scan(directions: Sequence[Direction], z: Tensor | None, **options: Any) -> Any:
    """The scan of one direction, or of a forward and a backward one, with ``delta_softplus``."""
    with stage("scan"):
        if len(directions) == 2:
            return bidirectional_selective_scan(*directions, z=z, delta_softplus=True, **options)
        (one,) = directions
        return selective_scan(*one[:6], z=z, delta_bias=one.delta_bias, delta_softplus=True, **options)
