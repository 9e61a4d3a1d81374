"""The table of an operator's operands: each one's name, type, shape, place, and whether it gets a gradient.

Everything that depends on the order of the operands is read from it: the schema, the arguments by
name, the results of the backward operator, what autograd wants back for each argument, and the
formulas of :mod:`storm_kernels.ops.flops`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import vjp


class Operand(NamedTuple):
    """One argument of a registered operator; its place is its place in the table."""

    name: str
    shape: str = ""  # of a tensor, in the symbols of contract.py
    type: str = "Tensor"  # as PyTorch's schemas write it: "Tensor", "Tensor?", "bool", "SymInt[]?", ...
    gradient: bool = False  # whether it gets one

    def of_second(self) -> Operand:
        """The same operand of a second direction or filter, which there may be or not."""
        return self._replace(name=f"{self.name}_b", type=f"{self.type.removesuffix('?')}?")


BACKEND = Operand("backend", type="str")  # the last argument of every operator: the backend asked for, or ""
NEEDS = Operand("needs", type="str")  # of a backward operator: names of the operands whose gradients are wanted


class Table:
    """The operands of one operator, in the schema's order, and the number of tensors it returns.

    Example:
        >>> table = Table(Operand("x", "(batch, L, E)", gradient=True), BACKEND, returns=1)
        >>> table.schema
        '(Tensor x, str backend) -> Tensor'
        >>> table.read((2, "cpu")).backend
        'cpu'
    """

    def __init__(self, *operands: Operand, returns: int):
        self.operands = operands
        self.names = tuple(operand.name for operand in operands)
        self.differentiable = tuple(operand.name for operand in operands if operand.gradient)
        self.read = namedtuple("Arguments", self.names)._make  # arguments in their order -> the same, by name
        results = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
        self.schema = f"({', '.join(f'{operand.type} {operand.name}' for operand in operands)}) -> {results}"

    def needed(self, needs_input_grad: Iterable[bool]) -> str:
        """The names of the arguments that autograd wants gradients of, separated by spaces."""
        return " ".join(name for name, wanted in zip(self.names, needs_input_grad, strict=True) if wanted)

    def for_arguments(self, gradients: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """What autograd takes from a backward pass: for each argument its gradient, or None."""
        return tuple(map(gradients.get, self.names))

    def results(self, gradients: Mapping[str, Tensor | None], needs: str, like: Tensor) -> tuple[Tensor, ...]:
        """What a backward operator returns: for each operand that gets a gradient the one found, or
        an empty tensor like ``like`` where ``needs`` does not name it.
        """
        names = needs.split()
        return tuple(gradients[name] if name in names else like.new_empty(0) for name in self.differentiable)

    def named(self, results: tuple[Tensor, ...], needs: str) -> dict[str, Tensor]:
        """The gradients that a backward operator returned, by name; those alone that ``needs`` names."""
        names = needs.split()
        return {name: grad for name, grad in zip(self.differentiable, results, strict=True) if name in names}

    def fake_results(self, backward, like: Tensor) -> tuple[Tensor, ...]:
        """:meth:`results` without values, from the arguments of the backward operator by name."""
        shaped = {
            name: torch.empty_like(getattr(backward, name), memory_format=torch.contiguous_format)
            for name in backward.needs.split()
        }
        return self.results(shaped, backward.needs, like)

    def plain_results(
        self, plain: Callable[..., tuple[Tensor, ...]], backward, grads: tuple[Tensor, ...], like: Tensor, **others
    ) -> tuple[Tensor, ...]:
        """:meth:`results` that can be differentiated again, through ``plain``: as many of its results
        as there are ``grads``.

        Its arguments are those of the backward operator by name, and ``others``.
        """
        names = backward.needs.split()
        args = tuple(others[name] if name in others else getattr(backward, name) for name in self.names)
        places = [self.names.index(name) for name in names]
        found = vjp(lambda *values: plain(*values)[: len(grads)], args, places, grads)
        return self.results(dict(zip(names, found, strict=True)), backward.needs, like)


def pick(operands: Iterable[Operand]) -> Callable[[object], tuple]:
    """A function from arguments by name to the tuple of these operands."""
    return attrgetter(*(operand.name for operand in operands))
