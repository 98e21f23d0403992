/* Matrices of affine grids as numbers, for products of the library: (code - zero point) * scale, each in float32 and
 * then rounded to bfloat16 where that is wanted. Both operations round once, so all paths give the same bits. */
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
