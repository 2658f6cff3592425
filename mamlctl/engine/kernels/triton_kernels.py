"""The kernels of `fused_block.py` for CUDA devices, in Triton: the arithmetic of c/block.c.

Letters and formulas are those of `block.py`. Unless noted otherwise a program handles one row of pooling
windows of one example, for BX channels. It writes its two sums to `partial`; these are added up in float64 in
a fixed order, so results are reproducible. With TRITON_INTERPRET=1 the kernels run on a CPU, slowly.

Arguments of the kernels, which are pointers to tensors unless noted otherwise:
    c, p, where, a: the convolution's output, its pooled values, their places in their windows, the output.
    ga, gc: the gradients of a and c. A suffix _t stands for a tangent; ct is c_t.
    c2; ga1, ga2: a second summand of c_t; the summands of ga_t. The second ones are read only with TWO.
    d: one float64 row of X values for each entry of `ChannelRow`.
    partial: two sums per program and channel, [rows, 2, X].
    rows, count: numbers: the rows of `partial`, and the values per channel that a mean divides by.
    eps, leak: numbers: added to the variance, and the slope of the activation below 0.
    H, W, X, PW, total: sizes: of c ([E, H, W, X]), the width of p, and the number of pooled values.
    REAL: the dtype of the arithmetic.
    BX, RS: channels (or pooled values) per program, and rows of `partial` that are added at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamlctl.engine.kernels.fused_block import ChannelRow

MEAN, VAR, GAMMA, BETA, R, S = (tl.constexpr(row.value) for row in list(ChannelRow)[:6])
B, PRODUCT, G, SLOPE, OFFSET = (tl.constexpr(row.value) for row in list(ChannelRow)[6:11])
MEAN_T, R_T, S_T, B_T, G_T, SLOPE_T, OFFSET_T = (tl.constexpr(row.value) for row in list(ChannelRow)[11:])


@triton.jit
def _row(d, row, X, x, inside, REAL: tl.constexpr):
    return tl.load(d + row * X + x, mask=inside, other=0.0).to(REAL)


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
def _slope(p, d, X, x, inside, leak, REAL: tl.constexpr):
    """act'(z) with z = s (p - mean) + beta, at pooled values p."""
    s = _row(d, S, X, x, inside, REAL)
    z = (p - _row(d, MEAN, X, x, inside, REAL)) * s + _row(d, BETA, X, x, inside, REAL)
    return tl.where(z > 0, 1.0, leak).to(REAL)


