"""Each list that has to name every operation does. An operation that a list leaves out would not be
checked, counted or timed there, and nothing else would say so.
"""

import re

import pytest

from storm_kernels import cli, verify
from storm_kernels.backends import dispatch
from storm_kernels.ops import flops
from tools import gpu

from ..backends import test_parity
from ..support import parity_cases, parity_random
from . import test_errors, test_global_state, test_operands, test_ops

BY_CASE = {
    "CALLS of tests/ops/test_ops.py": test_ops.CALLS,
    "CASES of tests/ops/test_errors.py": test_errors.CASES,
    "CASES of tests/ops/test_global_state.py": test_global_state.CASES,
    "CASES of tests/support/parity_random.py": parity_random.CASES,
    "KINDS of tests/support/parity_cases.py": parity_cases.KINDS,
    "LONG_CASES of tests/backends/test_parity.py": test_parity.LONG_CASES,
    "DEFAULT_CASES of tests/backends/test_parity.py, cpu": test_parity.DEFAULT_CASES["cpu"],
    "DEFAULT_CASES of tests/backends/test_parity.py, triton": test_parity.DEFAULT_CASES["triton"],
    "ORDER of backends/dispatch.py, cpu": dispatch.ORDER["cpu"],
    "ORDER of backends/dispatch.py, cuda": dispatch.ORDER["cuda"],
    "FUNCTIONS of backends/dispatch.py": dispatch.FUNCTIONS.values(),
    "_CASES of verify.py": verify._CASES,
    "SUBJECTS of cli.py": cli.SUBJECTS,
    "families() of tools/gpu.py": [op for _, op, *_ in gpu.families().values()],
}
BY_OPERATOR = {
    "TABLES of tests/ops/test_operands.py": test_operands.TABLES,
    "FORMULAS of ops/flops.py": flops.FORMULAS,
}


@pytest.mark.parametrize("where", BY_CASE)
def test_every_operation_has_a_case(where):
    """A case's name begins with its operation's."""
    assert set(dispatch.OPS) <= {re.split("[ _]", name)[0] for name in BY_CASE[where]}


@pytest.mark.parametrize("where", BY_OPERATOR)
def test_every_operator_has_a_row(where):
    assert BY_OPERATOR[where].keys() == test_ops.CHECKED
