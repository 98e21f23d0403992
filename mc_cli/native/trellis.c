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
#define PIECE 32 /* weights between two looks at the errors so far, where errors are fed back */
#define UNSETTLED 12 /* weights before such a look whose codes are still likely to change */

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
    float cost[2][STATES] __attribute__((aligned(64))); /* of every state at the weight reached, and room for the next */
    float values[STATES] __attribute__((aligned(64)));
    float best[STATES / 2] __attribute__((aligned(64)));
    uint8_t *from; /* [length][STATES / 2] */
    uint16_t *state; /* [length] */
    float *aim, *fed; /* [rings * length]: targets with what errors owe them; the errors that are counted in */
} Scratch;

typedef struct {
    const float *targets, *weights, *feedback, *values;
    int groups, rings, length, numerator, denominator, parts;
    uint8_t *codes;
    float *decoded;
    atomic_int failed;
} Search;

/* Bits by which the window moves between weight i and weight i + 1 of a ring. */
INLINE int step_bits(const Search *search, int i) {
    return (int)((int64_t)(i + 1) * search->numerator / search->denominator
                 - (int64_t)i * search->numerator / search->denominator);
}

/* Costs at the first weight of a path: of any state (overlap < 0), or of those that begin with the bits `overlap`. */
INLINE void begin_path(Scratch *s, float target, float weight, int last_bits, int overlap) {
    for (int state = 0; state < STATES; state++) {
        const float miss = s->values[state] - target;
        s->cost[0][state] = (overlap < 0 || state >> last_bits == overlap) ? weight * miss * miss : 1e30f;
    }
}

/* Costs at weight n of a path, from those at the one before, which lie in cost[(n - 1) % 2]. */
INLINE void advance(Scratch *s, int n, int bits, float target, float weight) {
    const float *cost = s->cost[(n - 1) & 1];
    float *next = s->cost[n & 1];
    uint8_t *from = s->from + (size_t)n * (STATES / 2);
    switch (bits) {
    case 1: step(1, cost, next, from, s->values, s->best, target, weight); break;
    case 2: step(2, cost, next, from, s->values, s->best, target, weight); break;
    case 3: step(3, cost, next, from, s->values, s->best, target, weight); break;
    case 4: step(4, cost, next, from, s->values, s->best, target, weight); break;
    default: step(5, cost, next, from, s->values, s->best, target, weight); break;
    }
}

/* state[0 .. count - 1] of the best path over the `count` weights from `first` on: to any state (overlap < 0), or to
 * one that ends with the bits `overlap`. */
INLINE void trace_back(Scratch *s, const Search *search, int first, int count, int last_bits, int overlap) {
    const int32_t *cost = (const int32_t *)s->cost[(count - 1) & 1]; /* as floats >= 0 are ordered */
    const int mask = overlap < 0 ? 0 : (STATES >> last_bits) - 1, ends = overlap < 0 ? 0 : overlap;
    int32_t least = INT32_MAX;
    for (int other = 0; other < STATES; other++) {
        const int32_t reached = (other & mask) == ends ? cost[other] : INT32_MAX;
        least = reached < least ? reached : least;
    }
    int state = 0;
    while ((state & mask) != ends || cost[state] != least) state++;
    for (int n = count - 1; n > 0; n--) {
        s->state[n] = (uint16_t)state;
        const int bits = step_bits(search, (first + n - 1) % search->length);
        const int group = state >> bits;
        state = s->from[(size_t)n * (STATES / 2) + group] * (STATES >> bits) + group;
    }
    s->state[0] = (uint16_t)state;
}

/* The bits that the states before and after the seam share, from the best path over the weights around it. */
INLINE int seam_bits(Scratch *s, const Search *search, const float *targets, const float *weights) {
    const int length = search->length, last_bits = step_bits(search, length - 1);
    const int before = 2 * WARM_UP < length ? WARM_UP : length / 2;
    int i = length - before;
    begin_path(s, targets[i], weights ? weights[i] : 1.0f, last_bits, -1);
    for (int n = 1; n < 2 * before; n++) {
        const int bits = step_bits(search, i);
        i = (length - before + n) % length;
        advance(s, n, bits, targets[i], weights ? weights[i] : 1.0f);
    }
    trace_back(s, search, length - before, 2 * before, last_bits, -1);
    return s->state[before - 1] & ((STATES >> last_bits) - 1);
}

/* Brings the targets of the group from weight `later` on up to the errors of `count` weights from `first` on. */
INLINE void feed_back(Scratch *s, const float *targets, const float *feedback, int rows, int first, int count, int later) {
    for (int n = 0; n < count; n++) {
        const float error = s->values[s->state[n]] - targets[first + n];
        const float change = error - s->fed[first + n];
        if (change == 0) continue; /* most of the path is as it was at the last look */
        s->fed[first + n] = error;
        const float *restrict owed = feedback + (size_t)(first + n) * rows;
        float *restrict aim = s->aim;
        for (int j = later; j < rows; j++) aim[j] -= change * owed[j];
    }
}

