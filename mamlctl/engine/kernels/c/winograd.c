/* 3x3 convolutions by Winograd's method F(4x4, 3x3), and their gradients; each task has its own weights.
 *
 * An image is cut into tiles of 4x4 outputs, each computed from 6x6 inputs. With d a tile of inputs, w a filter and y
 * the tile of outputs, and with the matrices of 6 points (below), a convolution is (Lavin & Gray 2016, arXiv:1509.09308)
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
#include <omp.h>
#ifndef BFLOAT16

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { LANE = BYTES / sizeof(REAL), BLOCK = 32, PANEL = 6, K = 36 }; /* values per vector, tiles per block, rows of a product, elements */
#ifdef FLOAT64
typedef int64_t INTEGER;
#else
typedef int32_t INTEGER;
#endif
typedef INTEGER integers __attribute__((vector_size(BYTES)));
typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define LOAD(from) (*(const vector *)(from))
#define STORE(to, v) (*(vector *)(to) = (v))
#define ROUND(n) (((n) + LANE - 1) / LANE * LANE)
#define TILES(n) (((n) + 3) / 4)
/* Distance between the 36 matrices, which must not be a multiple of the page size, see "4K aliasing". */
#define APART(rows, columns) ((long)(rows) * (columns) + LANE)

/* The points are 0, +-P, +-Q and infinity. With these, all constants are exact and the error is half of that of +-1
 * and +-2. */
#define P ((REAL)0.75)
#define Q ((REAL)1.5)
#define PP (P * P)
#define QQ (Q * Q)
#define BY_P (1 / (2 * PP * (PP - QQ))) /* the weights of the points in G */
#define BY_Q (1 / (2 * QQ * (QQ - PP)))

/* n values from memory, padded by zeros. */
INLINE vector read(const REAL *from, int n) {
    if (n == LANE) return LOAD(from);
    REAL each[LANE] = {0};
    memcpy(each, from, n * sizeof(REAL));
    return LOAD(each);
}

INLINE void write(REAL *to, vector v, int n) {
    if (n == LANE)
        STORE(to, v);
    else
        memcpy(to, &v, n * sizeof(REAL));
}

/* The transforms of one dimension: s and t are the distances between values. */
INLINE void by_B_transposed(const vector *d, int s, vector *o, int t) {
    const vector a = d[4 * s] - QQ * d[2 * s], b = P * (d[3 * s] - QQ * d[s]);
    const vector e = d[4 * s] - PP * d[2 * s], f = Q * (d[3 * s] - PP * d[s]);
    o[0] = PP * QQ * d[0] - (PP + QQ) * d[2 * s] + d[4 * s];
    o[t] = a + b, o[2 * t] = a - b, o[3 * t] = e + f, o[4 * t] = e - f;
    o[5 * t] = PP * QQ * d[s] - (PP + QQ) * d[3 * s] + d[5 * s];
}

INLINE void by_B(const vector *m, int s, vector *o, int t) {
    const vector a = m[s] + m[2 * s], b = P * (m[s] - m[2 * s]), e = m[3 * s] + m[4 * s], f = Q * (m[3 * s] - m[4 * s]);
    o[0] = PP * QQ * m[0];
    o[t] = PP * QQ * m[5 * s] - QQ * b - PP * f;
    o[2 * t] = -(PP + QQ) * m[0] - QQ * a - PP * e;
    o[3 * t] = b + f - (PP + QQ) * m[5 * s];
    o[4 * t] = m[0] + a + e;
    o[5 * t] = m[5 * s];
}

INLINE void by_A_transposed(const vector *m, int s, vector *o, int t) {
    const vector a = m[s] + m[2 * s], b = P * (m[s] - m[2 * s]), e = m[3 * s] + m[4 * s], f = Q * (m[3 * s] - m[4 * s]);
    o[0] = m[0] + a + e;
    o[t] = b + f;
    o[2 * t] = PP * a + QQ * e;
    o[3 * t] = PP * b + QQ * f + m[5 * s];
}

