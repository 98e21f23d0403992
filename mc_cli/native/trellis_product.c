/* Products with trellis-coded matrices, and their decoding. The format is described in encodings/trellis.py, the code in
 * numerics/trellis.py and trellis_code.py.
 *
 * Weights come out as bytes, 128 + level, in blocks [16][groups][lanes][4]: lane l of the k-th row of a block holds the
 * weights of output 16 * l + k for a group of 4 inputs. Activations come as two bytes, a coarse and a fine part, or as the
 * coarse one. So a product is a sum of byte products, exact in int32, and the same block serves vectors (VNNI) and
 * tiles (AMX). */

#include "product.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdlib.h>

#define PER_LANE 16 /* consecutive weights of a sequence in one lane */
#define LANES 16    /* of a sequence, at most */
#define GROUP 4     /* inputs whose bytes lie side by side */
#define MOST_PLANES 10
#define LANE_BYTES (LANES * GROUP)
#define FEW_GROUPS 8    /* in a block: its 8 KB leave room in the first cache for codes on their way */
#define MORE_GROUPS 32  /* for more tokens: every block costs a reading and writing of all sums */
#define MANY_GROUPS 256 /* for many, whose sums do not stay in the first cache: 256 KB stay in the second */
#define SUMS (PER_LANE * LANES) /* of one row of activations, with one sequence of outputs */
#define TOKENS_AT_ONCE 256
#define QUANTIZED_TOGETHER 8192 /* activations in a piece of work */
#define MORE_TOKENS 3 /* from here on larger blocks are faster, and tiles */

/* A hash's low six bits choose the level, its highest one negates it. Codes of up to 2 bits never negate, and their first
 * table gives back what is looked up: they do without both. */
typedef struct {
    const uint8_t *first, *second; /* [64] each, by the low and high bits of a window: their xor is its hash */
    const uint8_t *levels;         /* [64]: 128 + level */
    const uint8_t (*turned)[3][64]; /* [8]: these, by the bit of a byte where windows begin, for bits as six_bits has them */
} Code;

#define SIGNED_FROM 5 /* planes */

/* As `lookup_tables` in numerics/trellis_code.py: for every rate three tables, and eight times those again. */
static Code code_of(const uint8_t *tables, int planes) {
    const uint8_t (*own)[3][64] = (const uint8_t (*)[3][64])tables + (planes - 2) * 9;
    return (Code){own[0][0], own[0][1], own[0][2], own + 1};
}

typedef struct {
    const uint8_t *codes; /* [groups][planes][lanes][4], of one sequence of outputs */
    int groups, lanes, planes;
} Sequence;

typedef struct {
    uint8_t *bytes; /* [16][pitch][LANES][4] */
    int pitch;      /* groups that there is room for, for tiles a multiple of 16 */
} Block;

static Block new_block(int pitch) {
    return (Block){aligned_alloc(64, (size_t)PER_LANE * pitch * LANE_BYTES), pitch};
}

/* lane 0 of row k for the g-th group */
INLINE uint8_t *at(Block block, int k, int g) { return block.bytes + ((size_t)k * block.pitch + g) * LANE_BYTES; }

/* What one lane's `planes` bytes, and the first two of the next lane, say of its 16 weights. */
static void decode_portable(const Sequence *s, const Code *code, int first, int count, Block block) {
    const int stride = s->lanes * GROUP;
    for (int g = 0; g < count; g++) {
        const uint8_t *bytes = s->codes + (size_t)(first + g) * s->planes * stride;
        for (int lane = 0; lane < s->lanes; lane++) {
            const int next = lane + 1 < s->lanes ? lane + 1 : 0;
            for (int input = 0; input < GROUP; input++) {
                uint8_t own[MOST_PLANES + 4] = {0};
                for (int plane = 0; plane < s->planes; plane++) own[plane] = bytes[plane * stride + lane * GROUP + input];
                for (int plane = 0; plane < 2; plane++)
                    own[s->planes + plane] = bytes[plane * stride + next * GROUP + input];
                for (int k = 0; k < PER_LANE; k++) {
                    const int bit = k * s->planes / 2;
                    const uint32_t window = (own[bit >> 3] | own[(bit >> 3) + 1] << 8 | own[(bit >> 3) + 2] << 16) >> (bit & 7);
                    const uint8_t hash = code->first[window & 63] ^ code->second[window >> 6 & 63];
                    const uint8_t level = code->levels[hash & 63];
                    at(block, k, g)[lane * GROUP + input] = hash & 128 ? (uint8_t)-level : level;
                }
            }
        }
    }
}

/* sums [rows][16][16] += rows of activations x [rows][stride], from `x` on, times a block of `count` groups */
VERSIONS static void multiply_portable(Block block, int count, const int8_t *x, size_t stride, int rows,
                                       int32_t *sums) {
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < PER_LANE; k++) {
            int32_t *sum = sums + (row * PER_LANE + k) * LANES;
            for (int g = 0; g < count; g++) {
                const uint8_t *w = at(block, k, g);
                const int8_t *four = x + (size_t)row * stride + (size_t)g * GROUP;
                for (int lane = 0; lane < LANES; lane++)
                    sum[lane] += w[4 * lane] * four[0] + w[4 * lane + 1] * four[1] + w[4 * lane + 2] * four[2] +
                                 w[4 * lane + 3] * four[3];
            }
        }
}

