/* Trellis codes: the search for the best code sequence (Viterbi), and the way back. See encodings/trellis.py.
 *
 * A sequence of `length` weights is a ring of length * rate bits. The window of STATE_BITS bits that starts at bit
 * floor(i * rate) decides weight i. States here are windows with the first bit highest, so that one step of the
 * sequence shifts a state to the left. */

#include "compiler.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STATE_BITS 12
#define STATES (1 << STATE_BITS)
#define LANES 16
#define WARM_UP 48 /* weights on either side of the seam from which its bits are guessed */

typedef float vec __attribute__((vector_size(4 * LANES)));

INLINE vec broadcast(float x) { return x - (vec){0}; }

/* lane j of the result: lane (16 * part + j) >> k of m, so every lane 2^k times; k is 1, 2 or 3 */
INLINE vec spread(vec m, int k, int part) {
#define S(K, P, J) ((16 * (P) + (J)) >> (K))
#define SPREAD(K, P) return __builtin_shufflevector(m, m, S(K,P,0), S(K,P,1), S(K,P,2), S(K,P,3), S(K,P,4), S(K,P,5), \
    S(K,P,6), S(K,P,7), S(K,P,8), S(K,P,9), S(K,P,10), S(K,P,11), S(K,P,12), S(K,P,13), S(K,P,14), S(K,P,15))
    switch (k * 16 + part) {
    case 16: SPREAD(1, 0); case 17: SPREAD(1, 1);
    case 32: SPREAD(2, 0); case 33: SPREAD(2, 1); case 34: SPREAD(2, 2); case 35: SPREAD(2, 3);
    case 48: SPREAD(3, 0); case 49: SPREAD(3, 1); case 50: SPREAD(3, 2); case 51: SPREAD(3, 3);
    case 52: SPREAD(3, 4); case 53: SPREAD(3, 5); case 54: SPREAD(3, 6); case 55: SPREAD(3, 7);
    }
    return m;
}

/* One step of k bits: costs of reaching every state next, and which of the 2^k states before each was best. */
INLINE void step(int k, const float *restrict cost, float *restrict next, uint8_t *restrict from,
                 const float *restrict values, float *restrict scratch, float target, float weight) {
    const int groups = STATES >> k, fan = 1 << k;
    const vec aim = broadcast(target), scale = broadcast(weight);
    const int32_t *restrict before = (const int32_t *)cost;
    int32_t *restrict best = (int32_t *)scratch;
    for (int g = 0; g < groups; g++) { /* floats >= 0 are ordered as their bits are: the low ones carry the choice */
        int32_t least = before[g] & -fan;
#pragma GCC unroll 64
        for (int t = 1; t < fan; t++) {
            const int32_t other = (before[t * groups + g] & -fan) | t;
            least = other < least ? other : least;
        }
        best[g] = least;
        from[g] = (uint8_t)(least & (fan - 1));
    }
    for (int g = 0; g < groups; g += LANES) {
        const vec m = *(const vec *)(scratch + g);
#pragma GCC unroll 64
        for (int part = 0; part < fan; part++) {
            const int at = (g << k) + part * LANES;
            const vec miss = *(const vec *)(values + at) - aim;
            const vec reached = k < 4 ? spread(m, k, part) : broadcast(scratch[g + (part >> (k - 4))]);
            *(vec *)(next + at) = reached + scale * miss * miss;
        }
    }
}

typedef struct {
    float cost[2][STATES] __attribute__((aligned(64)));
    float values[STATES] __attribute__((aligned(64)));
    float best[STATES / 2] __attribute__((aligned(64)));
    uint8_t *from; /* [length][STATES / 2] */
    uint16_t *state; /* [length] */
} Scratch;

/* Bits by which the window moves between weight i and weight i + 1. */
INLINE int step_bits(int i, int numerator, int denominator) {
    return (int)((int64_t)(i + 1) * numerator / denominator - (int64_t)i * numerator / denominator);
}

/* Best path over weights first .. first + count - 1 of the ring; scratch->state[0..count) are its states.
 * overlap < 0: any path; else the states before and after the seam share the bits `overlap`. */
