/* Common to the sources of affine grids. The format is described in encodings/affine.py. */
#ifndef MC_AFFINE_H
#define MC_AFFINE_H

#include "product.h"

#include <stdatomic.h>
#include <stdlib.h>

#define VECTOR 64       /* bytes */
#define FLOATS 16       /* floats in a vector */
#define ROWS_AT_ONCE 64 /* outputs in a piece of work */
#define AHEAD 4096      /* bytes from codes that are multiplied to those that are fetched */
#define MOST_EXACT 256  /* inputs whose products, 255 * 32385 at most, an int32 holds the sum of */

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zero_points;
    int bits, inputs, outputs, group, groups;
} AffineMatrix;

INLINE AffineMatrix affine_matrix(const mc_affine_entry *entry, int group) {
    const int inputs = (int)entry->inputs;
    return (AffineMatrix){entry->codes, entry->scales, entry->zero_points, (int)entry->bits, inputs,
                          (int)entry->outputs, group, inputs / group};
}

INLINE int words_of(const AffineMatrix *m) { return (m->inputs + 7) / 8; } /* eight codes each, in a row */

INLINE const uint8_t *row_of(const AffineMatrix *m, int row) { return m->codes + (size_t)row * words_of(m) * m->bits; }

/* A token's activations, and what its groups weigh. */
typedef struct {
    const int8_t *coarse, *fine;  /* [groups][pitch], zeros behind a group's end */
    const int16_t *wide;          /* [groups][pitch], both in one: FINE * coarse + fine; NULL where products are of bytes */
    const float *steps, *totals;  /* [groups]: steps of coarse parts, and sums of activations */
    size_t pitch;
} AffineInputs;

/* Sums of one group of 32 rows of codes, `pitch` bytes apart, with 16 tokens. */
typedef struct {
    int32_t coarse[2 * TILE][TILE], fine[2 * TILE][TILE];
} AffineGroupSums __attribute__((aligned(64)));

typedef struct AffinePath AffinePath;

/* A product with a bank, as it is divided into pieces of work. */
typedef struct {
    const float *x;
    const int64_t *experts; /* NULL: all have the first matrix */
    const mc_affine_entry *entries;
    const AffinePath *path;
    float *out;
    int tokens, top_k, inputs, outputs, group, groups, activation_bytes; /* inputs, outputs and groups: the most */
    size_t pitch, stride, room; /* bytes of a group and of a row of activations; groups, in whole vectors of floats */
    int8_t *rows;               /* [tokens][2][stride], coarse and fine */
    int16_t *wide;              /* [tokens][groups * pitch], both in one; NULL where products are of bytes */
    float *steps, *totals;      /* [tokens][room], zeros behind the last group */
    mc_slots sorted;
    int8_t *tiled;              /* [blocks][groups * pitch / 64][2][16][16][4]: see affine_blocks.c; NULL without blocks */
    float *block_grids;         /* [blocks][groups][2][16]: steps and totals of a block's places */
    int *blocks;                /* [..][2]: first place of a block of tokens with one matrix, and how many */
    int *first_blocks;          /* [tasks], -1 where one has too few tokens for blocks */
    atomic_int failed;
} AffineProduct;

/* The functions that a processor's path has of its own. */
struct AffinePath {
    /* Outputs `first` to last - 1 of a matrix, for the places of the task of that number; 0, or 1 without memory. */
    int (*multiply)(const AffineProduct *p, const AffineMatrix *m, int task, int first, int last);
    /* `words` times 8 codes to 8 bytes. */
    void (*unpack)(const uint8_t *codes, int bits, int words, uint8_t *bytes);
    /* Writes the values of a group's codes to `floats`, or where that is NULL to `bfloat16s`. */
    void (*write)(const uint8_t *codes, int count, float scale, float zero_point, float *floats, uint16_t *bfloat16s);
    int wide; /* whether it multiplies activations as numbers of 16 bits, both parts in one */
    /* For blocks of 16 tokens; all zero where a path has none. */
    int block_tokens; /* tokens of one matrix from which on blocks are faster */
    int (*prepare_blocks)(AffineProduct *p, int slots, int threads);
    void (*multiply_group)(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int activation_bytes,
                           AffineGroupSums *found);
    void (*begin)(void), (*end)(void); /* around calls of multiply_group; NULL: nothing to do */
};

extern const AffinePath mc_affine_portable, mc_affine_avx2, mc_affine_avx512, mc_affine_amx;

const AffinePath *mc_affine_path(int path);

/* `unpack` and `write` in plain C. */
void mc_affine_unpack(const uint8_t *codes, int bits, int words, uint8_t *bytes);
void mc_affine_write(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                     uint16_t *bfloat16s);

/* scales, offsets [groups]: of one row of the matrix; an offset is scale times zero point. */
void mc_affine_read_grids(const AffineMatrix *m, int row, float *scales, float *offsets);

/* Divides the places of tasks with many tokens into blocks, and lays these out. Returns 0, or 1 without memory. */
int mc_affine_prepare_blocks(AffineProduct *p, int slots, int threads);

/* `multiply_group` of two paths. */
void mc_affine_group_avx512(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int activation_bytes,
                            AffineGroupSums *found);
void mc_affine_group_amx(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int activation_bytes,
                         AffineGroupSums *found);

/* `multiply` of a path, for a task in blocks. */
int mc_affine_multiply_blocks(const AffineProduct *p, const AffineMatrix *m, int task, int first, int last);

/* mc_affine_read_grids and `unpack` with AVX-512; they write whole vectors, zeros behind the last group. */
void mc_affine_read_grids_avx512(const AffineMatrix *m, int row, float *scales, float *offsets);
void mc_affine_unpack_avx512(const uint8_t *codes, int bits, int words, uint8_t *bytes);

INLINE AffineInputs activations_of(const AffineProduct *p, size_t token) {
    const int8_t *coarse = p->rows + 2 * token * p->stride;
    const int16_t *wide = p->wide ? p->wide + token * p->groups * p->pitch : NULL;
    return (AffineInputs){coarse, coarse + p->stride, wide, p->steps + token * p->room, p->totals + token * p->room,
                         p->pitch};
}

/* Room for one row: its grids, what they weigh, and its codes as bytes. */
typedef struct {
    float *scales, *offsets, *weights; /* [room] each */
    uint8_t *codes;                    /* the last group may be read beyond its end */
} AffineScratch;

/* Zeros, to be freed by their scales; scales NULL: no memory. */
INLINE AffineScratch new_scratch(const AffineProduct *p) {
    const size_t bytes = whole((size_t)p->inputs, VECTOR) + p->pitch;
    float *scales = calloc(1, 3 * p->room * sizeof(float) + bytes);
    if (!scales) return (AffineScratch){NULL, NULL, NULL, NULL};
    return (AffineScratch){scales, scales + p->room, scales + 2 * p->room, (uint8_t *)(scales + 3 * p->room)};
}

#endif
