/* What both kinds of block share: types, per-channel numbers, work items, and the sums of both backward passes.
 *
 * Layouts: [E][H][W][X] with channels last, X = tasks * filters; pooled tensors [E][H/2][W/2][X]. Per-channel numbers
 * are doubles in d[K][X], in the order of the enum below; block.py has the letters and the mathematics.
 * Sums are taken per example and then over examples in order, so that results do not depend on the threads.
 */
#pragma once
#include <stdint.h>
#include <string.h>

enum { MEAN, VAR, GAMMA, BETA, R, S, B, PRODUCT, G, SLOPE, OFFSET, MEAN_T, R_T, S_T, B_T, G_T, SLOPE_T, OFFSET_T };
enum { LANES = 128 }; /* channels that a thread takes at a time */

typedef struct {
    int examples, height, width, channels, threads, measured; /* measured: examples behind the statistics */
    int tasks, inputs;                                        /* of the first block */
    double eps, leak;
} shape;

static inline float widen(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t narrow(float f) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The type that large tensors are stored in, set by the compiler's command line. */
#if defined(BFLOAT16)
typedef uint16_t STORED;
typedef float REAL;
#define GET(v) widen(v)
#define PUT(v) narrow(v)
#elif defined(FLOAT64)
typedef double STORED, REAL;
#define GET(v) (v)
#define PUT(v) (v)
#else
typedef float STORED, REAL;
#define GET(v) (v)
#define PUT(v) (v)
#endif

/* A row of d for some channels, in the type of the arithmetic. */
static inline void take(REAL *to, const double *d, int row, int X, int x0, int n) {
    for (int l = 0; l < n; l++) to[l] = (REAL)d[row * X + x0 + l];
}

#define TAKE(to, row) \
    REAL to[LANES]; \
    take(to, d, row, X, x0, n)

/* z = scale p + beta, of pooled values p: the norm and its shift in one. */
#define TAKE_AFFINE \
    TAKE(scale, S); \
    TAKE(mean, MEAN); \
    TAKE(beta, BETA); \
    for (int l = 0; l < n; l++) beta[l] -= scale[l] * mean[l]

/* The two sums of a work item's example and channels, for sum_up to join. */
#define KEEP_SUMS(one, two) \
    for (int l = 0; l < n; l++) { \
        partial[(e * 2L) * X + x0 + l] = one[l]; \
        partial[(e * 2L + 1) * X + x0 + l] = two[l]; \
    }

/* Work items: one example, up to LANES channels. */
#define ITEMS \
    _Pragma("omp for schedule(static)") \
    for (int item = 0; item < s->examples * ((X + LANES - 1) / LANES); item++)
#define ITEM \
    const int e = item % s->examples, x0 = item / s->examples * LANES, n = X - x0 < LANES ? X - x0 : LANES

#define SHAPE \
    const int H = s->height, W = s->width, X = s->channels, PH = H / 2, PW = W / 2; \
    const REAL leak = (REAL)s->leak

#define POOLED (((long)(e * PH + i) * PW + j) * X + x0)
#define CELL(di, dj) (((long)(e * H + 2 * i + (di)) * W + 2 * j + (dj)) * X + x0)

/* Values of a channel behind its statistics. */
static inline double values(const shape *s) { return (double)s->measured * s->height * s->width; }

static void sum_up(const shape *s, const double *partial, int row, double *to, int examples) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) to[x] = 0;
    for (int e = 0; e < examples; e++)
        for (int x = 0; x < X; x++) to[x] += partial[(e * 2L + row) * X + x];
}

static void set_scale(const shape *s, double *d) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) {
        d[R * X + x] = 1 / __builtin_sqrt(d[VAR * X + x] + s->eps);
        d[S * X + x] = d[GAMMA * X + x] * d[R * X + x];
    }
}

