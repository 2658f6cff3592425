"""The kernels of a block for CUDA devices, in Triton: the arithmetic of c/block.c.

Letters and formulas are those of `block.py`. Unless noted otherwise a program handles one row of pooling
windows of one example, for BX channels. It writes its two sums to `partial`. The last program to finish adds
them up in float64 in a fixed order, so results are reproducible, and computes the channels' numbers in `d`,
which saves a launch. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly.

Arguments of the kernels, which are pointers to tensors unless noted otherwise:
    c, p, where, a: the convolution's output, its pooled values, their places in their windows, the output.
    ga, gc: the gradients of a and c. A suffix _t stands for a tangent; ct is c_t.
    c2; ga1, ga2: a second summand of c_t; the summands of ga_t. The second ones are read only with TWO.
    gamma, beta: of the norm: `norms` values each, which all tasks share if these are fewer than X.
    d: one float64 row of X values for each entry of `ChannelRow`.
    seen: mean and unbiased variance of each channel, in the norm's dtype.
    partial: two sums per program and channel, [rows, 2, X].
    tickets: one counter per tile of channels, 0 between two kernels.
    rows, count: numbers: the rows of `partial` to add up, and the values per channel that a mean divides by.
    eps, leak: numbers: added to the variance, and the slope of the activation below 0.
    H, W, X, PW, total: sizes: of c ([E, H, W, X]), the width of p, and the number of pooled values.
    REAL: the dtype of the arithmetic.
    BX, RS: channels (or pooled values) per program, and rows of `partial` that are added at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamlctl.engine.kernels.triton.channels import (
    MEAN,
    MEAN_T,
    OFFSET,
    OFFSET_T,
    S_T,
    SLOPE,
    SLOPE_T,
    VAR,
    both,
    is_last,
    join,
    norm_of,
    put_backward,
    put_statistics,
    put_tangent,
    put_tangent_backward,
    row_of,
    slope_at,
)


@triton.jit
def _channels(X, BX: tl.constexpr):
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    return x, x < X


@triton.jit
def _within(inside, h, H, w, W, BX: tl.constexpr):
    """Mask the channels if row h and column w are in the image; vectors, as the interpreter needs them."""
    zero = tl.zeros((BX,), tl.int32)
    return inside & (zero + h < H) & (zero + w < W)


@triton.jit
def _row(H):
    """The example and the row of pooling windows of this program."""
    item, rows = tl.program_id(0), (H + 1) // 2
    return item // rows, item % rows


@triton.jit
def _pooled(e, i, j, x, inside, H, W, X, BX: tl.constexpr):
    """Where window (i, j) is in the pooled tensors, and the channels to handle: none if it is incomplete."""
    at = ((e * (H // 2) + i) * (W // 2) + j) * X + x
    return at, _within(inside, 2 * i + 1, H, 2 * j + 1, W, BX)


@triton.jit
def _cell(q, e, i, j, x, inside, H, W, X, BX: tl.constexpr):
    """Where place q of window (i, j) is in c, and the channels to handle: none if it is outside."""
    h, w = 2 * i + q // 2, 2 * j + q % 2
    return ((e * H + h) * W + w) * X + x, _within(inside, h, H, w, W, BX)


@triton.jit
def _put_sums(partial, one, two, X, x, inside):
    """Store the two sums of this program."""
    item = tl.program_id(0)
    tl.store(partial + item * 2 * X + x, one.to(tl.float64), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, two.to(tl.float64), mask=inside)


@triton.jit
def pool(
    c, gamma, beta, p, where, d, seen, partial, tickets, rows, norms, count, eps, H, W, X,
    REAL: tl.constexpr, BX: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """Write p and `where` from c, and the statistics of c; with 0 rows mean and var are in d already."""
    e, i = _row(H)
    x, inside = _channels(X, BX)
    sign = tl.where(tl.load(gamma + x % norms, mask=inside, other=1.0) < 0, -1.0, 1.0).to(REAL)
    total = tl.zeros((BX,), REAL)
    square = tl.zeros((BX,), REAL)
    for j in range((W + 1) // 2):
        best = tl.zeros((BX,), REAL)
        which = tl.zeros((BX,), tl.int32)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, x, inside, H, W, X, BX)
            v = tl.load(c + cell, mask=present, other=0.0).to(REAL)
            total += v
            square += v * v
            larger = v * sign > best
            # With gamma < 0 the smallest value is selected.
            if q == 0:
                best = v * sign
            else:
                which = tl.where(larger, q, which)
                best = tl.where(larger, v * sign, best)
        at, pooled = _pooled(e, i, j, x, inside, H, W, X, BX)
        tl.store(p + at, (best * sign).to(p.dtype.element_ty), mask=pooled)
        tl.store(where + at, which.to(tl.uint8), mask=pooled)
    _put_sums(partial, total, square, X, x, inside)
    if is_last(tickets):
        mean, var = row_of(d, MEAN, X, x, inside, tl.float64), row_of(d, VAR, X, x, inside, tl.float64)
        if rows > 0:
            mean = join(partial, rows, 2, X, 0, x, inside, RS, BX) / count
            var = join(partial, rows, 2, X, 1, x, inside, RS, BX) / count - mean * mean
            var = tl.where(var < 0, 0.0, var)  # rounding of a constant channel
        put_statistics(d, seen, gamma, beta, norms, mean, var, count, eps, X, x, inside)


@triton.jit
def activate(p, a, d, leak, total, X, REAL: tl.constexpr, BX: tl.constexpr):
    """a = act(s (p - mean) + beta); a program handles BX pooled values."""
    at = tl.program_id(0) * BX + tl.arange(0, BX)
    inside, x = at < total, at % X
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    z = (tl.load(p + at, mask=inside, other=0.0).to(REAL) - mean) * s + beta
    tl.store(a + at, (z * tl.where(z > 0, 1.0, leak)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def backward_sums(
    ga, p, d, partial, tickets, rows, count, leak, PW, X,
    REAL: tl.constexpr, BX: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """The sums of gz = act'(z) ga and of gz p, and the numbers of the backward pass."""
    item = tl.program_id(0)
    x, inside = _channels(X, BX)
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    total = tl.zeros((BX,), REAL)
    product = tl.zeros((BX,), REAL)
    for j in range(PW):
        at = (item * PW + j) * X + x
        v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
        gz = tl.load(ga + at, mask=inside, other=0.0).to(REAL) * slope_at(v, s, mean, beta, leak, REAL)
        total += gz
        product += gz * v
    _put_sums(partial, total, product, X, x, inside)
    if is_last(tickets):
        b = join(partial, rows, 2, X, 0, x, inside, RS, BX)
        put_backward(d, b, join(partial, rows, 2, X, 1, x, inside, RS, BX), count, X, x, inside)