#if defined(HAS_VECTORS) || defined(HAS_NEON)
/* One copy of a loop for each rate, with its shifts as constants. */
#define BY_RATE(decode) \
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
#endif

#ifdef HAS_NEON
#define QUARTER (LANE_BYTES / 4) /* bytes of a vector: 4 lanes */

/* Every byte: bits `bit` to bit + 5 of its column of planes. */
INLINE uint8x16_t six_of(const uint8x16_t *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    uint8x16_t bits = planes[plane] >> from;
    if (from > 2) bits |= planes[plane + 1] << (8 - from);
    return vandq_u8(bits, vdupq_n_u8(63));
}

INLINE void decode_planes_neon(const Sequence *s, const Code *code, int first, int count, Block block,
                               const int planes) {
    const uint8x16x4_t one = vld1q_u8_x4(code->first), two = vld1q_u8_x4(code->second),
                       levels = vld1q_u8_x4(code->levels);
    const size_t stride = (size_t)s->lanes * GROUP;
    uint8_t near[MOST_PLANES + 2][LANE_BYTES] = {{0}};
    for (int g = 0; g < count; g++) {
        read_planes(s->codes + (size_t)(first + g) * planes * stride, planes, stride, near);
        for (size_t from = 0; from < stride; from += QUARTER) {
            uint8x16_t plane[MOST_PLANES + 2];
#pragma GCC unroll 12
            for (int p = 0; p < planes + 2; p++) plane[p] = vld1q_u8(near[p] + from);
#pragma GCC unroll 16
            for (int k = 0; k < PER_LANE; k++) {
                const int bit = k * planes / 2;
                const uint8x16_t low = six_of(plane, bit), high = vqtbl4q_u8(two, six_of(plane, bit + 6));
                uint8x16_t level;
                if (planes < SIGNED_FROM) level = vqtbl4q_u8(levels, veorq_u8(low, high));
                else {
                    const uint8x16_t hash = veorq_u8(vqtbl4q_u8(one, low), high);
                    const uint8x16_t negative = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(hash), 7));
                    level = vqtbl4q_u8(levels, vandq_u8(hash, vdupq_n_u8(63)));
                    level = vsubq_u8(veorq_u8(level, negative), negative);
                }
                vst1q_u8(at(block, k, g) + from, level);
            }
        }
    }
}

static void decode_neon(const Sequence *s, const Code *code, int first, int count, Block block) {
    BY_RATE(decode_planes_neon)
}

/* Levels, without the 128 that their bytes have more. */
INLINE int8x16_t levels_at(const uint8_t *bytes) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes), vdupq_n_u8(128)));
}

/* As multiply_portable, but with levels; two rows of activations at a time, so perhaps one beyond the last. */
static void multiply_neon(Block block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    for (int row = 0; row < rows; row += 2)
        for (int k = 0; k < PER_LANE; k++) {
            int32_t *sum = sums + ((size_t)row * PER_LANE + k) * LANES;
            int32x4_t found[2][4]; /* by row of activations, and quarter of the lanes */
            for (int i = 0; i < 4; i++) {
                found[0][i] = vld1q_s32(sum + 4 * i);
                found[1][i] = vld1q_s32(sum + SUMS + 4 * i);
            }
            for (int g = 0; g < count; g++) {
                int8x16_t four[2];
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    int32_t bytes;
                    memcpy(&bytes, x + (size_t)(row + r) * stride + (size_t)g * GROUP, GROUP);
                    four[r] = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const int8x16_t w = levels_at(at(block, k, g) + i * QUARTER);
#pragma GCC unroll 2
                    for (int r = 0; r < 2; r++) { /* two products of 127 * 127 at most are an int16 */
                        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four[r]));
                        const int16x8_t high = vmull_high_s8(w, four[r]);
                        found[r][i] = vpadalq_s16(found[r][i], vpaddq_s16(low, high));
                    }
                }
            }
            for (int i = 0; i < 4; i++) {
                vst1q_s32(sum + 4 * i, found[0][i]);
                vst1q_s32(sum + SUMS + 4 * i, found[1][i]);
            }
        }
}
#endif

#ifdef HAS_VECTORS
#define FOR_AVX2 __attribute__((target("avx2")))
#define HALF (LANE_BYTES / 2) /* bytes of a vector: 8 lanes */

/* The same hash from three tables of 16, and the levels in four parts; each twice, for both halves of a vector. */
typedef struct {
    __m256i first, second, third, levels[4];
} SmallTables;

