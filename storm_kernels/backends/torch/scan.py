"""The scan: the reference's, and its gradients by recomputing it. See `contract.Backend`."""

from __future__ import annotations

from torch import Tensor

from ... import reference
from ..contract import Checkpoints, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs, ScanResult
from .leaves import Leaves


def checkpoint_shapes(batch: int, length: int, channels: int, states: int, **options) -> tuple[tuple[int, ...], ...]:
    """Nothing is kept: the backward pass starts from the inputs."""
    return ()


def scan(call: ScanCall, save_checkpoints: bool) -> ScanResult:
    out, final_state = _scan(call)
    return ScanResult(out.contiguous(), final_state, ())


def _scan(call: ScanCall) -> tuple[Tensor, Tensor | None]:
    directions, z, delta_softplus, initial_state, cu_seqlens, grid, reduction = call
    shared = {"delta_softplus": delta_softplus, "cu_seqlens": cu_seqlens, "grid": grid, "reduction": reduction}
    plain = [reference.Direction(*direction[:7]) for direction in directions]
    if len(directions) == 2:
        forward, backward = reversed(plain) if directions[0].reverse else plain
        return reference.bidirectional_selective_scan(forward, backward, z, **shared), None
    u, delta, A, B, C, D, delta_bias = plain[0]
    options = {"reverse": directions[0].reverse, "initial_state": initial_state, "return_final_state": True}
    return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, **options, **shared)


def scan_backward(
    grad_out: Tensor, grad_final_state: Tensor | None, call: ScanCall, checkpoints: Checkpoints, needs: frozenset[str]
) -> ScanBackwardResult:
    leaves = Leaves(needs)
    copies = tuple(
        ScanInputs(*(leaves.add(name, t) for name, t in zip(ScanGrads._fields, one[:7], strict=True)), one.reverse)
        for one in call.directions
    )
    gate, start = leaves.add("z", call.z), leaves.add("initial_state", call.initial_state)
    call = call._replace(directions=copies, z=gate, initial_state=start)

    def outputs():
        out, final_state = _scan(call)
        return (out,) if grad_final_state is None else (out, final_state)

    found = leaves.gradients(outputs, (grad_out,) if grad_final_state is None else (grad_out, grad_final_state))
    per_direction = tuple(ScanGrads(*(found(t) for t in one[:7])) for one in copies)
    return per_direction, found(gate), found(start)
