/* The search for the best code sequence (Viterbi), and the way back. encodings/trellis.py has the format, a file for
 * each path of the processor the step, trellis_quick.c the same search with costs of a byte.
 *
 * A ring of T weights at R bits is T R bits. The window of weight i, 12 bits from bit o_i = floor(i R) on, says its
 * value v_i; sought is the least sum_i w_i (v_i - x_i)^2. A state is a window with the first bit highest, so a step of
 * k = o_{i+1} - o_i bits is a shift to the left: with G = 2^(12 - k), the states t G + g, and no others, lead to the
 * states g 2^k + j (g < G; t, j < 2^k), and the least costs of paths that end there are
 *
 *     C'[g 2^k + j] = m_g + w (v[g 2^k + j] - x)^2,    m_g = min_t C[t G + g].
 *
 * The seam of a ring is passed by 12 - k bits, k of the last step. States begin at what the 48 weights before the seam,
 * or all of a shorter ring, make of them, and the best path to the end of the ring says which bits: the last state has
 * to end with those that the first begins with. Where the best path to such a state begins with other bits, these are
 * tried, three times; after that the ring is searched once more, from states that begin with the bits tried first.
 * Given these, and but for rounding, the search is exact where errors are not fed back within the group; search_ring
 * says how they are. The context matters: paths meet late, at 1 bit after hundreds of weights. Bits chosen by the best
 * path over 48 weights on either side, in a search of their own, cost 0.6 % more error at 1 bit and 0.4 % at 2.
 *
 * Layout: costs [2][4096] and values [4096] by state; t of every m_g as bytes [T][2048], by which the way back goes. A
 * panel is some inputs of a matrix, [input][output], in order: input n is searched for (x_n - sum_m U_mn e_m) / scale
 * with U `factor`, and leaves the error e_n, what it missed over U_nn (GPTQ). All inputs of one group of outputs are
 * one thread's, so threads change nothing.
 *
 * Rounding: costs are floats of 0 or more, ordered as their bits, so their k lowest bits can carry t through the
 * minimum: that moves a cost by up to (2^k - 1) 2^-23 of itself. The square is v (w v + slope) + base, whose roundings
 * and sum are up to 2^-22 w (|v| + |x|)^2 + 2^-23 C. So a step is off by up to 2^(k - 23) C + 2^-22 w (|v| + |x|)^2 to
 * first order; of costs that near, the lower t may win. Plain C rounds the products, AVX2 and AVX-512 fuse them,
 * alike. Source: QTIP, Tseng et al. 2024, arXiv:2406.11235 (bit-shift trellis, tail-biting); GPTQ, Frantar et al.
 * 2022, arXiv:2210.17323. */

#include "threads.h"
#include "trellis_search.h"

#include <stdatomic.h>
#include <stdlib.h>

#define TRIALS 3 /* ends of a ring beside that which its best path begins with */
#define WARM_UP 48 /* weights before the seam */
#define QUICK_UNITS 3 /* of cost in the usual error of a weight of usual importance */
#define PIECE 32 /* weights between two looks at the errors so far, where errors are fed back */
#define UNSETTLED 12 /* weights before such a look whose codes are still likely to change */
#define SMALLEST_SCALE 1e-12f
#define SMALLEST_WEIGHT 1e-30f

static const SearchPath *const paths[] =
    BY_PATH(&mc_search_portable, &mc_search_avx2, &mc_search_portable, &mc_search_avx512, &mc_search_avx512);

typedef struct {
    float cost[2][STATES] __attribute__((aligned(64))); /* one per state at the weight reached, and room for the next */
    float values[STATES] __attribute__((aligned(64)));
    uint8_t *from;   /* [length][STATES / 2] */
    uint16_t *state; /* [length] */
    float *wanted, *aim, *fed, *decoded; /* [rows]: targets; targets with what errors owe them; errors counted in; found */
    float *before;   /* [2][rows]: aim and fed as they were before the search of a ring */
    float *errors;   /* [count][rows], of the inputs of the panel */
    Quick *quick;    /* NULL: the full search */
} Scratch;