FOR_AVX2 INLINE __m256i twice(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

FOR_AVX2 static SmallTables small_tables(const Code *code) {
    uint8_t second[16], third[16];
    for (int i = 0; i < 16; i++) {
        second[i] = code->first[16 * (i & 3)] ^ code->first[0] ^ code->second[i >> 2] ^ code->second[0];
        third[i] = code->second[4 * i];
    }
    return (SmallTables){twice(code->first), twice(second), twice(third),
                         {twice(code->levels), twice(code->levels + 16), twice(code->levels + 32),
                          twice(code->levels + 48)}};
}

/* Every byte: bits `bit` to bit + 3 of its column of planes. */
FOR_AVX2 INLINE __m256i four_bits(const __m256i *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    const __m256i four = _mm256_set1_epi8(15), low = _mm256_srli_epi16(planes[plane], from);
    if (from <= 4) return _mm256_and_si256(low, four);
    const __m256i own = _mm256_set1_epi8((char)((1 << (8 - from)) - 1));
    const __m256i high = _mm256_and_si256(_mm256_slli_epi16(planes[plane + 1], 8 - from), _mm256_andnot_si256(own, four));
    return _mm256_or_si256(_mm256_and_si256(low, own), high);
}

FOR_AVX2 INLINE void decode_planes_avx2(const Sequence *s, const Code *code, int first, int count, Block block,
                                        const int planes) {
    const SmallTables t = small_tables(code);
    const __m256i four = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
    const int stride = s->lanes * GROUP;
    uint8_t near[MOST_PLANES + 2][LANE_BYTES] = {{0}}; /* the planes, and two moved by a lane */
    for (int g = 0; g < count; g++) {
        read_planes(s->codes + (size_t)(first + g) * planes * stride, planes, (size_t)stride, near);
        for (int half = 0; half * HALF < stride; half++) {
            __m256i plane[MOST_PLANES + 2];
#pragma GCC unroll 12
            for (int p = 0; p < planes + 2; p++)
                plane[p] = _mm256_loadu_si256((const __m256i *)(near[p] + half * HALF));
#pragma GCC unroll 16
            for (int k = 0; k < PER_LANE; k++) {
                const int bit = k * planes / 2;
                const __m256i hash =
                    _mm256_xor_si256(_mm256_xor_si256(_mm256_shuffle_epi8(t.first, four_bits(plane, bit)),
                                                      _mm256_shuffle_epi8(t.second, four_bits(plane, bit + 4))),
                                     _mm256_shuffle_epi8(t.third, four_bits(plane, bit + 8)));
                const __m256i low = _mm256_and_si256(hash, four), bit4 = _mm256_slli_epi16(hash, 3),
                              bit5 = _mm256_slli_epi16(hash, 2);
                __m256i level = _mm256_blendv_epi8(_mm256_blendv_epi8(_mm256_shuffle_epi8(t.levels[0], low),
                                                                      _mm256_shuffle_epi8(t.levels[1], low), bit4),
                                                   _mm256_blendv_epi8(_mm256_shuffle_epi8(t.levels[2], low),
                                                                      _mm256_shuffle_epi8(t.levels[3], low), bit4),
                                                   bit5);
                if (planes >= SIGNED_FROM) level = _mm256_sign_epi8(level, _mm256_or_si256(hash, one));
                _mm256_store_si256((__m256i *)(at(block, k, g) + half * HALF), level);
            }
        }
    }
}

FOR_AVX2 static void decode_avx2(const Sequence *s, const Code *code, int first, int count, Block block) {
    BY_RATE(decode_planes_avx2)
}

/* As multiply_portable; two rows of activations and two of the block at a time, so perhaps one beyond the last. */
FOR_AVX2 static void multiply_avx2(Block block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int row = 0; row < rows; row += 2)
        for (int k = 0; k < PER_LANE; k += 2) {
            int32_t *sum = sums + ((size_t)row * PER_LANE + k) * LANES;
            __m256i found[2][4]; /* by row of activations, then by row of the block and half of its lanes */
            for (int i = 0; i < 4; i++) {
                found[0][i] = _mm256_load_si256((const __m256i *)sum + i);
                found[1][i] = _mm256_load_si256((const __m256i *)(sum + SUMS) + i);
            }
            for (int g = 0; g < count; g++) {
                __m256i even[2], odd[2];
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    int32_t four;
                    memcpy(&four, x + (size_t)(row + r) * stride + (size_t)g * GROUP, GROUP);
                    const __m256i all = _mm256_set1_epi32(four);
                    even[r] = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
                    odd[r] = _mm256_srai_epi16(all, 8);
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const __m256i w = _mm256_load_si256((const __m256i *)at(block, k + i / 2, g) + i % 2);
                    const __m256i w_even = _mm256_and_si256(w, low), w_odd = _mm256_srli_epi16(w, 8);
#pragma GCC unroll 2
                    for (int r = 0; r < 2; r++) {
                        found[r][i] = _mm256_add_epi32(found[r][i], _mm256_madd_epi16(w_even, even[r]));
                        found[r][i] = _mm256_add_epi32(found[r][i], _mm256_madd_epi16(w_odd, odd[r]));
                    }
                }
            }
            for (int i = 0; i < 4; i++) {
                _mm256_store_si256((__m256i *)sum + i, found[0][i]);
                _mm256_store_si256((__m256i *)(sum + SUMS) + i, found[1][i]);
            }
        }
}

