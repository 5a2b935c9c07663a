"""The norms of the Triton kernel: sums of channels in registers, and what follows them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A float32 block rounded to DTYPE and widened again."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def terms(x, SQUARED: tl.constexpr):
    """The summand of each channel: its value, or its square."""
    x = x.to(tl.float32)
    return x * x if SQUARED else x


@triton.jit
def inverse_rms(squares, eps, SIZE: tl.constexpr):
    """Reciprocal root mean square. Correctly rounded: one per row costs little; the approximate rsqrt is 2 ulp off."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / SIZE + eps))


@triton.jit
def head_total(x1, x2, tail, TAIL: tl.constexpr, SQUARED: tl.constexpr):
    """Sum over the channels, or their squares, of each head ``[tokens, heads, 1]``."""
    total = tl.sum(terms(x1, SQUARED) + terms(x2, SQUARED), axis=2, keep_dims=True)
    if TAIL > 0:
        total += tl.sum(terms(tail, SQUARED), axis=2, keep_dims=True)
    return total


@triton.jit
def centred(
    x1, x2, tail, mean, mask, DIM: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr,
    TAIL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The channels less their mean, float32; 0 where ``mask`` is false and where a head is padded."""
    p = tl.arange(0, PADDED)[None, None, :]
    x1, x2, tail = x1.to(tl.float32) - mean, x2.to(tl.float32) - mean, tail.to(tl.float32) - mean
    if HALF:
        x1, x2 = tl.where(mask & (p < PAIRS), x1, 0.0), tl.where(mask & (p < PAIRS), x2, 0.0)
    else:
        x1, x2 = tl.where(mask & (2 * p < WIDTH), x1, 0.0), tl.where(mask & (2 * p + 1 < WIDTH), x2, 0.0)
    if TAIL > 0:
        channel = 2 * PAIRS + tl.arange(0, TAIL)[None, None, :]
        tail = tl.where(mask & (channel < DIM), tail, 0.0)
    return x1, x2, tail


@triton.jit
def row_total(sums, tail_sums, TAIL: tl.constexpr):
    """Sum over heads and channels ``[tokens, 1, 1]``."""
    total = tl.sum(tl.sum(sums, axis=2, keep_dims=True), axis=1, keep_dims=True)
    if TAIL > 0:
        total += tl.sum(tl.sum(tail_sums, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return total


@triton.jit
def affine(
    x1, x2, tail, scale, w1, w2, w_tail, b1, b2, b_tail, STORED: tl.constexpr, TAIL: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """The channels times scale and weight, plus bias; a weight or bias that is None is left out.

    What ROUNDING, a value of NormRounding, says is rounded to STORED, the dtype of memory.
    """
    x1, x2, tail = x1 * scale, x2 * scale, tail * scale
    if w1 is not None:
        if ROUNDING == "every_step":
            x1, x2, tail = rounded(x1, STORED), rounded(x2, STORED), rounded(tail, STORED)
        x1, x2 = x1 * w1.to(tl.float32), x2 * w2.to(tl.float32)
        if TAIL > 0:
            tail = tail * w_tail.to(tl.float32)
    if b1 is not None:
        if ROUNDING == "every_step":
            x1, x2, tail = rounded(x1, STORED), rounded(x2, STORED), rounded(tail, STORED)
        x1, x2 = x1 + b1.to(tl.float32), x2 + b2.to(tl.float32)
        if TAIL > 0:
            tail = tail + b_tail.to(tl.float32)
    if ROUNDING != "none":
        x1, x2, tail = rounded(x1, STORED), rounded(x2, STORED), rounded(tail, STORED)
    return x1, x2, tail
