/* Batch norm, activation and 2x2 max-pooling after a convolution: forward, backward, and the tangents of both.
 * A function needs two passes over the data, because the values per channel are known only after all sums.
 */
#include "common.h"

/* c -> p, and where if `keep`; statistics of the first `measured` examples, unless those in d are used. Called by all
 * threads. */
INLINE void pool(const shape *s, const STORED *restrict c, STORED *restrict p, uint8_t *restrict where,
                 double *restrict d, double *restrict partial, const int keep) {
    SHAPE;
    (void)leak;
    ITEMS {
        ITEM;
        REAL sum[LANES] = {0}, square[LANES] = {0}, sign[LANES];
        for (int l = 0; l < n; l++) sign[l] = d[GAMMA * X + x0 + l] < 0 ? -1 : 1;
        for (int i = 0; 2 * i < H; i++)
            for (int j = 0; 2 * j < W; j++) {
                if (i < PH && j < PW) {
                    const STORED *c0 = c + CELL(0, 0), *c1 = c + CELL(0, 1), *c2 = c + CELL(1, 0), *c3 = c + CELL(1, 1);
                    STORED *to = p + POOLED;
                    uint8_t *at = keep ? where + POOLED : 0;
                    for (int l = 0; l < n; l++) { /* gamma < 0: the smallest value */
                        const REAL v0 = GET(c0[l]), v1 = GET(c1[l]), v2 = GET(c2[l]), v3 = GET(c3[l]), g = sign[l];
                        sum[l] += (v0 + v1) + (v2 + v3);
                        square[l] += (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3);
                        REAL best = v0 * g;
                        int32_t which = 0;
                        which = v1 * g > best ? 1 : which, best = v1 * g > best ? v1 * g : best;
                        which = v2 * g > best ? 2 : which, best = v2 * g > best ? v2 * g : best;
                        which = v3 * g > best ? 3 : which, best = v3 * g > best ? v3 * g : best;
                        to[l] = PUT(best * g);
                        if (keep) at[l] = (uint8_t)which;
                    }
                    continue;
                }
                for (int q = 0; q < 4; q++) { /* an odd last row or column enters the statistics only */
                    if (2 * i + q / 2 >= H || 2 * j + q % 2 >= W) continue;
                    const STORED *cell = c + CELL(q / 2, q % 2);
                    for (int l = 0; l < n; l++) {
                        const REAL v = GET(cell[l]);
                        sum[l] += v, square[l] += v * v;
                    }
                }
            }
        KEEP_SUMS(sum, square);
    }
#pragma omp single
    {
        if (s->measured) {
            const double count = values(s);
            double *mean = d + MEAN * X, *var = d + VAR * X;
            sum_up(s, partial, 0, mean, s->measured);
            sum_up(s, partial, 1, var, s->measured);
            for (int x = 0; x < X; x++) {
                mean[x] /= count;
                var[x] = var[x] / count - mean[x] * mean[x];
                if (var[x] < 0) var[x] = 0; /* rounding of a constant channel */
            }
        }
        set_scale(s, d);
    }
}

/* c -> p, where, a = act(s p + beta - s mean) */
void forward(const shape *s, const STORED *restrict c, STORED *restrict p, uint8_t *restrict where,
             STORED *restrict a, double *restrict d, double *restrict partial) {
    SHAPE;
    (void)H, (void)W;
#pragma omp parallel num_threads(s->threads)
    {
        pool(s, c, p, where, d, partial, 1);
        ITEMS {
            ITEM;
            TAKE_AFFINE;
            for (int i = 0; i < PH; i++)
                for (int j = 0; j < PW; j++) {
                    const STORED *from = p + POOLED;
                    STORED *to = a + POOLED;
                    for (int l = 0; l < n; l++) {
                        const REAL z = GET(from[l]) * scale[l] + beta[l];
                        to[l] = PUT(z * (z > 0 ? 1 : leak));
                    }
                }
        }
    }
}

