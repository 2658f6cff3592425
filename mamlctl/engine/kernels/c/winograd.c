/* 3x3 convolutions by Winograd's method F(4x4, 3x3), and their gradients; each task has its own weights.
 *
 * An image is cut into tiles of 4x4 outputs, each computed from 6x6 inputs. With d a tile of inputs, w a filter, y the
 * tile of outputs, and the matrices of 6 points in winograd_tiles.h, a convolution is (Lavin & Gray 2016,
 * arXiv:1509.09308)
 *
 *     V = B^T d B        U = G w G^T        y = A^T M A,  where M = sum over input channels of U V, element by element
 *
 * which takes 36 multiplications instead of 144. Each of the 36 elements is one product of matrices, tiles x channels
 * by channels x filters. The gradients are those of these formulas: with g the gradient of y,
 *
 *     Y = A g A^T        gradient of w: G^T (sum over tiles of V Y) G        of d: B (sum over filters of U Y) B^T
 *
 * where tiles of inputs overlap by 2 pixels, whose gradients are added.
 *
 * x is [E][H][W][T * C], outputs are [E][H][W][T * O]. A work item is a group of images of one task, so that results
 * depend neither on the number of threads nor on the other tasks.
 */
#include "common.h"
#ifndef BFLOAT16
#include "winograd_tiles.h"

/* Sizes in values. */
typedef struct {
    int C, O, wide_C, wide_O, tiles, groups;
    long V, Y, U, turned, thread; /* V and Y: one of the 36 matrices of a block; U and turned: those of a task */
} sizes;

static sizes sizes_of(const shape *s) {
    sizes z = {.C = s->inputs, .O = s->channels / s->tasks};
    z.wide_C = ROUND(z.C), z.wide_O = ROUND(z.O);
    z.tiles = TILES(s->height) * TILES(s->width);
    z.groups = s->examples * z.tiles / 128;
    z.groups = z.groups > 8 ? 8 : z.groups;
    z.groups = z.groups > s->examples ? s->examples : z.groups < 1 ? 1 : z.groups;
    z.V = APART(BLOCK, z.wide_C), z.Y = APART(BLOCK, z.wide_O);
    z.U = APART(z.C, z.wide_O), z.turned = APART(z.O, z.wide_C);
    z.thread = K * (2 * z.V + z.Y + 2 * (z.U > z.turned ? z.U : z.turned)) + z.wide_C + z.wide_O;
    return z;
}

/* Values of the working memory of winograd_forward and winograd_backward. */
void winograd_sizes(const shape *s, int64_t *to) {
    const sizes z = sizes_of(s);
    to[0] = s->threads * z.thread;
    to[1] = s->threads * z.thread + s->tasks * z.groups * K * z.U;
}

#define IMAGES(from, channels_, apart_) \
    {(REAL *)(from) + ((long)e0 * s->height * s->width * s->tasks + t) * (channels_), s->height, s->width, \
     s->tasks * (channels_), channels_, apart_}

#define GROUPS \
    _Pragma("omp for schedule(dynamic)") \
    for (int item = 0; item < s->tasks * z.groups; item++)
#define GROUP \
    const int t = item / z.groups, g = item % z.groups; \
    const int e0 = (long)g * s->examples / z.groups, tiles = ((long)(g + 1) * s->examples / z.groups - e0) * z.tiles

/* w [O][C][9] of one task -> U = G w G^T, 36 matrices C x O, or O x C if `turned`. Every work item does this, because
 * writing and reading the matrices of all tasks takes longer: they do not fit into the caches. */
INLINE void transform_weights(const sizes z, const REAL *w, REAL *to, const int turned) {
    for (int c0 = 0; c0 < z.C; c0 += LANE)
        for (int o = 0; o < z.O; o += LANE) {
            const int channels = z.C - c0 < LANE ? z.C - c0 : LANE, filters = z.O - o < LANE ? z.O - o : LANE;
            REAL taps[9 * LANE * LANE], square[K * LANE * LANE];
            REAL *first = turned ? square : to + (long)c0 * z.wide_O + o;
            const long row = turned ? LANE : z.wide_O, apart = turned ? LANE * LANE : z.U;
            transpose(w + ((long)o * z.C + c0) * 9, 9L * z.C, filters, 9 * channels, taps, LANE, 0);
            for (int c = 0; c < channels; c++) {
                vector d[9], half[18], all[6];
#pragma GCC unroll 9
                for (int i = 0; i < 9; i++) d[i] = LOAD(taps + (c * 9 + i) * LANE);
#pragma GCC unroll 3
                for (int j = 0; j < 3; j++) by_G(d + j, 3, half + j, 3);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) {
                    by_G(half + 3 * i, 1, all, 1);
                    for (int j = 0; j < 6; j++) STORE(first + c * row + (i * 6 + j) * apart, all[j]);
                }
            }
            if (!turned) continue;
            for (int k = 0; k < K; k++)
                transpose(square + k * apart, LANE, channels, filters, to + k * z.turned + (long)o * z.wide_C + c0,
                          z.wide_C, 0);
        }
}

