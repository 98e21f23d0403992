/* Steps of the trellis search in plain C, for NEON as well. trellis.c derives the full one, trellis_quick.c the quick
 * one: m_g = min_t C[t G + g], then C'[g 2^k + j] = m_g + w (v[g 2^k + j] - x)^2, with G = 2^(12 - k).
 *
 * Two loops over all states. The first takes the minima: costs that are compared lie G apart, so neighbours in memory
 * belong to neighbouring g, and compilers can take a vector of them. Full costs are compared as integers whose lowest k
 * bits are t: one minimum finds the cost and the choice. For them to carry t, the lowest bits of a cost are cut off,
 * which is the bound that trellis.c gives. Quick ones are bytes and leave no bit free: the choice is kept apart, and
 * changes where another cost is less, so the least t of equals stays, as with t in the lowest bits.
 *
 * The second loop goes from groups to states, in order: 2^k states of one g lie together. Full costs go by fours, a
 * vector of the compiler's (GCC, Clang): with k of 2 or more all four have one m_g, with k = 1 two have the one and
 * two the next. A square is v (w v + slope) + base, and base joins m_g before it is spread. Multiplications and
 * additions round each for itself on x86-64; compilers for other processors may fuse them. Quick costs look their
 * metric up one by one.
 *
 * Results: quick steps give the bytes of all other paths, as they are whole numbers. Full ones differ from fused ones
 * in the last bits of a cost, and so in a choice only where two costs are as near as that. */
#include "trellis_search.h"

typedef float four __attribute__((vector_size(16)));

INLINE void step_portable(const Step *s, const int k) {
    const int groups = STATES >> k, fan = 1 << k;
    const int32_t *restrict before = (const int32_t *)s->cost;
    float reached[STATES / 2] __attribute__((aligned(16)));
    int32_t *restrict best = (int32_t *)reached;
    uint8_t *restrict from = s->from;
    for (int g = 0; g < groups; g++) {
        int32_t least = before[g] & -fan;
#pragma GCC unroll 64
        for (int t = 1; t < fan; t++) {
            const int32_t other = (before[t * groups + g] & -fan) | t;
            least = other < least ? other : least;
        }
        best[g] = least;
        from[g] = (uint8_t)(least & (fan - 1));
    }
    for (int g = 0; g < groups; g += 4) {
        const four m = *(const four *)(reached + g) + s->base;
#pragma GCC unroll 64
        for (int part = 0; part < fan; part++) {
            const four value = *(const four *)(s->values + (g << k) + 4 * part);
            const four spread = k > 1 ? m[part >> (k - 2)] - (four){0}
                : part ? TWICE_EACH(m, 2, 3) : TWICE_EACH(m, 0, 1);
            *(four *)(s->next + (g << k) + 4 * part) = spread + value * (s->weight * value + s->slope);
        }
    }
}

FULL_STEPS(step_portable, )

INLINE uint8_t quick_portable(const QuickStep *s, const int k, const int more) {
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

QUICK_STEPS(quick_portable, )

const SearchPath mc_search_portable = {STEPS_OF(step_portable), QUICK_STEPS_OF(quick_portable)};
