/* Steps of the quick trellis search, in bytes.
 *
 * A step of k bits: state g of the 2^(12 - k) groups is reached from the 2^k states t * groups + g, and goes on to the
 * states g * 2^k + j. With costs c before the step, r = min_t c[t * groups + g] and
 *     c'[g * 2^k + j] = min(255, r - floor + metric[place[g * 2^k + j]]),
 * where the floor is the least r - floor of the step before, so that r - floor is never negative. Only differences of
 * costs matter to the search, so nothing is lost by the floor. What is lost: costs are whole units, and those of 255 or
 * more are alike. A usual error is three units: with two, errors are 0.5 % larger than the full search's, with three
 * 0.2 % (0.4 % where rows' importance is log-normal), and with five so many paths are alike after an outlier that the
 * best may be lost.
 *
 * A weight's metric depends on its level alone, of which there are 128 at most. So it is computed per level, in float,
 * and looked up per state: vpermb, or vpermi2b where there are more than 64. AVX2 looks up in tables of 16; an entry
 * whose index has bit 7 set is 0, so that the tables' results are joined by or. All paths give the same codes: costs are
 * integers, and the metric's float expression has no sum of a product, which some compilers would fuse. */
#include "trellis_quick.h"

#define WORST 255
#define BEND 96      /* metrics beyond this many units count an eighth, and ... */
#define MOST_OF_ONE 224 /* ... no more than this: one bad weight must not make all paths alike */
#define MOST_TWICE 65535

typedef struct {
    const Quick *q;
    const uint8_t *cost;
    uint8_t *next, *from;
} Step;

typedef uint8_t StepOf(const Step *);

/* One copy for every k, and for more than 64 levels. */
#define EACH(NAME, TARGET) \
    TARGET static uint8_t NAME##_1(const Step *s) { return NAME(s, 1, 0); } \
    TARGET static uint8_t NAME##_2(const Step *s) { return NAME(s, 2, 0); } \
    TARGET static uint8_t NAME##_3(const Step *s) { return NAME(s, 3, 0); } \
    TARGET static uint8_t NAME##_4(const Step *s) { return NAME(s, 4, 0); } \
    TARGET static uint8_t NAME##_5(const Step *s) { return NAME(s, 5, 0); } \
    TARGET static uint8_t NAME##_more_1(const Step *s) { return NAME(s, 1, 1); } \
    TARGET static uint8_t NAME##_more_2(const Step *s) { return NAME(s, 2, 1); } \
    TARGET static uint8_t NAME##_more_3(const Step *s) { return NAME(s, 3, 1); } \
    TARGET static uint8_t NAME##_more_4(const Step *s) { return NAME(s, 4, 1); } \
    TARGET static uint8_t NAME##_more_5(const Step *s) { return NAME(s, 5, 1); } \
    static StepOf *const NAME##_of[] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, \
                                        NAME##_more_1, NAME##_more_2, NAME##_more_3, NAME##_more_4, NAME##_more_5};

INLINE uint8_t step_portable(const Step *s, const int k, const int more) {
    const int groups = STATES >> k, fan = 1 << k;
    const uint8_t *restrict before = s->cost, floor = s->q->floor;
    const uint8_t *restrict places = s->q->places, *restrict metric = s->q->metric;
    uint8_t *restrict from = s->from, *restrict next = s->next;
    uint8_t reached[STATES / 2], lowest = WORST;
    (void)more;
    for (int g = 0; g < groups; g++) {
        uint8_t least = before[g], choice = 0;
        for (int t = 1; t < fan; t++) {
            const uint8_t other = before[t * groups + g];
            choice = other < least ? (uint8_t)t : choice;
            least = other < least ? other : least;
        }
        from[g] = choice;
        reached[g] = (uint8_t)(least > floor ? least - floor : 0);
        lowest = reached[g] < lowest ? reached[g] : lowest;
    }
    for (int state = 0; state < STATES; state++) {
        const int sum = reached[state >> k] + metric[places[state]];
        next[state] = (uint8_t)(sum < WORST ? sum : WORST);
    }
    return lowest;
}

EACH(step_portable, )

#ifdef HAS_VECTORS
#define FOR_AVX2 __attribute__((target("avx2")))

FOR_AVX2 INLINE uint8_t step_avx2(const Step *s, const int k, const int more) {
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

EACH(step_avx2, FOR_AVX2)

AVX512 INLINE uint8_t step_avx512(const Step *s, const int k, const int more) {
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

EACH(step_avx512, AVX512)
#endif

static StepOf *const *const paths[] =
    BY_PATH(step_portable_of, step_avx2_of, step_portable_of, step_avx512_of, step_avx512_of);

void mc_quick_init(Quick *q, const float *levels, int count, const uint8_t *places, int path) {
    q->count = count;
    q->path = path;
    for (int i = 0; i < MOST_LEVELS; i++) q->levels[i] = levels[i < count ? i : count - 1];
    q->least = levels[0];
    q->most = levels[count - 1];
    memcpy(q->places, places, STATES);
    for (int i = 0; i < TABLES; i++)
        for (int state = 0; state < STATES; state++)
            q->within[i][state] = (uint8_t)(places[state] / TABLE == i ? places[state] % TABLE : 128);
}

/* The cost of each level, less that of the value that is nearest to the target in the levels' range: with n that value,
 * (v - t)^2 - (n - t)^2 = (v - n) (v + n - 2 t). Whole units, rounded by way of half ones. */
VERSIONS static void measure(Quick *q, float target, float weight) {
    const float nearest = target < q->least ? q->least : target > q->most ? q->most : target;
    const float rest = nearest - 2 * target, half_units = 2 * weight * q->units;
    for (int i = 0; i < MOST_LEVELS; i++) {
        const float cost = (q->levels[i] - nearest) * (q->levels[i] + rest) * half_units;
        const int twice = cost < (float)MOST_TWICE ? (int)cost : MOST_TWICE, whole = (twice + 1) >> 1;
        const int bent = whole > BEND ? BEND + ((whole - BEND) >> 3) : whole;
        q->metric[i] = (uint8_t)(bent > MOST_OF_ONE ? MOST_OF_ONE : bent);
    }
}

void mc_quick_begin(Quick *q, float target, float weight, int last_bits, int overlap) {
    measure(q, target, weight);
    q->floor = 0;
    for (int state = 0; state < STATES; state++)
        q->cost[0][state] = overlap < 0 || state >> last_bits == overlap ? q->metric[q->places[state]] : WORST;
}

void mc_quick_advance(Quick *q, int n, int bits, float target, float weight, uint8_t *from) {
    measure(q, target, weight);
    const Step step = {q, q->cost[(n - 1) & 1], q->cost[n & 1], from};
    q->floor = paths[q->path][bits - 1 + (q->count > MOST_LEVELS / 2 ? 5 : 0)](&step);
}

VERSIONS int mc_quick_cheapest(const Quick *q, int n, int apart, int first) {
    const uint8_t *restrict cost = q->cost[n & 1];
    if (apart > 1) {
        int best = first;
        for (int state = first; state < STATES; state += apart) best = cost[state] < cost[best] ? state : best;
        return best;
    }
    uint8_t least = WORST;
    for (int state = 0; state < STATES; state++) least = cost[state] < least ? cost[state] : least;
    return (int)((const uint8_t *)memchr(cost, least, STATES) - cost);
}