/* c = conv(x, w), or conv(x, w) + conv(x2, w2) */
void winograd_forward(const shape *s, const REAL *x, const REAL *w, const REAL *x2, const REAL *w2, REAL *c,
                      REAL *work) {
    const sizes z = sizes_of(s);
#pragma omp parallel num_threads(s->threads)
    {
        REAL *V = work + omp_get_thread_num() * z.thread, *M = V + K * z.V, *zeros = M + K * z.Y;
        REAL *U = zeros + z.wide_C, *U2 = U + K * z.U;
        memset(zeros, 0, z.wide_C * sizeof(REAL));
        GROUPS {
            GROUP;
            const images in = IMAGES(x, z.C, z.V), in2 = IMAGES(x2, z.C, z.V), out = IMAGES(c, z.O, z.Y);
            transform_weights(z, w + (long)t * z.O * z.C * 9, U, 0);
            if (x2) transform_weights(z, w2 + (long)t * z.O * z.C * 9, U2, 0);
            for (int start = 0; start < tiles; start += BLOCK) {
                const int rows = tiles - start < BLOCK ? tiles - start : BLOCK;
                for (int second = 0; second < (x2 ? 2 : 1); second++) {
                    transform_block(INPUTS, second ? &in2 : &in, start, rows, V, zeros);
                    for (int k = 0; k < K; k++)
                        multiply(V + k * z.V, z.wide_C, 1, (second ? U2 : U) + k * z.U, M + k * z.Y, rows, z.C,
                                 z.wide_O, second);
                }
                transform_block(OUTPUTS, &out, start, rows, M, 0);
            }
        }
    }
}

/* The gradient of w from the sums of all groups. */
static void weights_gradient(const shape *s, const sizes z, const REAL *sums, REAL *gw) {
    const int chunks = z.wide_C / LANE;
#pragma omp for schedule(static)
    for (int item = 0; item < s->tasks * chunks; item++) {
        const int t = item / chunks, c0 = item % chunks * LANE, channels = z.C - c0 < LANE ? z.C - c0 : LANE;
        for (int o = 0; o < z.O; o += LANE) {
            REAL taps[9 * LANE * LANE];
            const int filters = z.O - o < LANE ? z.O - o : LANE;
            for (int c = 0; c < channels; c++) {
                vector d[K], half[18], all[3];
                const REAL *from = sums + t * z.groups * K * z.U + (long)(c0 + c) * z.wide_O + o;
                for (int k = 0; k < K; k++) d[k] = LOAD(from + k * z.U);
                for (int g = 1; g < z.groups; g++)
                    for (int k = 0; k < K; k++) d[k] += LOAD(from + (g * K + k) * z.U);
                for (int j = 0; j < 6; j++) by_G_transposed(d + j, 6, half + j, 6);
                for (int i = 0; i < 3; i++) {
                    by_G_transposed(half + 6 * i, 1, all, 1);
                    for (int j = 0; j < 3; j++) STORE(taps + (c * 9 + i * 3 + j) * LANE, all[j]);
                }
            }
            transpose(taps, LANE, 9 * channels, filters, gw + ((long)(t * z.O + o) * z.C + c0) * 9, 9L * z.C, 1);
        }
    }
}

/* The gradients of c = conv(x, w) from g: gx and gw; with g2, x2 and w2 the sums of two of each */
void winograd_backward(const shape *s, const REAL *g1, const REAL *x1, const REAL *w1, const REAL *g2,
                       const REAL *x2, const REAL *w2, REAL *gx, REAL *gw, REAL *work) {
    const sizes z = sizes_of(s);
    REAL *sums = work + s->threads * z.thread;
#pragma omp parallel num_threads(s->threads)
    {
        REAL *V = work + omp_get_thread_num() * z.thread, *N = V + K * z.V, *Y = N + K * z.V, *zeros = Y + K * z.Y;
        REAL *turned1 = zeros + z.wide_C + z.wide_O, *turned2 = turned1 + K * z.turned;
        memset(zeros, 0, (z.wide_C + z.wide_O) * sizeof(REAL));
        GROUPS {
            GROUP;
            const images x[2] = {IMAGES(x1, z.C, z.V), IMAGES(x2, z.C, z.V)};
            const images gradient[2] = {IMAGES(g1, z.O, z.Y), IMAGES(g2, z.O, z.Y)}, out = IMAGES(gx, z.C, z.V);
            transform_weights(z, w1 + (long)t * z.O * z.C * 9, turned1, 1);
            if (g2) transform_weights(z, w2 + (long)t * z.O * z.C * 9, turned2, 1);
            for (int start = 0; start < tiles; start += BLOCK) {
                const int rows = tiles - start < BLOCK ? tiles - start : BLOCK;
                for (int second = 0; second < (g2 ? 2 : 1); second++) {
                    transform_block(GRADIENTS, &gradient[second], start, rows, Y, zeros);
                    transform_block(INPUTS, &x[second], start, rows, V, zeros);
                    const REAL *turned = second ? turned2 : turned1;
                    for (int k = 0; k < K; k++) {
                        const REAL *Yk = Y + k * z.Y;
                        multiply(Yk, z.wide_O, 1, turned + k * z.turned, N + k * z.V, rows, z.O, z.wide_C, second);
                        multiply(V + k * z.V, 1, z.wide_C, Yk, sums + (item * K + k) * z.U, z.C, rows, z.wide_O,
                                 start || second);
                    }
                }
                transform_block(ADDED_INPUTS, &out, start, rows, N, 0);
            }
        }
        weights_gradient(s, z, sums, gw);
    }
}
#endif
