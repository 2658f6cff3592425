/* The first block, including its convolution. The output of the convolution, four times as large as the pooled one, is
 * never stored.
 *
 * x: padded planes [E][T][C][H+2][W+2]. Weights: [T][C][9][O] with O filters, padded to a multiple of PAD. The caller
 * computes mean and var from the moments of the image's patches and passes them in d (see NativeFirstTape).
 */
#include "common.h"

/* Filters per vector, and the multiple that filters are padded to. Compilers turn vectors that are longer than the
 * processor's into slow code: the first block took 1.2 s of a 20-way meta-step with AVX2, and 0.13 s with AVX-512. */
#if defined(__AVX512F__)
enum { VEC = 16, PAD = 16 };
#else
enum { VEC = 8, PAD = 16 };
#endif
#ifdef FLOAT64
typedef int64_t INTEGER;
#else
typedef int32_t INTEGER;
#endif
typedef REAL vec __attribute__((vector_size(VEC * sizeof(REAL)), aligned(sizeof(REAL))));
typedef REAL lanes[VEC];
typedef INTEGER integers __attribute__((vector_size(VEC * sizeof(REAL)), aligned(sizeof(REAL))));

#define WIDE (W + 2)
#define PLANE ((long)(H + 2) * WIDE)
#define PADDED(filters) (((filters) + PAD - 1) / PAD * PAD)
#define FIRST \
    SHAPE; \
    const int T = s->tasks, C = s->inputs, O = X / T; \
    (void)leak, (void)H, (void)PH, (void)PW, (void)C

/* Sums of q and q q^T over the patches q of the measured examples -> sum [T][D], product [T][D][D], D = 9 C. In double,
 * because variances are small differences of them; rows are added one after another in any order of the loops. */
void patch_sums(const shape *s, const REAL *restrict x, double *restrict sum, double *restrict product) {
    const int H = s->height, W = s->width, T = s->tasks, C = s->inputs, D = 9 * C;
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
    for (int item = 0; item < T * D; item++) {
        const int t = item / D, one = item % D;
        double total = 0, both[D];
        for (int other = 0; other < D; other++) both[other] = 0;
        for (int e = 0; e < s->measured; e++) {
            const REAL *planes = x + ((long)e * T + t) * C * PLANE;
            for (int i = 0; i < H; i++) {
                const REAL *from = planes + one / 9 * PLANE + (i + one % 9 / 3) * WIDE + one % 3;
                double u[W], alone = 0;
#pragma omp simd reduction(+ : alone)
                for (int j = 0; j < W; j++) u[j] = from[j], alone += from[j];
                total += alone;
                for (int other = one / 3 * 3; other < D; other += 3) { /* a row of taps; some may be before `one` */
                    const REAL *v = planes + other / 9 * PLANE + (i + other % 9 / 3) * WIDE;
                    double row0 = 0, row1 = 0, row2 = 0;
#pragma omp simd reduction(+ : row0, row1, row2)
                    for (int j = 0; j < W; j++) row0 += u[j] * v[j], row1 += u[j] * v[j + 1], row2 += u[j] * v[j + 2];
                    both[other] += row0, both[other + 1] += row1, both[other + 2] += row2;
                }
            }
        }
        for (int other = one; other < D; other++)
            product[((long)t * D + one) * D + other] = product[((long)t * D + other) * D + one] = both[other];
        sum[(long)t * D + one] = total;
    }
}

/* The four outputs of the convolution in each of `windows` pooling windows beside each other, one or two, for VEC
 * filters. Two share the loads of the weights, and their eight sums hide the latency of the additions. */