@triton.jit
def backward_spread(ga, p, where, c, gc, d, leak, H, W, X, REAL: tl.constexpr, BX: tl.constexpr):
    """gc = s gz at the selected places + slope c + offset."""
    e, i = _row(H)
    x, inside = _channels(X, BX)
    slope, offset = row_of(d, SLOPE, X, x, inside, REAL), row_of(d, OFFSET, X, x, inside, REAL)
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    for j in range((W + 1) // 2):
        at, pooled = _pooled(e, i, j, x, inside, H, W, X, BX)
        v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
        h = s * tl.load(ga + at, mask=pooled, other=0.0).to(REAL) * slope_at(v, s, mean, beta, leak, REAL)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, x, inside, H, W, X, BX)
            value = slope * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset
            value += tl.where(which == q, h, 0.0)
            tl.store(gc + cell, value.to(gc.dtype.element_ty), mask=present)


@triton.jit
def tangent_pool(
    ct, c2, c, where, p_t, d, partial, tickets, rows, count, H, W, X,
    TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """c_t += c2 if TWO, p_t = c_t at the selected places, and mean_t, r_t, s_t from c_t and c c_t."""
    e, i = _row(H)
    x, inside = _channels(X, BX)
    total = tl.zeros((BX,), REAL)
    cross = tl.zeros((BX,), REAL)
    for j in range((W + 1) // 2):
        at, pooled = _pooled(e, i, j, x, inside, H, W, X, BX)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        kept = tl.zeros((BX,), REAL)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, x, inside, H, W, X, BX)
            v = tl.load(ct + cell, mask=present, other=0.0).to(REAL)
            if TWO:
                v += tl.load(c2 + cell, mask=present, other=0.0).to(REAL)
                v = v.to(ct.dtype.element_ty).to(REAL)  # the sums use the rounded value that is stored
                tl.store(ct + cell, v.to(ct.dtype.element_ty), mask=present)
            total += v
            cross += v * tl.load(c + cell, mask=present, other=0.0).to(REAL)
            kept = tl.where(which == q, v, kept)
        tl.store(p_t + at, kept.to(p_t.dtype.element_ty), mask=pooled)
    _put_sums(partial, total, cross, X, x, inside)
    if is_last(tickets):
        mean_t = join(partial, rows, 2, X, 0, x, inside, RS, BX) / count
        mixed = join(partial, rows, 2, X, 1, x, inside, RS, BX) / count
        var_t = 2.0 * (mixed - row_of(d, MEAN, X, x, inside, tl.float64) * mean_t)
        put_tangent(d, mean_t, var_t, X, x, inside)


@triton.jit
def tangent_activate(p, p_t, a_t, d, leak, total, X, REAL: tl.constexpr, BX: tl.constexpr):
    """a_t = act'(z) (s (p_t - mean_t) + s_t (p - mean)); a program handles BX pooled values."""
    at = tl.program_id(0) * BX + tl.arange(0, BX)
    inside, x = at < total, at % X
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
    v_t = tl.load(p_t + at, mask=inside, other=0.0).to(REAL) - row_of(d, MEAN_T, X, x, inside, REAL)
    z_t = s * v_t + row_of(d, S_T, X, x, inside, REAL) * (v - mean)
    z_t *= slope_at(v, s, mean, beta, leak, REAL)
    tl.store(a_t + at, z_t.to(a_t.dtype.element_ty), mask=inside)


@triton.jit
def tangent_sums(
    ga1, ga2, ga, p, p_t, d, partial, tickets, rows, count, leak, PW, X,
    TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """The sums of gz_t = act'(z) ga_t and of gz_t p + gz p_t, and the tangents of the backward numbers."""
    item = tl.program_id(0)
    x, inside = _channels(X, BX)
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    total = tl.zeros((BX,), REAL)
    product = tl.zeros((BX,), REAL)
    for j in range(PW):
        at = (item * PW + j) * X + x
        v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
        step = slope_at(v, s, mean, beta, leak, REAL)
        gz_t = step * both(ga1, ga2, at, inside, TWO, REAL)
        gz = step * tl.load(ga + at, mask=inside, other=0.0).to(REAL)
        total += gz_t
        product += gz_t * v + gz * tl.load(p_t + at, mask=inside, other=0.0).to(REAL)
    _put_sums(partial, total, product, X, x, inside)
    if is_last(tickets):
        b_t = join(partial, rows, 2, X, 0, x, inside, RS, BX)
        product_t = join(partial, rows, 2, X, 1, x, inside, RS, BX)
        put_tangent_backward(d, b_t, product_t, count, X, x, inside)


@triton.jit
def tangent_spread(
    ga1, ga2, ga, p, where, c, ct, d, leak, H, W, X, TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr
):
    """gc_t = s gz_t + s_t gz at the selected places + slope_t c + slope c_t + offset_t, written over c_t."""
    e, i = _row(H)
    x, inside = _channels(X, BX)
    slope, slope_t = row_of(d, SLOPE, X, x, inside, REAL), row_of(d, SLOPE_T, X, x, inside, REAL)
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    s_t, offset_t = row_of(d, S_T, X, x, inside, REAL), row_of(d, OFFSET_T, X, x, inside, REAL)
    for j in range((W + 1) // 2):
        at, pooled = _pooled(e, i, j, x, inside, H, W, X, BX)
        v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
        h = s * both(ga1, ga2, at, pooled, TWO, REAL)
        h += s_t * tl.load(ga + at, mask=pooled, other=0.0).to(REAL)
        h *= slope_at(v, s, mean, beta, leak, REAL)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, x, inside, H, W, X, BX)
            value = slope_t * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset_t
            value += slope * tl.load(ct + cell, mask=present, other=0.0).to(REAL)
            value += tl.where(which == q, h, 0.0)
            tl.store(ct + cell, value.to(ct.dtype.element_ty), mask=present)
