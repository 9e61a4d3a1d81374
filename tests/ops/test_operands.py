"""The tables of operands say what the operators are called with: names, types, shapes, gradients."""

import pytest
import torch

from storm_kernels.backends.contract import ConvFilter, ScanGrads, ScanInputs
from storm_kernels.ops import conv, reduce, scan_operator

from ..support.parity_cases import ConvCase, ReduceCase, ScanCase, simplest
from .test_ops import CALLS, recorded

TABLES = {
    "scan": scan_operator.SCAN,
    "scan_backward": scan_operator.SCAN_BACKWARD,
    "conv": conv.CONV,
    "conv_backward": conv.CONV_BACKWARD,
    "reduce": reduce.REDUCE,
    "reduce_backward": reduce.REDUCE_BACKWARD,
}
OTHERWISE = {"z"}  # its shape has two readings
MORE = {
    "scan_both": simplest(ScanCase, direction="both", D=True, bias=True, z="all", groups=2),
    "conv_both": simplest(ConvCase, direction="both", bias=True),
    "reduce_alone": simplest(ReduceCase, reduction=(2, 2, 2)),
}


@pytest.mark.parametrize("name", TABLES)
def test_schema_is_the_tables(name):
    schema = getattr(torch.ops.storm_kernels, name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == TABLES[name].names
    assert len(schema.returns) == TABLES[name].schema.partition("->")[2].count("Tensor")


def test_directions_and_filters_are_the_contracts():
    def names(operands):
        return tuple(operand.name for operand in operands)

    assert names(scan_operator._DIRECTION) == ScanGrads._fields == ScanInputs._fields[: len(ScanGrads._fields)]
    assert names(conv._FILTER) == ConvFilter._fields[: len(conv._FILTER)]


@pytest.mark.parametrize("call", [*CALLS, *MORE])
def test_operands_have_the_shapes_of_the_table(call):
    """Each symbol has one value in a call, and each operand as many axes as its table names."""
    for function, args in recorded((CALLS | MORE)[call], "torch"):
        table, sizes = TABLES[function.name().split("::")[1]], {}
        for operand, value in zip(table.operands, args, strict=True):
            assert isinstance(value, torch.Tensor) <= bool(operand.shape or operand in scan_operator._CHECKPOINTS)
            if not isinstance(value, torch.Tensor) or not operand.shape or operand.name in OTHERWISE:
                continue
            symbols = operand.shape.strip("(),").split(", ")
            assert value.dim() == len(symbols), operand
            for symbol, size in zip(symbols, value.shape, strict=True):
                assert sizes.setdefault(symbol, size) == size, (operand, symbol, sizes)
        assert sizes.get("K-1", 0) in (0, sizes.get("K", 1) - 1)


@pytest.mark.parametrize("call", [*CALLS, *MORE])
def test_each_operand_with_a_gradient_gets_one(call):
    """Of its own shape, in the backward operator's order."""
    (function, args), *_ = recorded((CALLS | MORE)[call], "torch")
    table = TABLES[function.name().split("::")[1]]
    leaves = [a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    sum(out.square().sum() for out in outs[:2] if out.requires_grad).backward()
    for operand, leaf in zip(table.operands, leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert (leaf.grad is not None) == operand.gradient, operand
            assert leaf.grad is None or leaf.grad.shape == leaf.shape
