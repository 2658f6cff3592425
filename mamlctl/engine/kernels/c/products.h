/* Vectors of values, and products of small matrices. The file that includes this defines BYTES, the length of a vector,
 * and PANEL, the rows of a product that are in registers, 6 at most. */
#pragma once
#include "common.h"

enum { LANE = BYTES / sizeof(REAL) }; /* values of a vector */
typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

#define LOAD(from) (*(const vector *)(from))
#define STORE(to, v) (*(vector *)(to) = (v))
#define ROUND(n) (((n) + LANE - 1) / LANE * LANE)

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

INLINE void panel(const REAL *a, long by_row, long by_k, const REAL *b, REAL *c, long wide, int rows, int depth,
                  int add, const int columns) {
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