/* From mean_t and var_t (in S_T's place) the other tangents of the forward pass's numbers. */
static void set_scale_tangent(const shape *s, double *d) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) {
        const double r = d[R * X + x];
        d[R_T * X + x] = -0.5 * r * r * r * d[S_T * X + x];
        d[S_T * X + x] = d[GAMMA * X + x] * d[R_T * X + x];
    }
}

/* Sums over the gradient behind the activation, and what follows from them; called by all threads. */
static void backward_sums(const shape *s, const STORED *restrict ga, const STORED *restrict p, double *restrict d,
                                double *restrict partial) {
    SHAPE;
    ITEMS {
        ITEM;
        TAKE_AFFINE;
        REAL sum[LANES] = {0}, product[LANES] = {0};
        for (int i = 0; i < PH; i++)
            for (int j = 0; j < PW; j++) {
                const STORED *from = p + POOLED, *gradient = ga + POOLED;
                for (int l = 0; l < n; l++) {
                    const REAL v = GET(from[l]), gz = GET(gradient[l]) * (v * scale[l] + beta[l] > 0 ? 1 : leak);
                    sum[l] += gz, product[l] += gz * v;
                }
            }
        KEEP_SUMS(sum, product);
    }
#pragma omp single
    {
        const double count = values(s);
        sum_up(s, partial, 0, d + B * X, s->examples);
        sum_up(s, partial, 1, d + PRODUCT * X, s->examples);
        for (int x = 0; x < X; x++) {
            const double r = d[R * X + x], scale = d[S * X + x], mean = d[MEAN * X + x], b = d[B * X + x];
            const double g = r * (d[PRODUCT * X + x] - mean * b), slope = -scale * r * g / count;
            d[G * X + x] = g;
            d[SLOPE * X + x] = slope;
            d[OFFSET * X + x] = -scale * b / count - slope * mean;
        }
    }
}

/* Sums over the tangent of the gradient behind the activation; called by all threads. */
static void tangent_sums(const shape *s, const STORED *restrict ga1_t, const STORED *restrict ga2_t,
                               const STORED *restrict ga, const STORED *restrict p, const STORED *restrict p_t,
                               double *restrict d, double *restrict partial) {
    SHAPE;
    ITEMS {
        ITEM;
        TAKE_AFFINE;
        REAL sum[LANES] = {0}, product[LANES] = {0};
        for (int i = 0; i < PH; i++)
            for (int j = 0; j < PW; j++) {
                const long at = POOLED;
                for (int l = 0; l < n; l++) {
                    const REAL v = GET(p[at + l]), step = v * scale[l] + beta[l] > 0 ? 1 : leak;
                    const REAL gz_t = step * (GET(ga1_t[at + l]) + (ga2_t ? GET(ga2_t[at + l]) : 0));
                    sum[l] += gz_t, product[l] += gz_t * v + step * GET(ga[at + l]) * GET(p_t[at + l]);
                }
            }
        KEEP_SUMS(sum, product);
    }
#pragma omp single
    {
        const double count = values(s);
        sum_up(s, partial, 0, d + B_T * X, s->examples);
        sum_up(s, partial, 1, d + G_T * X, s->examples);
        for (int x = 0; x < X; x++) {
            const double r = d[R * X + x], r_t = d[R_T * X + x], k = d[S * X + x], k_t = d[S_T * X + x];
            const double mean = d[MEAN * X + x], mean_t = d[MEAN_T * X + x], b = d[B * X + x], b_t = d[B_T * X + x];
            const double g = d[G * X + x], slope = d[SLOPE * X + x];
            const double g_t = r_t * (d[PRODUCT * X + x] - mean * b) + r * (d[G_T * X + x] - mean * b_t - mean_t * b);
            const double slope_t = -(2 * k_t * r * g + k * r * g_t) / count;
            d[G_T * X + x] = g_t;
            d[SLOPE_T * X + x] = slope_t;
            d[OFFSET_T * X + x] = -(k_t * b + k * b_t) / count - slope_t * mean - slope * mean_t;
        }
    }
}
