/* Products with affine grids, and their decoding. The format is described in encodings/affine.py.
 *
 * A row's codes come out as bytes. Activations come as two bytes each, a coarse and a fine part (or the coarse one and
 * zeros), with one step for each of the row's groups. So what a group gives is a sum of byte products, exact in int32,
 * times scale and step; sums over groups are float32. */

#include "product.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>

#define VECTOR 64        /* bytes */
#define FLOATS 16        /* in a vector */
#define ROWS_AT_ONCE 64  /* outputs in a piece of work */
#define AHEAD 4096       /* bytes from codes that are multiplied to those that are fetched */
#define TOKENS_AT_ONCE 8 /* quantized in a piece of work */
#define TOKENS_FOR_TILES 4  /* from here on blocks of 16 tokens are faster, in tiles */
#define TOKENS_FOR_LANES 7  /* and in vectors */
#define MOST_EXACT 256   /* inputs whose products, 255 * 32385 at most, an int32 holds the sum of */
#define INPUTS_IN_CACHE 256 /* of ROWS_AT_ONCE outputs: 16 KB of codes stay in the first cache beside what they meet */

typedef struct {
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zero_points;
    int bits, inputs, group, groups;
} Matrix;

INLINE size_t whole(size_t count, size_t unit) { return (count + unit - 1) / unit * unit; }

INLINE int words_of(const Matrix *m) { return (m->inputs + 7) / 8; } /* of eight codes, in a row */

INLINE const uint8_t *row_of(const Matrix *m, int row) { return m->codes + (size_t)row * words_of(m) * m->bits; }

/* `words` times 8 codes to 8 bytes; the fields of a word move apart in three halving steps. */
INLINE void unpack_words(const uint8_t *codes, const int bits, int words, uint8_t *bytes) {
    const uint64_t half = ~0ull >> (64 - 4 * bits), quarter = (~0ull >> (64 - 2 * bits)) * 0x0000000100000001ull,
                   eighth = (~0ull >> (64 - bits)) * 0x0001000100010001ull;
    for (int i = 0; i < words; i++) {
        uint64_t word = 0;
#pragma GCC unroll 8
        for (int byte = 0; byte < bits; byte++) word |= (uint64_t)codes[i * bits + byte] << 8 * byte;
        word = (word & half) | (word >> 4 * bits & half) << 32;
        word = (word & quarter) | (word >> 2 * bits & quarter) << 16;
        word = (word & eighth) | (word >> bits & eighth) << 8;
#pragma GCC unroll 8
        for (int byte = 0; byte < 8; byte++) bytes[8 * i + byte] = (uint8_t)(word >> 8 * byte);
    }
}

VERSIONS static void unpack_portable(const uint8_t *codes, int bits, int words, uint8_t *bytes) {
    switch (bits) { /* with shifts that are constants */
    case 1: unpack_words(codes, 1, words, bytes); break;
    case 2: unpack_words(codes, 2, words, bytes); break;
    case 3: unpack_words(codes, 3, words, bytes); break;
    case 4: unpack_words(codes, 4, words, bytes); break;
    case 5: unpack_words(codes, 5, words, bytes); break;
    case 6: unpack_words(codes, 6, words, bytes); break;
    case 7: unpack_words(codes, 7, words, bytes); break;
    default: memcpy(bytes, codes, 8 * (size_t)words);
    }
}

/* A row's activations, and what its groups weigh. */
typedef struct {
    const int8_t *coarse, *fine;  /* [groups][pitch], zeros behind a group's end */
    const int16_t *wide;          /* likewise, both in one: FINE * coarse + fine; where there are no products of bytes */
    const float *steps, *totals;  /* [groups]: of coarse parts; the sums of activations */
    size_t pitch;
} Activations;

/* scales, offsets [groups]: of one row of the matrix; an offset is scale times zero point. */
VERSIONS static void read_grids(const Matrix *m, int row, float *scales, float *offsets) {
    const float unit = 1.0f / (float)(1 << (8 - m->bits));
    const uint16_t *stored = m->scales + (size_t)row * m->groups;
    const uint8_t *zero_points = m->zero_points + (size_t)row * m->groups;
    for (int g = 0; g < m->groups; g++) {
        scales[g] = from_half(stored[g]);
        offsets[g] = scales[g] * unit * (float)zero_points[g];
    }
}

