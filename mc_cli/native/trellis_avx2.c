/* Products with trellis codes on AVX2, by the sums that trellis_portable.c derives.
 *
 * A vector has 8 lanes of 4 inputs. vpshufb looks up in tables of 16 bytes alone, so the hash comes from three tables
 * by four bits of a window each, which is the same one: codes are made of such tables (numerics/trellis_code.py), so
 * that an entry of the first table of 64 is one by the low four bits, xor one by the high two, and an entry of the
 * second one by the low two, xor one by the high four (small_tables puts the middle four bits together). The 64 levels are four tables of
 * 16; two of the hash's bits choose among what these give (vpblendvb looks at the highest bit of a byte), and vpsignb
 * negates where the hash is negative.
 *
 * AVX2 multiplies unsigned by signed bytes with saturation alone, so bytes are widened: even and odd ones of a vector
 * of weights and of the activations become 16 bits, and vpmaddwd gives sums of two products in int32, exact; two of
 * them are the four inputs of a lane. 65536 inputs stay within an int32.
 *
 * Two rows of activations meet two rows of the block: sums are [2 rows][2 of 16, 2 halves] of 8 lanes, eight registers
 * while the groups of a block pass. With an odd number of rows one beyond the last is read and its sums are written. */
#include "trellis_product.h"

#ifdef HAS_VECTORS

#define FOR_AVX2 __attribute__((target("avx2")))
#define HALF (LANE_BYTES / 2) /* bytes of a vector: 8 lanes */

/* The hash from three tables of 16, and the levels in four parts; each twice, for both halves of a vector. */
typedef struct {
    __m256i first, second, third, levels[4];
} SmallTables;

FOR_AVX2 INLINE __m256i twice(const uint8_t *table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

FOR_AVX2 static SmallTables small_tables(const TrellisCode *code) {
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

FOR_AVX2 INLINE void decode_planes(const TrellisSequence *s, const TrellisCode *code, int first, int count,
                                   TrellisBlock block, const int planes) {
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

FOR_AVX2 static void decode(const TrellisSequence *s, const TrellisCode *code, int first, int count, TrellisBlock block) {
    BY_RATE(decode_planes, block)
}

/* Two rows of activations and two of the block at a time, so perhaps one beyond the last. */
FOR_AVX2 static void multiply(TrellisBlock block, int count, const int8_t *x, size_t stride, int rows, int32_t *sums) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int row = 0; row < rows; row += 2)
        for (int k = 0; k < PER_LANE; k += 2) {
            int32_t *sum = sums + ((size_t)row * PER_LANE + k) * LANES;
            __m256i found[2][4]; /* [row of activations][row of the block, half of its lanes] */
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

const TrellisPath mc_trellis_avx2 = {.decode = decode, .multiply = multiply, .finish = mc_trellis_finish,
                                     .rows_together = 2};

#endif
