/* Products with affine grids on AVX2.
 *
 * The sums are those that affine_portable.c derives: E_g = sum_i c_i (254 a_i + b_i), exact in int32 over 256 inputs.
 * AVX2 has no product of unsigned and signed bytes without saturation, so codes are widened to 16 bits and meet both
 * parts of an activation in one number (vpmaddwd): one multiplication where bytes would need two.
 *
 * Codes never become bytes in memory. 16 of them are two words of `bits` bytes each, so 16 bytes hold them at every
 * width. A lane of 16 bits takes the two bytes that its code lies in (vpshufb), a multiplication by a power of two
 * moves the code to the upper end, and what lay above it out of the lane; a shift by 16 - bits, the same for all lanes,
 * moves it down and leaves zeros above. A code never begins in one byte and ends in the one after the next: it has at
 * most 8 bits, and its first bit is within its first byte.
 *
 * Every code, once widened, meets up to 4 tokens, whose sums are in registers: [token] of 8 lanes, lane l the sum over
 * inputs 2l, 2l + 1 of every 16. Lanes become float32 after 256 inputs or a group, times s_g t_g, and are added up
 * last; 1 / 254 and the offsets follow once per row. A lane holds 32 products, far from the end of an int32.
 *
 * Steps read 16 bytes, of which the last may lie behind the matrix: such rows are copied first. Groups that are no
 * whole steps of 16 are left to the portable path. */
#include "affine.h"

#ifdef HAS_VECTORS

#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define STEP 16           /* codes at a time, two words: in lanes of 16 bits */
#define TOKENS_TOGETHER 4 /* each unpacked code meets this many tokens */

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
FOR_AVX2 INLINE void multiply_wide(const AffineMatrix *m, const Widening *w, const uint8_t *at, const float *scales,
                                   const float *offsets, const AffineInputs *x, const int count, float *out) {
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

FOR_AVX2 static void multiply_tokens(const AffineMatrix *m, const uint8_t *at, const float *scales, const float *offsets,
                                     const AffineInputs *x, int count, float *out) {
    const Widening w = widening(m->bits);
    switch (count) {
    case 1: multiply_wide(m, &w, at, scales, offsets, x, 1, out); break;
    case 2: multiply_wide(m, &w, at, scales, offsets, x, 2, out); break;
    case 3: multiply_wide(m, &w, at, scales, offsets, x, 3, out); break;
    default: multiply_wide(m, &w, at, scales, offsets, x, 4, out); break;
    }
}

static int multiply(const AffineProduct *p, const AffineMatrix *m, int task, int first, int last) {
    if (p->group % STEP) return mc_affine_portable.multiply(p, m, task, first, last);
    const mc_task *of = p->sorted.tasks + task;
    const int *slots = p->sorted.slots + of->first;
    const AffineScratch s = new_scratch(p);
    if (!s.scales) return 1;
    for (int row = first; row < last; row++) {
        const uint8_t *at = row_of(m, row);
        const size_t row_bytes = (size_t)words_of(m) * m->bits, left = (size_t)(m->outputs - 1 - row) * row_bytes;
        if (left + 2 * (size_t)m->bits < 16) at = memcpy(s.codes, at, row_bytes); /* steps read 16 bytes */
        mc_affine_read_grids(m, row, s.scales, s.offsets);
        for (int i = 0; i < of->count; i += TOKENS_TOGETHER) {
            const int count = of->count - i < TOKENS_TOGETHER ? of->count - i : TOKENS_TOGETHER;
            AffineInputs x[TOKENS_TOGETHER];
            float found[TOKENS_TOGETHER];
            for (int t = 0; t < count; t++) x[t] = activations_of(p, (size_t)(slots[i + t] / p->top_k));
            multiply_tokens(m, at, s.scales, s.offsets, x, count, found);
            for (int t = 0; t < count; t++) p->out[(size_t)slots[i + t] * p->outputs + row] = found[t];
        }
    }
    free(s.scales);
    return 0;
}

const AffinePath mc_affine_avx2 = {.multiply = multiply, .unpack = mc_affine_unpack, .write = mc_affine_write, .wide = 1};

#endif
