/* What mlp.c consists of: its settings, the layout of weights and intermediate results, and small matrix products. */
#pragma once
#include "common.h"

#include <math.h>
#include <omp.h>

#if defined(__AVX__) || defined(FLOAT64)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { PAD = BYTES / sizeof(REAL), ROWS = 5 }; /* a tile's ROWS x 2 vectors fit into the registers of AVX2 */
typedef REAL vec __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define INDEPENDENT _Pragma("omp simd") /* for loops whose arrays do not overlap, or are the same */

typedef struct {
    int tasks, layers, support, query, steps, threads;
    int first_order, learns_rates, rate_rows, rate_per_weight; /* rate_rows: steps beyond the last row use it too */
    double leak;
    const int *widths;     /* [layers + 1], inputs first */
    const double *weights; /* [steps], of the query losses in the meta-loss, divided by the number of tasks */
    const int *measured;   /* [steps + 1], whether the query loss after so many steps is wanted */
} mlp;

typedef struct {
    int in, out, in_row, out_row; /* widths, and the same padded */
    long w, b, t;                 /* offsets of W, b and the transposed W in an image */
    long a, gz;                   /* offsets of the layer's input and of the gradient of its output in a tape */
} layer;

typedef struct {
    const mlp *s;
    int layers, examples;
    long natural, image, tape; /* sizes of the first part of an image, of an image, and of a tape */
    const layer *at;
} plan;

static int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

/* Fills at[layers + 1]; the last entry is for the output. */
static plan plan_of(const mlp *s, int examples, layer *at) {
    plan n = {s, s->layers, examples, 0, 0, 0, at};
    for (int l = 0; l <= s->layers; l++) {
        layer *one = at + l;
        one->in = s->widths[l], one->in_row = padded(one->in);
        one->a = n.tape, n.tape += (long)examples * one->in_row;
        one->gz = n.tape; /* gz of the layer below, at this layer's input; unused for l = 0 */
        n.tape += (long)examples * one->in_row;
        if (l == s->layers) break;
        one->out = s->widths[l + 1], one->out_row = padded(one->out);
        one->w = n.natural, n.natural += (long)one->out * one->in_row;
        one->b = n.natural, n.natural += one->out_row;
    }
    n.image = n.natural;
    for (int l = 0; l < s->layers; l++) at[l].t = n.image, n.image += (long)at[l].in * at[l].out_row;
    return n;
}

/* A tile of C (+)= A B with B [K][...]; A has any strides, so that it may be transposed. */
INLINE void tile(int rows, int vecs, int K, const REAL *A, long row, long column, const REAL *B, long b_row, REAL *C,
                 long c_row, int add) {
    vec sum[ROWS][2];
#pragma GCC unroll 5
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) sum[r][v] = add ? *(vec *)(C + r * c_row + v * PAD) : (vec){0};
    for (int k = 0; k < K; k++)
#pragma GCC unroll 5
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < vecs; v++)
                sum[r][v] += A[r * row + k * column] * *(const vec *)(B + k * b_row + v * PAD);
#pragma GCC unroll 5
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vecs; v++) *(vec *)(C + r * c_row + v * PAD) = sum[r][v];
}

INLINE void strip(int rows, int N, int K, const REAL *A, long row, long column, const REAL *B, long b_row, REAL *C,
                  long c_row, int add) {
    int n = 0;
    for (; n + 2 * PAD <= N; n += 2 * PAD) tile(rows, 2, K, A, row, column, B + n, b_row, C + n, c_row, add);
    if (n < N) tile(rows, 1, K, A, row, column, B + n, b_row, C + n, c_row, add);
}

/* C [M][N] (+)= A [M][K] B [K][N], with N a multiple of PAD and element (m, k) of A at m * row + k * column. */
static void product(int M, int N, int K, const REAL *A, long row, long column, const REAL *B, long b_row, REAL *C,
                    long c_row, int add) {
    for (int m = 0; m < M; m += ROWS, A += ROWS * row, C += ROWS * c_row) switch (M - m) {
            case 1: strip(1, N, K, A, row, column, B, b_row, C, c_row, add); break;
            case 2: strip(2, N, K, A, row, column, B, b_row, C, c_row, add); break;
            case 3: strip(3, N, K, A, row, column, B, b_row, C, c_row, add); break;
            case 4: strip(4, N, K, A, row, column, B, b_row, C, c_row, add); break;
            default: strip(5, N, K, A, row, column, B, b_row, C, c_row, add);
        }
}