VERSIONS static float multiply_portable(const Matrix *m, const uint8_t *w, const float *scales, const float *offsets,
                                        Activations x) {
    float sum = 0;
    for (int g = 0; g < m->groups; g++) {
        const uint8_t *codes = w + (size_t)g * m->group;
        const int16_t *wide = x.wide + g * x.pitch;
        float found = 0;
        for (int begin = 0; begin < m->group; begin += MOST_EXACT) {
            const int end = begin + MOST_EXACT < m->group ? begin + MOST_EXACT : m->group;
            int32_t exact = 0;
            for (int i = begin; i < end; i++) exact += (int16_t)codes[i] * wide[i];
            found += (float)exact;
        }
        sum += scales[g] * x.steps[g] * (found / FINE) - offsets[g] * x.totals[g];
    }
    return sum;
}

#ifdef HAS_VECTORS

#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define STEP 16           /* codes at a time, two words: in lanes of 16 bits */
#define TOKENS_TOGETHER 4 /* that a code, once unpacked, meets */

/* How 16 codes come into lanes of 16 bits: the two bytes that a code lies in, to the left up to the end of the lane, and
 * then to the right. */
typedef struct {
    __m256i bytes, factors;
    __m128i down;
    int bits;
} Widening;

FOR_AVX2 INLINE Widening widening(int bits) {
    uint8_t bytes[2 * STEP];
    uint16_t factors[STEP];
    for (int i = 0; i < STEP; i++) {
        const int bit = i % 8 * bits, byte = i / 8 * bits + (bit >> 3);
        bytes[2 * i] = (uint8_t)byte;
        bytes[2 * i + 1] = byte + 1 < 16 ? (uint8_t)(byte + 1) : 0x80; /* where it would matter it is there */
        factors[i] = (uint16_t)(1 << (16 - (bit & 7) - bits));
    }
    return (Widening){_mm256_loadu_si256((const __m256i *)bytes), _mm256_loadu_si256((const __m256i *)factors),
                      _mm_cvtsi32_si128(16 - bits), bits};
}

/* The two words from `at` on; 16 bytes are read. */
FOR_AVX2 INLINE __m256i widened(const Widening *w, const uint8_t *at) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)at));
    return _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, w->bytes), w->factors), w->down);
}

FOR_AVX2 INLINE float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

/* out [count]: one row of packed codes, `at`, and as many rows of activations; groups are of whole steps. */
FOR_AVX2 INLINE void multiply_wide(const Matrix *m, const Widening *w, const uint8_t *at, const float *scales,
                                   const float *offsets, const Activations *x, const int count, float *out) {
    __m256 sums[TOKENS_TOGETHER];
    float taken[TOKENS_TOGETHER];
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
        sums[t] = _mm256_setzero_ps();
        taken[t] = 0;
    }
    for (int g = 0; g < m->groups; g++) {
        for (int begin = 0; begin < m->group; begin += MOST_EXACT) {
            const int end = begin + MOST_EXACT < m->group ? begin + MOST_EXACT : m->group;
            __m256i exact[TOKENS_TOGETHER];
#pragma GCC unroll 4
            for (int t = 0; t < count; t++) exact[t] = _mm256_setzero_si256();
            for (int i = begin; i < end; i += STEP, at += 2 * w->bits) {
                const __m256i codes = widened(w, at);
#pragma GCC unroll 4
                for (int t = 0; t < count; t++) {
                    const __m256i *inputs = (const __m256i *)(x[t].wide + (size_t)g * x[t].pitch + i);
                    exact[t] = _mm256_add_epi32(exact[t], _mm256_madd_epi16(codes, _mm256_load_si256(inputs)));
                }
            }
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int t = 0; t < count; t++)
                sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact[t]), _mm256_set1_ps(scales[g] * x[t].steps[g]), sums[t]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) taken[t] += offsets[g] * x[t].totals[g];
    }
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) out[t] = sum_of(sums[t]) / FINE - taken[t];
}