/* Bytes from codes that are decoded to those that are fetched: to the first cache, and before to the second, as the first
 * can wait for fewer lines than the memory needs to be busy. */
#define NEAR 2048
#define FAR 8192

/* The low six bits of every byte: bits `bit` to bit + 5 of its column of planes, the other two are anything.
 *
 * In which order they lie does not matter to look-ups in tables made for it. So where the six bits are of two planes, those
 * of the second stay where they are, and those of the first, moved by two whatever the bit, go above them: one shift
 * serves all windows that begin in a plane. `lookup_tables` says which order that is. */
AVX512 INLINE __m512i six_bits(const __m512i *planes, int bit) {
    const int plane = bit >> 3, from = bit & 7;
    if (from < 2) return from ? _mm512_srli_epi16(planes[plane], 1) : planes[plane];
    const __m512i moved = _mm512_srli_epi16(planes[plane], 2), below = _mm512_set1_epi8((char)((1 << (from - 2)) - 1));
    return from == 2 ? moved : _mm512_ternarylogic_epi32(below, planes[plane + 1], moved, 0xCA);
}

AVX512 INLINE void decode_planes(const Sequence *s, const Code *code, int first, int count, Block block,
                                 const int planes) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i one[8], two[8], levels[8]; /* by the bit of a byte where a window begins */
#pragma GCC unroll 8
    for (int bit = 0; bit < 8; bit++) {
        one[bit] = _mm512_loadu_si512(code->turned[bit][0]);
        two[bit] = _mm512_loadu_si512(code->turned[bit][1]);
        levels[bit] = _mm512_loadu_si512(code->turned[bit][2]);
    }
    const __mmask16 mask = (__mmask16)((1u << s->lanes) - 1);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i next = _mm512_maskz_add_epi32(mask >> 1, lane, _mm512_set1_epi32(1)); /* of the last, the first */
    const int stride = s->lanes * GROUP;
    const uint8_t *codes = s->codes + (size_t)first * planes * stride;
    for (int g = 0; g < count; g++) {
        __m512i plane[MOST_PLANES + 2];
#pragma GCC unroll 12
        for (int p = 0; p < planes; p++) plane[p] = _mm512_maskz_loadu_epi32(mask, codes + p * stride);
        plane[planes] = _mm512_permutexvar_epi32(next, plane[0]);
        plane[planes + 1] = _mm512_permutexvar_epi32(next, plane[1]);
#pragma GCC unroll 10
        for (int p = 0; p < planes; p++) {
            _mm_prefetch((const char *)codes + FAR + p * LANE_BYTES, _MM_HINT_T1);
            _mm_prefetch((const char *)codes + NEAR + p * LANE_BYTES, _MM_HINT_T0);
        }
        codes += planes * stride;
#pragma GCC unroll 16
        for (int k = 0; k < PER_LANE; k++) {
            const int bit = k * planes / 2;
            const __m512i low = six_bits(plane, bit); /* look-ups ignore the two highest bits */
            const __m512i high = _mm512_permutexvar_epi8(six_bits(plane, bit + 6), two[bit & 7]);
            const __m512i first = planes < SIGNED_FROM ? low : _mm512_permutexvar_epi8(low, one[bit & 7]);
            const __m512i hash = _mm512_xor_si512(first, high);
            __m512i level = _mm512_permutexvar_epi8(hash, levels[planes < SIGNED_FROM ? bit & 7 : 0]);
            if (planes >= SIGNED_FROM) level = _mm512_mask_sub_epi8(level, _mm512_movepi8_mask(hash), zero, level);
            _mm512_store_si512(at(block, k, g), level);
        }
    }
}

AVX512 static void decode_avx512(const Sequence *s, const Code *code, int first, int count, Block block) {
    if (block.pitch == FEW_GROUPS) { /* so that places in it are constants */
        block.pitch = FEW_GROUPS;
        BY_RATE(decode_planes)
    } else {
        BY_RATE(decode_planes)
    }
}

