"""A fault to be seeded: what `storm_kernels.backends.triton.math.product` would be without its fma."""

import triton


@triton.jit
def plain_product(a, b):
    return a * b
