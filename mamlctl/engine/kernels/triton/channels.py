"""Numbers of each channel in Triton kernels: sums over all programs, and the rows of `d`.

Letters and formulas are those of `block.py`; the arguments are described in `block_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamlctl.engine.kernels.block import ChannelRow

MEAN, VAR, GAMMA, BETA, R, S = (tl.constexpr(row.value) for row in list(ChannelRow)[:6])
B, PRODUCT, G, SLOPE, OFFSET = (tl.constexpr(row.value) for row in list(ChannelRow)[6:11])
MEAN_T, R_T, S_T, B_T, G_T, SLOPE_T, OFFSET_T = (tl.constexpr(row.value) for row in list(ChannelRow)[11:])


@triton.jit
def row_of(d, row, X, x, inside, REAL: tl.constexpr):
    return tl.load(d + row * X + x, mask=inside, other=0.0).to(REAL)


@triton.jit
def put_row(d, row, X, x, inside, value):
    tl.store(d + row * X + x, value, mask=inside)


@triton.jit
def is_last(tickets):
    """Whether all other programs of this tile of channels have written their partial sums."""
    tl.debug_barrier()  # the stores of all threads of this program come before its ticket
    ticket = tl.atomic_add(tickets + tl.program_id(1), 1)
    last = ticket == tl.num_programs(0) - 1
    if last:
        tl.store(tickets + tl.program_id(1), 0)
    return last


@triton.jit
def join(partial, X, x, inside, RS: tl.constexpr, BX: tl.constexpr):
    """Add up both partial sums of all programs, those of RS programs at a time, in float64."""
    one, two = tl.zeros((BX,), tl.float64), tl.zeros((BX,), tl.float64)
    rows = tl.num_programs(0)
    for first in range(0, rows, RS):
        row = first + tl.arange(0, RS)
        present = (row < rows)[:, None] & inside[None, :]
        # .cg reads the second-level cache, which has what other programs wrote.
        at = partial + row[:, None] * 2 * X + x[None, :]
        one += tl.sum(tl.load(at, mask=present, other=0.0, cache_modifier=".cg").to(tl.float64), 0)
        two += tl.sum(tl.load(at + X, mask=present, other=0.0, cache_modifier=".cg").to(tl.float64), 0)
    return one, two


@triton.jit
def put_statistics(d, seen, gamma, beta, norms, mean, var, count, eps, X, x, inside):
    """Store mean, var, r = 1 / sqrt(var + eps) and s = gamma r, and what running statistics are made of."""
    weight = tl.load(gamma + x % norms, mask=inside, other=1.0).to(tl.float64)
    r = 1.0 / tl.sqrt(var + eps)
    put_row(d, MEAN, X, x, inside, mean)
    put_row(d, VAR, X, x, inside, var)
    put_row(d, GAMMA, X, x, inside, weight)
    put_row(d, BETA, X, x, inside, tl.load(beta + x % norms, mask=inside, other=0.0).to(tl.float64))
    put_row(d, R, X, x, inside, r)
    put_row(d, S, X, x, inside, weight * r)
    unbiased = var * (count / tl.maximum(count - 1.0, 1.0))
    tl.store(seen + x, mean.to(seen.dtype.element_ty), mask=inside)
    tl.store(seen + X + x, unbiased.to(seen.dtype.element_ty), mask=inside)


@triton.jit
def put_backward(d, b, product, count, X, x, inside):
    """Store b, sum gz p, G, slope and offset of the backward pass; return slope."""
    r, s = row_of(d, R, X, x, inside, tl.float64), row_of(d, S, X, x, inside, tl.float64)
    mean = row_of(d, MEAN, X, x, inside, tl.float64)
    g = r * (product - mean * b)
    slope = -s * r * g / count
    put_row(d, B, X, x, inside, b)
    put_row(d, PRODUCT, X, x, inside, product)
    put_row(d, G, X, x, inside, g)
    put_row(d, SLOPE, X, x, inside, slope)
    put_row(d, OFFSET, X, x, inside, -s * b / count - slope * mean)
    return slope


@triton.jit
def scale_tangent(d, var_t, X, x, inside):
    """r_t = -r^3 var_t / 2 and s_t = gamma r_t."""
    r = row_of(d, R, X, x, inside, tl.float64)
    r_t = -0.5 * r * r * r * var_t
    return r_t, row_of(d, GAMMA, X, x, inside, tl.float64) * r_t


@triton.jit
def put_tangent(d, mean_t, var_t, X, x, inside):
    """Store mean_t, r_t and s_t."""
    r_t, s_t = scale_tangent(d, var_t, X, x, inside)
    put_row(d, MEAN_T, X, x, inside, mean_t)
    put_row(d, R_T, X, x, inside, r_t)
    put_row(d, S_T, X, x, inside, s_t)


@triton.jit
def put_tangent_backward(d, b_t, product_t, count, X, x, inside):
    """Store b_t, G_t, slope_t and offset_t of the backward pass; return slope_t."""
    r, r_t = row_of(d, R, X, x, inside, tl.float64), row_of(d, R_T, X, x, inside, tl.float64)
    s, s_t = row_of(d, S, X, x, inside, tl.float64), row_of(d, S_T, X, x, inside, tl.float64)
    mean, mean_t = row_of(d, MEAN, X, x, inside, tl.float64), row_of(d, MEAN_T, X, x, inside, tl.float64)
    b, g = row_of(d, B, X, x, inside, tl.float64), row_of(d, G, X, x, inside, tl.float64)
    product, slope = row_of(d, PRODUCT, X, x, inside, tl.float64), row_of(d, SLOPE, X, x, inside, tl.float64)
    g_t = r_t * (product - mean * b) + r * (product_t - mean * b_t - mean_t * b)
    slope_t = -(2.0 * s_t * r * g + s * r * g_t) / count
    put_row(d, B_T, X, x, inside, b_t)
    put_row(d, G_T, X, x, inside, g_t)
    put_row(d, SLOPE_T, X, x, inside, slope_t)
    put_row(d, OFFSET_T, X, x, inside, -(s_t * b + s * b_t) / count - slope_t * mean - slope * mean_t)
    return slope_t


@triton.jit
def norm_of(d, X, x, inside, REAL: tl.constexpr):
    """s, mean and beta."""
    s, mean = row_of(d, S, X, x, inside, REAL), row_of(d, MEAN, X, x, inside, REAL)
    return s, mean, row_of(d, BETA, X, x, inside, REAL)


@triton.jit
def norm_rows(d, X, x, inside, REAL: tl.constexpr):
    """s, mean and beta as rows."""
    s, mean, beta = norm_of(d, X, x, inside, REAL)
    return s[None, :], mean[None, :], beta[None, :]


@triton.jit
def slope_at(p, s, mean, beta, leak, REAL: tl.constexpr):
    """act'(z) with z = s (p - mean) + beta, at pooled values p."""
    return tl.where((p - mean) * s + beta > 0, 1.0, leak).to(REAL)