INLINE void by_A(const vector *d, int s, vector *o, int t) {
    const vector a = d[0] + PP * d[2 * s], b = P * (d[s] + PP * d[3 * s]);
    const vector e = d[0] + QQ * d[2 * s], f = Q * (d[s] + QQ * d[3 * s]);
    o[0] = d[0];
    o[t] = a + b, o[2 * t] = a - b, o[3 * t] = e + f, o[4 * t] = e - f;
    o[5 * t] = d[3 * s];
}

INLINE void by_G(const vector *w, int s, vector *o, int t) {
    const vector a = BY_P * (w[0] + PP * w[2 * s]), b = BY_P * P * w[s];
    const vector e = BY_Q * (w[0] + QQ * w[2 * s]), f = BY_Q * Q * w[s];
    o[0] = w[0] / (PP * QQ);
    o[t] = a + b, o[2 * t] = a - b, o[3 * t] = e + f, o[4 * t] = e - f;
    o[5 * t] = w[2 * s];
}

INLINE void by_G_transposed(const vector *m, int s, vector *o, int t) {
    const vector a = BY_P * (m[s] + m[2 * s]), b = BY_P * (m[s] - m[2 * s]);
    const vector e = BY_Q * (m[3 * s] + m[4 * s]), f = BY_Q * (m[3 * s] - m[4 * s]);
    o[0] = m[0] / (PP * QQ) + a + e;
    o[t] = P * b + Q * f;
    o[2 * t] = PP * a + QQ * e + m[5 * s];
}

/* Images of one task with its channels, in memory with those of all tasks. */
typedef struct {
    REAL *first; /* channel 0 of the task in the first pixel */
    int H, W, X, channels;
    long apart; /* between the matrices of `elements` */
} images;

/* The pixels of the window of size x size that begins at (top, left); `outside` for those outside of the image: zeros to
 * read, or null. */
INLINE void window(const images *m, long e, int top, int left, int size, REAL *outside, REAL **at) {
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            const int h = top + i, w = left + j, inside = h >= 0 && h < m->H && w >= 0 && w < m->W;
            at[i * size + j] = inside ? m->first + ((e * m->H + h) * m->W + w) * m->X : outside;
        }
}

/* LANE channels from c on of one tile; `to` has its 36 elements at distances `apart`. */
INLINE void tile_of_inputs(REAL *const *at, int c, int n, REAL *to, long apart) {
    vector d[K], o[K];
    for (int j = 0; j < 6; j++) {
        vector column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) column[i] = read(at[i * 6 + j] + c, n);
        by_B_transposed(column, 1, d + j, 6);
    }
    for (int i = 0; i < 6; i++) {
        by_B_transposed(d + i * 6, 1, o, 1);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) STORE(to + (i * 6 + j) * apart, o[j]);
    }
}

INLINE void tile_of_gradients(REAL *const *at, int c, int n, REAL *to, long apart) {
    vector d[24], o[K];
    for (int j = 0; j < 4; j++) {
        vector column[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) column[i] = read(at[i * 4 + j] + c, n);
        by_A(column, 1, d + j, 4);
    }
    for (int i = 0; i < 6; i++) {
        by_A(d + i * 4, 1, o, 1);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) STORE(to + (i * 6 + j) * apart, o[j]);
    }
}

INLINE void tile_of_outputs(const REAL *from, long apart, REAL *const *at, int c, int n) {
    vector d[24], o[4];
    for (int j = 0; j < 6; j++) {
        vector column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) column[i] = LOAD(from + (i * 6 + j) * apart);
        by_A_transposed(column, 1, d + j, 6);
    }
    for (int i = 0; i < 4; i++) {
        by_A_transposed(d + i * 6, 1, o, 1);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (at[i * 4 + j]) write(at[i * 4 + j] + c, o[j], n);
    }
}