INLINE void convolve(const REAL *plane, const REAL *w, int C, long size, int wide, int padded, const int windows,
                     lanes out[8]) {
    vec v0 = {0}, v1 = {0}, v2 = {0}, v3 = {0}, u0 = {0}, u1 = {0}, u2 = {0}, u3 = {0};
    for (int c = 0; c < C; c++, plane += size)
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; tap++, w += padded) {
            const vec weight = *(const vec *)w;
            const REAL *x = plane + tap / 3 * wide + tap % 3, *y = x + wide;
            v0 += x[0] * weight, v1 += x[1] * weight, v2 += y[0] * weight, v3 += y[1] * weight;
            if (windows == 2) u0 += x[2] * weight, u1 += x[3] * weight, u2 += y[2] * weight, u3 += y[3] * weight;
        }
    memcpy(out[0], &v0, sizeof v0), memcpy(out[1], &v1, sizeof v1);
    memcpy(out[2], &v2, sizeof v2), memcpy(out[3], &v3, sizeof v3);
    if (windows == 1) return;
    memcpy(out[4], &u0, sizeof u0), memcpy(out[5], &u1, sizeof u1);
    memcpy(out[6], &u2, sizeof u2), memcpy(out[7], &u3, sizeof u3);
}

/* The outputs of window (i, j), of which the even ones compute the next one too. `both` contains the last two. */
INLINE const lanes *window(const shape *s, const REAL *planes, const REAL *w, int t, int o, int i, int j,
                           lanes both[8]) {
    FIRST;
    const REAL *corner = planes + 2 * i * WIDE + 2 * j, *weights = w + (long)t * C * 9 * PADDED(O) + o;
    if (j % 2) return both + 4;
    if (j + 1 < PW)
        convolve(corner, weights, C, PLANE, WIDE, PADDED(O), 2, both);
    else
        convolve(corner, weights, C, PLANE, WIDE, PADDED(O), 1, both);
    return both;
}

/* One example and task, n filters from o on -> a, and p and where if `keep`. Callers pass the constant VEC if they can,
 * for which the compiler vectorises the loops. */
INLINE void forward_filters(const shape *s, const REAL *planes, const REAL *w, STORED *p, uint8_t *where, STORED *a,
                            const double *d, int e, int t, int o, const int n, const int keep) {
    FIRST;
    const int x0 = t * O + o;
    lanes both[8];
    REAL sign[VEC], scale[VEC], shift[VEC];
    for (int l = 0; l < n; l++) {
        sign[l] = d[GAMMA * X + x0 + l] < 0 ? -1 : 1;
        scale[l] = (REAL)d[S * X + x0 + l];
        shift[l] = (REAL)(d[BETA * X + x0 + l] - d[S * X + x0 + l] * d[MEAN * X + x0 + l]);
    }
    for (int i = 0; i < PH; i++)
        for (int j = 0; j < PW; j++) {
            const lanes *v = window(s, planes, w, t, o, i, j, both);
            const long at = POOLED;
            for (int l = 0; l < n; l++) {
                const REAL v0 = v[0][l] * sign[l], v1 = v[1][l] * sign[l];
                const REAL v2 = v[2][l] * sign[l], v3 = v[3][l] * sign[l];
                REAL best = v0;
                int32_t which = 0;
                which = v1 > best ? 1 : which, best = v1 > best ? v1 : best;
                which = v2 > best ? 2 : which, best = v2 > best ? v2 : best;
                which = v3 > best ? 3 : which, best = v3 > best ? v3 : best;
                const STORED kept = PUT(best * sign[l]);
                const REAL z = GET(kept) * scale[l] + shift[l];
                if (keep) p[at + l] = kept, where[at + l] = (uint8_t)which;
                a[at + l] = PUT(z * (z > 0 ? 1 : leak));
            }
        }
}

/* All examples, tasks and filters. */
INLINE void first_block(const shape *s, const REAL *restrict x, const REAL *restrict w, STORED *restrict p,
                        uint8_t *restrict where, STORED *restrict a, double *restrict d, const int keep) {
    FIRST;
    set_scale(s, d);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int item = 0; item < s->examples * T; item++) {
        const REAL *planes = x + (long)item * C * PLANE;
        for (int o = 0; o < O; o += VEC)
            if (O - o >= VEC)
                forward_filters(s, planes, w, p, where, a, d, item / T, item % T, o, VEC, keep);
            else
                forward_filters(s, planes, w, p, where, a, d, item / T, item % T, o, O - o, keep);
    }
}

/* x, weights -> p, where, a */
void first_forward(const shape *s, const REAL *restrict x, const REAL *restrict w, STORED *restrict p,
                   uint8_t *restrict where, STORED *restrict a, double *restrict d) {
    first_block(s, x, w, p, where, a, d, 1);
}