FOR_AVX2 static void multiply_avx2(const Matrix *m, const uint8_t *at, const float *scales, const float *offsets,
                                   const Activations *x, int count, float *out) {
    const Widening w = widening(m->bits);
    switch (count) {
    case 1: multiply_wide(m, &w, at, scales, offsets, x, 1, out); break;
    case 2: multiply_wide(m, &w, at, scales, offsets, x, 2, out); break;
    case 3: multiply_wide(m, &w, at, scales, offsets, x, 3, out); break;
    default: multiply_wide(m, &w, at, scales, offsets, x, 4, out); break;
    }
}

/* How 64 codes become bytes: 8 codes are `bits` bytes, which go to a word of their own and from there bit by bit. */
typedef struct {
    __m512i bytes, shifts, low;
    int bits;
} Spreading;

AVX512 INLINE Spreading spreading(int bits) {
    uint8_t bytes[VECTOR], shifts[VECTOR];
    for (int i = 0; i < VECTOR; i++) {
        bytes[i] = (uint8_t)(i / 8 * bits + i % 8);
        shifts[i] = (uint8_t)(i % 8 * bits);
    }
    return (Spreading){_mm512_loadu_si512(bytes), _mm512_loadu_si512(shifts),
                       _mm512_set1_epi8((char)((1 << bits) - 1)), bits};
}

/* 64 codes of a row from `at` on, of which `words` * 8 are there, as bytes. */
AVX512 INLINE __m512i unpacked(Spreading s, const uint8_t *at, int words) {
    const int count = words < 8 ? words * s.bits : 8 * s.bits;
    const __m512i packed = _mm512_maskz_loadu_epi8(~0ull >> (VECTOR - count), at);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(s.shifts, _mm512_permutexvar_epi8(s.bytes, packed)), s.low);
}

AVX512 static void unpack_avx512(const uint8_t *codes, int bits, int words, uint8_t *bytes) {
    const Spreading s = spreading(bits);
    for (int i = 0; i < words; i += 8, codes += 8 * bits) {
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        _mm512_storeu_si512(bytes + 8 * (size_t)i, unpacked(s, codes, words - i));
    }
}

AVX512 INLINE float total(__m512 coarse, __m512 fine) {
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(fine, _mm512_set1_ps(1 / FINE), coarse));
}

/* As read_grids; writes whole vectors, zeros behind the last group. */
AVX512 static void read_grids_avx512(const Matrix *m, int row, float *scales, float *offsets) {
    const __m512 unit = _mm512_set1_ps(1.0f / (float)(1 << (8 - m->bits)));
    const uint16_t *stored = m->scales + (size_t)row * m->groups;
    const uint8_t *zero_points = m->zero_points + (size_t)row * m->groups;
    for (int g = 0; g < m->groups; g += FLOATS) {
        const __mmask16 there = m->groups - g < FLOATS ? (__mmask16)((1u << (m->groups - g)) - 1) : 0xffff;
        const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, stored + g));
        const __m512 steps = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, zero_points + g)));
        _mm512_storeu_ps(scales + g, scale);
        _mm512_storeu_ps(offsets + g, _mm512_mul_ps(_mm512_mul_ps(scale, unit), steps));
    }
}

/* What offsets take away. */
AVX512 INLINE float taken(const float *offsets, const float *totals, int groups) {
    __m512 sum = _mm512_setzero_ps();
    for (int g = 0; g < groups; g += FLOATS)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(offsets + g), _mm512_loadu_ps(totals + g), sum);
    return _mm512_reduce_add_ps(sum);
}

AVX512 INLINE void weigh(const float *scales, const float *steps, int groups, float *weights) {
    for (int g = 0; g < groups; g += FLOATS)
        _mm512_storeu_ps(weights + g, _mm512_mul_ps(_mm512_loadu_ps(scales + g), _mm512_loadu_ps(steps + g)));
}

/* scales, offsets, steps, totals and `weights`, which is scratch: [groups], zeros up to whole vectors */
AVX512 static float multiply_avx512(const Matrix *m, const uint8_t *w, const float *scales, const float *offsets,
                                    Activations x, float *weights) {
    __m512 coarse = _mm512_setzero_ps(), fine = coarse;
    weigh(scales, x.steps, m->groups, weights);
    for (int g = 0; g < m->groups; g++) {
        __m512i most = _mm512_setzero_si512(), rest = most;
        for (size_t i = 0; i < x.pitch; i += VECTOR) { /* codes behind a group's end meet zeros */
            const __m512i codes = _mm512_loadu_si512(w + (size_t)g * m->group + i);
            most = _mm512_dpbusd_epi32(most, codes, _mm512_load_si512(x.coarse + g * x.pitch + i));
            rest = _mm512_dpbusd_epi32(rest, codes, _mm512_load_si512(x.fine + g * x.pitch + i));
        }
        const __m512 weight = _mm512_set1_ps(weights[g]);
        coarse = _mm512_fmadd_ps(_mm512_cvtepi32_ps(most), weight, coarse);
        fine = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), weight, fine);
    }
    return total(coarse, fine) - taken(offsets, x.totals, m->groups);
}

