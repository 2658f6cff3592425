"""The head of `head.py` in Triton: all of a pass in one kernel, with a program per task.

Arguments of the kernels, which are pointers to tensors unless noted otherwise:
    a, a_t, ga, ga_t: the last block's output, its tangent, and the gradients of both.
    weight, bias, gw, gb: of the linear layer, [T, N, F] and [T, N], and their gradients; _t for tangents.
    y, logits, soft, g: labels [T, E] in int64; class scores, probabilities and gradients, [T, E, N].
    loss, score: of each task.
    X, P, F, N, E: numbers: channels of all tasks, pixels of a map, features, classes, examples.
    BE, BN, BF: tiles of examples, classes and features; the first two hold all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _features(a, k, e, X, P, F, E, REAL: tl.constexpr):
    """Features k of this task's examples e."""
    return tl.load(a + _places(k, e, X, P, F), mask=_both(e, E, k, F), other=0.0).to(REAL)


@triton.jit
def _places(k, e, X, P, F):
    """Where features are in a tensor [E, H, W, X]."""
    channel = tl.program_id(0) * (F // P) + k // P
    return (e[:, None] * P + (k % P)[None, :]) * X + channel[None, :]


@triton.jit
def _both(one, ones, other, others):
    return (one < ones)[:, None] & (other < others)[None, :]


@triton.jit
def _weights(weight, n, k, N, F, REAL: tl.constexpr):
    at = weight + (tl.program_id(0) * N + n)[:, None] * F + k[None, :]
    return tl.load(at, mask=_both(n, N, k, F), other=0.0).to(REAL)


@triton.jit
def _product(one, other, REAL: tl.constexpr):
    """A matrix product without rounding to TF32: it is small."""
    return tl.dot(one, other, input_precision="ieee", out_dtype=REAL)


@triton.jit
def _put_weights(gw, value, n, k, N, F):
    at = gw + (tl.program_id(0) * N + n)[:, None] * F + k[None, :]
    tl.store(at, value.to(gw.dtype.element_ty), mask=_both(n, N, k, F))


@triton.jit
def head_gradient(
    a, weight, bias, y, logits, loss, score, g, soft, ga, gw, gb, X, P, F, N, E,
    REAL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Everything that `TorchHead.gradient` returns or keeps."""
    t, e, n = tl.program_id(0), tl.arange(0, BE), tl.arange(0, BN)
    z = tl.zeros((BE, BN), REAL)
    for first in range(0, F, BF):
        k = first + tl.arange(0, BF)
        w = _weights(weight, n, k, N, F, REAL)
        z += _product(_features(a, k, e, X, P, F, E, REAL), tl.trans(w), REAL)
    z += tl.load(bias + t * N + n, mask=n < N, other=0.0).to(REAL)[None, :]
    at, present = (t * E + e)[:, None] * N + n[None, :], _both(e, E, n, N)
    tl.store(logits + at, z.to(logits.dtype.element_ty), mask=present)
    z = tl.where((n < N)[None, :], z, -float("inf"))
    label = tl.load(y + t * E + e, mask=e < E, other=0).to(tl.int32)
    right = (n[None, :] == label[:, None]) & present
    z -= tl.max(z, 1)[:, None]
    power = tl.exp(z)
    total = tl.sum(power, 1)
    p = power / total[:, None]
    log_p = tl.where(right, z - tl.log(total)[:, None], 0.0)
    tl.store(loss + t, (-tl.sum(tl.sum(log_p, 1), 0) / E).to(loss.dtype.element_ty))
    hit = (tl.argmax(z, 1) == label) & (e < E)
    tl.store(score + t, (tl.sum(tl.where(hit, 1.0, 0.0), 0) / E).to(score.dtype.element_ty))
    d = tl.where(present, (p - tl.where(right, 1.0, 0.0)) / E, 0.0).to(REAL)
    tl.store(soft + at, p.to(soft.dtype.element_ty), mask=present)
    tl.store(g + at, d.to(g.dtype.element_ty), mask=present)
    tl.store(gb + t * N + n, tl.sum(d, 0).to(gb.dtype.element_ty), mask=n < N)
    for first in range(0, F, BF):
        k = first + tl.arange(0, BF)
        by_f = _product(d, _weights(weight, n, k, N, F, REAL), REAL)
        tl.store(ga + _places(k, e, X, P, F), by_f.to(ga.dtype.element_ty), mask=_both(e, E, k, F))
        by_w = _product(tl.trans(d), _features(a, k, e, X, P, F, E, REAL), REAL)
        _put_weights(gw, by_w, n, k, N, F)


@triton.jit
def head_tangent(
    a, a_t, weight, weight_t, bias_t, g, soft, ga_t, gw, gb, X, P, F, N, E,
    REAL: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Everything that `TorchHead.tangent` returns; gw and gb are then tangents."""
    t, e, n = tl.program_id(0), tl.arange(0, BE), tl.arange(0, BN)
    z_t = tl.zeros((BE, BN), REAL)
    for first in range(0, F, BF):
        k = first + tl.arange(0, BF)
        w = _weights(weight, n, k, N, F, REAL)
        z_t += _product(_features(a_t, k, e, X, P, F, E, REAL), tl.trans(w), REAL)
        w_t = _weights(weight_t, n, k, N, F, REAL)
        z_t += _product(_features(a, k, e, X, P, F, E, REAL), tl.trans(w_t), REAL)
    z_t += tl.load(bias_t + t * N + n, mask=n < N, other=0.0).to(REAL)[None, :]
    at, present = (t * E + e)[:, None] * N + n[None, :], _both(e, E, n, N)
    p = tl.load(soft + at, mask=present, other=0.0).to(REAL)
    d = tl.load(g + at, mask=present, other=0.0).to(REAL)
    d_t = p * (z_t - tl.sum(p * z_t, 1)[:, None]) / E
    tl.store(gb + t * N + n, tl.sum(d_t, 0).to(gb.dtype.element_ty), mask=n < N)
    for first in range(0, F, BF):
        k = first + tl.arange(0, BF)
        by_f = _product(d_t, _weights(weight, n, k, N, F, REAL), REAL)
        by_f += _product(d, _weights(weight_t, n, k, N, F, REAL), REAL)
        tl.store(ga_t + _places(k, e, X, P, F), by_f.to(ga_t.dtype.element_ty), mask=_both(e, E, k, F))
        by_w = _product(tl.trans(d_t), _features(a, k, e, X, P, F, E, REAL), REAL)
        by_w += _product(tl.trans(d), _features(a_t, k, e, X, P, F, E, REAL), REAL)
        _put_weights(gw, by_w, n, k, N, F)