/* c -> a, without p and where: p is written into a first */
void forward_only(const shape *s, const STORED *restrict c, STORED *restrict a, double *restrict d,
                  double *restrict partial) {
    SHAPE;
    (void)H, (void)W;
#pragma omp parallel num_threads(s->threads)
    {
        pool(s, c, a, 0, d, partial, 0);
        ITEMS {
            ITEM;
            TAKE_AFFINE;
            for (int i = 0; i < PH; i++)
                for (int j = 0; j < PW; j++) {
                    STORED *at = a + POOLED;
                    for (int l = 0; l < n; l++) {
                        const REAL z = GET(at[l]) * scale[l] + beta[l];
                        at[l] = PUT(z * (z > 0 ? 1 : leak));
                    }
                }
        }
    }
}

/* ga -> gc = h + slope c + offset with h = s gz at the selected places, and the values of backward_sums */
void backward(const shape *s, const STORED *restrict ga, const STORED *restrict p, const uint8_t *restrict where,
              const STORED *restrict c, STORED *restrict gc, double *restrict d, double *restrict partial) {
    SHAPE;
#pragma omp parallel num_threads(s->threads)
    {
        backward_sums(s, ga, p, d, partial);
        ITEMS {
            ITEM;
            TAKE_AFFINE;
            TAKE(slope, SLOPE);
            TAKE(offset, OFFSET);
            for (int i = 0; 2 * i < H; i++)
                for (int j = 0; 2 * j < W; j++) {
                    REAL h[LANES] = {0};
                    int32_t which[LANES] = {0};
                    if (i < PH && j < PW) {
                        const STORED *from = p + POOLED, *gradient = ga + POOLED;
                        const uint8_t *at = where + POOLED;
                        for (int l = 0; l < n; l++) {
                            h[l] = scale[l] * GET(gradient[l]) * (GET(from[l]) * scale[l] + beta[l] > 0 ? 1 : leak);
                            which[l] = at[l];
                        }
                    }
                    for (int q = 0; q < 4; q++) {
                        if (2 * i + q / 2 >= H || 2 * j + q % 2 >= W) continue;
                        const STORED *cell = c + CELL(q / 2, q % 2);
                        STORED *to = gc + CELL(q / 2, q % 2);
                        for (int l = 0; l < n; l++)
                            to[l] = PUT(slope[l] * GET(cell[l]) + offset[l] + (which[l] == q ? h[l] : 0));
                    }
                }
        }
    }
}

/* c_t: ct = conv(x, W_t) += c2 = conv(x_t, W) unless c2 is absent; then p_t and a_t = act'(z) z_t.
 * Row S_T contains sum c c_t, then var_t, then s_t. */