INLINE uint32_t reversed(uint32_t x) {
    uint32_t r = 0;
    for (int b = 0; b < STATE_BITS; b++) r |= ((x >> b) & 1u) << (STATE_BITS - 1 - b);
    return r;
}

static void free_scratch(Scratch *s) {
    if (s) { free(s->from); free(s->state); free(s->aim); free(s->fed); }
    free(s);
}

static Scratch *new_scratch(const Search *search) {
    Scratch *s = aligned_alloc(64, sizeof(Scratch));
    if (!s) return NULL;
    const size_t rows = (size_t)search->rings * search->length;
    s->from = aligned_alloc(64, (size_t)search->length * (STATES / 2));
    s->state = malloc(sizeof(uint16_t) * (size_t)search->length);
    s->aim = malloc(sizeof(float) * rows);
    s->fed = malloc(sizeof(float) * rows);
    if (!s->from || !s->state || !s->aim || !s->fed) { free_scratch(s); return NULL; }
    for (int state = 0; state < STATES; state++) s->values[state] = search->values[reversed((uint32_t)state)];
    return s;
}

/* Codes and values of the ring whose path is in state[]. */
INLINE void store_ring(const Scratch *s, const Search *search, uint8_t *out, float *decoded) {
    const int length = search->length;
    memset(out, 0, (size_t)((int64_t)length * search->numerator / search->denominator) / 8);
    for (int i = 0; i < length; i++) {
        /* the bits that weight i is the first to pass: the highest ones of its window */
        const int offset = (int)((int64_t)i * search->numerator / search->denominator), bits = step_bits(search, i);
        for (int b = 0; b < bits; b++)
            out[(offset + b) >> 3] |= (uint8_t)(((s->state[i] >> (STATE_BITS - 1 - b)) & 1) << ((offset + b) & 7));
        decoded[i] = s->values[s->state[i]];
    }
}

/* The rings of group g, one after the other.
 *
 * Errors are fed back without a second search: every PIECE weights the best path so far is traced back, and what its
 * errors, but for the UNSETTLED last ones, owe to the weights ahead is taken from their targets. The path is not held
 * to; where a later look finds another one, the difference is made good. To hold to it, in pieces of 64
 * weights with 32 more looked at ahead, costs 1.5 % of the error at 2 bits. */
INLINE void search_group(const Search *search, Scratch *s, int g) {
    const int length = search->length, rows = search->rings * length, last_bits = step_bits(search, length - 1);
    const size_t bytes = (size_t)((int64_t)length * search->numerator / search->denominator) / 8;
    const float *wanted = search->targets + (size_t)g * rows;
    const float *feedback = search->feedback ? search->feedback + (size_t)g * rows * rows : NULL;
    memcpy(s->aim, wanted, sizeof(float) * rows);
    memset(s->fed, 0, sizeof(float) * rows);
    for (int ring = 0; ring < search->rings; ring++) {
        const int start = ring * length;
        const float *t = s->aim + start, *w = search->weights ? search->weights + (size_t)g * rows + start : NULL;
        const int overlap = seam_bits(s, search, t, w);
        begin_path(s, t[0], w ? w[0] : 1.0f, last_bits, overlap);
        for (int n = 1; n < length; n++) {
            if (feedback && n % PIECE == 0) {
                trace_back(s, search, 0, n, last_bits, -1);
                feed_back(s, wanted, feedback, rows, start, n - UNSETTLED, start + n);
            }
            advance(s, n, step_bits(search, n - 1), t[n], w ? w[n] : 1.0f);
        }
        trace_back(s, search, 0, length, last_bits, overlap);
        if (feedback) feed_back(s, wanted, feedback, rows, start, length, start + length);
        const size_t place = (size_t)g * search->rings + ring;
        store_ring(s, search, search->codes + place * bytes, search->decoded + place * length);
    }
}

VERSIONS static void search_part(void *context, int part) {
    Search *search = context;
    Scratch *s = new_scratch(search);
    if (!s) { atomic_store(&search->failed, 1); return; }
    const int first = (int)((int64_t)search->groups * part / search->parts);
    const int last = (int)((int64_t)search->groups * (part + 1) / search->parts);
    for (int g = first; g < last; g++) search_group(search, s, g);
    free_scratch(s);
}

/* targets, weights, decoded [groups, rings, length] (weights may be NULL: ones); values [STATES] by window with the
 * first bit LOWEST; codes [groups, rings, length * numerator / denominator / 8]; feedback [groups, rings * length,
 * rings * length], what a unit of error of a weight (row) takes from the target of one after it (column); NULL: nothing.
 * Returns 0, or 1 without memory. */
int mc_trellis_encode(const float *targets, const float *weights, const float *feedback, const float *values,
                      int groups, int rings, int length, int numerator, int denominator, int threads, uint8_t *codes,
                      float *decoded) {
    const int parts = groups < threads ? groups : threads; /* all groups take as long; scratch has its price */
    Search search = {targets, weights, feedback, values, groups, rings, length, numerator, denominator, parts,
                     codes, decoded};
    atomic_init(&search.failed, 0);
    mc_parallel(search_part, &search, search.parts, threads);
    return atomic_load(&search.failed);
}
