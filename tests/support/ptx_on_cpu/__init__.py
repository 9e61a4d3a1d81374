"""Runs what the compilers made of the GPU kernels, on a CPU: PTX, interpreted in NumPy, with every
access and every order of accesses checked.

`OnPtx` takes the CUDA backend's launches, `triton_on_ptx` those of the Triton backend. Both raise
`Refused` where a GPU might fault, hang or give another result. docs/kernels.md tells how to debug a
kernel with them.
"""

from . import accesses, floats, integers, meetings, moves  # noqa: F401 (they register their opcodes)
from .cuda import OnPtx, compile_both, ptx_of
from .machine import Machine, Options
from .refusal import Refused, Unknown

__all__ = ["Machine", "OnPtx", "Options", "Refused", "Unknown", "compile_both", "ptx_of"]