/* Adds to the gradient of the inputs; the first tile that contains a pixel replaces its value. Tiles of an image come
 * from top to bottom and from left to right, and overlap by 2. */
INLINE void add_tile_of_inputs(const REAL *from, long apart, REAL *const *at, int top, int left, int c, int n) {
    vector d[K], o[6];
    for (int j = 0; j < 6; j++) {
        vector column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) column[i] = LOAD(from + (i * 6 + j) * apart);
        by_B(column, 1, d + j, 6);
    }
    for (int i = 0; i < 6; i++) {
        by_B(d + i * 6, 1, o, 1);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) {
            REAL *to = at[i * 6 + j];
            if (!to) continue;
            const int first = (i >= 2 || !top) && (j >= 2 || !left);
            write(to + c, first ? o[j] : (vector)(read(to + c, n) + o[j]), n);
        }
    }
}

/* ROWS x COLUMNS vectors of c = a b, or c += a b; element (i, k) of a is a[i * by_row + k * by_k]. */
#define MULTIPLY(ROWS, COLUMNS) \
    { \
        vector sum[ROWS][COLUMNS]; \
        for (int i = 0; i < ROWS; i++) \
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = add ? LOAD(c + i * wide + j * LANE) : (vector){0}; \
        for (int k = 0; k < depth; k++) { \
            vector right[COLUMNS]; \
            for (int j = 0; j < COLUMNS; j++) right[j] = LOAD(b + (long)k * wide + j * LANE); \
            for (int i = 0; i < ROWS; i++) \
                for (int j = 0; j < COLUMNS; j++) sum[i][j] += a[i * by_row + k * by_k] * right[j]; \
        } \
        for (int i = 0; i < ROWS; i++) \
            for (int j = 0; j < COLUMNS; j++) STORE(c + i * wide + j * LANE, sum[i][j]); \
    }

INLINE void panel(const REAL *a, long by_row, long by_k, const REAL *b, REAL *c, long wide, int rows, int depth, int add,
                  const int columns) {
#define CASE(ROWS) \
    case ROWS: \
        if (columns == 2) MULTIPLY(ROWS, 2) else MULTIPLY(ROWS, 1) \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    }
}

/* c = a b or c += a b, with rows x depth by depth x wide values; wide is a multiple of LANE. */
static void multiply(const REAL *a, long by_row, long by_k, const REAL *b, REAL *c, int rows, int depth, long wide,
                     int add) {
    for (long x = 0; x < wide; x += 2 * LANE)
        for (int row = 0; row < rows; row += PANEL) {
            const int n = rows - row < PANEL ? rows - row : PANEL;
            if (wide - x >= 2 * LANE)
                panel(a + row * by_row, by_row, by_k, b + x, c + row * wide + x, wide, n, depth, add, 2);
            else
                panel(a + row * by_row, by_row, by_k, b + x, c + row * wide + x, wide, n, depth, add, 1);
        }
}

/* The transforms of the tiles of a block, rows of the 36 matrices in `elements`. */
enum { INPUTS, GRADIENTS, OUTPUTS, ADDED_INPUTS };

INLINE void transform(const int which, const images *m, REAL *const *at, REAL *elements, int top, int left, int c,
                      const int n) {
    if (which == INPUTS) tile_of_inputs(at, c, n, elements, m->apart);
    if (which == GRADIENTS) tile_of_gradients(at, c, n, elements, m->apart);
    if (which == OUTPUTS) tile_of_outputs(elements, m->apart, at, c, n);
    if (which == ADDED_INPUTS) add_tile_of_inputs(elements, m->apart, at, top, left, c, n);
}