/* The panel: inputs `first` to first + count - 1 of matrices that have `inputs`, held as [input][output]. */
typedef struct {
    const float *targets; /* [batch][count][outputs] */
    const float *factor;  /* [factors][inputs][inputs], upper; NULL: errors are not fed into later inputs */
    const float *scales;  /* [batch][outputs]; NULL: ones */
    const int64_t *members; /* [groups][rows]: the outputs of each group, ring after ring */
    const float *weights;   /* [batch][groups][rows]; NULL: ones */
    const float *feedback;  /* [batch][groups][rows][rows]; NULL: nothing */
    const float *values;    /* [STATES] by window with the first bit LOWEST */
    const float *levels;    /* [level_count] for the quick search: the different values, ascending; NULL: the full one */
    const uint8_t *places;  /* [STATES] by window, where its value is among the levels */
    int level_count;
    int factors; /* one for all matrices, or as many as those */
    int batch, first, count, inputs, outputs, groups, rings, length, pieces, numerator, denominator;
    const SearchPath *path;
    uint8_t *codes; /* [batch][outputs / length][inputs][bytes] */
    float *decoded; /* [batch][inputs][outputs], in units of the scales */
    float *errors;  /* [rows]: targets less values, over the factor's diagonal; NULL where there is no factor */
    int *offsets;   /* [length + 1]: the first bit of every weight's window */
    atomic_int failed;
} Search;

/* Bits by which the window moves between weight i and weight i + 1 of a ring. */
INLINE int step_bits(const Search *search, int i) { return search->offsets[i + 1] - search->offsets[i]; }

/* Costs at the first weight of a path: of any state (overlap < 0), or of those that begin with the bits `overlap`, which
 * the quick search is never held to. */
INLINE void begin_path(Scratch *s, float target, float weight, int last_bits, int overlap) {
    if (s->quick) { mc_quick_begin(s->quick, target, weight); return; }
    for (int state = 0; state < STATES; state++) {
        const float miss = s->values[state] - target;
        s->cost[0][state] = (overlap < 0 || state >> last_bits == overlap) ? weight * miss * miss : 1e30f;
    }
}

/* Costs at weight n of a path, from those at the one before, which lie in cost[(n - 1) % 2]. */
INLINE void advance(Scratch *s, const Search *search, int n, int bits, float target, float weight) {
    if (s->quick) {
        mc_quick_advance(s->quick, n, bits, target, weight, s->from + (size_t)n * (STATES / 2));
        return;
    }
    const Step step = {s->cost[(n - 1) & 1], s->cost[n & 1], s->from + (size_t)n * (STATES / 2), s->values,
                       weight, -2 * weight * target, weight * target * target};
    search->path->step[bits - 1](&step);
}

/* The first of the cheapest states at weight n, of those that lie `apart` from `first` on. */
INLINE int cheapest(const Scratch *s, int n, int apart, int first) {
    if (s->quick) return mc_quick_cheapest(s->quick, n, apart, first);
    const int32_t *cost = (const int32_t *)s->cost[n & 1]; /* floats >= 0 are ordered as their bits are */
    int state = first;
    if (apart > 1) {
        for (int other = first; other < STATES; other += apart) state = cost[other] < cost[state] ? other : state;
        return state;
    }
    int32_t least = INT32_MAX;
    for (int other = 0; other < STATES; other++) least = cost[other] < least ? cost[other] : least;
    while (cost[state] != least) state++;
    return state;
}

/* state[0 .. count - 1] of the best path over the first `count` weights: to any state (overlap < 0), or to one that ends
 * with the bits `overlap`. The first `known` are of an earlier look at the same path: where both meet they stay one.
 * Returns the first weight whose state may have changed. */
INLINE int trace_back(Scratch *s, const Search *search, int count, int last_bits, int overlap, int known) {
    int state = overlap < 0 ? cheapest(s, count - 1, 1, 0) : cheapest(s, count - 1, STATES >> last_bits, overlap);
    for (int n = count - 1; n >= 0; n--) {
        if (n < known && s->state[n] == state) return n + 1;
        s->state[n] = (uint16_t)state;
        if (n == 0) break;
        const int bits = step_bits(search, n - 1);
        const int group = state >> bits;
        state = s->from[(size_t)n * (STATES / 2) + group] * (STATES >> bits) + group;
    }
    return 0;
}

