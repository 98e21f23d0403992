/* Products with affine grids for many tokens, on AVX-512 (VNNI) and in tiles (AMX): blocks of 32 rows by 16 tokens.
 *
 * The sums are those of affine_avx512.c, A_g = sum_i c_i a_i and B_g = sum_i c_i b_i. For one token, a group's sum is
 * spread over the lanes of a vector, which have to become floats and be added up for every row and token. Here a lane
 * belongs to a token: a vector has the sums of one row with 16 tokens, and one conversion, two multiplications by
 * scales and steps, and no sum across lanes serve all 16. A lane adds up a whole group, at most 65536 inputs: 65536 *
 * 255 * 127 is less than 2^31, so sums are exact, and in tiles they are the same. Floats are added group after group,
 * for one token lane after lane: with the number of tokens that share a matrix, last bits of an output may change.
 *
 * Layout: 16 tokens lie in tiles of 1 KB, one for 64 inputs of all and each part: [groups * pitch / 64][2][16][16][4],
 * the indices being 64 inputs, part, fours of inputs, token, input. So 64 bytes hold the same four inputs of 16 tokens:
 * vpdpbusd multiplies them with four codes in all lanes, and tdpbusd takes them as a row of a tile of B. Tokens that a
 * block lacks are zeros. Codes become bytes once per 64 rows; 32 of those rows, 64 codes wide, are two tiles of A.
 *
 * With AMX, tiles 0 to 3 are sums ([upper, lower 16 rows] of coarse, then of fine parts), 4 and 5 codes, 6 and 7
 * activations. While tiles multiply one group, AVX-512 adds what they gave for the group before: their results take
 * that long. A few groups at a time, so that codes of 256 inputs and 64 rows stay in the first cache while block after
 * block of tokens passes; sums [rows][16] lie in the second. */
#include "affine.h"
#include "threads.h"

#ifdef HAS_VECTORS

#define INPUTS_IN_CACHE 256 /* with ROWS_AT_ONCE outputs, 16 KB of codes stay in the first cache beside activations */
#define TILE_BYTES (TILE * VECTOR)

/* Room for the activations of one block, both parts, of as many groups as a matrix has at most. */
INLINE size_t block_bytes(const AffineProduct *p) { return 2 * TILE * (size_t)p->groups * p->pitch; }

/* One block of 16 tokens, as tiles: 64 inputs of all, fours of inputs by fours, first coarse and then fine parts. */
static void lay_block(void *context, int block) {
    AffineProduct *p = context;
    const int *slots = p->sorted.slots + p->blocks[2 * block], count = p->blocks[2 * block + 1];
    int8_t *out = p->tiled + (size_t)block * block_bytes(p);
    float *grids = p->block_grids + (size_t)block * p->groups * 2 * TILE;
    memset(out, 0, block_bytes(p));
    memset(grids, 0, sizeof(float) * (size_t)p->groups * 2 * TILE);
    const int64_t matrix = p->experts ? p->experts[slots[0]] : 0;
    const int groups = (int)p->entries[matrix].inputs / p->group; /* those behind are not read */
    for (int column = 0; column < count; column++) {
        const size_t token = (size_t)(slots[column] / p->top_k);
        const int8_t *row = p->rows + 2 * token * p->stride;
        for (int part = 0; part < p->activation_bytes; part++)
            for (size_t at = 0; at < groups * p->pitch; at += 4)
                memcpy(out + (2 * (at / VECTOR) + part) * TILE_BYTES + at % VECTOR / 4 * VECTOR + 4 * column,
                       row + part * p->stride + at, 4);
        for (int g = 0; g < groups; g++) {
            grids[2 * TILE * g + column] = p->steps[token * p->room + g];
            grids[2 * TILE * g + TILE + column] = p->totals[token * p->room + g];
        }
    }
}

#define ROWS_TOGETHER 8 /* their sums are in registers */

