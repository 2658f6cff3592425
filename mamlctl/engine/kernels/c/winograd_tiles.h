/* The tiles of winograd.c, and transposes of matrices. */
#pragma once
#include <omp.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { K = 36, BLOCK = 32, PANEL = 6 }; /* elements of a tile; tiles that are in the cache together; see products.h */
#include "products.h"

#ifdef FLOAT64
typedef int64_t INTEGER;
#else
typedef int32_t INTEGER;
#endif
typedef INTEGER integers __attribute__((vector_size(BYTES)));

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

/* The pixels of the window of size x size that begins at (top, left); `outside` (zeros to read, or null) for those
 * outside of the image. */
INLINE void window(const images *m, long e, int top, int left, int size, REAL *outside, REAL **at) {
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            const int h = top + i, w = left + j, inside = h >= 0 && h < m->H && w >= 0 && w < m->W;
            at[i * size + j] = inside ? m->first + ((e * m->H + h) * m->W + w) * m->X : outside;
        }
}

/* LANE channels from c on of a tile of 6x6 inputs or 4x4 gradients; `to` has its 36 elements at distances `apart`. */
INLINE void to_elements(REAL *const *at, int c, int n, REAL *to, long apart, const int size) {
    vector d[K], o[6];
    for (int j = 0; j < size; j++) {
        vector column[6];
#pragma GCC unroll 6
        for (int i = 0; i < size; i++) column[i] = read(at[i * size + j] + c, n);
        if (size == 6)
            by_B_transposed(column, 1, d + j, size);
        else
            by_A(column, 1, d + j, size);
    }
    for (int i = 0; i < 6; i++) {
        if (size == 6)
            by_B_transposed(d + i * size, 1, o, 1);
        else
            by_A(d + i * size, 1, o, 1);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) STORE(to + (i * 6 + j) * apart, o[j]);
    }
}

/* From 36 elements to a tile of 4x4 outputs or 6x6 gradients of inputs. Those add up over tiles, which come from top to
 * bottom and from left to right and overlap by 2: the first tile that contains a pixel replaces its value. */
INLINE void from_elements(const REAL *from, long apart, REAL *const *at, int top, int left, int c, int n,
                          const int size) {
    vector d[K], o[6];
    for (int j = 0; j < 6; j++) {
        vector column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) column[i] = LOAD(from + (i * 6 + j) * apart);
        if (size == 6)
            by_B(column, 1, d + j, 6);
        else
            by_A_transposed(column, 1, d + j, 6);
    }
    for (int i = 0; i < size; i++) {
        if (size == 6)
            by_B(d + i * 6, 1, o, 1);
        else
            by_A_transposed(d + i * 6, 1, o, 1);
#pragma GCC unroll 6
        for (int j = 0; j < size; j++) {
            REAL *to = at[i * size + j];
            if (!to) continue;
            const int first = size == 4 || ((i >= 2 || !top) && (j >= 2 || !left));
            write(to + c, first ? o[j] : (vector)(read(to + c, n) + o[j]), n);
        }
    }
}

/* The transforms of the tiles of a block, rows of the 36 matrices in `elements`. */
enum { INPUTS, GRADIENTS, OUTPUTS, ADDED_INPUTS };

INLINE void transform(const int which, const images *m, REAL *const *at, REAL *elements, int top, int left, int c,
                      const int n, const int size) {
    if (which == INPUTS || which == GRADIENTS)
        to_elements(at, c, n, elements, m->apart, size);
    else
        from_elements(elements, m->apart, at, top, left, c, n, size);
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
            transform(which, m, at, elements + row * wide + c, i, j, c, LANE, size);
        if (c < m->channels) transform(which, m, at, elements + row * wide + c, i, j, c, m->channels - c, size);
    }
}

/* One round of a transposition: interleaves the first half of the rows with the second. */
INLINE void interleave(const vector *v, vector *o) {
#ifdef __clang__ /* which has no shuffle by a vector */
#pragma GCC unroll 16
    for (int i = 0; i < LANE; i++)
        for (int l = 0; l < LANE; l++) o[i][l] = v[i / 2 + l % 2 * (LANE / 2)][l / 2 + i % 2 * (LANE / 2)];
#else
    integers low, high;
    for (int l = 0; l < LANE; l++) low[l] = l / 2 + l % 2 * LANE, high[l] = low[l] + LANE / 2;
#pragma GCC unroll 8
    for (int i = 0; i < LANE / 2; i++) {
        o[2 * i] = __builtin_shuffle(v[i], v[i + LANE / 2], low);
        o[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANE / 2], high);
    }
#endif
}

/* LANE x LANE values, of which down x across are there; log2(LANE) rounds transpose them. */
INLINE void transpose_square(const REAL *from, long from_row, REAL *to, long to_row, int down, int across,
                             int written) {
    vector v[LANE], o[LANE];
#pragma GCC unroll 16
    for (int i = 0; i < LANE; i++) v[i] = i < down ? read(from + i * from_row, across) : (vector){0};
    interleave(v, o);
    if (LANE > 2) interleave(o, v);
    if (LANE > 4) interleave(v, o);
    if (LANE > 8) interleave(o, v);
#pragma GCC unroll 16
    for (int i = 0; i < LANE; i++)
        if (i < across) write(to + i * to_row, LANE == 4 || LANE == 16 ? v[i] : o[i], written);
}

/* The matrix with rows and columns exchanged; writes whole vectors unless `exact`. */
INLINE void transpose(const REAL *from, long from_row, int rows, int columns, REAL *to, long to_row, const int exact) {
    for (int r = 0; r < rows; r += LANE)
        for (int c = 0; c < columns; c += LANE) {
            const int down = rows - r < LANE ? rows - r : LANE, across = columns - c < LANE ? columns - c : LANE;
            const REAL *source = from + r * from_row + c;
            REAL *target = to + c * to_row + r;
            if (down == LANE && across == LANE)
                transpose_square(source, from_row, target, to_row, LANE, LANE, LANE);
            else
                transpose_square(source, from_row, target, to_row, down, across, exact ? down : LANE);
        }
}