void tangent(const shape *s, STORED *restrict ct, const STORED *restrict c2, const STORED *restrict c,
             const STORED *restrict p, const uint8_t *restrict where, STORED *restrict p_t, STORED *restrict a_t,
             double *restrict d, double *restrict partial) {
    SHAPE;
#pragma omp parallel num_threads(s->threads)
    {
        ITEMS {
            ITEM;
            REAL sum[LANES] = {0}, cross[LANES] = {0};
            for (int i = 0; 2 * i < H; i++)
                for (int j = 0; 2 * j < W; j++) {
                    REAL kept[LANES] = {0};
                    int32_t which[LANES] = {0};
                    const int pooled = i < PH && j < PW;
                    if (pooled) {
                        const uint8_t *at = where + POOLED;
                        for (int l = 0; l < n; l++) which[l] = at[l];
                    }
                    for (int q = 0; q < 4; q++) {
                        if (2 * i + q / 2 >= H || 2 * j + q % 2 >= W) continue;
                        const long cell = CELL(q / 2, q % 2);
                        for (int l = 0; l < n; l++) {
                            ct[cell + l] = PUT(GET(ct[cell + l]) + (c2 ? GET(c2[cell + l]) : 0));
                            const REAL v = GET(ct[cell + l]);
                            sum[l] += v, cross[l] += v * GET(c[cell + l]);
                            kept[l] = which[l] == q ? v : kept[l];
                        }
                    }
                    if (pooled) {
                        STORED *to = p_t + POOLED;
                        for (int l = 0; l < n; l++) to[l] = PUT(kept[l]);
                    }
                }
            KEEP_SUMS(sum, cross);
        }
#pragma omp single
        {
            const double count = values(s);
            sum_up(s, partial, 0, d + MEAN_T * X, s->examples);
            sum_up(s, partial, 1, d + S_T * X, s->examples);
            for (int x = 0; x < X; x++) {
                d[MEAN_T * X + x] /= count;
                d[S_T * X + x] = 2 * (d[S_T * X + x] / count - d[MEAN * X + x] * d[MEAN_T * X + x]);
            }
            set_scale_tangent(s, d);
        }
        ITEMS {
            ITEM;
            TAKE(scale, S);
            TAKE(mean, MEAN);
            TAKE(beta, BETA);
            TAKE(scale_t, S_T);
            TAKE(mean_t, MEAN_T);
            for (int i = 0; i < PH; i++)
                for (int j = 0; j < PW; j++) {
                    const STORED *from = p + POOLED, *from_t = p_t + POOLED;
                    STORED *to = a_t + POOLED;
                    for (int l = 0; l < n; l++) {
                        const REAL v = GET(from[l]) - mean[l];
                        const REAL z_t = scale[l] * (GET(from_t[l]) - mean_t[l]) + scale_t[l] * v;
                        to[l] = PUT(z_t * (v * scale[l] + beta[l] > 0 ? 1 : leak));
                    }
                }
        }
    }
}

/* ga_t = ga1_t + ga2_t (which may be absent) -> gc_t = h + slope_t c + slope c_t + offset_t with h = s gz_t + s_t gz at
 * the selected places, written over ct; and the values of tangent_sums */
void tangent_backward(const shape *s, const STORED *restrict ga1_t, const STORED *restrict ga2_t,
                      const STORED *restrict ga, const STORED *restrict p, const STORED *restrict p_t,
                      const uint8_t *restrict where, const STORED *restrict c, STORED *restrict ct,
                      double *restrict d, double *restrict partial) {
    SHAPE;
#pragma omp parallel num_threads(s->threads)
    {
        tangent_sums(s, ga1_t, ga2_t, ga, p, p_t, d, partial);
        ITEMS {
            ITEM;
            TAKE_AFFINE;
            TAKE(slope, SLOPE);
            TAKE(scale_t, S_T);
            TAKE(slope_t, SLOPE_T);
            TAKE(offset_t, OFFSET_T);
            for (int i = 0; 2 * i < H; i++)
                for (int j = 0; 2 * j < W; j++) {
                    REAL h[LANES] = {0};
                    int32_t which[LANES] = {0};
                    if (i < PH && j < PW) {
                        const long at = POOLED;
                        for (int l = 0; l < n; l++) {
                            const REAL step = GET(p[at + l]) * scale[l] + beta[l] > 0 ? 1 : leak;
                            const REAL ga_t = GET(ga1_t[at + l]) + (ga2_t ? GET(ga2_t[at + l]) : 0);
                            h[l] = step * (scale[l] * ga_t + scale_t[l] * GET(ga[at + l]));
                            which[l] = where[at + l];
                        }
                    }
                    for (int q = 0; q < 4; q++) {
                        if (2 * i + q / 2 >= H || 2 * j + q % 2 >= W) continue;
                        const long cell = CELL(q / 2, q % 2);
                        for (int l = 0; l < n; l++)
                            ct[cell + l] = PUT(slope_t[l] * GET(c[cell + l]) + slope[l] * GET(ct[cell + l]) +
                                               offset_t[l] + (which[l] == q ? h[l] : 0));
                    }
                }
        }
    }
}
