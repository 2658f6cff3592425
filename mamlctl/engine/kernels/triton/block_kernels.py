"""The kernels of a block for CUDA devices, in Triton: the arithmetic of c/block.c.

Letters and formulas are those of `block.py`. Unless noted otherwise a program handles some groups of BW
pooling windows, for BX channels. It writes its two sums to `partial`. The last program to finish adds
them up in float64 in a fixed order, so results are reproducible, and computes the channels' numbers in `d`,
which saves a launch. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly.

Arguments of the kernels, which are pointers to tensors unless noted otherwise:
    c, p, where, a: the convolution's output, its pooled values, their places in their windows, the output.
    ga, gc: the gradients of a and c. A suffix _t stands for a tangent; ct is c_t.
    gamma, beta: of the norm: `norms` values each, which all tasks share if these are fewer than X.
    d: one float64 row of X values for each entry of `ChannelRow`.
    seen: mean and unbiased variance of each channel, in the norm's dtype.
    partial: two sums per program and channel, [rows, 2, X], in REAL.
    tickets: one counter per tile of channels, 0 between two kernels.
    measured, count: numbers: the leading examples that the statistics come from, and the values per channel
        that a mean divides by.
    eps, leak: numbers: added to the variance, and the slope of the activation below 0.
    E, H, W, X: sizes of c, [E, H, W, X].
    items, total: numbers: the pooled values of a channel, and of all.
    REAL: the dtype of the arithmetic.
    BX, BW, RS: channels and windows of a group, and rows of `partial` that are added at a time.
    BV: pooled values of a program that handles each of them alone.
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
    is_last,
    join,
    norm_of,
    norm_rows,
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
def _windows(first, E, H, W, BW: tl.constexpr):
    """The examples, rows and columns of the windows from number `first`, and which of them exist.

    Windows at the border that have no place in p, because H or W is odd, are counted too.
    """
    item, height, width = first + tl.arange(0, BW), (H + 1) // 2, (W + 1) // 2
    return item // (height * width), item // width % height, item % width, item < E * height * width


@triton.jit
def _pooled(e, i, j, here, x, inside, H, W, X):
    """Where windows are in the pooled tensors, and which of these places exist; [BW, BX]."""
    at = ((e * (H // 2) + i) * (W // 2) + j)[:, None] * X + x[None, :]
    return at, (here & (2 * i + 1 < H) & (2 * j + 1 < W))[:, None] & inside[None, :]


@triton.jit
def _cell(q, e, i, j, here, x, inside, H, W, X):
    """Where place q of the windows is in c, and which of these places exist; [BW, BX]."""
    h, w = 2 * i + q // 2, 2 * j + q % 2
    at = ((e * H + h) * W + w)[:, None] * X + x[None, :]
    return at, (here & (h < H) & (w < W))[:, None] & inside[None, :]


@triton.jit
def _values(item, items, x, inside, X):
    """Where pooled values are, and which of them exist; [BW, BX]."""
    return item[:, None] * X + x[None, :], (item < items)[:, None] & inside[None, :]


@triton.jit
def _put_sums(partial, one, two, X, x, inside):
    """Store the two sums of this program."""
    item = tl.program_id(0)
    tl.store(partial + item * 2 * X + x, tl.sum(one, 0), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, tl.sum(two, 0), mask=inside)


@triton.jit
def pool(
    c, gamma, beta, p, where, d, seen, partial, tickets, measured, norms, count, eps, E, H, W, X,
    REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """Write p and `where` from c, and its statistics; if `measured` is 0, mean and var are in d already."""
    x, inside = _channels(X, BX)
    sign = tl.where(tl.load(gamma + x % norms, mask=inside, other=1.0) < 0, -1.0, 1.0).to(REAL)[None, :]
    total = tl.zeros((BW, BX), REAL)
    square = tl.zeros((BW, BX), REAL)
    for first in range(tl.program_id(0) * BW, E * ((H + 1) // 2) * ((W + 1) // 2), tl.num_programs(0) * BW):
        e, i, j, here = _windows(first, E, H, W, BW)
        counts = (e < measured)[:, None]
        best = tl.zeros((BW, BX), REAL)
        which = tl.zeros((BW, BX), tl.int32)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, here, x, inside, H, W, X)
            v = tl.load(c + cell, mask=present, other=0.0).to(REAL)
            counted = tl.where(counts, v, 0.0)
            total += counted
            square += counted * v
            # With gamma < 0 the smallest value is selected.
            if q == 0:
                best = v * sign
            else:
                which = tl.where(v * sign > best, q, which)
                best = tl.maximum(v * sign, best)
        at, pooled = _pooled(e, i, j, here, x, inside, H, W, X)
        tl.store(p + at, (best * sign).to(p.dtype.element_ty), mask=pooled)
        tl.store(where + at, which.to(tl.uint8), mask=pooled)
    _put_sums(partial, total, square, X, x, inside)
    if is_last(tickets):
        mean, var = row_of(d, MEAN, X, x, inside, tl.float64), row_of(d, VAR, X, x, inside, tl.float64)
        if measured > 0:
            mean, var = join(partial, X, x, inside, RS, BX)
            mean = mean / count
            var = var / count - mean * mean
            var = tl.where(var < 0, 0.0, var)  # rounding of a constant channel
        put_statistics(d, seen, gamma, beta, norms, mean, var, count, eps, X, x, inside)


@triton.jit
def activate(p, a, d, leak, total, X, REAL: tl.constexpr, BV: tl.constexpr):
    """a = act(s (p - mean) + beta); a program handles BV pooled values."""
    at = tl.program_id(0) * BV + tl.arange(0, BV)
    inside, x = at < total, at % X
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    z = (tl.load(p + at, mask=inside, other=0.0).to(REAL) - mean) * s + beta
    tl.store(a + at, (z * tl.where(z > 0, 1.0, leak)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def backward_sums(
    ga, p, d, partial, tickets, count, leak, items, X,
    REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """The sums of gz = act'(z) ga and of gz p, and the numbers of the backward pass."""
    x, inside = _channels(X, BX)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    total = tl.zeros((BW, BX), REAL)
    product = tl.zeros((BW, BX), REAL)
    for first in range(tl.program_id(0) * BW, items, tl.num_programs(0) * BW):
        at, present = _values(first + tl.arange(0, BW), items, x, inside, X)
        v = tl.load(p + at, mask=present, other=0.0).to(REAL)
        gz = tl.load(ga + at, mask=present, other=0.0).to(REAL) * slope_at(v, s, mean, beta, leak, REAL)
        total += gz
        product += gz * v
    _put_sums(partial, total, product, X, x, inside)
    if is_last(tickets):
        b, of_p = join(partial, X, x, inside, RS, BX)
        put_backward(d, b, of_p, count, X, x, inside)