/* `wide` rows of activations with `high` rows of the block at a time, their sums in registers */
AVX512 INLINE void multiply_tile(Block block, int count, const int8_t *x, size_t stride, int32_t *sums,
                                 const int wide, const int high) {
    for (int k = 0; k < PER_LANE; k += high) {
        __m512i sum[16];
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            sum[i] = _mm512_load_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES);
        for (int g = 0; g < count; g++) {
#pragma GCC unroll 8
            for (int h = 0; h < high; h++) {
                const __m512i w = _mm512_load_si512(at(block, k + h, g));
#pragma GCC unroll 16
                for (int row = 0; row < wide; row++) {
                    const int8_t *four = x + (size_t)row * stride + (size_t)g * GROUP;
                    __m512i *into = sum + row * high + h;
                    if (high == 1) *into = add_products_with(*into, w, four);
                    else {
                        int32_t all;
                        memcpy(&all, four, GROUP);
                        *into = add_products(*into, w, _mm512_set1_epi32(all));
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < wide * high; i++)
            _mm512_store_si512(sums + ((i / high) * PER_LANE + k + i % high) * LANES, sum[i]);
    }
}

AVX512 static void multiply_avx512(Block block, int count, const int8_t *x, size_t stride, int rows,
                                   int32_t *sums) {
    int row = 0;
#define TILES(WIDE, HIGH) \
    for (; row + WIDE <= rows; row += WIDE) \
        multiply_tile(block, count, x + (size_t)row * stride, stride, sums + (size_t)row * PER_LANE * LANES, WIDE, HIGH)
    TILES(16, 1);
    TILES(8, 2);
    TILES(4, 4);
    TILES(2, 4);
    TILES(1, 4);
}

#ifdef HAS_AMX
/* Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights, or 5 to 7.
 * As multiply_portable, in whole tiles, configured before: rows and groups beyond the last are read, too. Activations
 * beyond the last group are zeros, sums of rows beyond the last are of no use. */
AMX static void multiply_amx(Block block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    const long line = SUMS * sizeof(int32_t);
    const int pairs = (rows + TILE - 1) / (2 * TILE) * 2 * TILE;
    for (int k = 0; k < PER_LANE; k += 2) /* two rows of the block stay near while all activations pass */
        for (int row = 0; row < pairs; row += 2 * TILE) {
            int32_t *sum = sums + (size_t)row * SUMS + k * LANES, *below = sum + TILE * SUMS;
            const int8_t *a = x + (size_t)row * stride, *b = a + TILE * stride;
            _tile_loadd(0, sum, line);
            _tile_loadd(1, sum + LANES, line);
            _tile_loadd(2, below, line);
            _tile_loadd(3, below + LANES, line);
            for (int g = 0; g < count; g += TILE) {
                _tile_loadd(4, a + g * GROUP, (long)stride);
                _tile_loadd(6, at(block, k, g), LANE_BYTES);
                _tile_dpbsud(0, 4, 6);
                _tile_loadd(7, at(block, k + 1, g), LANE_BYTES);
                _tile_dpbsud(1, 4, 7);
                _tile_loadd(5, b + g * GROUP, (long)stride);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
            _tile_stored(0, sum, line);
            _tile_stored(1, sum + LANES, line);
            _tile_stored(2, below, line);
            _tile_stored(3, below + LANES, line);
        }
    if (pairs >= rows) return;
    for (int k = 0; k < PER_LANE; k += 4) {
        int32_t *sum = sums + (size_t)pairs * SUMS + k * LANES;
        const int8_t *a = x + (size_t)pairs * stride;
        _tile_loadd(0, sum, line);
        _tile_loadd(1, sum + LANES, line);
        _tile_loadd(2, sum + 2 * LANES, line);
        _tile_loadd(3, sum + 3 * LANES, line);
        for (int g = 0; g < count; g += TILE) {
            _tile_loadd(4, a + g * GROUP, (long)stride);
            _tile_loadd(6, at(block, k, g), LANE_BYTES);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, at(block, k + 1, g), LANE_BYTES);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, at(block, k + 2, g), LANE_BYTES);
            _tile_dpbsud(2, 4, 5);
            _tile_loadd(6, at(block, k + 3, g), LANE_BYTES);
            _tile_dpbsud(3, 4, 6);
        }
        _tile_stored(0, sum, line);
        _tile_stored(1, sum + LANES, line);
        _tile_stored(2, sum + 2 * LANES, line);
        _tile_stored(3, sum + 3 * LANES, line);
    }
}

#endif
#endif

static void decode_block(const Sequence *s, const Code *code, int first, int count, int path, Block block) {
#ifdef HAS_VECTORS
    if (path >= AVX512_VNNI) {
        decode_avx512(s, code, first, count, block);
        return;
    }
    if (path == AVX2) {
        decode_avx2(s, code, first, count, block);
        return;
    }
#endif
#ifdef HAS_NEON
    if (path == NEON) {
        decode_neon(s, code, first, count, block);
        return;
    }
#endif
    (void)path;
    decode_portable(s, code, first, count, block);
}

/* Whether a path's sums are of levels: all others are of their bytes, which have 128 more. */
static int sums_levels(int path) {
#ifdef HAS_NEON
    return path == NEON;
#else
    (void)path;
    return 0;
#endif
}

static void multiply(Block block, int count, const int8_t *x, size_t stride, int rows, int path, int32_t *sums) {
#ifdef HAS_AMX
    if (path == AMX_TILES) {
        multiply_amx(block, count, x, stride, rows, sums);
        return;
    }
#endif
#ifdef HAS_VECTORS
    if (path == AVX512_VNNI) {
        multiply_avx512(block, count, x, stride, rows, sums);
        return;
    }
    if (path == AVX2) {
        multiply_avx2(block, count, x, stride, rows, sums);
        return;
    }
#endif
#ifdef HAS_NEON
    if (path == NEON) {
        multiply_neon(block, count, x, stride, rows, sums);
        return;
    }
#endif
    (void)path;
    multiply_portable(block, count, x, stride, rows, sums);
}

#if defined(__clang__) /* shuffles only by constants */
#define SHORTEST_HALF 1
#else
#define SHORTEST_HALF 16 /* shorter ones are done within vectors */
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

/* The last four rounds of a Hadamard transform, within 16 values. */
INLINE void transform16(float *x) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec v;
    memcpy(&v, x, sizeof v);
#pragma GCC unroll 4
    for (int half = 1; half < 16; half <<= 1) {
        const ints turned = (ints)v ^ (((lane & half) != 0) & (int32_t)0x80000000); /* the second halves, negated */
        v = __builtin_shuffle(v, lane ^ half) + (vec)turned;
    }
    memcpy(x, &v, sizeof v);
}
#endif