/* out [outputs]: rows `first` to `last` for one row of activations, straight from packed codes; groups are of whole
 * vectors. scales, offsets and weights are scratch, as above. */
AVX512 static void multiply_packed(const Matrix *m, int first, int last, Activations x, float *scales, float *offsets,
                                   float *weights, float *out) {
    const Spreading s = spreading(m->bits);
    for (int row = first; row < last; row++) {
        const uint8_t *at = row_of(m, row);
        __m512 coarse = _mm512_setzero_ps(), fine = coarse;
        read_grids_avx512(m, row, scales, offsets);
        weigh(scales, x.steps, m->groups, weights);
        for (int g = 0; g < m->groups; g++) {
            __m512i most = _mm512_setzero_si512(), rest = most;
            for (size_t i = 0; i < x.pitch; i += VECTOR, at += 8 * m->bits) {
                const __m512i codes = unpacked(s, at, 8);
                most = _mm512_dpbusd_epi32(most, codes, _mm512_load_si512(x.coarse + g * x.pitch + i));
                rest = _mm512_dpbusd_epi32(rest, codes, _mm512_load_si512(x.fine + g * x.pitch + i));
            }
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            const __m512 weight = _mm512_set1_ps(weights[g]);
            coarse = _mm512_fmadd_ps(_mm512_cvtepi32_ps(most), weight, coarse);
            fine = _mm512_fmadd_ps(_mm512_cvtepi32_ps(rest), weight, fine);
        }
        out[row] = total(coarse, fine) - taken(offsets, x.totals, m->groups);
    }
}

#endif

static void unpack(const uint8_t *codes, int bits, int words, int path, uint8_t *bytes) {
#ifdef HAS_VECTORS
    if (path >= AVX512_VNNI) {
        unpack_avx512(codes, bits, words, bytes);
        return;
    }
#endif
    (void)path;
    unpack_portable(codes, bits, words, bytes);
}

static float multiply(const Matrix *m, const uint8_t *w, const float *scales, const float *offsets, Activations x,
                      int path, float *weights) {
#ifdef HAS_VECTORS
    if (path >= AVX512_VNNI) return multiply_avx512(m, w, scales, offsets, x, weights);
#endif
    (void)path;
    (void)weights;
    return multiply_portable(m, w, scales, offsets, x);
}

typedef struct {
    const float *x;
    const mc_affine_entry *entries;
    float *out;
    int tokens, share, inputs, outputs, group, groups, parts, path, pieces;
    size_t pitch, stride, room; /* bytes of a group and of a row of activations; groups, in whole vectors of floats */
    int8_t *rows;               /* [tokens][2][stride], coarse and fine */
    int16_t *wide;              /* [tokens][groups * pitch], both in one; NULL where products are of bytes */
    float *steps, *totals;      /* [tokens][room], zeros behind the last group */
    mc_slots sorted;
    int8_t *tiled;              /* [blocks][groups * pitch / 64][2][16][16][4]: see lay_block; NULL without blocks */
    float *block_grids;         /* [blocks][groups][2][16]: steps and totals of a block's places */
    int *blocks;                /* [..][2]: first place of a block of tokens with one matrix, and how many */
    int *first_blocks;          /* by task, -1 where it has too few tokens for blocks */
    atomic_int failed;
} Product;

