/* Steps of the trellis search on AVX-512 (VBMI), also where there is AMX. trellis.c derives the full one,
 * trellis_quick.c the quick one: m_g = min_t C[t G + g], then C'[g 2^k + j] = m_g + w (v[g 2^k + j] - x)^2, G = 2^(12
 * - k).
 *
 * One loop over the groups, a vector of them at a time, so minima go from register to register into the 2^k vectors of
 * states that follow from them. Compared costs lie G apart: each t is one load.
 *
 * Full: 16 groups. The lowest k bits of a cost become t (and, or), and vpminsd finds cost and choice in one; vpmovdb
 * writes the choices. m_g + base then becomes 2^k vectors of 16 states: lane j of part p is group (16 p + j) / 2^k,
 * which vpermps fetches. The square is two fused operations, v * (w * v + slope) + m_g: as on AVX2, lane by lane, so
 * both give the same bits.
 *
 * Quick: 64 groups in bytes. A mask of lanes where another cost is less takes its t: the least t of equals is kept.
 * vpsubusb takes the floor away, vpaddusb adds and stops at 255; vpermb fetches the group of each of 64 states from
 * the vector of 64 minima, whichever part it is. The metric is one look-up of 64 bytes by the places of 64 states
 * (vpermb), or of 128 where there are more than 64 levels (vpermi2b). The next floor is a minimum over all vectors,
 * then over lanes. Whole numbers, so the bytes are those of every path.
 *
 * A vector of 64 groups needs 2^12 / 2^k >= 64 of them: k is 5 at most, which leaves 128. */
#include "trellis_search.h"

#ifdef HAS_VECTORS

AVX512 INLINE void step_avx512(const Step *s, const int k) {
    const int groups = STATES >> k, fan = 1 << k;
    const __m512 scale = _mm512_set1_ps(s->weight), slope = _mm512_set1_ps(s->slope), base = _mm512_set1_ps(s->base);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i mask = _mm512_set1_epi32(-fan);
    for (int g = 0; g < groups; g += 16) {
        const int32_t *before = (const int32_t *)s->cost + g;
        __m512i least = _mm512_and_si512(_mm512_load_si512(before), mask);
#pragma GCC unroll 64
        for (int t = 1; t < fan; t++) {
            const __m512i other = _mm512_and_si512(_mm512_load_si512(before + t * groups), mask);
            least = _mm512_min_epi32(least, _mm512_or_si512(other, _mm512_set1_epi32(t)));
        }
        _mm_storeu_si128((__m128i *)(s->from + g), _mm512_cvtepi32_epi8(_mm512_andnot_si512(mask, least)));
        const __m512 reached = _mm512_add_ps(_mm512_castsi512_ps(least), base);
#pragma GCC unroll 64
        for (int part = 0; part < fan; part++) {
            const int at = (g << k) + part * 16;
            const __m512i group = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * part)), (unsigned)k);
            const __m512 value = _mm512_load_ps(s->values + at);
            const __m512 spread = _mm512_permutexvar_ps(group, reached);
            _mm512_store_ps(s->next + at, _mm512_fmadd_ps(value, _mm512_fmadd_ps(scale, value, slope), spread));
        }
    }
}

FULL_STEPS(step_avx512, AVX512)

AVX512 INLINE uint8_t quick_avx512(const QuickStep *s, const int k, const int more) {
    const int groups = STATES >> k, fan = 1 << k;
    const __m512i floor = _mm512_set1_epi8((char)s->q->floor);
    const __m512i low = _mm512_load_si512(s->q->metric), high = _mm512_load_si512(s->q->metric + 64);
    __m512i lowest = _mm512_set1_epi8((char)WORST);
    uint8_t spread[64] __attribute__((aligned(64))); /* lane j: that of its group, from 0 */
    for (int j = 0; j < 64; j++) spread[j] = (uint8_t)(j >> k);
    const __m512i groups_of = _mm512_load_si512(spread);
    for (int g = 0; g < groups; g += 64) {
        __m512i least = _mm512_load_si512(s->cost + g), choice = _mm512_setzero_si512();
#pragma GCC unroll 32
        for (int t = 1; t < fan; t++) {
            const __m512i other = _mm512_load_si512(s->cost + t * groups + g);
            choice = _mm512_mask_mov_epi8(choice, _mm512_cmplt_epu8_mask(other, least), _mm512_set1_epi8((char)t));
            least = _mm512_min_epu8(least, other);
        }
        _mm512_storeu_si512(s->from + g, choice);
        const __m512i reached = _mm512_subs_epu8(least, floor);
        lowest = _mm512_min_epu8(lowest, reached);
#pragma GCC unroll 32
        for (int part = 0; part < fan; part++) {
            const int at = (g << k) + 64 * part;
            const __m512i own = _mm512_add_epi8(groups_of, _mm512_set1_epi8((char)(part * (64 >> k))));
            const __m512i place = _mm512_load_si512(s->q->places + at);
            const __m512i found =
                more ? _mm512_permutex2var_epi8(low, place, high) : _mm512_permutexvar_epi8(place, low);
            _mm512_store_si512(s->next + at, _mm512_adds_epu8(_mm512_permutexvar_epi8(own, reached), found));
        }
    }
    const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(lowest), _mm512_extracti64x4_epi64(lowest, 1));
    const __m128i quarter = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    /* vphminposuw finds the least of eight words: of pairs of bytes, first */
    const __m128i pairs = _mm_min_epu8(quarter, _mm_srli_epi16(quarter, 8));
    return (uint8_t)_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_and_si128(pairs, _mm_set1_epi16(255))));
}

QUICK_STEPS(quick_avx512, AVX512)

const SearchPath mc_search_avx512 = {STEPS_OF(step_avx512), QUICK_STEPS_OF(quick_avx512)};

#endif
