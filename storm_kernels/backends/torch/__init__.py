"""The backend that is always there: the reference, and its gradients by recomputing it under autograd."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ... import reference
from ...tokens import TokenGrid, TokenReduction
from ..contract import ConvCall, ConvFilter, ConvGrads, ScanBackwardResult, ScanCall, ScanGrads, ScanInputs, ScanResult

NAME = "torch"


def own_device() -> str:
    """The one that every machine has."""
    return "cpu"


def why_not(op: str, *, device: str, dtypes: frozenset, d_state: int, d_conv: int) -> str | None:
    """It runs everywhere."""
    return None


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
    grad_out: Tensor,
    grad_final_state: Tensor | None,
    call: ScanCall,
    checkpoints: tuple[Tensor, ...],
    needs: frozenset[str],
) -> ScanBackwardResult:
    leaves = _Leaves(needs)
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


def conv(call: ConvCall) -> tuple[Tensor, ...]:
    x, filters, silu, initial_state, cu_seqlens = call
    options = {"activation": "silu" if silu else None, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    with torch.autocast(x.device.type, enabled=False):  # which would round a convolution's operands
        return tuple(
            reference.causal_conv1d(x, one.weight, one.bias, reverse=one.reverse, **options).contiguous()
            for one in filters
        )


def conv_backward(grads: tuple[Tensor, ...], call: ConvCall, needs: frozenset[str]) -> ConvGrads:
    x, filters, silu, initial_state, cu_seqlens = call
    leaves = _Leaves(needs)
    inputs, start = leaves.add("x", x), leaves.add("initial_state", initial_state)
    copies = tuple(
        ConvFilter(leaves.add("weight", one.weight), leaves.add("bias", one.bias), one.reverse) for one in filters
    )
    found = leaves.gradients(lambda: conv(ConvCall(inputs, copies, silu, start, cu_seqlens)), grads)
    return found(inputs), tuple((found(one.weight), found(one.bias)) for one in copies), found(start)


def reduce(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    return reference.reduce_tokens(x, grid, reduction).contiguous()


def reduce_backward(grad: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    leaves = _Leaves(frozenset("x"))
    x = leaves.add("x", grad.new_zeros(grad.shape[0], grid.tokens, grad.shape[2]))
    return leaves.gradients(lambda: (reference.reduce_tokens(x, grid, reduction),), (grad,))(x)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.clone() if residual is None else (x.to(weight.dtype) + residual.to(weight.dtype)).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(summed.to(weight.dtype), weight.shape, weight, bias, eps)
    return normed.to(x.dtype), summed, mean.flatten(), rstd.flatten()


def norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = weight.dtype
    per_row = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
    bias = torch.zeros_like(weight)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(acc), summed.to(acc), weight.shape, *per_row, weight, bias, [True, True, True]
    )
    return (grad if grad_sum is None else grad + grad_sum.to(acc)).to(summed.dtype), grad_weight, grad_bias


class _Leaves:
    """Detached copies of the inputs whose gradients are needed, and the way back to those gradients."""

    def __init__(self, needs: frozenset[str]):
        self.needs = needs
        self.leaves: list[Tensor] = []

    def add(self, name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or name not in self.needs:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def gradients(
        self, outputs: Callable[[], tuple[Tensor, ...]], grads: tuple[Tensor, ...]
    ) -> Callable[[Tensor | None], Tensor | None]:
        """A function from an input to its gradient: zeros where nothing depends on it, None where it is no leaf.

        An operator's implementation runs below autograd; a fresh thread, on the same stream, stands
        above it again.
        """
        stream = torch.cuda.current_stream(grads[0].device) if grads[0].is_cuda else None

        def run() -> tuple[Tensor, ...]:
            with torch.cuda.stream(stream), torch.enable_grad():
                pairs = [(out, grad) for out, grad in zip(outputs(), grads, strict=True) if out.requires_grad]
                outs, incoming = [out for out, _ in pairs], [grad for _, grad in pairs]
                return torch.autograd.grad(outs, self.leaves, incoming, allow_unused=True, materialize_grads=True)

        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(run).result()
        # An operator's results may share no memory with its operands, and a gradient may be the
        # incoming one itself.
        table = {
            id(leaf): grad.clone(memory_format=torch.contiguous_format)
            for leaf, grad in zip(self.leaves, found, strict=True)
        }
        return lambda tensor: table.get(id(tensor))