/* Costs of the states before weight 0, in cost[1], from the best paths over the weights before the seam: more than that
 * of the cheapest. */
INLINE void warm_up(Scratch *s, const Search *search, const float *targets, const float *weights) {
    const int length = search->length, before = WARM_UP < length ? WARM_UP : length; /* both even */
    int i = length - before;
    begin_path(s, targets[i], weights ? weights[i] : 1.0f, 0, -1);
    for (int n = 1; n < before; n++, i++)
        advance(s, search, n, step_bits(search, i), targets[i + 1], weights ? weights[i + 1] : 1.0f);
    if (s->quick) return; /* which counts from the cheapest ever */
    float *restrict cost = s->cost[1], least = cost[0];
    for (int state = 1; state < STATES; state++) least = cost[state] < least ? cost[state] : least;
    for (int state = 0; state < STATES; state++) cost[state] -= least;
}

/* Brings the targets of the group from weight `later` on up to the errors of weights n to end - 1 of the ring at
 * `start`. */
INLINE void feed_back(Scratch *s, const float *feedback, int rows, int start, int n, int end, int later) {
    for (; n < end; n++) {
        const float error = s->values[s->state[n]] - s->wanted[start + n];
        const float change = error - s->fed[start + n];
        if (change == 0) continue; /* most of the path is as it was at the last look */
        s->fed[start + n] = error;
        const float *restrict owed = feedback + (size_t)(start + n) * rows;
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
    if (s) { free(s->from); free(s->state); free(s->wanted); free(s->errors); free(s->quick); }
    free(s);
}

static Scratch *new_scratch(const Search *search) {
    Scratch *s = aligned_alloc(64, sizeof(Scratch));
    if (!s) return NULL;
    const size_t rows = (size_t)search->rings * search->length;
    s->from = aligned_alloc(64, (size_t)search->length * (STATES / 2));
    s->state = malloc(sizeof(uint16_t) * (size_t)search->length);
    s->wanted = malloc(6 * sizeof(float) * rows);
    s->errors = malloc(sizeof(float) * rows * (size_t)search->count);
    s->quick = search->levels ? aligned_alloc(64, (sizeof(Quick) + 63) / 64 * 64) : NULL;
    if (!s->from || !s->state || !s->wanted || !s->errors || (search->levels && !s->quick)) {
        free_scratch(s);
        return NULL;
    }
    if (s->quick) {
        uint8_t places[STATES];
        for (int state = 0; state < STATES; state++) places[state] = search->places[reversed((uint32_t)state)];
        mc_quick_init(s->quick, search->levels, search->level_count, places, search->path);
    }
    s->aim = s->wanted + rows;
    s->fed = s->aim + rows;
    s->decoded = s->fed + rows;
    s->before = s->decoded + rows;
    for (int state = 0; state < STATES; state++) s->values[state] = search->values[reversed((uint32_t)state)];
    return s;
}

/* Codes and values of the ring whose path is in state[]. */
INLINE void store_ring(const Scratch *s, const Search *search, uint8_t *out, float *decoded) {
    const int length = search->length;
    memset(out, 0, (size_t)search->offsets[length] / 8);
    for (int i = 0; i < length; i++) {
        /* the bits that weight i is the first to pass: the highest ones of its window */
        const int offset = search->offsets[i], bits = step_bits(search, i);
        for (int b = 0; b < bits; b++)
            out[(offset + b) >> 3] |= (uint8_t)(((s->state[i] >> (STATE_BITS - 1 - b)) & 1) << ((offset + b) & 7));
        decoded[i] = s->values[s->state[i]];
    }
}

/* Units of the quick search's costs in a squared error of weight 1: see trellis_quick.c for how many a usual error is.
 * Errors are about 1.12 * 4^-rate, and not much below 0.0005 for want of finer levels. */
INLINE float units_of(const Search *search, const float *weights) {
    float usual = 1.12f, sum = 0;
    for (int half = 0; half < 2 * search->numerator / search->denominator; half++) usual /= 2;
    for (int i = 0; i < search->length; i++) sum += weights ? weights[i] : 1.0f;
    const float mean = sum / (float)search->length;
    return QUICK_UNITS / ((usual + 0.0005f) * (mean > SMALLEST_WEIGHT ? mean : SMALLEST_WEIGHT));
}

/* One ring's path, from targets with all that earlier rings owe: from any state, each at what the weights before the
 * seam make of it (*overlap < 0), or from those that begin with the bits *overlap, which are set to the best path's.
 * Returns 0 where no path to a state that ends with these bits begins with them.
 *
 * Errors are fed back without a second search: every PIECE weights the best path so far is traced back, and what its
 * errors, but for the UNSETTLED last ones, owe to the weights ahead is taken from their targets. The path is not held
 * to; where a later look finds another one, the difference is made good. Holding to it, in pieces of 64 weights with 32
 * more looked at ahead, costs 1.5 % of the error at 2 bits. */
INLINE int search_ring(const Search *search, Scratch *s, const float *weights, const float *feedback, int ring,
                       int *overlap) {
    const int length = search->length, rows = search->rings * length, last_bits = step_bits(search, length - 1);
    const int start = ring * length, open = *overlap < 0;
    const float *t = s->aim + start, *w = weights ? weights + start : NULL;
    if (s->quick) s->quick->units = units_of(search, w);
    if (open) warm_up(s, search, t, w);
    else begin_path(s, t[0], w ? w[0] : 1.0f, last_bits, *overlap);
    int looked_at = 0, counted = 0; /* weights of the path that is in state[]; those whose errors are fed back */
    for (int n = open ? 0 : 1; n < length; n++) {
        if (feedback && n && n % PIECE == 0) {
            const int changed = trace_back(s, search, n, last_bits, -1, looked_at);
            feed_back(s, feedback, rows, start, changed < counted ? changed : counted, n - UNSETTLED, start + n);
            looked_at = n;
            counted = n - UNSETTLED;
        }
        advance(s, search, n, step_bits(search, (n + length - 1) % length), t[n], w ? w[n] : 1.0f);
    }
    int changed = length, end = *overlap;
    if (open) {
        changed = trace_back(s, search, length, last_bits, -1, looked_at);
        end = *overlap = s->state[0] >> last_bits;
        looked_at = length;
    }
    for (int trial = 0;; trial++) {
        const int closing = trace_back(s, search, length, last_bits, end, looked_at);
        changed = closing < changed ? closing : changed;
        if (s->state[0] >> last_bits == end) break;
        if (!open || trial == TRIALS) return 0;
        end = s->state[0] >> last_bits;
    }
    if (feedback)
        feed_back(s, feedback, rows, start, changed < counted ? changed : counted, length, start + length);
    return 1;
}

/* The rings of one input's weights of a group, one after the other; codes lie `pitch` bytes apart, ring by ring. */
INLINE void search_rings(const Search *search, Scratch *s, const float *weights, const float *feedback,
                         const int64_t *members, uint8_t *codes, size_t pitch) {
    const size_t length = (size_t)search->length, rows = (size_t)search->rings * length;
    memcpy(s->aim, s->wanted, sizeof(float) * rows);
    memset(s->fed, 0, sizeof(float) * rows);
    for (int ring = 0; ring < search->rings; ring++) {
        int overlap = -1;
        memcpy(s->before, s->aim, 2 * sizeof(float) * rows);
        if (!search_ring(search, s, weights, feedback, ring, &overlap)) { /* again, in full and held to these bits */
            Quick *quick = s->quick;
            s->quick = NULL;
            memcpy(s->aim, s->before, 2 * sizeof(float) * rows);
            search_ring(search, s, weights, feedback, ring, &overlap);
            s->quick = quick;
        }
        const size_t start = (size_t)ring * length;
        store_ring(s, search, codes + ((size_t)members[start] / length) * pitch, s->decoded + start);
    }
}

/* A row of zeros has scale 0: its values do not matter. */
INLINE float divisor_of(const float *scales, int64_t output) {
    return !scales ? 1.0f : scales[output] > SMALLEST_SCALE ? scales[output] : SMALLEST_SCALE;
}

/* All inputs of the panel for one group of outputs of one matrix. */
INLINE void search_group(const Search *search, Scratch *s, int item, int group) {
    const int rows = search->rings * search->length, outputs = search->outputs;
    const size_t place = (size_t)item * search->groups + group, bytes = (size_t)search->offsets[search->length] / 8;
    const float *weights = search->weights ? search->weights + place * rows : NULL;
    const float *feedback = search->feedback ? search->feedback + place * rows * rows : NULL;
    const int64_t *members = search->members + (size_t)group * rows;
    const float *scales = search->scales ? search->scales + (size_t)item * outputs : NULL;
    const size_t inputs = (size_t)search->inputs;
    const float *factor = search->factor ? search->factor + (search->factors > 1 ? item * inputs * inputs : 0) : NULL;
    for (int n = 0; n < search->count; n++) {
        const int input = search->first + n;
        const float *target = search->targets + ((size_t)item * search->count + n) * outputs;
        float *restrict error = s->errors + (size_t)n * rows, *restrict wanted = s->wanted;
        for (int i = 0; i < rows; i++) error[i] = target[members[i]];
        for (int m = 0; factor && m < n; m++) { /* debts of earlier inputs of the panel */
            const float share = factor[(size_t)(search->first + m) * inputs + input];
            const float *restrict owed = s->errors + (size_t)m * rows;
            for (int i = 0; i < rows; i++) error[i] -= share * owed[i];
        }
        for (int i = 0; i < rows; i++) wanted[i] = error[i] / divisor_of(scales, members[i]);
        uint8_t *codes = search->codes + ((size_t)item * (outputs / search->length) * inputs + input) * bytes;
        search_rings(search, s, weights, feedback, members, codes, inputs * bytes);
        const size_t column = ((size_t)item * inputs + input) * outputs;
        for (int i = 0; i < rows; i++) search->decoded[column + members[i]] = s->decoded[i];
        if (!factor) continue;
        const float inverse = 1.0f / factor[(size_t)input * inputs + input];
        for (int i = 0; i < rows; i++) {
            error[i] = (error[i] - (scales ? scales[members[i]] : 1.0f) * s->decoded[i]) * inverse;
            search->errors[column + members[i]] = error[i];
        }
    }
}

VERSIONS static void search_piece(void *context, int piece) {
    Search *search = context;
    Scratch *s = new_scratch(search);
    if (!s) { atomic_store(&search->failed, 1); return; }
    const int64_t all = (int64_t)search->batch * search->groups;
    const int first = (int)(all * piece / search->pieces), last = (int)(all * (piece + 1) / search->pieces);
    for (int i = first; i < last; i++) search_group(search, s, i / search->groups, i % search->groups);
    free_scratch(s);
}

int mc_trellis_encode(const float *targets, const float *factor, const float *scales, const int64_t *members,
                      const float *weights, const float *feedback, const float *values, int factors, int batch,
                      int first, int count, int inputs, int outputs, int groups, int rings, int length, int numerator,
                      int denominator, const float *levels, const uint8_t *places, int level_count, int path,
                      int threads, uint8_t *codes, float *decoded, float *errors) {
    const int all = batch * groups, known = known_path(path < 0 ? mc_best_path() : path);
    if (level_count > MOST_LEVELS) return 2;
    Search search = {.targets = targets, .factor = factor, .scales = scales, .members = members, .weights = weights,
                     .feedback = feedback, .values = values, .factors = factors, .batch = batch, .first = first,
                     .count = count, .inputs = inputs, .outputs = outputs, .groups = groups, .rings = rings,
                     .length = length, .path = paths[known], .codes = codes,
                     .levels = levels, .places = places, .level_count = level_count,
                     .numerator = numerator, .denominator = denominator,
                     .pieces = all < threads ? all : threads, /* all groups take as long; scratch has its price */
                     .decoded = decoded, .errors = errors, .offsets = malloc(sizeof(int) * ((size_t)length + 1))};
    if (!search.offsets) return 1;
    for (int i = 0; i <= length; i++) search.offsets[i] = (int)((int64_t)i * numerator / denominator);
    atomic_init(&search.failed, 0);
    mc_parallel(search_piece, &search, search.pieces, threads);
    free(search.offsets);
    return atomic_load(&search.failed);
}