static void quantize_tokens(void *context, int part) {
    Product *p = context;
    for (int token = part * TOKENS_AT_ONCE; token < p->tokens && token < (part + 1) * TOKENS_AT_ONCE; token++) {
        int8_t *coarse = p->rows + 2 * (size_t)token * p->stride, *fine = coarse + p->stride;
        float *steps = p->steps + (size_t)token * p->room, *totals = p->totals + (size_t)token * p->room;
        for (int g = 0; g < p->groups; g++) {
            int32_t sums[2];
            steps[g] = mc_split(p->x + (size_t)token * p->inputs + (size_t)g * p->group, p->group,
                                coarse + g * p->pitch, p->parts > 1 ? fine + g * p->pitch : NULL, sums);
            totals[g] = steps[g] * ((float)sums[0] + (float)sums[1] / FINE);
        }
        const size_t all = p->groups * p->pitch;
        for (size_t i = 0; p->wide && i < all; i++)
            p->wide[(size_t)token * all + i] = (int16_t)((int)FINE * coarse[i] + fine[i]);
    }
}

static Activations activations_of(const Product *p, size_t token) {
    const int8_t *coarse = p->rows + 2 * token * p->stride;
    const int16_t *wide = p->wide ? p->wide + token * p->groups * p->pitch : NULL;
    return (Activations){coarse, coarse + p->stride, wide, p->steps + token * p->room, p->totals + token * p->room,
                         p->pitch};
}

#ifdef HAS_VECTORS

#define TILE_BYTES (TILE * VECTOR)

/* Room for the activations of one block, both parts. */
INLINE size_t block_bytes(const Product *p) { return 2 * TILE * (size_t)p->groups * p->pitch; }

/* One block of 16 tokens, as tiles: 64 inputs of all, fours of inputs by fours, first coarse and then fine parts. */
static void lay_block(void *context, int block) {
    Product *p = context;
    const int *slots = p->sorted.slots + p->blocks[2 * block], count = p->blocks[2 * block + 1];
    int8_t *out = p->tiled + (size_t)block * block_bytes(p);
    float *grids = p->block_grids + (size_t)block * p->groups * 2 * TILE;
    memset(out, 0, block_bytes(p));
    memset(grids, 0, sizeof(float) * (size_t)p->groups * 2 * TILE);
    for (int column = 0; column < count; column++) {
        const size_t token = (size_t)(slots[column] / p->share);
        const int8_t *row = p->rows + 2 * token * p->stride;
        for (int part = 0; part < p->parts; part++)
            for (size_t at = 0; at < p->groups * p->pitch; at += 4)
                memcpy(out + (2 * (at / VECTOR) + part) * TILE_BYTES + at % VECTOR / 4 * VECTOR + 4 * column,
                       row + part * p->stride + at, 4);
        for (int g = 0; g < p->groups; g++) {
            grids[2 * TILE * g + column] = p->steps[token * p->room + g];
            grids[2 * TILE * g + TILE + column] = p->totals[token * p->room + g];
        }
    }
}

/* What one group of 32 rows of codes, `pitch` bytes apart, gives with 16 tokens. */
typedef struct {
    int32_t coarse[2 * TILE][TILE], fine[2 * TILE][TILE];
} GroupSums __attribute__((aligned(64)));

#define ROWS_TOGETHER 8 /* whose sums are in registers */

AVX512 INLINE void multiply_lanes(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, const int parts,
                                  GroupSums *found) {
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
                if (parts > 1) fine[r] = add_products(fine[r], all, rest);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_TOGETHER; r++) {
            _mm512_store_si512(found->coarse[first + r], coarse[r]);
            _mm512_store_si512(found->fine[first + r], fine[r]);
        }
    }
}

AVX512 static void multiply_group_avx512(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int parts,
                                         GroupSums *found) {
    if (parts > 1) multiply_lanes(w, pitch, x, vectors, 2, found);
    else multiply_lanes(w, pitch, x, vectors, 1, found);
}