/* Tiles `start` to `start + rows` of the images, counted over all images. */
INLINE void transform_block(const int which, const images *m, int start, int rows, REAL *elements, REAL *zeros) {
    const int down = TILES(m->H), across = TILES(m->W), tiles = down * across, wide = ROUND(m->channels);
    const int size = which == INPUTS || which == ADDED_INPUTS ? 6 : 4, margin = size == 6;
    for (int row = 0; row < rows; row++) {
        const int e = (start + row) / tiles, i = (start + row) % tiles / across, j = (start + row) % across;
        REAL *at[K];
        window(m, e, 4 * i - margin, 4 * j - margin, size, zeros, at);
        int c = 0;
        for (; c + LANE <= m->channels; c += LANE)
            transform(which, m, at, elements + row * wide + c, i, j, c, LANE);
        if (c < m->channels) transform(which, m, at, elements + row * wide + c, i, j, c, m->channels - c);
    }
}

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
    z.thread = K * (2 * z.V + z.Y) + z.wide_C + z.wide_O;
    return z;
}

/* Values of the tensors u, turned, and the workspaces of winograd_forward and winograd_backward. */
void winograd_sizes(const shape *s, int64_t *to) {
    const sizes z = sizes_of(s);
    to[0] = s->tasks * K * z.U;
    to[1] = s->tasks * K * z.turned;
    to[2] = s->threads * z.thread;
    to[3] = s->threads * z.thread + s->tasks * z.groups * K * z.U;
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

/* c = conv(x, w), or conv(x, w) + conv(x2, w2) */
void winograd_forward(const shape *s, const REAL *x, const REAL *u, const REAL *x2, const REAL *u2, REAL *c,
                      REAL *work) {
    const sizes z = sizes_of(s);
#pragma omp parallel num_threads(s->threads)
    {
        REAL *V = work + omp_get_thread_num() * z.thread, *M = V + K * z.V, *zeros = M + K * z.Y;
        memset(zeros, 0, z.wide_C * sizeof(REAL));
        GROUPS {
            GROUP;
            const images in = IMAGES(x, z.C, z.V), in2 = IMAGES(x2, z.C, z.V), out = IMAGES(c, z.O, z.Y);
            for (int start = 0; start < tiles; start += BLOCK) {
                const int rows = tiles - start < BLOCK ? tiles - start : BLOCK;
                for (int second = 0; second < (x2 ? 2 : 1); second++) {
                    transform_block(INPUTS, second ? &in2 : &in, start, rows, V, zeros);
                    for (int k = 0; k < K; k++)
                        multiply(V + k * z.V, z.wide_C, 1, (second ? u2 : u) + (t * K + k) * z.U, M + k * z.Y, rows, z.C,
                                 z.wide_O, second);
                }
                transform_block(OUTPUTS, &out, start, rows, M, 0);
            }
        }
    }
}

/* Transposes LANE x LANE values: each round interleaves the first half of the rows with the second. */
INLINE void exchange(vector *v, vector *o) {
    integers low, high;
    for (int l = 0; l < LANE; l++) low[l] = l / 2 + l % 2 * LANE, high[l] = low[l] + LANE / 2;
    for (int round = 1; round < LANE; round *= 2) {
        for (int i = 0; i < LANE / 2; i++) {
            o[2 * i] = __builtin_shuffle(v[i], v[i + LANE / 2], low);
            o[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANE / 2], high);
        }
        memcpy(v, o, LANE * sizeof *v);
    }
}

/* The matrix with rows and columns exchanged, in blocks of LANE x LANE; writes whole vectors unless `exact`. */
INLINE void transpose(const REAL *from, long from_row, int rows, int columns, REAL *to, long to_row, const int exact) {
    for (int r = 0; r < rows; r += LANE)
        for (int c = 0; c < columns; c += LANE) {
            const int down = rows - r < LANE ? rows - r : LANE, across = columns - c < LANE ? columns - c : LANE;
            vector v[LANE], o[LANE];
            for (int i = 0; i < LANE; i++) v[i] = i < down ? read(from + (r + i) * from_row + c, across) : (vector){0};
            exchange(v, o);
            for (int i = 0; i < across; i++) write(to + (c + i) * to_row + r, o[i], exact ? down : LANE);
        }
}

