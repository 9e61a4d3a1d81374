"""The public functions: argument checks, operator schemas, fake kernels and autograd; the only door to the kernels."""

from . import flops
from .conv import bidirectional_causal_conv1d, causal_conv1d
from .reduce import reduce_tokens
from .scan import bidirectional_selective_scan, selective_scan

__all__ = [
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "reduce_tokens",
    "selective_scan",
]

flops.offer()  # its formulas name the operators that these modules register