#ifdef HAS_AMX
AMX static void multiply_group_amx(const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int parts,
                                   GroupSums *found) {
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
        if (parts < 2) continue;
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

static void multiply_group(int path, const uint8_t *w, size_t pitch, const int8_t *x, size_t vectors, int parts,
                           GroupSums *found) {
#ifdef HAS_AMX
    if (path == AMX_TILES) {
        multiply_group_amx(w, pitch, x, vectors, parts, found);
        return;
    }
#endif
    (void)path;
    multiply_group_avx512(w, pitch, x, vectors, parts, found);
}

/* sums [2 * 16][16] += those of a group; scales and offsets of row r lie r * room behind those of the first.
 * grids: the tokens' steps, then their totals. */
AVX512 static void add_group(const GroupSums *found, const float *scales, const float *offsets, size_t room,
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
static void multiply_block(const Product *p, const Rows *r, int begin, int end, int block, float (*sums)[TILE]) {
    const int8_t *x = p->tiled + (size_t)block * block_bytes(p);
    const float *grids = p->block_grids + (size_t)block * p->groups * 2 * TILE;
    const int range = end - begin, steps = r->rows / (2 * TILE) * range;
    GroupSums found[2];
    for (int step = 0; step <= steps; step++) {
        if (step < steps) {
            const size_t row = (size_t)(step / range) * 2 * TILE, g = (size_t)(begin + step % range);
            multiply_group(p->path, r->codes + row * r->pitch + g * p->group, r->pitch, x + 2 * TILE * g * p->pitch,
                           p->pitch / VECTOR, p->parts, found + step % 2);
        }
        if (step) {
            const size_t row = (size_t)((step - 1) / range) * 2 * TILE, g = (size_t)(begin + (step - 1) % range);
            add_group(found + (step - 1) % 2, r->scales + row * p->room + g, r->offsets + row * p->room + g, p->room,
                      grids + 2 * TILE * g, sums + row);
        }
    }
}

/* As multiply_rows, for many places: in blocks of 32 rows and 16 places. A few groups at a time, so that all their codes
 * stay in the first cache while block after block of tokens passes. */
static void multiply_blocks(Product *p, const Matrix *m, const mc_task *task, int first_block, int first, int last) {
    const size_t pitch = whole((size_t)p->inputs, VECTOR) + p->pitch; /* of a row of codes */
    const int rows = (int)whole((size_t)(last - first), 2 * TILE), blocks = (task->count + TILE - 1) / TILE;
    const size_t grids = (size_t)rows * p->room * sizeof(float), each = (size_t)rows * TILE * sizeof(float);
    uint8_t *memory = aligned_alloc(VECTOR, whole(2 * grids + (size_t)blocks * each + (size_t)rows * pitch, VECTOR));
    if (!memory) {
        atomic_store(&p->failed, 1);
        return;
    }
    float *scales = (float *)memory, *offsets = scales + (size_t)rows * p->room;
    float(*sums)[TILE] = (float(*)[TILE])(memory + 2 * grids);
    uint8_t *codes = memory + 2 * grids + (size_t)blocks * each;
    for (int row = 0; row < last - first; row++) {
        read_grids_avx512(m, first + row, scales + row * p->room, offsets + row * p->room);
        unpack_avx512(row_of(m, first + row), m->bits, words_of(m), codes + row * pitch);
    }
    memset(sums, 0, (size_t)blocks * each);
    const Rows unpacked = {codes, scales, offsets, pitch, rows};
    const int range = p->pitch < INPUTS_IN_CACHE ? (int)(INPUTS_IN_CACHE / p->pitch) : 1;
#ifdef HAS_AMX
    if (p->path == AMX_TILES) mc_configure_tiles();
#endif
    for (int g = 0; g < p->groups; g += range)
        for (int i = 0; i < blocks; i++)
            multiply_block(p, &unpacked, g, g + range < p->groups ? g + range : p->groups, first_block + i,
                           sums + (size_t)i * rows);
#ifdef HAS_AMX
    if (p->path == AMX_TILES) mc_release_tiles();
#endif
    for (int place = 0; place < task->count; place++) {
        float *out = p->out + (size_t)p->sorted.slots[task->first + place] * p->outputs + first;
        for (int row = 0; row < last - first; row++) out[row] = sums[place / TILE * rows + row][place % TILE];
    }
    free(memory);
}

/* Divides the places of tasks with many tokens into blocks, and lays these out. Returns 0, or 1 without memory. */
static int prepare_blocks(Product *p, int slots, int threads) {
    const int many = p->path == AMX_TILES ? TOKENS_FOR_TILES : TOKENS_FOR_LANES;
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

/* Some outputs of one expert, for its places. */
static void multiply_rows(void *context, int index) {
    Product *p = context;
    const mc_task *task = p->sorted.tasks + index / p->pieces;
    const int *slots = p->sorted.slots + task->first;
    const mc_affine_entry *entry = p->entries + task->matrix;
    const Matrix m = {entry->codes, entry->scales, entry->zero_points, (int)entry->bits, p->inputs, p->group, p->groups};
    const int first = index % p->pieces * ROWS_AT_ONCE;
    const int last = first + ROWS_AT_ONCE < p->outputs ? first + ROWS_AT_ONCE : p->outputs;
#ifdef HAS_VECTORS
    if (p->path >= AVX512_VNNI && p->first_blocks[index / p->pieces] >= 0) {
        multiply_blocks(p, &m, task, p->first_blocks[index / p->pieces], first, last);
        return;
    }
#endif
    const size_t bytes = whole((size_t)p->inputs, VECTOR) + p->pitch; /* the last group may be read beyond its end */
    float *scales = calloc(1, 3 * p->room * sizeof(float) + bytes), *offsets = scales + p->room;
    if (!scales) {
        atomic_store(&p->failed, 1);
        return;
    }
    float *weights = offsets + p->room;
    uint8_t *w = (uint8_t *)(weights + p->room);
#ifdef HAS_VECTORS
    if (p->path >= AVX512_VNNI && task->count == 1 && p->group % VECTOR == 0) {
        const Activations x = activations_of(p, (size_t)(slots[0] / p->share));
        multiply_packed(&m, first, last, x, scales, offsets, weights, p->out + (size_t)slots[0] * p->outputs);
        free(scales);
        return;
    }
    if (p->path == AVX2 && p->group % STEP == 0) {
        for (int row = first; row < last; row++) {
            const uint8_t *at = row_of(&m, row);
            const size_t row_bytes = (size_t)words_of(&m) * m.bits, left = (size_t)(p->outputs - 1 - row) * row_bytes;
            if (left + 2 * (size_t)m.bits < 16) at = memcpy(w, at, row_bytes); /* steps read 16 bytes, whatever is left */
            read_grids(&m, row, scales, offsets);
            for (int i = 0; i < task->count; i += TOKENS_TOGETHER) {
                const int count = task->count - i < TOKENS_TOGETHER ? task->count - i : TOKENS_TOGETHER;
                Activations x[TOKENS_TOGETHER];
                float found[TOKENS_TOGETHER];
                for (int t = 0; t < count; t++) x[t] = activations_of(p, (size_t)(slots[i + t] / p->share));
                multiply_avx2(&m, at, scales, offsets, x, count, found);
                for (int t = 0; t < count; t++) p->out[(size_t)slots[i + t] * p->outputs + row] = found[t];
            }
        }
        free(scales);
        return;
    }
#endif
    for (int row = first; row < last; row++) {
        read_grids(&m, row, scales, offsets);
        unpack(row_of(&m, row), m.bits, words_of(&m), p->path, w);
        for (int i = 0; i < task->count; i++)
            p->out[(size_t)slots[i] * p->outputs + row] =
                multiply(&m, w, scales, offsets, activations_of(p, (size_t)(slots[i] / p->share)), p->path, weights);
    }
    free(scales);
}

int mc_affine_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int share, int parts,
                      int path, int threads, float *out) {
    const int slots = tokens * share, inputs = bank->inputs, outputs = bank->outputs, group = bank->block;
    const size_t pitch = whole((size_t)group, VECTOR), groups = (size_t)(inputs / group);
    Product p = {.x = x, .entries = bank->affine, .out = out, .tokens = tokens, .share = share, .inputs = inputs,
                 .outputs = outputs, .group = group, .groups = (int)groups, .parts = parts, .path = path,
                 .pieces = (outputs + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, .pitch = pitch,
                 .stride = groups * pitch + VECTOR, .room = whole(groups, FLOATS)};
    int failed = mc_sort_slots(&p.sorted, bank, experts, slots);
    const size_t bytes = 2 * (size_t)tokens * p.stride;
    p.rows = aligned_alloc(VECTOR, whole(bytes + 1, VECTOR));
    const size_t wide_bytes = path < AVX512_VNNI ? (size_t)tokens * groups * pitch * sizeof(int16_t) : 0;
    p.wide = wide_bytes ? aligned_alloc(VECTOR, wide_bytes) : NULL;
    p.steps = calloc((size_t)tokens * p.room + 1, sizeof(float));
    p.totals = calloc((size_t)tokens * p.room + 1, sizeof(float));
    atomic_init(&p.failed, failed || !p.rows || !p.steps || !p.totals || (wide_bytes && !p.wide));
    if (!atomic_load(&p.failed)) {
        memset(p.rows, 0, bytes);
        mc_clear_missing(&p.sorted, slots, outputs, out);
        mc_parallel(quantize_tokens, &p, (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, threads);
#ifdef HAS_VECTORS
        if (path >= AVX512_VNNI && prepare_blocks(&p, slots, threads)) atomic_store(&p.failed, 1);
#endif
        if (!atomic_load(&p.failed)) mc_parallel(multiply_rows, &p, p.sorted.count * p.pieces, threads);
    }
    free(p.tiled);
    free(p.block_grids);
    free(p.blocks);
    free(p.first_blocks);
    free(p.rows);
    free(p.wide);
    free(p.steps);
    free(p.totals);
    mc_free_slots(&p.sorted);
    return atomic_load(&p.failed);
}

typedef struct {
    Matrix matrix;
    int rows, path;
    float *floats;    /* [rows][inputs], or NULL */
    uint16_t *halves; /* the same, rounded to bfloat16, or NULL */
    atomic_int failed;
} Decoding;

/* What the codes of a group stand for, in `floats`, or where that is NULL in `halves`. */
VERSIONS static void write_portable(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                                    uint16_t *halves) {
    if (floats)
        for (int i = 0; i < count; i++) floats[i] = ((float)codes[i] - zero_point) * scale;
    else
        for (int i = 0; i < count; i++) halves[i] = to_bfloat16(((float)codes[i] - zero_point) * scale);
}

#ifdef HAS_VECTORS
AVX512 static void write_avx512(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                                uint16_t *halves) {
    const __m512 scales = _mm512_set1_ps(scale), zero_points = _mm512_set1_ps(zero_point);
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    for (int i = 0; i < count; i += FLOATS) {
        const __mmask16 there = count - i < FLOATS ? (__mmask16)((1u << (count - i)) - 1) : 0xffff;
        const __m512 steps = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, codes + i)));
        const __m512 values = _mm512_mul_ps(_mm512_sub_ps(steps, zero_points), scales);
        if (floats) {
            _mm512_mask_storeu_ps(floats + i, there, values);
            continue;
        }
        const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, half), odd);
        _mm256_mask_storeu_epi16(halves + i, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}
#endif

static void write_group(const uint8_t *codes, int count, float scale, float zero_point, int path, float *floats,
                        uint16_t *halves) {
#ifdef HAS_VECTORS
    if (path >= AVX512_VNNI) {
        write_avx512(codes, count, scale, zero_point, floats, halves);
        return;
    }
#endif
    (void)path;
    write_portable(codes, count, scale, zero_point, floats, halves);
}

static void write_rows(void *context, int piece) {
    Decoding *d = context;
    const Matrix *m = &d->matrix;
    uint8_t *w = malloc(whole((size_t)m->inputs, VECTOR));
    if (!w) {
        atomic_store(&d->failed, 1);
        return;
    }
    const float unit = 1.0f / (float)(1 << (8 - m->bits));
    for (int row = piece * ROWS_AT_ONCE; row < d->rows && row < (piece + 1) * ROWS_AT_ONCE; row++) {
        unpack(row_of(m, row), m->bits, words_of(m), d->path, w);
        for (int g = 0; g < m->groups; g++) {
            const size_t grid = (size_t)row * m->groups + g, at = (size_t)row * m->inputs + (size_t)g * m->group;
            const float scale = from_half(m->scales[grid]), zero_point = unit * (float)m->zero_points[grid];
            write_group(w + (size_t)g * m->group, m->group, scale, zero_point, d->path, d->floats ? d->floats + at : NULL,
                        d->halves ? d->halves + at : NULL);
        }
    }
    free(w);
}

int mc_affine_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *zero_points, int bits, int rows,
                     int inputs, int group, int path, int threads, float *floats, uint16_t *halves) {
    Decoding d = {.matrix = {codes, scales, zero_points, bits, inputs, group, inputs / group}, .rows = rows,
                  .path = path < 0 ? mc_best_path() : path, .floats = floats, .halves = halves};
    atomic_init(&d.failed, 0);
    mc_parallel(write_rows, &d, (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads);
    return atomic_load(&d.failed);
}
