"""Gradients of a plain function, from below autograd."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Leaves:
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