AVX512 INLINE void multiply_lanes(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors,
                                  const int activation_bytes, AffineGroupSums *found) {
    for (int first = 0; first < 2 * TILE; first += ROWS_TOGETHER) {
        const uint8_t *row = w + first * pitch;
        __m512i coarse[ROWS_TOGETHER], fine[ROWS_TOGETHER];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_TOGETHER; r++) coarse[r] = fine[r] = _mm512_setzero_si512();
        for (size_t i = 0; i < vectors * TILE; i++) { /* codes behind a group's end meet zeros */
            const int8_t *four = x + (i / TILE * 2 * TILE + i % TILE) * VECTOR;
            const __m512i most = _mm512_load_si512(four), rest = _mm512_load_si512(four + TILE_BYTES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_TOGETHER; r++) {
                int32_t codes;
                memcpy(&codes, row + r * pitch + 4 * i, 4);
                const __m512i all = _mm512_set1_epi32(codes);
                coarse[r] = add_products(coarse[r], all, most);
                if (activation_bytes > 1) fine[r] = add_products(fine[r], all, rest);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_TOGETHER; r++) {
            _mm512_store_si512(found->coarse[first + r], coarse[r]);
            _mm512_store_si512(found->fine[first + r], fine[r]);
        }
    }
}

AVX512 void mc_affine_group_avx512(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors,
                                   int activation_bytes, AffineGroupSums *found) {
    if (activation_bytes > 1) multiply_lanes(w, pitch, x, vectors, 2, found);
    else multiply_lanes(w, pitch, x, vectors, 1, found);
}

#ifdef HAS_AMX
AMX void mc_affine_group_amx(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int activation_bytes,
                             AffineGroupSums *found) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t i = 0; i < vectors; i++, x += 2 * TILE_BYTES) { /* codes behind a group's end meet zeros */
        _tile_loadd(4, w + i * VECTOR, (long)pitch);
        _tile_loadd(5, w + TILE * pitch + i * VECTOR, (long)pitch);
        _tile_loadd(6, x, VECTOR);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        if (activation_bytes < 2) continue;
        _tile_loadd(7, x + TILE_BYTES, VECTOR);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, found->coarse, VECTOR);
    _tile_stored(1, found->coarse + TILE, VECTOR);
    _tile_stored(2, found->fine, VECTOR);
    _tile_stored(3, found->fine + TILE, VECTOR);
}
#endif

/* sums [2 * 16][16] += those of a group; scales and offsets of row r lie r * room behind those of the first.
 * grids: the tokens' steps, then their totals. */
AVX512 static void add_group(const AffineGroupSums *found, const float *scales, const float *offsets, size_t room,
                             const float *grids, float (*sums)[TILE]) {
    const __m512 steps = _mm512_loadu_ps(grids), totals = _mm512_loadu_ps(grids + TILE), part = _mm512_set1_ps(1 / FINE);
    for (int row = 0; row < 2 * TILE; row++) {
        const __m512 coarse = _mm512_cvtepi32_ps(_mm512_load_si512(found->coarse[row])),
                     fine = _mm512_cvtepi32_ps(_mm512_load_si512(found->fine[row]));
        const __m512 product = _mm512_mul_ps(_mm512_fmadd_ps(fine, part, coarse), steps);
        const __m512 sum = _mm512_fmadd_ps(product, _mm512_set1_ps(scales[row * room]), _mm512_load_ps(sums[row]));
        _mm512_store_ps(sums[row], _mm512_fnmadd_ps(totals, _mm512_set1_ps(offsets[row * room]), sum));
    }
}

/* Some rows of codes, unpacked, and their grids. */
typedef struct {
    const uint8_t *codes;          /* [rows][pitch] */
    const float *scales, *offsets; /* [rows][room] */
    size_t pitch;
    int rows; /* whole pairs of 16 */
} Rows;

/* sums [rows][16] += groups `begin` to `end` of all rows with one block of tokens. While tiles multiply, what they gave
 * for the group before is added. */
