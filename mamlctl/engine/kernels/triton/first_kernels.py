"""The first block in Triton, including its convolution, whose output c is never stored: as in c/first.c.

The image needs no gradient, so only the selected place of each pooling window contributes values of its own.
All sums over c follow from the mean <q> and the covariance cov(q) of the image's 3x3 patches q, as explained
in `c_block.NativeFirstTape`. A program handles BX filters of one task.

Arguments beyond those of `block_kernels.py`, pointers unless noted otherwise:
    images: the images, padded by zeros, [E, T, C, H + 2, W + 2].
    w, w_t: the filters and their tangent, [X, D] with D = 9 C.
    mean_q, cov: <q> of each task, [T, D], and cov(q), [T, D, D]; float64.
    partial: 2 + D sums per program and channel, in REAL: those of `backward_sums`, and h q over the windows.
    gw: the gradient of w, or its tangent.
    T, F, E, C: numbers: tasks, filters of a task (X = T F), examples, channels of the image.
    GIVEN: whether mean and variance are in d already.
    BD: a power of two that is not less than D.
    BW: pooling windows that are computed at a time.
    RP: programs whose sums are added at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamlctl.engine.kernels.triton.channels import (
    MEAN,
    S_T,
    SLOPE,
    VAR,
    B,
    S,
    is_last,
    norm_rows,
    put_backward,
    put_statistics,
    put_tangent,
    put_tangent_backward,
    row_of,
    scale_tangent,
    slope_at,
)


@triton.jit
def _filters(F, BX: tl.constexpr):
    """The task, the channels of its filters, and which of them exist."""
    tiles = tl.cdiv(F, BX)
    task = tl.program_id(1) // tiles
    f = tl.program_id(1) % tiles * BX + tl.arange(0, BX)
    return task, task * F + f, f < F


@triton.jit
def _by_patch(w, x, inside, D, BD: tl.constexpr):
    """Filters as [BD, BX], in float64."""
    k = tl.arange(0, BD)
    present = (k < D)[:, None] & inside[None, :]
    return tl.load(w + x[None, :] * D + k[:, None], mask=present, other=0.0).to(tl.float64)


@triton.jit
def _mean_of(mean_q, task, D, BD: tl.constexpr):
    k = tl.arange(0, BD)
    return tl.load(mean_q + task * D + k, mask=k < D, other=0.0)[:, None]


@triton.jit
def _along(cov, w, task, x, inside, D: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr):
    """cov(q) w, [BD, BX]."""
    k = tl.arange(0, BD)
    result = tl.zeros((BD, BX), tl.float64)
    for other in tl.static_range(D):
        column = tl.load(cov + (task * D + k) * D + other, mask=k < D, other=0.0)
        result += column[:, None] * tl.load(w + x * D + other, mask=inside, other=0.0).to(tl.float64)[None, :]
    return result


@triton.jit
def _group(first, windows, images, x, inside, task, T, H, W, X, C, BW: tl.constexpr):
    """BW windows, of all examples', from number `first`.

    Returns their places in the pooled tensors and which of these exist, [BW, BX]; then which windows exist,
    and where their first pixels are in the padded images, [BW].
    """
    item, width, height = first + tl.arange(0, BW), W // 2, H // 2
    e, i, j = item // (width * height), item // width % height, item % width
    window = images + ((e * T + task) * C * (H + 2) + 2 * i) * (W + 2) + 2 * j
    here = item < windows
    return item[:, None] * X + x[None, :], here[:, None] & inside[None, :], here, window


@triton.jit
def _tap(k, H, W):
    """The place of value k of a patch, from that of its first pixel."""
    return (k // 9 * (H + 2) + k % 9 // 3) * (W + 2) + k % 3


@triton.jit
def _convolved(window, q, w_DX, here, H, W, D, BD: tl.constexpr, REAL: tl.constexpr):
    """The convolution at place q of windows, [BW, BX]."""
    k = tl.arange(0, BD)
    at = (window + q // 2 * (W + 2) + q % 2)[:, None] + _tap(k, H, W)[None, :]
    patch = tl.load(at, mask=here[:, None] & (k < D)[None, :], other=0.0).to(REAL)
    return tl.dot(patch, w_DX, input_precision="tf32x3", out_dtype=REAL)


@triton.jit
def first_forward(
    images, w, mean_q, cov, gamma, beta, p, where, a, d, seen, norms, count, eps, leak, H, W, X, T, F, E,
    C: tl.constexpr, GIVEN: tl.constexpr, REAL: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Write the statistics, p, `where` and a; a program handles groups of BW windows."""
    D: tl.constexpr = 9 * C
    task, x, inside = _filters(F, BX)
    w_DX = _by_patch(w, x, inside, D, BD)
    if GIVEN:
        mean, var = row_of(d, MEAN, X, x, inside, tl.float64), row_of(d, VAR, X, x, inside, tl.float64)
    else:
        # Every program computes them, which costs less than a launch.
        mean = tl.sum(w_DX * _mean_of(mean_q, task, D, BD), 0)
        # Rounding can make the variance of a constant image negative.
        var = tl.maximum(tl.sum(_along(cov, w, task, x, inside, D, BD, BX) * w_DX, 0), 0.0)
    if tl.program_id(0) == 0:
        put_statistics(d, seen, gamma, beta, norms, mean, var, count, eps, X, x, inside)
    weight = tl.load(gamma + x % norms, mask=inside, other=1.0).to(tl.float64)
    s, mean = (weight / tl.sqrt(var + eps)).to(REAL)[None, :], mean.to(REAL)[None, :]
    shift = tl.load(beta + x % norms, mask=inside, other=0.0).to(REAL)[None, :]
    w_DX = w_DX.to(REAL)
    sign = tl.where(weight < 0, -1.0, 1.0).to(REAL)[None, :]
    windows = E * (H // 2) * (W // 2)
    for first in range(tl.program_id(0) * BW, windows, tl.num_programs(0) * BW):
        at, present, here, window = _group(first, windows, images, x, inside, task, T, H, W, X, C, BW)
        v0 = _convolved(window, 0, w_DX, here, H, W, D, BD, REAL)
        v1 = _convolved(window, 1, w_DX, here, H, W, D, BD, REAL)
        v2 = _convolved(window, 2, w_DX, here, H, W, D, BD, REAL)
        v3 = _convolved(window, 3, w_DX, here, H, W, D, BD, REAL)
        best, which = v0 * sign, tl.zeros((BW, BX), tl.int32)
        which, best = tl.where(v1 * sign > best, 1, which), tl.maximum(best, v1 * sign)
        which, best = tl.where(v2 * sign > best, 2, which), tl.maximum(best, v2 * sign)
        which, best = tl.where(v3 * sign > best, 3, which), tl.maximum(best, v3 * sign)
        kept = (best * sign).to(p.dtype.element_ty)
        z = (kept.to(REAL) - mean) * s + shift
        tl.store(p + at, kept, mask=present)
        tl.store(where + at, which.to(tl.uint8), mask=present)
        tl.store(a + at, (z * tl.where(z > 0, 1.0, leak)).to(a.dtype.element_ty), mask=present)


@triton.jit
def first_tangent(
    images, w, w_t, mean_q, cov, p, where, p_t, a_t, d, leak, H, W, X, T, F, E,
    C: tl.constexpr, REAL: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """mean_t, r_t, s_t, p_t and a_t; a program handles groups of BW windows."""
    D: tl.constexpr = 9 * C
    task, x, inside = _filters(F, BX)
    along = _by_patch(w_t, x, inside, D, BD)
    mean_t = tl.sum(along * _mean_of(mean_q, task, D, BD), 0)
    var_t = 2.0 * tl.sum(along * _along(cov, w, task, x, inside, D, BD, BX), 0)
    if tl.program_id(0) == 0:
        put_tangent(d, mean_t, var_t, X, x, inside)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    _, s_t = scale_tangent(d, var_t, X, x, inside)
    s_t, mean_t = s_t.to(REAL)[None, :], mean_t.to(REAL)[None, :]
    along = along.to(REAL)
    windows = E * (H // 2) * (W // 2)
    for first in range(tl.program_id(0) * BW, windows, tl.num_programs(0) * BW):
        at, present, here, window = _group(first, windows, images, x, inside, task, T, H, W, X, C, BW)
        which = tl.load(where + at, mask=present, other=4).to(tl.int32)
        v_t = tl.zeros((BW, BX), REAL)
        for q in tl.static_range(4):
            v_t = tl.where(which == q, _convolved(window, q, along, here, H, W, D, BD, REAL), v_t)
        kept = v_t.to(p_t.dtype.element_ty)
        v = tl.load(p + at, mask=present, other=0.0).to(REAL)
        z_t = s * (kept.to(REAL) - mean_t) + s_t * (v - mean)
        z_t *= slope_at(v, s, mean, beta, leak, REAL)
        tl.store(p_t + at, kept, mask=present)
        tl.store(a_t + at, z_t.to(a_t.dtype.element_ty), mask=present)


@triton.jit
def _put_sums(partial, one, two, patches, X, x, inside, D, BD: tl.constexpr):
    """Store the sums of this program."""
    k, base = tl.arange(0, BD), tl.program_id(0) * (2 + D)
    tl.store(partial + base * X + x, tl.sum(one, 0), mask=inside)
    tl.store(partial + (base + 1) * X + x, tl.sum(two, 0), mask=inside)
    present = (k < D)[:, None] & inside[None, :]
    tl.store(partial + (base + 2 + k)[:, None] * X + x[None, :], patches, mask=present)


@triton.jit
def _join(partial, X, x, inside, D, BD: tl.constexpr, BX: tl.constexpr, RP: tl.constexpr):
    """Add up the sums of all programs, those of RP programs at a time, in float64."""
    k = tl.arange(0, BD)
    one, two = tl.zeros((BX,), tl.float64), tl.zeros((BX,), tl.float64)
    patches = tl.zeros((BD, BX), tl.float64)
    for first in range(0, tl.num_programs(0), RP):
        item = first + tl.arange(0, RP)
        present = (item < tl.num_programs(0))[:, None] & inside[None, :]
        at = partial + (item * (2 + D) * X)[:, None] + x[None, :]
        one += tl.sum(tl.load(at, mask=present, other=0.0, cache_modifier=".cg").to(tl.float64), 0)
        two += tl.sum(tl.load(at + X, mask=present, other=0.0, cache_modifier=".cg").to(tl.float64), 0)
        more, here = at[:, None, :] + (2 + k)[None, :, None] * X, present[:, None, :] & (k < D)[None, :, None]
        patches += tl.sum(tl.load(more, mask=here, other=0.0, cache_modifier=".cg").to(tl.float64), 0)
    return one, two, patches


@triton.jit
def _add_patches(acc, window, which, h, here, H, W, D, BD: tl.constexpr, REAL: tl.constexpr):
    """Add the patches at the selected places of windows, times h [BW, BX], to acc [BD, BX]."""
    k = tl.arange(0, BD)
    for q in tl.static_range(4):
        at = (window + q // 2 * (W + 2) + q % 2)[None, :] + _tap(k, H, W)[:, None]
        patch = tl.load(at, mask=here[None, :] & (k < D)[:, None], other=0.0).to(REAL)
        selected = tl.where(which == q, h, 0.0)
        acc = tl.dot(patch, selected, acc, input_precision="tf32x3", out_dtype=REAL)
    return acc


@triton.jit
def _put_gradient(gw, value, x, inside, D, BD: tl.constexpr):
    k = tl.arange(0, BD)
    present = (k < D)[:, None] & inside[None, :]
    tl.store(gw + x[None, :] * D + k[:, None], value.to(gw.dtype.element_ty), mask=present)


@triton.jit
def first_backward(
    images, ga, w, mean_q, cov, p, where, d, partial, tickets, gw, count, leak, H, W, X, T, F, E,
    C: tl.constexpr, REAL: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """The numbers of the backward pass, and gw; a program handles groups of BW windows."""
    D: tl.constexpr = 9 * C
    task, x, inside = _filters(F, BX)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    total = tl.zeros((BW, BX), REAL)
    product = tl.zeros((BW, BX), REAL)
    patches = tl.zeros((BD, BX), REAL)
    windows = E * (H // 2) * (W // 2)
    for first in range(tl.program_id(0) * BW, windows, tl.num_programs(0) * BW):
        at, present, here, window = _group(first, windows, images, x, inside, task, T, H, W, X, C, BW)
        which = tl.load(where + at, mask=present, other=4).to(tl.int32)
        v = tl.load(p + at, mask=present, other=0.0).to(REAL)
        gz = tl.load(ga + at, mask=present, other=0.0).to(REAL) * slope_at(v, s, mean, beta, leak, REAL)
        total += gz
        product += gz * v
        patches = _add_patches(patches, window, which, s * gz, here, H, W, D, BD, REAL)
    _put_sums(partial, total, product, patches, X, x, inside, D, BD)
    if is_last(tickets):
        b, product_all, through_pool = _join(partial, X, x, inside, D, BD, BX, RP)
        slope = put_backward(d, b, product_all, count, X, x, inside)
        scale = row_of(d, S, X, x, inside, tl.float64)[None, :]
        rest = count * slope[None, :] * _along(cov, w, task, x, inside, D, BD, BX)
        rest -= scale * b[None, :] * _mean_of(mean_q, task, D, BD)
        _put_gradient(gw, through_pool + rest, x, inside, D, BD)


@triton.jit
def first_tangent_backward(
    images, ga_t, ga, w, w_t, mean_q, cov, p, p_t, where, d, partial, tickets, gw, count, leak,
    H, W, X, T, F, E,
    C: tl.constexpr, REAL: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr, BW: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """The same for the tangents of `first_backward`; gw is then the tangent of the gradient."""
    D: tl.constexpr = 9 * C
    task, x, inside = _filters(F, BX)
    s, mean, beta = norm_rows(d, X, x, inside, REAL)
    s_t = row_of(d, S_T, X, x, inside, REAL)[None, :]
    total = tl.zeros((BW, BX), REAL)
    product = tl.zeros((BW, BX), REAL)
    patches = tl.zeros((BD, BX), REAL)
    windows = E * (H // 2) * (W // 2)
    for first in range(tl.program_id(0) * BW, windows, tl.num_programs(0) * BW):
        at, present, here, window = _group(first, windows, images, x, inside, task, T, H, W, X, C, BW)
        which = tl.load(where + at, mask=present, other=4).to(tl.int32)
        v = tl.load(p + at, mask=present, other=0.0).to(REAL)
        step = slope_at(v, s, mean, beta, leak, REAL)
        gz_t = step * tl.load(ga_t + at, mask=present, other=0.0).to(REAL)
        gz = step * tl.load(ga + at, mask=present, other=0.0).to(REAL)
        total += gz_t
        product += gz_t * v + gz * tl.load(p_t + at, mask=present, other=0.0).to(REAL)
        patches = _add_patches(patches, window, which, s * gz_t + s_t * gz, here, H, W, D, BD, REAL)
    _put_sums(partial, total, product, patches, X, x, inside, D, BD)
    if is_last(tickets):
        b_t, product_t, through_pool = _join(partial, X, x, inside, D, BD, BX, RP)
        slope_t = count * put_tangent_backward(d, b_t, product_t, count, X, x, inside)
        slope = count * row_of(d, SLOPE, X, x, inside, tl.float64)
        # The tangent of M slope cov(q) w - s b <q>.
        rest = slope_t[None, :] * _along(cov, w, task, x, inside, D, BD, BX)
        rest += slope[None, :] * _along(cov, w_t, task, x, inside, D, BD, BX)
        by_s = row_of(d, S_T, X, x, inside, tl.float64) * row_of(d, B, X, x, inside, tl.float64)
        by_b = row_of(d, S, X, x, inside, tl.float64) * b_t
        rest -= (by_s + by_b)[None, :] * _mean_of(mean_q, task, D, BD)
        _put_gradient(gw, through_pool + rest, x, inside, D, BD)
