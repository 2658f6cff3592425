/* What mlp.c consists of: its settings, and the layout of weights and intermediate results. */
#pragma once
#include <math.h>
#include <omp.h>

#if defined(__AVX__) || defined(FLOAT64)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { PANEL = 5 }; /* PANEL x 2 vectors fit into the registers of AVX2 */
#include "products.h"

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

/* Fills at[layers + 1]; the last entry is for the output. */
static plan plan_of(const mlp *s, int examples, layer *at) {
    plan n = {s, s->layers, examples, 0, 0, 0, at};
    for (int l = 0; l <= s->layers; l++) {
        layer *one = at + l;
        one->in = s->widths[l], one->in_row = ROUND(one->in);
        one->a = n.tape, n.tape += (long)examples * one->in_row;
        one->gz = n.tape; /* gz of the layer below, at this layer's input; unused for l = 0 */
        n.tape += (long)examples * one->in_row;
        if (l == s->layers) break;
        one->out = s->widths[l + 1], one->out_row = ROUND(one->out);
        one->w = n.natural, n.natural += (long)one->out * one->in_row;
        one->b = n.natural, n.natural += one->out_row;
    }
    n.image = n.natural;
    for (int l = 0; l < s->layers; l++) at[l].t = n.image, n.image += (long)at[l].in * at[l].out_row;
    return n;
}