/* x, weights -> a */
void first_forward_only(const shape *s, const REAL *restrict x, const REAL *restrict w, STORED *restrict a,
                        double *restrict d) {
    first_block(s, x, w, 0, 0, a, d, 0);
}

/* The same for p_t and a_t = act'(z) (s (p_t - mean_t) + s_t (p - mean)); w contains the direction. */
INLINE void tangent_filters(const shape *s, const REAL *planes, const REAL *w, const STORED *p, const uint8_t *where,
                            STORED *p_t, STORED *a_t, const double *d, int e, int t, int o, const int n) {
    FIRST;
    const int x0 = t * O + o;
    lanes both[8];
    TAKE(scale, S);
    TAKE(mean, MEAN);
    TAKE(beta, BETA);
    TAKE(scale_t, S_T);
    TAKE(mean_t, MEAN_T);
    for (int i = 0; i < PH; i++)
        for (int j = 0; j < PW; j++) {
            const lanes *v = window(s, planes, w, t, o, i, j, both);
            const long at = POOLED;
            for (int l = 0; l < n; l++) {
                const int32_t which = where[at + l];
                REAL kept = v[0][l];
                kept = which == 1 ? v[1][l] : kept;
                kept = which == 2 ? v[2][l] : kept;
                kept = which == 3 ? v[3][l] : kept;
                const STORED rounded = PUT(kept);
                const REAL u = GET(p[at + l]) - mean[l];
                const REAL z_t = scale[l] * (GET(rounded) - mean_t[l]) + scale_t[l] * u;
                p_t[at + l] = rounded;
                a_t[at + l] = PUT(z_t * (u * scale[l] + beta[l] > 0 ? 1 : leak));
            }
        }
}

/* x, the direction of the weights -> p_t, a_t; d contains mean_t, and var_t in row S_T */
void first_tangent(const shape *s, const REAL *restrict x, const REAL *restrict w, const STORED *restrict p,
                   const uint8_t *restrict where, STORED *restrict p_t, STORED *restrict a_t, double *restrict d) {
    FIRST;
    set_scale_tangent(s, d);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int item = 0; item < s->examples * T; item++) {
        const REAL *planes = x + (long)item * C * PLANE;
        for (int o = 0; o < O; o += VEC)
            if (O - o >= VEC)
                tangent_filters(s, planes, w, p, where, p_t, a_t, d, item / T, item % T, o, VEC);
            else
                tangent_filters(s, planes, w, p, where, p_t, a_t, d, item / T, item % T, o, O - o);
    }
}

/* A vector of n stored values, padded by 0. */
INLINE vec read(const STORED *from, const int n) {
    REAL each[VEC] = {0};
    vec all;
    for (int l = 0; l < n; l++) each[l] = GET(from[l]);
    memcpy(&all, each, sizeof all);
    return all;
}

/* A vector of n channels of a row of d, padded by 0. */
INLINE vec row(const double *d, int which, int X, int x0, const int n) {
    REAL each[VEC] = {0};
    vec all;
    take(each, d, which, X, x0, n);
    memcpy(&all, each, sizeof all);
    return all;
}

/* The gradients of the four places of a pooling window, h[4]: s gz at the selected place (s gz_t + s_t gz if ga1_t is
 * present) and 0 at the others. Written with vector masks, because compilers turn the scalar form into branches
 * (1.5 ms against 0.5 ms for 40 images of 28x28). */
INLINE void spread(const STORED *ga1_t, const STORED *ga2_t, const STORED *ga, const STORED *p, const uint8_t *where,
                   vec scale, vec shift, vec scale_t, REAL leak, const int n, vec h[4]) {
    INTEGER each[VEC] = {0};
    integers which;
    for (int l = 0; l < n; l++) each[l] = where[l];
    memcpy(&which, each, sizeof which);
    vec value = read(ga, n);
    if (ga1_t) {
        const vec ga_t = ga2_t ? read(ga1_t, n) + read(ga2_t, n) : read(ga1_t, n);
        value = scale * ga_t + scale_t * value;
    } else
        value *= scale;
    const integers positive = read(p, n) * scale + shift > 0;
    const integers active = (integers)value, damped = (integers)(value * leak);
    const integers both = (active & positive) | (damped & ~positive);
    for (int q = 0; q < 4; q++) h[q] = (vec)(both & (which == q));
}

