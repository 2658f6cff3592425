"""The 3x3 convolutions of the inner blocks in Triton: implicit matrix products of every task.

Arguments of the kernels, pointers to tensors unless noted otherwise:
    x, g: the input [E, H, W, T * K] and the gradient of the output [E, H, W, T * N].
    w, gw: the filters [T, N, 3, 3, K] and their gradient.
    x2, w2, g2: a second pair, whose result is added, as the product rule needs it; read only with TWO.
    out: the result.
    sums, tickets: partial sums [PARTS, T, N, 3, 3, K] in REAL, and a counter of 0 per tile of filters.
    M, H, W, T: numbers: M = E H W pixels, height, width, tasks.
    K, N: numbers: the channels that a product adds up, and those of the result.
    BACK: whether the filters are those of the transposed convolution, [T, K, 3, 3, N], rotated.
    PARTS: the programs that share the pixels of a tile of filters.
    TF32, REAL: whether products of float32 numbers are in TF32; the dtype of sums.
    BP, BO, BI: pixels, channels of the result and channels of the input of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mamlctl.engine.kernels.triton.channels import is_last


@triton.jit
def _added(
    acc, x, w, m, h, v, n, task, M, H, W, T, K, N,
    BACK: tl.constexpr, TF32: tl.constexpr, REAL: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Add the convolution of the pixels m, in rows h and columns v, to acc."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    blocks = tl.cdiv(K, BI)
    for step in range(9 * blocks):
        tap, k = step // blocks, step % blocks * BI + tl.arange(0, BI)
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (m < M) & (h + down >= 0) & (h + down < H) & (v + right >= 0) & (v + right < W)
        at = (m + down * W + right)[:, None] * (T * K) + (task * K + k)[None, :]
        a = tl.load(x + at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        present = (k < K)[:, None] & (n < N)[None, :]
        if BACK:
            place = ((task * K + k) * 9 + (8 - tap))[:, None] * N + n[None, :]
        else:
            place = ((task * N + n) * 9 + tap)[None, :] * K + k[:, None]
        b = tl.load(w + place, mask=present, other=0.0)
        acc = tl.dot(a, b, acc, precision, out_dtype=REAL)
    return acc


@triton.jit
def convolve(
    x, w, x2, w2, out, M, H, W, T, K, N,
    BACK: tl.constexpr, TWO: tl.constexpr, TF32: tl.constexpr, REAL: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out = conv(x, w), + conv(x2, w2) if TWO; a program computes BP pixels and BO channels of a task."""
    tiles = tl.cdiv(N, BO)
    task = tl.program_id(1) // tiles
    m = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.program_id(1) % tiles * BO + tl.arange(0, BO)
    h, v = m // W % H, m % W
    acc = tl.zeros((BP, BO), REAL)
    acc = _added(acc, x, w, m, h, v, n, task, M, H, W, T, K, N, BACK, TF32, REAL, BI)
    if TWO:
        acc = _added(acc, x2, w2, m, h, v, n, task, M, H, W, T, K, N, BACK, TF32, REAL, BI)
    at = m[:, None] * (T * N) + (task * N + n)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _moved(x, m, there, h, v, down, right, k, task, H, W, T, K):
    """The values of x for pixels m and a place of the filter, [BI, BP]."""
    inside = there & (h + down >= 0) & (h + down < H) & (v + right >= 0) & (v + right < W)
    at = (m + down * W + right)[None, :] * (T * K) + (task * K + k)[:, None]
    return tl.load(x + at, mask=inside[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _products(
    one, two, three, g, x, first, end, n, k, down, task, M, H, W, T, K, N,
    TF32: tl.constexpr, REAL: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add x^T g over the pixels from first to end, for the three places of a row of the filter."""
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    for start in range(first, end, BP):
        m = start + tl.arange(0, BP)
        h, v, there = m // W % H, m % W, m < end
        at = m[:, None] * (T * N) + (task * N + n)[None, :]
        value = tl.load(g + at, mask=there[:, None] & (n < N)[None, :], other=0.0)
        left = _moved(x, m, there, h, v, down, -1, k, task, H, W, T, K)
        one = tl.dot(left, value, one, precision, out_dtype=REAL)
        middle = _moved(x, m, there, h, v, down, 0, k, task, H, W, T, K)
        two = tl.dot(middle, value, two, precision, out_dtype=REAL)
        right = _moved(x, m, there, h, v, down, 1, k, task, H, W, T, K)
        three = tl.dot(right, value, three, precision, out_dtype=REAL)
    return one, two, three


@triton.jit
def _total(sums, at, present, size, PARTS: tl.constexpr):
    """Add up the partial sums of all programs."""
    total = tl.load(sums + at, mask=present, other=0.0, cache_modifier=".cg")
    for part in range(1, PARTS):
        total += tl.load(sums + part * size + at, mask=present, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def filter_gradient(
    g, x, g2, x2, gw, sums, tickets, M, H, W, T, K, N,
    PARTS: tl.constexpr, TWO: tl.constexpr, TF32: tl.constexpr, REAL: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """gw = the gradient of the filters, + that of (g2, x2) if TWO; a program has one row of a filter."""
    wide, deep = tl.cdiv(N, BO), tl.cdiv(K, BI)
    row, place = tl.program_id(1) % 3, tl.program_id(1) // 3
    task = place // (wide * deep)
    n = place // deep % wide * BO + tl.arange(0, BO)
    k = place % deep * BI + tl.arange(0, BI)
    each = tl.cdiv(tl.cdiv(M, BP), PARTS) * BP
    first = tl.program_id(0) * each
    end = tl.minimum(first + each, M)
    one = tl.zeros((BI, BO), REAL)
    two, three = one, one
    one, two, three = _products(
        one, two, three, g, x, first, end, n, k, row - 1, task, M, H, W, T, K, N, TF32, REAL, BP
    )
    if TWO:
        one, two, three = _products(
            one, two, three, g2, x2, first, end, n, k, row - 1, task, M, H, W, T, K, N, TF32, REAL, BP
        )
    at = ((task * N + n) * 9 + row * 3)[None, :] * K + k[:, None]
    present = (n < N)[None, :] & (k < K)[:, None]
    if PARTS > 1:
        size = T * N * 9 * K
        mine = sums + tl.program_id(0) * size + at
        tl.store(mine, one, mask=present)
        tl.store(mine + K, two, mask=present)
        tl.store(mine + 2 * K, three, mask=present)
        if is_last(tickets):
            tl.store(gw + at, _total(sums, at, present, size, PARTS), mask=present)
            tl.store(gw + at + K, _total(sums, at + K, present, size, PARTS), mask=present)
            tl.store(gw + at + 2 * K, _total(sums, at + 2 * K, present, size, PARTS), mask=present)
    else:
        tl.store(gw + at, one, mask=present)
        tl.store(gw + at + K, two, mask=present)
        tl.store(gw + at + 2 * K, three, mask=present)
