/* Matrices of affine grids as numbers, for products of the library: v = (c - z) s, of codes c of 1 to 8 bits, with the
 * scale s (float16) and the zero point z of a code's row and group of inputs; encodings/affine.py has the format.
 *
 * Layout: a row has its codes side by side, ceil(inputs / 8) words of 8 codes in `bits` bytes; scales and zero points
 * are [rows][inputs / group], values [rows][inputs], float32 or bfloat16. A piece of work is 64 rows: a row's codes
 * become bytes, one each (`unpack` of the path), and then group after group becomes values (`write`), with s and z the
 * same in all lanes. Pieces share no value that they write, so threads change nothing.
 *
 * Exactness: z is a stored byte over 2^(8 - bits), so c - z is a whole number of steps of 2^-(8 - bits), at most 255
 * of them up or down: 8 bits. A float16 has 11, so the product has 19 at most, between 2^-31 and 2^24: float32 holds
 * both results, no operation rounds, and the float32 matrix is the stored one, on every path. Bfloat16 rounds once, to
 * nearest, ties to even, by up to 2^-8 of the value. All that is of finite scales; the format has no others.
 *
 * Paths differ in how codes become bytes: by three halving steps of 64-bit words in plain C (affine_portable.c,
 * also for AVX2 and NEON), or by vpermb and vpmultishiftqb (affine_avx512.c, also for AMX). Bytes and values are
 * the same. */
#include "affine.h"
#include "threads.h"

typedef struct {
    AffineMatrix matrix;
    const AffinePath *path;
    float *floats;    /* [rows][inputs], or NULL */
    uint16_t *bfloat16s; /* the same, rounded to bfloat16, or NULL */
    atomic_int failed;
} Decoding;

static void write_rows(void *context, int piece) {
    Decoding *d = context;
    const AffineMatrix *m = &d->matrix;
    uint8_t *w = malloc(whole((size_t)m->inputs, VECTOR));
    if (!w) {
        atomic_store(&d->failed, 1);
        return;
    }
    const float unit = 1.0f / (float)(1 << (8 - m->bits));
    for (int row = piece * ROWS_AT_ONCE; row < m->outputs && row < (piece + 1) * ROWS_AT_ONCE; row++) {
        d->path->unpack(row_of(m, row), m->bits, words_of(m), w);
        for (int g = 0; g < m->groups; g++) {
            const size_t grid = (size_t)row * m->groups + g, at = (size_t)row * m->inputs + (size_t)g * m->group;
            const float scale = from_half(m->scales[grid]), zero_point = unit * (float)m->zero_points[grid];
            d->path->write(w + (size_t)g * m->group, m->group, scale, zero_point, d->floats ? d->floats + at : NULL,
                           d->bfloat16s ? d->bfloat16s + at : NULL);
        }
    }
    free(w);
}

int mc_affine_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *zero_points, int bits, int rows,
                     int inputs, int group, int path, int threads, float *floats, uint16_t *bfloat16s) {
    Decoding d = {.matrix = {codes, scales, zero_points, bits, inputs, rows, group, inputs / group},
                  .path = mc_affine_path(path < 0 ? mc_best_path() : path), .floats = floats, .bfloat16s = bfloat16s};
    atomic_init(&d.failed, 0);
    mc_parallel(write_rows, &d, (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads);
    return atomic_load(&d.failed);
}