/* The part of the weights' gradient that comes from the selected places, sum of h q over patches q; for one task, one
 * input channel and n filters. */
INLINE void pooled_part(const shape *s, const REAL *x, const STORED *ga1_t, const STORED *ga2_t, const STORED *ga,
                        const STORED *p, const uint8_t *where, const double *d, REAL *gw, int t, int channel, int o,
                        const int n) {
    FIRST;
    const int x0 = t * O + o, padded = PADDED(O);
    const vec scale = row(d, S, X, x0, n), scale_t = row(d, S_T, X, x0, n);
    const vec shift = row(d, BETA, X, x0, n) - scale * row(d, MEAN, X, x0, n);
    vec total[9] = {{0}};
    for (int e = 0; e < s->examples; e++) {
        const REAL *plane = x + (((long)e * T + t) * C + channel) * PLANE;
        vec sum[9] = {{0}};
        for (int i = 0; i < PH; i++)
            for (int j = 0; j < PW; j++) {
                const long at = POOLED;
                const REAL *u = plane + 2 * i * WIDE + 2 * j;
                vec h[4];
                spread(ga1_t ? ga1_t + at : 0, ga2_t ? ga2_t + at : 0, ga + at, p + at, where + at, scale, shift,
                       scale_t, leak, n, h);
#pragma GCC unroll 9
                for (int tap = 0; tap < 9; tap++) {
                    const REAL *v = u + tap / 3 * WIDE + tap % 3;
                    sum[tap] += v[0] * h[0];
                    sum[tap] += v[1] * h[1];
                    sum[tap] += v[WIDE] * h[2];
                    sum[tap] += v[WIDE + 1] * h[3];
                }
            }
        for (int tap = 0; tap < 9; tap++) total[tap] += sum[tap];
    }
    for (int tap = 0; tap < 9; tap++)
        memcpy(gw + (((long)t * C + channel) * 9 + tap) * padded + o, &total[tap], sizeof total[tap]);
}

/* The same for all tasks, channels and filters -> gw [T][C][9][O]: the gradient if ga1_t is absent, else its tangent.
 * Called by all threads. */
static void through_pool(const shape *s, const REAL *x, const STORED *ga1_t, const STORED *ga2_t, const STORED *ga,
                         const STORED *p, const uint8_t *where, const double *d, REAL *gw) {
    FIRST;
    const int blocks = PADDED(O) / VEC;
#pragma omp for schedule(static)
    for (int item = 0; item < T * C * blocks; item++) {
        const int t = item / (C * blocks), channel = item / blocks % C, o = item % blocks * VEC;
        if (O - o >= VEC)
            pooled_part(s, x, ga1_t, ga2_t, ga, p, where, d, gw, t, channel, o, VEC);
        else
            pooled_part(s, x, ga1_t, ga2_t, ga, p, where, d, gw, t, channel, o, O - o);
    }
}

/* ga -> gw, and the values of backward_sums */
void first_backward(const shape *s, const REAL *x, const STORED *ga, const STORED *p, const uint8_t *where, double *d,
                    double *partial, REAL *gw) {
#pragma omp parallel num_threads(s->threads)
    {
        backward_sums(s, ga, p, d, partial);
        through_pool(s, x, 0, 0, ga, p, where, d, gw);
    }
}

/* ga_t = ga1_t + ga2_t -> the tangent of gw, and the values of tangent_sums */
void first_tangent_backward(const shape *s, const REAL *x, const STORED *ga1_t, const STORED *ga2_t, const STORED *ga,
                            const STORED *p, const STORED *p_t, const uint8_t *where, double *d, double *partial,
                            REAL *gw) {
#pragma omp parallel num_threads(s->threads)
    {
        tangent_sums(s, ga1_t, ga2_t, ga, p, p_t, d, partial);
        through_pool(s, x, ga1_t, ga2_t, ga, p, where, d, gw);
    }
}