/* The normalised Hadamard transform of every `block` entries of signs * x, as numerics/rotation.py defines it. */
VERSIONS static void rotate(const float *x, const float *signs, int count, int block, float *out) {
    float norm = 1.0f;
    for (int size = block; size > 1; size >>= 1) norm *= 0.70710678118654752f;
    for (int i = 0; i < count; i++) out[i] = norm * signs[i] * x[i];
    for (float *first = out; first < out + count; first += block) {
        int half = block / 2;
        for (; half >= (block < 16 ? 1 : SHORTEST_HALF); half >>= 1)
            for (int i = 0; i < block; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    const float a = first[j], b = first[j + half];
                    first[j] = a + b;
                    first[j + half] = a - b;
                }
#if SHORTEST_HALF > 1
        if (block >= 16)
            for (int i = 0; i < block; i += 16) transform16(first + i);
#endif
    }
}

typedef struct {
    const float *x, *signs;
    const mc_trellis_entry *entries;
    const uint8_t *tables;
    float unit;
    float *out;
    int tokens, share, inputs, outputs, block, length, parts, path, chunks;
    int together;    /* tokens that are quantized in a piece of work */
    size_t stride;   /* bytes of a row of activations, zeros behind its end; no power of two, which caches dislike */
    int8_t *rows;    /* [places][parts][stride], coarse and fine; a place is a slot, those of an expert side by side */
    float *steps;    /* [places] */
    int32_t *totals; /* [places][2] */
    mc_slots sorted;
    atomic_int failed;
} Product;

/* Some tokens: rotated, quantized, and put where their experts find them. */
static void quantize_tokens(void *context, int part) {
    Product *p = context;
    float *rotated = malloc(sizeof(float) * (size_t)p->inputs);
    if (!rotated) {
        atomic_store(&p->failed, 1);
        return;
    }
    const int first = part * p->together;
    for (int token = first; token < p->tokens && token < first + p->together; token++) {
        int done = -1;
        for (int slot = token * p->share; slot < (token + 1) * p->share; slot++) {
            const int place = p->sorted.places[slot];
            if (place < 0) continue;
            int8_t *row = p->rows + (size_t)p->parts * place * p->stride;
            if (done < 0) {
                rotate(p->x + (size_t)token * p->inputs, p->signs, p->inputs, p->block, rotated);
                int8_t *fine = p->parts > 1 ? row + p->stride : NULL;
                p->steps[place] = mc_split(rotated, p->inputs, row, fine, p->totals + 2 * place);
                for (int i = 0; i < p->parts; i++) memset(row + i * p->stride + p->inputs, 0, p->stride - (size_t)p->inputs);
                done = place;
            } else {
                memcpy(row, p->rows + (size_t)p->parts * done * p->stride, (size_t)p->parts * p->stride);
                p->steps[place] = p->steps[done];
                memcpy(p->totals + 2 * place, p->totals + 2 * done, 2 * sizeof(int32_t));
            }
        }
    }
    free(rotated);
}

/* Outputs of one place, from the sums of its one or two rows; totals: of the activations that were multiplied by 128
 * more. */
VERSIONS static void finish(const int32_t *sums, int parts, const int32_t *totals, float step, const uint16_t *scales,
                            int count, float *out) {
    float values[SUMS];
    if (parts == 1)
        for (int i = 0; i < SUMS; i++) values[i] = step * (float)(sums[i] - 128 * totals[0]);
    else
        for (int i = 0; i < SUMS; i++)
            values[i] = step * ((float)(sums[i] - 128 * totals[0]) + (float)(sums[SUMS + i] - 128 * totals[1]) / FINE);
    for (int i = 0; i < count; i++) out[i] = from_half(scales[i]) * values[i % PER_LANE * LANES + i / PER_LANE];
}

