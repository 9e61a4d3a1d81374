"""Functions of one value, in float32, for every kernel of this folder: no inline assembly nor external functions, so the interpreter runs them."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def exp_negative(v):
    """exp(-v) for v >= 0. ``exp2(v log2(e))`` alone is wrong by v ulp: take out the integer n next to v log2(e), exactly, with ln(2) in two parts."""
    v = tl.where(v > 87.0, 87.0, v)
    shifted = v * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: n stands in the low bits
    n = shifted - 12582912.0
    rest = v - n * 0.693359375 + n * 2.12194440e-4
    scale = (1262485504 + 127 - shifted.to(tl.int32, bitcast=True)) << 23  # 2^-n; 1262485504 are the bits of 12582912.0
    return tl.exp2(-1.4426950408889634 * rest) * scale.to(tl.float32, bitcast=True)


@triton.jit
def softplus(v):
    """``log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|))``; above 20 the second term is under half an ulp, so SPEC.md's threshold needs no branch.

    ``log1p(e) = 2 atanh(e / (2 + e))`` as a series in ``(e / (2 + e))^2 <= 1/9``: relative accuracy also where exp(v) is tiny, as log1p has it.
    """
    e = exp_negative(tl.abs(v))
    ratio = e / (2.0 + e)
    square = ratio * ratio
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    twice = 2.0 * ratio
    return tl.maximum(v, 0.0) + (twice * (series * square) + twice)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest even. The interpreter cuts bfloat16 off instead, so there the rounding is done first, on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)