@triton.jit
def backward_spread(
    ga, p, where, c, gc, d, leak, E, H, W, X, REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr
):
    """gc = s gz at the selected places + slope c + offset."""
    x, inside = _channels(X, BX)
    e, i, j, here = _windows(tl.program_id(0) * BW, E, H, W, BW)
    slope = row_of(d, SLOPE, X, x, inside, REAL)[None, :]
    offset = row_of(d, OFFSET, X, x, inside, REAL)[None, :]
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    at, pooled = _pooled(e, i, j, here, x, inside, H, W, X)
    v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
    h = s * tl.load(ga + at, mask=pooled, other=0.0).to(REAL) * slope_at(v, s, mean, beta, leak, REAL)
    which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
    for q in tl.static_range(4):
        cell, present = _cell(q, e, i, j, here, x, inside, H, W, X)
        value = slope * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset
        value += tl.where(which == q, h, 0.0)
        tl.store(gc + cell, value.to(gc.dtype.element_ty), mask=present)


@triton.jit
def tangent_pool(
    ct, c, where, p_t, d, partial, tickets, measured, count, E, H, W, X,
    REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """p_t = c_t at the selected places, and mean_t, r_t, s_t from c_t and c c_t."""
    x, inside = _channels(X, BX)
    total = tl.zeros((BW, BX), REAL)
    cross = tl.zeros((BW, BX), REAL)
    for first in range(tl.program_id(0) * BW, E * ((H + 1) // 2) * ((W + 1) // 2), tl.num_programs(0) * BW):
        e, i, j, here = _windows(first, E, H, W, BW)
        counts = (e < measured)[:, None]
        at, pooled = _pooled(e, i, j, here, x, inside, H, W, X)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        kept = tl.zeros((BW, BX), REAL)
        for q in tl.static_range(4):
            cell, present = _cell(q, e, i, j, here, x, inside, H, W, X)
            v = tl.load(ct + cell, mask=present, other=0.0).to(REAL)
            counted = tl.where(counts, v, 0.0)
            total += counted
            cross += counted * tl.load(c + cell, mask=present, other=0.0).to(REAL)
            kept = tl.where(which == q, v, kept)
        tl.store(p_t + at, kept.to(p_t.dtype.element_ty), mask=pooled)
    _put_sums(partial, total, cross, X, x, inside)
    if is_last(tickets):
        mean_t, mixed = join(partial, X, x, inside, RS, BX)
        mean_t = mean_t / count
        var_t = 2.0 * (mixed / count - row_of(d, MEAN, X, x, inside, tl.float64) * mean_t)
        put_tangent(d, mean_t, var_t, X, x, inside)


@triton.jit
def tangent_activate(p, p_t, a_t, d, leak, total, X, REAL: tl.constexpr, BV: tl.constexpr):
    """a_t = act'(z) (s (p_t - mean_t) + s_t (p - mean)); a program handles BV pooled values."""
    at = tl.program_id(0) * BV + tl.arange(0, BV)
    inside, x = at < total, at % X
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
    v_t = tl.load(p_t + at, mask=inside, other=0.0).to(REAL) - row_of(d, MEAN_T, X, x, inside, REAL)
    z_t = s * v_t + row_of(d, S_T, X, x, inside, REAL) * (v - mean)
    z_t *= slope_at(v, s, mean, beta, leak, REAL)
    tl.store(a_t + at, z_t.to(a_t.dtype.element_ty), mask=inside)


@triton.jit
def tangent_sums(
    ga_t, ga, p, p_t, d, partial, tickets, count, leak, items, X,
    REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr, RS: tl.constexpr,
):  # fmt: skip
    """The sums of gz_t = act'(z) ga_t and of gz_t p + gz p_t, and the tangents of the backward numbers."""
    x, inside = _channels(X, BX)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    total = tl.zeros((BW, BX), REAL)
    product = tl.zeros((BW, BX), REAL)
    for first in range(tl.program_id(0) * BW, items, tl.num_programs(0) * BW):
        at, present = _values(first + tl.arange(0, BW), items, x, inside, X)
        v = tl.load(p + at, mask=present, other=0.0).to(REAL)
        step = slope_at(v, s, mean, beta, leak, REAL)
        gz_t = step * tl.load(ga_t + at, mask=present, other=0.0).to(REAL)
        gz = step * tl.load(ga + at, mask=present, other=0.0).to(REAL)
        total += gz_t
        product += gz_t * v + gz * tl.load(p_t + at, mask=present, other=0.0).to(REAL)
    _put_sums(partial, total, product, X, x, inside)
    if is_last(tickets):
        b_t, product_t = join(partial, X, x, inside, RS, BX)
        put_tangent_backward(d, b_t, product_t, count, X, x, inside)


@triton.jit
def tangent_spread(
    ga_t, ga, p, where, c, ct, d, leak, E, H, W, X, REAL: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr
):
    """gc_t = s gz_t + s_t gz at the selected places + slope_t c + slope c_t + offset_t, written over c_t."""
    x, inside = _channels(X, BX)
    e, i, j, here = _windows(tl.program_id(0) * BW, E, H, W, BW)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    s_t = row_of(d, S_T, X, x, inside, REAL)[None, :]
    slope = row_of(d, SLOPE, X, x, inside, REAL)[None, :]
    slope_t = row_of(d, SLOPE_T, X, x, inside, REAL)[None, :]
    offset_t = row_of(d, OFFSET_T, X, x, inside, REAL)[None, :]
    at, pooled = _pooled(e, i, j, here, x, inside, H, W, X)
    v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
    h = s * tl.load(ga_t + at, mask=pooled, other=0.0).to(REAL)
    h += s_t * tl.load(ga + at, mask=pooled, other=0.0).to(REAL)
    h *= slope_at(v, s, mean, beta, leak, REAL)
    which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
    for q in tl.static_range(4):
        cell, present = _cell(q, e, i, j, here, x, inside, H, W, X)
        value = slope_t * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset_t
        value += slope * tl.load(ct + cell, mask=present, other=0.0).to(REAL)
        value += tl.where(which == q, h, 0.0)
        tl.store(ct + cell, value.to(ct.dtype.element_ty), mask=present)