#ifdef HAS_VECTORS
/* Rows become columns: halves change places, then quarters within them, and so on. */
AVX512 INLINE void transpose(__m512 *rows) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int half = 8; half; half >>= 1) {
        const __m512i shift = _mm512_set1_epi32(half), other = _mm512_set1_epi32(LANES);
        const __mmask16 second = _mm512_test_epi32_mask(lane, shift);
        const __m512i low = _mm512_mask_add_epi32(lane, second, _mm512_sub_epi32(lane, shift), other);
        const __m512i high = _mm512_mask_mov_epi32(_mm512_add_epi32(lane, shift), second, _mm512_add_epi32(lane, other));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half) continue;
            const __m512 a = rows[i], b = rows[i + half];
            rows[i] = _mm512_permutex2var_ps(a, low, b);
            rows[i + half] = _mm512_permutex2var_ps(a, high, b);
        }
    }
}

/* As finish, with scales as they are stored. */
AVX512 static void finish_avx512(const int32_t *sums, int parts, const int32_t *totals, float step,
                                 const uint16_t *scales, int count, float *out) {
    const __m512 steps = _mm512_set1_ps(step), fine = _mm512_set1_ps(FINE);
    __m512 values[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < PER_LANE; k++) {
        const __m512i coarse = _mm512_sub_epi32(_mm512_load_si512(sums + k * LANES), _mm512_set1_epi32(128 * totals[0]));
        values[k] = _mm512_cvtepi32_ps(coarse);
        if (parts > 1) {
            const __m512i rest =
                _mm512_sub_epi32(_mm512_load_si512(sums + SUMS + k * LANES), _mm512_set1_epi32(128 * totals[1]));
            values[k] = _mm512_add_ps(values[k], _mm512_div_ps(_mm512_cvtepi32_ps(rest), fine));
        }
        values[k] = _mm512_mul_ps(steps, values[k]);
    }
    transpose(values);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) {
        const int left = count - lane * PER_LANE;
        if (left <= 0) break;
        const __mmask16 there = left < PER_LANE ? (__mmask16)((1u << left) - 1) : 0xffff;
        const __m256i stored = _mm256_maskz_loadu_epi16(there, scales + lane * PER_LANE);
        _mm512_mask_storeu_ps(out + lane * PER_LANE, there, _mm512_mul_ps(_mm512_cvtph_ps(stored), values[lane]));
    }
}
#endif

/* One sequence of outputs of one expert, for its places. */
static void multiply_sequence(void *context, int index) {
    Product *p = context;
    const mc_task *task = p->sorted.tasks + index / p->chunks;
    const int chunk = index % p->chunks, lanes = p->length / PER_LANE, groups = (p->inputs + GROUP - 1) / GROUP;
    const mc_trellis_entry *entry = p->entries + task->matrix;
    const Sequence s = {entry->codes + (size_t)chunk * groups * entry->planes * lanes * GROUP,
                        groups, lanes, (int)entry->planes};
    const Code code = code_of(p->tables, s.planes);
    const int path = p->path == AMX_TILES && task->count < MORE_TOKENS ? AVX512_VNNI : p->path;
    const int most = task->count < TOKENS_AT_ONCE ? task->count : TOKENS_AT_ONCE;
    const int rows_together = path == AMX_TILES ? TILE : 2;
    const size_t sum_rows = (size_t)(p->parts * most + rows_together - 1) / rows_together * rows_together;
    const size_t sum_bytes = sum_rows * SUMS * sizeof(int32_t);
    uint8_t few_bytes[PER_LANE * FEW_GROUPS * LANE_BYTES] __attribute__((aligned(64)));
    int32_t few_sums[2 * (MORE_TOKENS - 1) * SUMS] __attribute__((aligned(64)));
    const int few = most < MORE_TOKENS;
    const Block block = few                  ? (Block){few_bytes, FEW_GROUPS}
                        : path < AVX512_VNNI ? new_block(FEW_GROUPS)
                        : most <= TILE       ? new_block(MORE_GROUPS)
                                             : new_block(MANY_GROUPS);
    int32_t *sums = few ? few_sums : aligned_alloc(64, sum_bytes);
    if (!block.bytes || !sums) {
        atomic_store(&p->failed, 1);
        free(block.bytes);
        free(sums);
        return;
    }
    const int32_t none[2] = {0, 0};
    const int first_output = chunk * p->length;
    const int outputs = p->outputs - first_output < p->length ? p->outputs - first_output : p->length;
    const uint16_t *scales = entry->scales + first_output;
    for (int i = 0; i < outputs; i += LANE_BYTES / 2) __builtin_prefetch(scales + i);
    if (lanes < LANES) memset(block.bytes, 0, (size_t)PER_LANE * block.pitch * LANE_BYTES); /* lanes that are not there are multiplied, too */
#ifdef HAS_AMX
    if (path == AMX_TILES) mc_configure_tiles();
#endif
    for (int begin = 0; begin < task->count; begin += most) {
        const int count = task->count - begin < most ? task->count - begin : most, place = task->first + begin;
        const int8_t *rows = p->rows + (size_t)p->parts * place * p->stride;
        memset(sums, 0, sum_bytes);
        for (int first = 0; first < groups; first += block.pitch) {
            const int some = groups - first < block.pitch ? groups - first : block.pitch;
            decode_block(&s, &code, first, some, path, block);
            multiply(block, some, rows + (size_t)first * GROUP, p->stride, p->parts * count, path, sums);
        }
        for (int i = 0; i < count; i++) {
            const int32_t *sum = sums + (size_t)p->parts * i * SUMS, *total = p->totals + 2 * (place + i);
            const float step = p->steps[place + i] * p->unit;
            float *out = p->out + (size_t)p->sorted.slots[place + i] * p->outputs + first_output;
#ifdef HAS_VECTORS
            if (path >= AVX512_VNNI) {
                finish_avx512(sum, p->parts, total, step, scales, outputs, out);
                continue;
            }
#endif
            finish(sum, p->parts, sums_levels(path) ? none : total, step, scales, outputs, out);
        }
    }
#ifdef HAS_AMX
    if (path == AMX_TILES) mc_release_tiles();
#endif
    if (few) return;
    free(block.bytes);
    free(sums);
}

