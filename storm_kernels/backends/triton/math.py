"""Functions of one value, in float32, for every kernel of this folder: no inline assembly nor
external functions, so the interpreter runs them.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def exp_negative(v):
    """exp(-v) for v >= 0. ``exp2(v log2(e))`` alone is wrong by v ulp: take out the integer n next
    to v log2(e), exactly, with ln(2) in two parts.
    """
    v = tl.minimum(v, 87.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = v * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: n stands in the low bits
    n = shifted - 12582912.0
    rest = v - n * 0.693359375 + n * 2.12194440e-4
    scale = (1262485504 + 127 - shifted.to(tl.int32, bitcast=True)) << 23  # 2^-n; 1262485504 are the bits of 12582912.0
    return tl.exp2(-1.4426950408889634 * rest) * scale.to(tl.float32, bitcast=True)


@triton.jit
def softplus(v):
    """``log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|))``; above 20 the second term is under half an
    ulp, so docs/spec.md's threshold needs no branch.

    ``log1p(e) = e + e^2 series(e)`` on [0, 1]: relative to the result it is exact where exp(v) is
    tiny, as log1p is, and needs no division, whose special cases cost eight instructions. The
    coefficients are a least-maximum fit; the result is off by at most 6e-9 of itself before
    rounding.
    """
    e = exp_negative(tl.abs(v))
    series = 0.020204348489642143 - e * 0.003318420145660639
    series = series * e - 0.05766400322318077
    series = series * e + 0.10680510848760605
    series = series * e - 0.15355369448661804
    series = series * e + 0.1969539225101471
    series = series * e - 0.2495858520269394
    series = series * e + 0.33330512046813965
    series = series * e - 0.4999993145465851
    return tl.maximum(v, 0.0) + ((e * series) * e + e)


@triton.jit
def product(a, b):
    """``a * b`` rounded, for a sum over lanes. The compiler may fuse a plain product with the sum's
    first addition, of which each lane has another half: then lanes that hold the same sum hold it
    in different bits, and which one is stored is chance."""
    return tl.fma(a, b, 0.0)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest even. The interpreter cuts bfloat16 off instead, so
    there the rounding is done first, on the bits.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)
