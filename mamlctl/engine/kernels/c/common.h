/* Code that block.c and first.c share: types, values per channel, work items, and the sums of both backward passes.
 *
 * block.py explains the letters and formulas. Tensors are [E][H][W][X] with channels last, X = tasks * filters, and
 * pooled tensors [E][H/2][W/2][X]. The values of a channel are doubles in d[row][X], with the rows of the enum below.
 * Sums are computed for each example and then added in the order of the examples, so that results do not depend on
 * the number of threads.
 */
#pragma once
#include <stdint.h>
#include <string.h>

enum { MEAN, VAR, GAMMA, BETA, R, S, B, PRODUCT, G, SLOPE, OFFSET, MEAN_T, R_T, S_T, B_T, G_T, SLOPE_T, OFFSET_T };
enum { LANES = 128 }; /* channels of a work item */

typedef struct {
    int examples, height, width, channels, threads, measured; /* measured: leading examples behind the statistics */
    int tasks, inputs;                                        /* used by the first block only */
    double eps, leak;
} shape;

/* bfloat16 is the upper half of a float. */
static inline float widen(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t narrow(float f) { /* rounds to nearest, ties to even; 0x7fc0 is NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* STORED is the type of large tensors, chosen on the compiler's command line; REAL is that of the arithmetic. */
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

#define INLINE static inline __attribute__((always_inline))

/* Converts n channels of a row of d to REAL. */
static inline void take(REAL *to, const double *d, int row, int X, int x0, int n) {
    for (int l = 0; l < n; l++) to[l] = (REAL)d[row * X + x0 + l];
}

#define TAKE(to, row) \
    REAL to[LANES]; \
    take(to, d, row, X, x0, n)

/* z = scale p + beta at pooled values p, with scale = s and beta replaced by beta - s mean. */
#define TAKE_AFFINE \
    TAKE(scale, S); \
    TAKE(mean, MEAN); \
    TAKE(beta, BETA); \
    for (int l = 0; l < n; l++) beta[l] -= scale[l] * mean[l]

/* Stores the two sums of a work item for sum_up. */
#define KEEP_SUMS(one, two) \
    for (int l = 0; l < n; l++) { \
        partial[(e * 2L) * X + x0 + l] = one[l]; \
        partial[(e * 2L + 1) * X + x0 + l] = two[l]; \
    }

/* A work item is one example with up to LANES channels. */
#define ITEMS \
    _Pragma("omp for schedule(static)") \
    for (int item = 0; item < s->examples * ((X + LANES - 1) / LANES); item++)
#define ITEM \
    const int e = item % s->examples, x0 = item / s->examples * LANES, n = X - x0 < LANES ? X - x0 : LANES

#define SHAPE \
    const int H = s->height, W = s->width, X = s->channels, PH = H / 2, PW = W / 2; \
    const REAL leak = (REAL)s->leak

/* Offsets of pooled value (i, j), and of place (di, dj) in its window, at example e and channel x0. */
#define POOLED (((long)(e * PH + i) * PW + j) * X + x0)
#define CELL(di, dj) (((long)(e * H + 2 * i + (di)) * W + 2 * j + (dj)) * X + x0)

/* M, the number of values per channel behind the statistics. */
static inline double values(const shape *s) { return (double)s->measured * s->height * s->width; }

/* Adds one of the two partial sums over the first examples, in order. */
static void sum_up(const shape *s, const double *partial, int row, double *to, int examples) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) to[x] = 0;
    for (int e = 0; e < examples; e++)
        for (int x = 0; x < X; x++) to[x] += partial[(e * 2L + row) * X + x];
}

/* r = 1 / sqrt(var + eps), s = gamma r */
static void set_scale(const shape *s, double *d) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) {
        d[R * X + x] = 1 / __builtin_sqrt(d[VAR * X + x] + s->eps);
        d[S * X + x] = d[GAMMA * X + x] * d[R * X + x];
    }
}

/* r_t = -r^3 var_t / 2, s_t = gamma r_t; row S_T contains var_t on entry. */
static void set_scale_tangent(const shape *s, double *d) {
    const int X = s->channels;
    for (int x = 0; x < X; x++) {
        const double r = d[R * X + x];
        d[R_T * X + x] = -0.5 * r * r * r * d[S_T * X + x];
        d[S_T * X + x] = d[GAMMA * X + x] * d[R_T * X + x];
    }
}

/* From ga: b = sum gz with gz = act'(z) ga, sum gz p, and G, slope and offset. Called by all threads. */
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

/* From ga_t = ga1_t + ga2_t: b_t = sum gz_t, sum (gz_t p + gz p_t) (first into row G_T), and G_t, slope_t and offset_t.
 * k is s of block.py. Called by all threads. */
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