INLINE float best_path(Scratch *s, const float *targets, const float *weights, int length, int numerator,
                       int denominator, int first, int count, int overlap) {
    const float huge = 1e30f;
    float *cost = s->cost[0], *next = s->cost[1];
    int i = first % length;
    float weight = weights ? weights[i] : 1.0f, target = targets[i];
    const int last_bits = step_bits(length - 1, numerator, denominator);
    for (int state = 0; state < STATES; state++) {
        const float miss = s->values[state] - target;
        cost[state] = (overlap < 0 || state >> last_bits == overlap) ? weight * miss * miss : huge;
    }
    for (int n = 1; n < count; n++) {
        const int bits = step_bits(i, numerator, denominator);
        i = (first + n) % length;
        weight = weights ? weights[i] : 1.0f;
        target = targets[i];
        uint8_t *from = s->from + (size_t)n * (STATES / 2);
        switch (bits) {
        case 1: step(1, cost, next, from, s->values, s->best, target, weight); break;
        case 2: step(2, cost, next, from, s->values, s->best, target, weight); break;
        case 3: step(3, cost, next, from, s->values, s->best, target, weight); break;
        case 4: step(4, cost, next, from, s->values, s->best, target, weight); break;
        default: step(5, cost, next, from, s->values, s->best, target, weight); break;
        }
        float *swap = cost; cost = next; next = swap;
    }
    int best = -1;
    for (int state = 0; state < STATES; state++)
        if ((overlap < 0 || (state & ((STATES >> last_bits) - 1)) == overlap) && (best < 0 || cost[state] < cost[best]))
            best = state;
    const float total = cost[best];
    int state = best;
    for (int n = count - 1; n > 0; n--) {
        s->state[n] = (uint16_t)state;
        const int bits = step_bits((first + n - 1) % length, numerator, denominator);
        const int group = state >> bits;
        state = s->from[(size_t)n * (STATES / 2) + group] * (STATES >> bits) + group;
    }
    s->state[0] = (uint16_t)state;
    return total;
}

INLINE uint32_t reversed(uint32_t x) {
    uint32_t r = 0;
    for (int b = 0; b < STATE_BITS; b++) r |= ((x >> b) & 1u) << (STATE_BITS - 1 - b);
    return r;
}

typedef struct {
    const float *targets, *weights, *values;
    int sequences, length, numerator, denominator, parts;
    uint8_t *codes;
    float *decoded;
    atomic_int failed;
} Search;

static void free_scratch(Scratch *s) {
    if (s) { free(s->from); free(s->state); }
    free(s);
}

static Scratch *new_scratch(const Search *search) {
    Scratch *s = aligned_alloc(64, sizeof(Scratch));
    if (!s) return NULL;
    s->from = aligned_alloc(64, (size_t)search->length * (STATES / 2));
    s->state = malloc(sizeof(uint16_t) * (size_t)search->length);
    if (!s->from || !s->state) { free_scratch(s); return NULL; }
    for (int state = 0; state < STATES; state++) s->values[state] = search->values[reversed((uint32_t)state)];
    return s;
}

/* The codes and values of sequence q. */
INLINE void search_one(const Search *search, Scratch *s, int q) {
    const int length = search->length, numerator = search->numerator, denominator = search->denominator;
    const int bytes = (int)((int64_t)length * numerator / denominator) / 8;
    const int last_bits = step_bits(length - 1, numerator, denominator);
    const float *t = search->targets + (size_t)q * length;
    const float *w = search->weights ? search->weights + (size_t)q * length : NULL;
    const int around = 2 * WARM_UP < length ? 2 * WARM_UP : length, before = around / 2;
    best_path(s, t, w, length, numerator, denominator, length - before, around, -1);
    const int overlap = s->state[before - 1] & ((STATES >> last_bits) - 1);
    best_path(s, t, w, length, numerator, denominator, 0, length, overlap);
    uint8_t *out = search->codes + (size_t)q * bytes;
    memset(out, 0, bytes);
    for (int i = 0; i < length; i++) {
        /* the bits that weight i is the first to pass: the highest ones of its window */
        const int offset = (int)((int64_t)i * numerator / denominator);
        const int bits = step_bits(i, numerator, denominator);
        for (int b = 0; b < bits; b++)
            out[(offset + b) >> 3] |= (uint8_t)(((s->state[i] >> (STATE_BITS - 1 - b)) & 1) << ((offset + b) & 7));
        search->decoded[(size_t)q * length + i] = s->values[s->state[i]];
    }
}

VERSIONS static void search_part(void *context, int part) {
    Search *search = context;
    Scratch *s = new_scratch(search);
    if (!s) { atomic_store(&search->failed, 1); return; }
    const int first = (int)((int64_t)search->sequences * part / search->parts);
    const int last = (int)((int64_t)search->sequences * (part + 1) / search->parts);
    for (int q = first; q < last; q++) search_one(search, s, q);
    free_scratch(s);
}

/* targets, weights, decoded [sequences, length] (weights may be NULL: ones); values [STATES] by window with the first
 * bit LOWEST; codes [sequences, length * numerator / denominator / 8]. Returns 0, or 1 without memory. */
int mc_trellis_encode(const float *targets, const float *weights, const float *values, int sequences, int length,
                      int numerator, int denominator, int threads, uint8_t *codes, float *decoded) {
    const int parts = sequences < threads ? sequences : threads; /* all sequences take as long; scratch has its price */
    Search search = {targets, weights, values, sequences, length, numerator, denominator, parts, codes, decoded};
    atomic_init(&search.failed, 0);
    mc_parallel(search_part, &search, search.parts, threads);
    return atomic_load(&search.failed);
}
