/* Common to the sources of products with trellis codes. The format is described in encodings/trellis.py. */
#ifndef MC_TRELLIS_PRODUCT_H
#define MC_TRELLIS_PRODUCT_H

#include "product.h"

#include <stdlib.h>

#define PER_LANE 16 /* consecutive weights of a sequence in one lane */
#define LANES 16    /* the most that a sequence has */
#define GROUP 4     /* inputs whose bytes lie side by side */
#define MOST_PLANES 10
#define LANE_BYTES (LANES * GROUP)
#define SUMS (PER_LANE * LANES) /* one row of activations with one sequence of outputs */
#define FEW_GROUPS 8            /* a block of them, 8 KB, leaves room in the first cache for codes on their way */
#define SIGNED_FROM 5           /* planes */

/* A hash's low six bits choose the level, its highest one negates it. Codes of up to 2 bits never negate, and their first
 * table gives back what is looked up: they do without both. */
typedef struct {
    const uint8_t *first, *second; /* [64] each, by the low and high bits of a window: their xor is its hash */
    const uint8_t *levels;         /* [64]: 128 + level */
    const uint8_t (*turned)[3][64]; /* [8]: these, by the bit where windows begin, for bits as six_bits has them */
} TrellisCode;

/* `lookup_tables` in numerics/trellis_code.py makes these: for every rate three tables, and eight times those again. */
INLINE TrellisCode code_of(const uint8_t *tables, int planes) {
    const uint8_t (*own)[3][64] = (const uint8_t (*)[3][64])tables + (planes - 2) * 9;
    return (TrellisCode){own[0][0], own[0][1], own[0][2], own + 1};
}

typedef struct {
    const uint8_t *codes; /* [groups][planes][lanes][4], of one sequence of outputs */
    int groups, lanes, planes;
} TrellisSequence;

typedef struct {
    uint8_t *bytes; /* [16][pitch][LANES][4] */
    int pitch;      /* groups that there is room for, for tiles a multiple of 16 */
} TrellisBlock;

INLINE TrellisBlock new_block(int pitch) {
    return (TrellisBlock){aligned_alloc(64, (size_t)PER_LANE * pitch * LANE_BYTES), pitch};
}

/* lane 0 of row k for the g-th group */
INLINE uint8_t *at(TrellisBlock block, int k, int g) { return block.bytes + ((size_t)k * block.pitch + g) * LANE_BYTES; }

/* One copy of a loop for each rate, with its shifts as constants. */
#define BY_RATE(decode, block) \
    switch (s->planes) { \
    case 2: decode(s, code, first, count, block, 2); break; \
    case 3: decode(s, code, first, count, block, 3); break; \
    case 4: decode(s, code, first, count, block, 4); break; \
    case 5: decode(s, code, first, count, block, 5); break; \
    case 6: decode(s, code, first, count, block, 6); break; \
    case 7: decode(s, code, first, count, block, 7); break; \
    case 8: decode(s, code, first, count, block, 8); break; \
    case 9: decode(s, code, first, count, block, 9); break; \
    default: decode(s, code, first, count, block, 10); break; \
    }

/* The planes of a group of inputs, and two that are the first ones moved by a lane. */
INLINE void read_planes(const uint8_t *codes, int planes, size_t stride, uint8_t (*near)[LANE_BYTES]) {
    for (int plane = 0; plane < planes; plane++) memcpy(near[plane], codes + plane * stride, stride);
    for (int plane = 0; plane < 2; plane++) {
        memcpy(near[planes + plane], near[plane] + GROUP, stride - GROUP);
        memcpy(near[planes + plane] + stride - GROUP, near[plane], GROUP);
    }
}

/* The functions that a processor's path has of its own. */
typedef struct TrellisPath {
    /* Groups `first` to first + count - 1 of a sequence, as the bytes of a block. */
    void (*decode)(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block);
    /* sums [rows][16][16] += rows of activations x [rows][stride], from `x` on, times a block of `count` groups. */
    void (*multiply)(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums);
    /* Outputs of one place, from the sums of its one or two rows; totals: the sums of its activations' bytes. */
    void (*finish)(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                   const uint16_t *scales, int count, float *out);
    int rows_together; /* rows that `multiply` reads, perhaps beyond the last, and writes the sums of */
    int large_blocks;  /* whether larger blocks serve tasks of more tokens */
    const struct TrellisPath *for_few; /* the path for tasks of few tokens; NULL: this one */
    void (*begin)(void), (*end)(void); /* around calls of multiply; NULL: nothing to do */
} TrellisPath;

extern const TrellisPath mc_trellis_portable, mc_trellis_avx2, mc_trellis_neon, mc_trellis_avx512, mc_trellis_amx;

const TrellisPath *mc_trellis_path(int path);

/* `finish` in plain C, where sums are of bytes, 128 + level, and where they are of levels. */
void mc_trellis_finish(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                       const uint16_t *scales, int count, float *out);
void mc_trellis_finish_levels(const int32_t *sums, int activation_bytes, const int32_t *totals, float step,
                              const uint16_t *scales, int count, float *out);

#endif