static void multiply_block(const AffineProduct *p, const Rows *r, int begin, int end, int block, float (*sums)[TILE]) {
    const int8_t *x = p->tiled + (size_t)block * block_bytes(p);
    const float *grids = p->block_grids + (size_t)block * p->groups * 2 * TILE;
    const int range = end - begin, steps = r->rows / (2 * TILE) * range;
    AffineGroupSums found[2];
    for (int step = 0; step <= steps; step++) {
        if (step < steps) {
            const size_t row = (size_t)(step / range) * 2 * TILE, g = (size_t)(begin + step % range);
            p->path->multiply_group(r->codes + row * r->pitch + g * p->group, r->pitch, x + 2 * TILE * g * p->pitch,
                           p->pitch / VECTOR, p->activation_bytes, found + step % 2);
        }
        if (step) {
            const size_t row = (size_t)((step - 1) / range) * 2 * TILE, g = (size_t)(begin + (step - 1) % range);
            add_group(found + (step - 1) % 2, r->scales + row * p->room + g, r->offsets + row * p->room + g, p->room,
                      grids + 2 * TILE * g, sums + row);
        }
    }
}

/* Work goes in blocks of 32 rows and 16 places, a few groups at a time, so that all their codes stay in the first cache
 * while block after block of tokens passes. */
int mc_affine_multiply_blocks(const AffineProduct *p, const AffineMatrix *m, int number, int first, int last) {
    const mc_task *task = p->sorted.tasks + number;
    const size_t pitch = whole((size_t)m->inputs, VECTOR) + p->pitch; /* between two rows of codes */
    const int rows = (int)whole((size_t)(last - first), 2 * TILE), blocks = (task->count + TILE - 1) / TILE;
    const size_t grids = (size_t)rows * p->room * sizeof(float), each = (size_t)rows * TILE * sizeof(float);
    uint8_t *memory = aligned_alloc(VECTOR, whole(2 * grids + (size_t)blocks * each + (size_t)rows * pitch, VECTOR));
    if (!memory) return 1;
    float *scales = (float *)memory, *offsets = scales + (size_t)rows * p->room;
    float(*sums)[TILE] = (float(*)[TILE])(memory + 2 * grids);
    uint8_t *codes = memory + 2 * grids + (size_t)blocks * each;
    for (int row = 0; row < last - first; row++) {
        mc_affine_read_grids_avx512(m, first + row, scales + row * p->room, offsets + row * p->room);
        mc_affine_unpack_avx512(row_of(m, first + row), m->bits, words_of(m), codes + row * pitch);
    }
    memset(sums, 0, (size_t)blocks * each);
    const Rows unpacked = {codes, scales, offsets, pitch, rows};
    const int range = p->pitch < INPUTS_IN_CACHE ? (int)(INPUTS_IN_CACHE / p->pitch) : 1;
    if (p->path->begin) p->path->begin();
    for (int g = 0; g < m->groups; g += range)
        for (int i = 0; i < blocks; i++)
            multiply_block(p, &unpacked, g, g + range < m->groups ? g + range : m->groups, p->first_blocks[number] + i,
                           sums + (size_t)i * rows);
    if (p->path->end) p->path->end();
    for (int place = 0; place < task->count; place++) {
        float *out = p->out + (size_t)p->sorted.slots[task->first + place] * p->outputs + first;
        for (int row = 0; row < last - first; row++) out[row] = sums[place / TILE * rows + row][place % TILE];
    }
    free(memory);
    return 0;
}

int mc_affine_prepare_blocks(AffineProduct *p, int slots, int threads) {
    const int many = p->path->block_tokens;
    int count = 0;
    p->blocks = malloc(sizeof(int) * 2 * (size_t)(slots / TILE + p->sorted.count + 1));
    p->first_blocks = malloc(sizeof(int) * (size_t)(p->sorted.count + 1));
    if (!p->blocks || !p->first_blocks) return 1;
    for (int i = 0; i < p->sorted.count; i++) {
        const mc_task *task = p->sorted.tasks + i;
        p->first_blocks[i] = task->count < many ? -1 : count;
        for (int done = 0; done < task->count && task->count >= many; done += TILE, count++) {
            p->blocks[2 * count] = task->first + done;
            p->blocks[2 * count + 1] = task->count - done < TILE ? task->count - done : TILE;
        }
    }
    p->tiled = aligned_alloc(VECTOR, (size_t)count * block_bytes(p) + VECTOR);
    p->block_grids = malloc(sizeof(float) * ((size_t)count * p->groups * 2 * TILE + 1));
    if (!p->tiled || !p->block_grids) return 1;
    mc_parallel(lay_block, p, count, threads);
    return 0;
}

#endif
