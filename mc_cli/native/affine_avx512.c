/* Products with affine grids on AVX-512 (VBMI, VNNI), for few tokens; affine_blocks.c has many.
 *
 * The sums are those that affine_portable.c derives, with coarse and fine parts of activations apart, as vpdpbusd
 * multiplies unsigned by signed bytes and adds four neighbours to an int32, without saturation:
 *
 *     E_g = 254 A_g + B_g,    A_g = sum_i c_i a_i,    B_g = sum_i c_i b_i
 *
 * A lane of 32 bits adds up a sixteenth of a group, 4096 products of 255 * 127 for the longest one (65536 inputs): it
 * cannot overflow, so both sums are exact. Lanes become float32 per group, times s_g t_g; A and B / 254 are added last,
 * and what the offsets take, sum_g s_g z_g X_g, is a product of two rows of floats.
 *
 * 64 codes are 8 words of `bits` bytes, at most one vector. vpermb gives each word 8 bytes of its own, vpmultishiftqb
 * picks from these the 8 bits that begin where each code does, and a mask leaves the code: three instructions at any
 * width. Code j of a word begins at bit j * bits, so 8 bits from there on are within the word, and those behind the
 * code are masked.
 *
 * With one token, codes are multiplied as they come out (multiply_packed), where groups are of whole vectors. Otherwise
 * a row becomes bytes once and meets one token after the other; groups then begin at any byte, and codes behind the end
 * of one meet the zeros that activations have there: [groups][pitch], pitch a multiple of 64. */
#include "affine.h"

#ifdef HAS_VECTORS

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

AVX512 void mc_affine_unpack_avx512(const uint8_t *codes, int bits, int words, uint8_t *bytes) {
    const Spreading s = spreading(bits);
    for (int i = 0; i < words; i += 8, codes += 8 * bits) {
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        _mm512_storeu_si512(bytes + 8 * (size_t)i, unpacked(s, codes, words - i));
    }
}

AVX512 INLINE float total(__m512 coarse, __m512 fine) {
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(fine, _mm512_set1_ps(1 / FINE), coarse));
}

AVX512 void mc_affine_read_grids_avx512(const AffineMatrix *m, int row, float *scales, float *offsets) {
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

/* The sum that offsets take away. Totals behind the last group may belong to groups of longer matrices, and be NaN. */
AVX512 INLINE float taken(const float *offsets, const float *totals, int groups) {
    __m512 sum = _mm512_setzero_ps();
    for (int g = 0; g < groups; g += FLOATS) {
        const __mmask16 there = groups - g < FLOATS ? (__mmask16)((1u << (groups - g)) - 1) : 0xffff;
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(offsets + g), _mm512_maskz_loadu_ps(there, totals + g), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

AVX512 INLINE void weigh(const float *scales, const float *steps, int groups, float *weights) {
    for (int g = 0; g < groups; g += FLOATS)
        _mm512_storeu_ps(weights + g, _mm512_mul_ps(_mm512_loadu_ps(scales + g), _mm512_loadu_ps(steps + g)));
}

/* scales, offsets, steps, totals and `weights`, which is scratch: [groups], zeros up to whole vectors */
AVX512 static float row_product(const AffineMatrix *m, const uint8_t *w, const float *scales, const float *offsets,
                                AffineInputs x, float *weights) {
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
AVX512 static void multiply_packed(const AffineMatrix *m, int first, int last, AffineInputs x, float *scales,
                                   float *offsets, float *weights, float *out) {
    const Spreading s = spreading(m->bits);
    for (int row = first; row < last; row++) {
        const uint8_t *at = row_of(m, row);
        __m512 coarse = _mm512_setzero_ps(), fine = coarse;
        mc_affine_read_grids_avx512(m, row, scales, offsets);
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

static int multiply(const AffineProduct *p, const AffineMatrix *m, int task, int first, int last) {
    if (p->first_blocks[task] >= 0) return mc_affine_multiply_blocks(p, m, task, first, last);
    const mc_task *of = p->sorted.tasks + task;
    const int *slots = p->sorted.slots + of->first;
    const AffineScratch s = new_scratch(p);
    if (!s.scales) return 1;
    if (of->count == 1 && p->group % VECTOR == 0) {
        const AffineInputs x = activations_of(p, (size_t)(slots[0] / p->top_k));
        multiply_packed(m, first, last, x, s.scales, s.offsets, s.weights, p->out + (size_t)slots[0] * p->outputs);
        free(s.scales);
        return 0;
    }
    for (int row = first; row < last; row++) {
        mc_affine_read_grids(m, row, s.scales, s.offsets);
        mc_affine_unpack_avx512(row_of(m, row), m->bits, words_of(m), s.codes);
        for (int i = 0; i < of->count; i++) {
            const AffineInputs x = activations_of(p, (size_t)(slots[i] / p->top_k));
            p->out[(size_t)slots[i] * p->outputs + row] = row_product(m, s.codes, s.scales, s.offsets, x, s.weights);
        }
    }
    free(s.scales);
    return 0;
}

AVX512 static void write_group(const uint8_t *codes, int count, float scale, float zero_point, float *floats,
                               uint16_t *bfloat16s) {
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
        _mm256_mask_storeu_epi16(bfloat16s + i, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

#define TOKENS_FOR_LANES 7 /* tokens from which on blocks are faster */
#define TOKENS_FOR_TILES 4 /* the same number with tiles */

const AffinePath mc_affine_avx512 = {.multiply = multiply, .unpack = mc_affine_unpack_avx512, .write = write_group,
                                     .block_tokens = TOKENS_FOR_LANES, .prepare_blocks = mc_affine_prepare_blocks,
                                     .multiply_group = mc_affine_group_avx512};

#ifdef HAS_AMX
const AffinePath mc_affine_amx = {.multiply = multiply, .unpack = mc_affine_unpack_avx512, .write = write_group,
                                  .block_tokens = TOKENS_FOR_TILES, .prepare_blocks = mc_affine_prepare_blocks,
                                  .multiply_group = mc_affine_group_amx,
                                  .begin = mc_configure_tiles, .end = mc_release_tiles};
#endif

#endif