@triton.jit
def pool(c, p, where, d, partial, H, W, X, REAL: tl.constexpr, BX: tl.constexpr):
    """Write p and `where` from c, and the partial sums of c and c^2."""
    item = tl.program_id(0)
    e, i = item // ((H + 1) // 2), item % ((H + 1) // 2)
    x, inside = _channels(X, BX)
    sign = tl.where(_row(d, GAMMA, X, x, inside, REAL) < 0, -1.0, 1.0).to(REAL)
    total = tl.zeros((BX,), REAL)
    square = tl.zeros((BX,), REAL)
    for j in range((W + 1) // 2):
        best = tl.zeros((BX,), REAL)
        which = tl.zeros((BX,), tl.int32)
        for q in tl.static_range(4):
            h, w = 2 * i + q // 2, 2 * j + q % 2
            v = tl.load(c + ((e * H + h) * W + w) * X + x, mask=_within(inside, h, H, w, W, BX), other=0.0)
            v = v.to(REAL)
            total += v
            square += v * v
            larger = v * sign > best
            # With gamma < 0 the smallest value is selected.
            if q == 0:
                best = v * sign
            else:
                which = tl.where(larger, q, which)
                best = tl.where(larger, v * sign, best)
        pooled = _within(inside, 2 * i + 1, H, 2 * j + 1, W, BX)
        at = ((e * (H // 2) + i) * (W // 2) + j) * X + x
        tl.store(p + at, (best * sign).to(p.dtype.element_ty), mask=pooled)
        tl.store(where + at, which.to(tl.uint8), mask=pooled)
    tl.store(partial + item * 2 * X + x, total.to(tl.float64), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, square.to(tl.float64), mask=inside)


@triton.jit
def _join(partial, rows, X, which, x, inside, RS: tl.constexpr, BX: tl.constexpr):
    """Add up one of the two partial sums over `rows` rows; RS rows at a time."""
    total = tl.zeros((BX,), tl.float64)
    for first in range(0, rows, RS):
        row = first + tl.arange(0, RS)
        present = (row < rows)[:, None] & inside[None, :]
        tile = tl.load(partial + (row[:, None] * 2 + which) * X + x[None, :], mask=present, other=0.0)
        total += tl.sum(tile, 0)
    return total


@triton.jit
def _put(d, row, X, x, inside, value):
    tl.store(d + row * X + x, value, mask=inside)


@triton.jit
def statistics(d, partial, rows, count, eps, X, RS: tl.constexpr, BX: tl.constexpr):
    """mean, var, r = 1 / sqrt(var + eps) and s = gamma r; with 0 rows mean and var are in d already."""
    x, inside = _channels(X, BX)
    var = _row(d, VAR, X, x, inside, tl.float64)
    if rows > 0:
        mean = _join(partial, rows, X, 0, x, inside, RS, BX) / count
        var = _join(partial, rows, X, 1, x, inside, RS, BX) / count - mean * mean
        var = tl.where(var < 0, 0.0, var)  # rounding of a constant channel
        _put(d, MEAN, X, x, inside, mean)
        _put(d, VAR, X, x, inside, var)
    r = 1.0 / tl.sqrt(var + eps)
    _put(d, R, X, x, inside, r)
    _put(d, S, X, x, inside, _row(d, GAMMA, X, x, inside, tl.float64) * r)


@triton.jit
def activate(p, a, d, leak, total, X, REAL: tl.constexpr, BX: tl.constexpr):
    """a = act(s (p - mean) + beta); a program handles BX pooled values."""
    at = tl.program_id(0) * BX + tl.arange(0, BX)
    inside, x = at < total, at % X
    s = _row(d, S, X, x, inside, REAL)
    v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
    z = (v - _row(d, MEAN, X, x, inside, REAL)) * s + _row(d, BETA, X, x, inside, REAL)
    tl.store(a + at, (z * tl.where(z > 0, 1.0, leak)).to(a.dtype.element_ty), mask=inside)


@triton.jit
def backward_sums(ga, p, d, partial, leak, PW, X, REAL: tl.constexpr, BX: tl.constexpr):
    """Partial sums of gz = act'(z) ga and of gz p."""
    item = tl.program_id(0)
    x, inside = _channels(X, BX)
    total = tl.zeros((BX,), REAL)
    product = tl.zeros((BX,), REAL)
    for j in range(PW):
        at = (item * PW + j) * X + x
        v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
        gz = tl.load(ga + at, mask=inside, other=0.0).to(REAL) * _slope(v, d, X, x, inside, leak, REAL)
        total += gz
        product += gz * v
    tl.store(partial + item * 2 * X + x, total.to(tl.float64), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, product.to(tl.float64), mask=inside)


@triton.jit
def backward_numbers(d, partial, rows, count, X, RS: tl.constexpr, BX: tl.constexpr):
    """b, sum gz p, G, slope and offset of the backward pass."""
    x, inside = _channels(X, BX)
    b = _join(partial, rows, X, 0, x, inside, RS, BX)
    product = _join(partial, rows, X, 1, x, inside, RS, BX)
    r, s = _row(d, R, X, x, inside, tl.float64), _row(d, S, X, x, inside, tl.float64)
    mean = _row(d, MEAN, X, x, inside, tl.float64)
    g = r * (product - mean * b)
    slope = -s * r * g / count
    _put(d, B, X, x, inside, b)
    _put(d, PRODUCT, X, x, inside, product)
    _put(d, G, X, x, inside, g)
    _put(d, SLOPE, X, x, inside, slope)
    _put(d, OFFSET, X, x, inside, -s * b / count - slope * mean)


@triton.jit
def backward_spread(ga, p, where, c, gc, d, leak, H, W, X, REAL: tl.constexpr, BX: tl.constexpr):
    """gc = s gz at the selected places + slope c + offset."""
    item = tl.program_id(0)
    e, i = item // ((H + 1) // 2), item % ((H + 1) // 2)
    x, inside = _channels(X, BX)
    slope, offset = _row(d, SLOPE, X, x, inside, REAL), _row(d, OFFSET, X, x, inside, REAL)
    s = _row(d, S, X, x, inside, REAL)
    for j in range((W + 1) // 2):
        pooled = _within(inside, 2 * i + 1, H, 2 * j + 1, W, BX)
        at = ((e * (H // 2) + i) * (W // 2) + j) * X + x
        v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
        h = s * tl.load(ga + at, mask=pooled, other=0.0).to(REAL) * _slope(v, d, X, x, inside, leak, REAL)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        for q in tl.static_range(4):
            row, col = 2 * i + q // 2, 2 * j + q % 2
            cell, present = ((e * H + row) * W + col) * X + x, _within(inside, row, H, col, W, BX)
            value = slope * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset
            value += tl.where(which == q, h, 0.0)
            tl.store(gc + cell, value.to(gc.dtype.element_ty), mask=present)


@triton.jit
def tangent_pool(
    ct, c2, c, where, p_t, partial, H, W, X, TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr
):
    """c_t += c2 if TWO, p_t = c_t at the selected places, and the partial sums of c_t and c c_t."""
    item = tl.program_id(0)
    e, i = item // ((H + 1) // 2), item % ((H + 1) // 2)
    x, inside = _channels(X, BX)
    total = tl.zeros((BX,), REAL)
    cross = tl.zeros((BX,), REAL)
    for j in range((W + 1) // 2):
        pooled = _within(inside, 2 * i + 1, H, 2 * j + 1, W, BX)
        at = ((e * (H // 2) + i) * (W // 2) + j) * X + x
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        kept = tl.zeros((BX,), REAL)
        for q in tl.static_range(4):
            row, col = 2 * i + q // 2, 2 * j + q % 2
            cell, present = ((e * H + row) * W + col) * X + x, _within(inside, row, H, col, W, BX)
            v = tl.load(ct + cell, mask=present, other=0.0).to(REAL)
            if TWO:
                v += tl.load(c2 + cell, mask=present, other=0.0).to(REAL)
                v = v.to(ct.dtype.element_ty).to(REAL)  # the sums use the rounded value that is stored
                tl.store(ct + cell, v.to(ct.dtype.element_ty), mask=present)
            total += v
            cross += v * tl.load(c + cell, mask=present, other=0.0).to(REAL)
            kept = tl.where(which == q, v, kept)
        tl.store(p_t + at, kept.to(p_t.dtype.element_ty), mask=pooled)
    tl.store(partial + item * 2 * X + x, total.to(tl.float64), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, cross.to(tl.float64), mask=inside)


@triton.jit
def tangent_numbers(d, partial, rows, count, X, RS: tl.constexpr, BX: tl.constexpr):
    """mean_t, r_t = -r^3 var_t / 2 and s_t = gamma r_t."""
    x, inside = _channels(X, BX)
    mean_t = _join(partial, rows, X, 0, x, inside, RS, BX) / count
    cross = _join(partial, rows, X, 1, x, inside, RS, BX) / count
    var_t = 2.0 * (cross - _row(d, MEAN, X, x, inside, tl.float64) * mean_t)
    r = _row(d, R, X, x, inside, tl.float64)
    r_t = -0.5 * r * r * r * var_t
    _put(d, MEAN_T, X, x, inside, mean_t)
    _put(d, R_T, X, x, inside, r_t)
    _put(d, S_T, X, x, inside, _row(d, GAMMA, X, x, inside, tl.float64) * r_t)


@triton.jit
def tangent_activate(p, p_t, a_t, d, leak, total, X, REAL: tl.constexpr, BX: tl.constexpr):
    """a_t = act'(z) (s (p_t - mean_t) + s_t (p - mean)); a program handles BX pooled values."""
    at = tl.program_id(0) * BX + tl.arange(0, BX)
    inside, x = at < total, at % X
    v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
    v_t = tl.load(p_t + at, mask=inside, other=0.0).to(REAL) - _row(d, MEAN_T, X, x, inside, REAL)
    z_t = _row(d, S, X, x, inside, REAL) * v_t
    z_t += _row(d, S_T, X, x, inside, REAL) * (v - _row(d, MEAN, X, x, inside, REAL))
    z_t *= _slope(v, d, X, x, inside, leak, REAL)
    tl.store(a_t + at, z_t.to(a_t.dtype.element_ty), mask=inside)


@triton.jit
def _both(one, two, at, inside, TWO: tl.constexpr, REAL: tl.constexpr):
    """Load ga_t from its summands: one + two if TWO, else one."""
    value = tl.load(one + at, mask=inside, other=0.0).to(REAL)
    if TWO:
        value += tl.load(two + at, mask=inside, other=0.0).to(REAL)
    return value


@triton.jit
def tangent_sums(
    ga1, ga2, ga, p, p_t, d, partial, leak, PW, X, TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr
):
    """Partial sums of gz_t = act'(z) ga_t and of gz_t p + gz p_t."""
    item = tl.program_id(0)
    x, inside = _channels(X, BX)
    total = tl.zeros((BX,), REAL)
    product = tl.zeros((BX,), REAL)
    for j in range(PW):
        at = (item * PW + j) * X + x
        v = tl.load(p + at, mask=inside, other=0.0).to(REAL)
        step = _slope(v, d, X, x, inside, leak, REAL)
        gz_t = step * _both(ga1, ga2, at, inside, TWO, REAL)
        gz = step * tl.load(ga + at, mask=inside, other=0.0).to(REAL)
        total += gz_t
        product += gz_t * v + gz * tl.load(p_t + at, mask=inside, other=0.0).to(REAL)
    tl.store(partial + item * 2 * X + x, total.to(tl.float64), mask=inside)
    tl.store(partial + (item * 2 + 1) * X + x, product.to(tl.float64), mask=inside)


@triton.jit
def tangent_backward_numbers(d, partial, rows, count, X, RS: tl.constexpr, BX: tl.constexpr):
    """b_t, G_t, slope_t and offset_t of the backward pass."""
    x, inside = _channels(X, BX)
    b_t = _join(partial, rows, X, 0, x, inside, RS, BX)
    product_t = _join(partial, rows, X, 1, x, inside, RS, BX)
    r, r_t = _row(d, R, X, x, inside, tl.float64), _row(d, R_T, X, x, inside, tl.float64)
    s, s_t = _row(d, S, X, x, inside, tl.float64), _row(d, S_T, X, x, inside, tl.float64)
    mean, mean_t = _row(d, MEAN, X, x, inside, tl.float64), _row(d, MEAN_T, X, x, inside, tl.float64)
    b, g = _row(d, B, X, x, inside, tl.float64), _row(d, G, X, x, inside, tl.float64)
    product, slope = _row(d, PRODUCT, X, x, inside, tl.float64), _row(d, SLOPE, X, x, inside, tl.float64)
    g_t = r_t * (product - mean * b) + r * (product_t - mean * b_t - mean_t * b)
    slope_t = -(2.0 * s_t * r * g + s * r * g_t) / count
    _put(d, B_T, X, x, inside, b_t)
    _put(d, G_T, X, x, inside, g_t)
    _put(d, SLOPE_T, X, x, inside, slope_t)
    _put(d, OFFSET_T, X, x, inside, -(s_t * b + s * b_t) / count - slope_t * mean - slope * mean_t)


@triton.jit
def tangent_spread(
    ga1, ga2, ga, p, where, c, ct, d, leak, H, W, X, TWO: tl.constexpr, REAL: tl.constexpr, BX: tl.constexpr
):
    """gc_t = s gz_t + s_t gz at the selected places + slope_t c + slope c_t + offset_t, written over c_t."""
    item = tl.program_id(0)
    e, i = item // ((H + 1) // 2), item % ((H + 1) // 2)
    x, inside = _channels(X, BX)
    slope, slope_t = _row(d, SLOPE, X, x, inside, REAL), _row(d, SLOPE_T, X, x, inside, REAL)
    s, s_t = _row(d, S, X, x, inside, REAL), _row(d, S_T, X, x, inside, REAL)
    offset_t = _row(d, OFFSET_T, X, x, inside, REAL)
    for j in range((W + 1) // 2):
        pooled = _within(inside, 2 * i + 1, H, 2 * j + 1, W, BX)
        at = ((e * (H // 2) + i) * (W // 2) + j) * X + x
        v = tl.load(p + at, mask=pooled, other=0.0).to(REAL)
        h = s * _both(ga1, ga2, at, pooled, TWO, REAL)
        h += s_t * tl.load(ga + at, mask=pooled, other=0.0).to(REAL)
        h *= _slope(v, d, X, x, inside, leak, REAL)
        which = tl.load(where + at, mask=pooled, other=4).to(tl.int32)
        for q in tl.static_range(4):
            row, col = 2 * i + q // 2, 2 * j + q % 2
            cell, present = ((e * H + row) * W + col) * X + x, _within(inside, row, H, col, W, BX)
            value = slope_t * tl.load(c + cell, mask=present, other=0.0).to(REAL) + offset_t
            value += slope * tl.load(ct + cell, mask=present, other=0.0).to(REAL)
            value += tl.where(which == q, h, 0.0)
            tl.store(ct + cell, value.to(ct.dtype.element_ty), mask=present)