/* w [T][O][C][9] -> u = G w G^T, 36 matrices C x O per task */
void winograd_weights(const shape *s, const REAL *w, REAL *u) {
    const sizes z = sizes_of(s);
    const int chunks = z.wide_C / LANE;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int item = 0; item < s->tasks * chunks; item++) {
        const int t = item / chunks, c0 = item % chunks * LANE, channels = z.C - c0 < LANE ? z.C - c0 : LANE;
        for (int o = 0; o < z.O; o += LANE) {
            REAL taps[9 * LANE * LANE];
            const int filters = z.O - o < LANE ? z.O - o : LANE;
            transpose(w + ((long)(t * z.O + o) * z.C + c0) * 9, 9L * z.C, filters, 9 * channels, taps, LANE, 0);
            REAL *to = u + t * K * z.U + (long)c0 * z.wide_O + o;
            for (int c = 0; c < channels; c++, to += z.wide_O) {
                vector d[9], half[18], all[6];
#pragma GCC unroll 9
                for (int i = 0; i < 9; i++) d[i] = LOAD(taps + (c * 9 + i) * LANE);
#pragma GCC unroll 3
                for (int j = 0; j < 3; j++) by_G(d + j, 3, half + j, 3);
#pragma GCC unroll 6
                for (int i = 0; i < 6; i++) {
                    by_G(half + 3 * i, 1, all, 1);
                    for (int j = 0; j < 6; j++) STORE(to + (i * 6 + j) * z.U, all[j]);
                }
            }
        }
    }
}

/* u -> turned: the same matrices as O x C */
void winograd_turned(const shape *s, const REAL *u, REAL *turned) {
    const sizes z = sizes_of(s);
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int item = 0; item < s->tasks * K; item++)
        transpose(u + item * z.U, z.wide_O, z.C, z.O, turned + item * z.turned, z.wide_C, 0);
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

/* The gradients of c = conv(x, w) from g: gx and gw; with g2, x2 and turned2 the sums of two of each */
void winograd_backward(const shape *s, const REAL *g1, const REAL *x1, const REAL *turned1, const REAL *g2,
                       const REAL *x2, const REAL *turned2, REAL *gx, REAL *gw, REAL *work) {
    const sizes z = sizes_of(s);
    REAL *sums = work + s->threads * z.thread;
#pragma omp parallel num_threads(s->threads)
    {
        REAL *V = work + omp_get_thread_num() * z.thread, *N = V + K * z.V, *Y = N + K * z.V, *zeros = Y + K * z.Y;
        memset(zeros, 0, (z.wide_C + z.wide_O) * sizeof(REAL));
        GROUPS {
            GROUP;
            const images x[2] = {IMAGES(x1, z.C, z.V), IMAGES(x2, z.C, z.V)};
            const images gradient[2] = {IMAGES(g1, z.O, z.Y), IMAGES(g2, z.O, z.Y)}, out = IMAGES(gx, z.C, z.V);
            for (int start = 0; start < tiles; start += BLOCK) {
                const int rows = tiles - start < BLOCK ? tiles - start : BLOCK;
                for (int second = 0; second < (g2 ? 2 : 1); second++) {
                    transform_block(GRADIENTS, &gradient[second], start, rows, Y, zeros);
                    transform_block(INPUTS, &x[second], start, rows, V, zeros);
                    const REAL *turned = (second ? turned2 : turned1) + t * K * z.turned;
                    for (int k = 0; k < K; k++) {
                        multiply(Y + k * z.Y, z.wide_O, 1, turned + k * z.turned, N + k * z.V, rows, z.O, z.wide_C, second);
                        multiply(V + k * z.V, 1, z.wide_C, Y + k * z.Y, sums + (item * K + k) * z.U, z.C, rows, z.wide_O,
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
