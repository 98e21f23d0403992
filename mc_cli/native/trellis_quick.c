/* The quick trellis search: costs of one byte, so that a vector has four times the states of the full search.
 *
 * The recursion is that of trellis.c. With costs c before a step of k bits, G = 2^(12 - k), r_g = min_t c[t G + g]:
 *
 *     c'[g 2^k + j] = min(255, r_g - floor + metric[place[g 2^k + j]])
 *
 * where the floor is the least r_g - floor of the step before, so that r_g - floor is never negative. Only differences
 * of costs matter to the search, so nothing is lost by the floor, nor by taking from a weight's costs that of the
 * value n that is nearest to its target x among the levels' range: (v - x)^2 - (n - x)^2 = (v - n) (v + n - 2 x), at
 * least 0. The metric is `units` of that times the weight, rounded to whole ones; above 96 an eighth counts, and 224
 * at most.
 *
 * What is lost: costs are whole units, and those of 255 or more are alike. A usual error is three units: with two,
 * errors are 0.5 % larger than the full search's, with three 0.2 % (0.4 % where rows' importance is log-normal), and
 * with five so many paths are alike after an outlier that the best may be lost. A ring whose path does not close for
 * that is searched again in full (search_rings).
 *
 * Layout: costs [2][4096] by state; [4096] which of the levels, 128 at most, a state's value is, its place; the metric
 * [128] by place. So a weight's metric is computed per level, in float, and looked up per state. For AVX2, which looks
 * up in 16 bytes, places lie once more as [8 tables][4096].
 *
 * Exactness: costs are bytes, no sum passes 255 + 224, and the least t of equal costs is taken, so steps give the same
 * bytes on all paths. The metric is computed by the same code for all; its only product in a sum, 2 x, is exact, so
 * compilers may fuse it. */
#include "trellis_search.h"

#define BEND 96      /* metrics beyond this many units count an eighth, and ... */
#define MOST_OF_ONE 224 /* ... no more than this: one bad weight must not make all paths alike */
#define MOST_TWICE 65535

void mc_quick_init(Quick *q, const float *levels, int count, const uint8_t *places, const SearchPath *path) {
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

/* The metric. Whole units are rounded by way of half ones. */
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

void mc_quick_begin(Quick *q, float target, float weight) {
    measure(q, target, weight);
    q->floor = 0;
    for (int state = 0; state < STATES; state++) q->cost[0][state] = q->metric[q->places[state]];
}

void mc_quick_advance(Quick *q, int n, int bits, float target, float weight, uint8_t *from) {
    measure(q, target, weight);
    const QuickStep step = {q, q->cost[(n - 1) & 1], q->cost[n & 1], from};
    q->floor = q->path->quick_step[bits - 1 + (q->count > MOST_LEVELS / 2 ? LONGEST_STEP : 0)](&step);
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