int mc_trellis_product(const mc_bank *bank, const float *x, const int64_t *experts, int tokens, int share, int parts,
                       int path, int threads, float *out) {
    const int slots = tokens * share, inputs = bank->inputs, outputs = bank->outputs;
    const int groups = (inputs + GROUP - 1) / GROUP;
    Product p = {.x = x, .signs = bank->signs, .entries = bank->trellis, .tables = bank->tables, .unit = bank->unit, .out = out,
                 .tokens = tokens, .share = share, .inputs = inputs, .outputs = outputs, .block = bank->block,
                 .length = bank->length, .parts = parts, .path = path,
                 .chunks = (outputs + bank->length - 1) / bank->length,
                 .together = inputs < QUANTIZED_TOGETHER ? QUANTIZED_TOGETHER / inputs : 1,
                 .stride = ((size_t)(groups + TILE - 1) / TILE * TILE + TILE) * GROUP};
    const size_t room = (size_t)slots + (slots < MORE_TOKENS ? 1 : TILE); /* pairs and tiles read rows beyond the last */
    int failed = mc_sort_slots(&p.sorted, bank, experts, slots);
    p.rows = malloc(parts * room * p.stride);
    p.steps = malloc(sizeof(float) * room);
    p.totals = malloc(sizeof(int32_t) * 2 * room);
    atomic_init(&p.failed, failed || !p.rows || !p.steps || !p.totals);
    if (!atomic_load(&p.failed)) {
        mc_clear_missing(&p.sorted, slots, outputs, out);
        mc_parallel(quantize_tokens, &p, (tokens + p.together - 1) / p.together, threads);
        if (!atomic_load(&p.failed)) mc_parallel(multiply_sequence, &p, p.sorted.count * p.chunks, threads);
    }
    free(p.rows);
    free(p.steps);
    free(p.totals);
    mc_free_slots(&p.sorted);
    return atomic_load(&p.failed);
}

typedef struct {
    Sequence first;
    const uint16_t *scales;
    Code code;
    float unit;
    float *out;
    int inputs, outputs, length, path;
    atomic_int failed;
} Matrix;

static void write_sequence(void *context, int chunk) {
    Matrix *m = context;
    Sequence s = m->first;
    s.codes += (size_t)chunk * s.groups * s.planes * s.lanes * GROUP;
    const Block block = new_block(FEW_GROUPS);
    if (!block.bytes) {
        atomic_store(&m->failed, 1);
        return;
    }
    for (int first = 0; first < s.groups; first += FEW_GROUPS) {
        const int count = s.groups - first < FEW_GROUPS ? s.groups - first : FEW_GROUPS;
        decode_block(&s, &m->code, first, count, m->path, block);
        const int begin = first * GROUP, end = begin + count * GROUP < m->inputs ? begin + count * GROUP : m->inputs;
        for (int i = 0; i < m->length && chunk * m->length + i < m->outputs; i++) {
            const int output = chunk * m->length + i;
            const uint8_t *row = at(block, i % PER_LANE, 0) + i / PER_LANE * GROUP;
            const float scale = m->unit * from_half(m->scales[output]);
            float *out = m->out + (size_t)output * m->inputs;
            for (int j = begin; j < end; j++)
                out[j] = scale * (float)(row[(j - begin) / GROUP * LANE_BYTES + j % GROUP] - 128);
        }
    }
    free(block.bytes);
}

int mc_trellis_matrix(const uint8_t *codes, const uint16_t *scales, const uint8_t *tables, float unit, int inputs,
                      int outputs, int length, int planes, int path, int threads, float *out) {
    Matrix m = {.first = {codes, (inputs + GROUP - 1) / GROUP, length / PER_LANE, planes}, .scales = scales,
                .code = code_of(tables, planes), .unit = unit, .out = out, .inputs = inputs,
                .outputs = outputs, .length = length, .path = path < 0 ? mc_best_path() : path};
    atomic_init(&m.failed, 0);
    mc_parallel(write_sequence, &m, (outputs + length - 1) / length, threads);
    return atomic_load(&m.failed);
}
