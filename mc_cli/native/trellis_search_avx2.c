/* Steps of the trellis search on AVX2. trellis.c derives the full one, trellis_quick.c the quick one: m_g = min_t C[t
 * G + g], then C'[g 2^k + j] = m_g + w (v[g 2^k + j] - x)^2, with G = 2^(12 - k).
 *
 * One loop over the groups, a vector of them at a time, so minima go from register to register into the 2^k vectors of
 * states that follow from them. Compared costs lie G apart: each t is one load.
 *
 * Full: 8 groups. The lowest k bits of a cost become t (and, or), and vpminsd finds cost and choice in one; choices
 * are the low bytes of its lanes, brought together by vpshufb. m_g + base then becomes 2^k vectors of 8 states: lane j
 * of part p is group (8 p + j) / 2^k, which vpermps fetches. The square is two fused operations, v * (w * v + slope) +
 * m_g: as on AVX-512, lane by lane, so both give the same bits.
 *
 * Quick: 32 groups in bytes. The choice is blended where another cost is less; AVX2 compares no unsigned bytes for
 * that, so it asks whether the greater of both is the other one, and then all stays: the least t of equals is kept.
 * vpsubusb takes the floor away, vpaddusb adds and stops at 255. Within a part of 32 states groups are neighbours, at
 * most 16 of them, in one half of 16 bytes, of which a copy in both halves of a vector lets vpshufb fetch them.
 *
 * The metric is looked up in tables of 16 bytes, 4 or 8 of them: an index with the highest bit set gives 0, and
 * within[i] has it set where a place is in another table, so exactly one look-up gives the metric and an or joins
 * them. Whole numbers, so the bytes are those of every path. */
#include "trellis_search.h"

#ifdef HAS_VECTORS

#define FOR_AVX2 __attribute__((target("avx2,fma")))

FOR_AVX2 INLINE void step_avx2(const Step *s, const int k) {
    const int groups = STATES >> k, fan = 1 << k;
    const __m256 scale = _mm256_set1_ps(s->weight), slope = _mm256_set1_ps(s->slope), base = _mm256_set1_ps(s->base);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), mask = _mm256_set1_epi32(-fan);
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                               0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    for (int g = 0; g < groups; g += 8) {
        const int32_t *before = (const int32_t *)s->cost + g;
        __m256i least = _mm256_and_si256(_mm256_load_si256((const __m256i *)before), mask);
#pragma GCC unroll 64
        for (int t = 1; t < fan; t++) {
            const __m256i other = _mm256_and_si256(_mm256_load_si256((const __m256i *)(before + t * groups)), mask);
            least = _mm256_min_epi32(least, _mm256_or_si256(other, _mm256_set1_epi32(t)));
        }
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_andnot_si256(mask, least), low_bytes);
        _mm_storel_epi64((__m128i *)(s->from + g),
                         _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
        const __m256 reached = _mm256_add_ps(_mm256_castsi256_ps(least), base);
#pragma GCC unroll 64
        for (int part = 0; part < fan; part++) { /* lane j: that of the group before it, (8 * part + j) >> k */
            const int at = (g << k) + part * 8;
            const __m256i group = _mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(8 * part)), k);
            const __m256 value = _mm256_load_ps(s->values + at);
            const __m256 spread = _mm256_permutevar8x32_ps(reached, group);
            _mm256_store_ps(s->next + at, _mm256_fmadd_ps(value, _mm256_fmadd_ps(scale, value, slope), spread));
        }
    }
}

FULL_STEPS(step_avx2, FOR_AVX2)

FOR_AVX2 INLINE uint8_t quick_avx2(const QuickStep *s, const int k, const int more) {
    const int groups = STATES >> k, fan = 1 << k, tables = more ? TABLES : TABLES / 2;
    const __m256i floor = _mm256_set1_epi8((char)s->q->floor);
    __m256i lowest = _mm256_set1_epi8((char)WORST), metric[TABLES];
    for (int i = 0; i < tables; i++)
        metric[i] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)s->q->metric + i));
    uint8_t spread[2 * TABLE] __attribute__((aligned(32))); /* lane j: that of its group, from 0 */
    for (int j = 0; j < 2 * TABLE; j++) spread[j] = (uint8_t)(j >> k);
    const __m256i groups_of = _mm256_load_si256((const __m256i *)spread);
    for (int g = 0; g < groups; g += 32) {
        __m256i least = _mm256_load_si256((const __m256i *)(s->cost + g)), choice = _mm256_setzero_si256();
        for (int t = 1; t < fan; t++) {
            const __m256i other = _mm256_load_si256((const __m256i *)(s->cost + t * groups + g));
            const __m256i stays = _mm256_cmpeq_epi8(_mm256_max_epu8(other, least), other);
            choice = _mm256_blendv_epi8(_mm256_set1_epi8((char)t), choice, stays);
            least = _mm256_min_epu8(least, other);
        }
        _mm256_storeu_si256((__m256i *)(s->from + g), choice);
        const __m256i reached = _mm256_subs_epu8(least, floor);
        lowest = _mm256_min_epu8(lowest, reached);
        const __m256i halves[2] = {_mm256_permute2x128_si256(reached, reached, 0x00),
                                   _mm256_permute2x128_si256(reached, reached, 0x11)};
#pragma GCC unroll 32
        for (int part = 0; part < fan; part++) {
            const int at = (g << k) + 32 * part, first = part * (32 >> k);
            const __m256i own = _mm256_add_epi8(groups_of, _mm256_set1_epi8((char)(first & (TABLE - 1))));
            __m256i sum = _mm256_shuffle_epi8(halves[first / TABLE], own), found = _mm256_setzero_si256();
#pragma GCC unroll 8
            for (int i = 0; i < tables; i++)
                found = _mm256_or_si256(found, _mm256_shuffle_epi8(
                                                   metric[i], _mm256_load_si256((const __m256i *)(s->q->within[i] + at))));
            sum = _mm256_adds_epu8(sum, found);
            _mm256_store_si256((__m256i *)(s->next + at), sum);
        }
    }
    uint8_t lanes[32] __attribute__((aligned(32))), least = WORST;
    _mm256_store_si256((__m256i *)lanes, lowest);
    for (int j = 0; j < 32; j++) least = lanes[j] < least ? lanes[j] : least;
    return least;
}

QUICK_STEPS(quick_avx2, FOR_AVX2)

const SearchPath mc_search_avx2 = {STEPS_OF(step_avx2), QUICK_STEPS_OF(quick_avx2)};

#endif
