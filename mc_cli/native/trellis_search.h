/* Common to the sources of the trellis search: its steps, of which each path of the processor has its own, and the
 * quick search. */
#ifndef MC_TRELLIS_SEARCH_H
#define MC_TRELLIS_SEARCH_H

#include "product.h"

#define STATE_BITS 12
#define STATES (1 << STATE_BITS)
#define LONGEST_STEP 5 /* bits */
#define MOST_LEVELS 128
#define TABLE 16 /* entries of a vpshufb's table */
#define TABLES (MOST_LEVELS / TABLE)
#define WORST 255 /* cost of the quick search */

/* One step of k bits: costs of reaching every state next, and which of the 2^k states before each was best. A value v
 * adds v * (weight * v + slope) + base. Where rounding makes a cost negative, it is about zero and the order is of no
 * use. */
typedef struct {
    const float *cost; /* [STATES] */
    float *next;       /* [STATES] */
    uint8_t *from;     /* [STATES >> k] */
    const float *values;
    float weight, slope, base;
} Step;

typedef struct SearchPath SearchPath;

typedef struct {
    uint8_t cost[2][STATES] __attribute__((aligned(64)));         /* by parity of the weight */
    uint8_t places[STATES] __attribute__((aligned(64)));          /* by state: where its value is among the levels */
    uint8_t within[TABLES][STATES] __attribute__((aligned(64)));  /* places in each table; 128 where it is another's */
    uint8_t metric[MOST_LEVELS] __attribute__((aligned(64)));     /* by level: the cost of this weight's error */
    float levels[MOST_LEVELS], least, most;
    float units; /* of cost in a squared error of weight 1 */
    int count;
    const SearchPath *path;
    uint8_t floor; /* what all states cost at the least */
} Quick;

/* The same of the quick search. Returns the floor of the step after it. */
typedef struct {
    const Quick *q;
    const uint8_t *cost;
    uint8_t *next, *from;
} QuickStep;

typedef void StepOf(const Step *);
typedef uint8_t QuickStepOf(const QuickStep *);

/* The functions that a processor's path has of its own. */
struct SearchPath {
    StepOf *step[LONGEST_STEP];                /* by bits, from 1 on */
    QuickStepOf *quick_step[2 * LONGEST_STEP]; /* likewise; the second ones for more than MOST_LEVELS / 2 levels */
};

extern const SearchPath mc_search_portable, mc_search_avx2, mc_search_avx512;

/* One copy of a step for every k, with its shuffles as constants, and of quick ones another for more levels. */
#define FULL_STEPS(NAME, TARGET) \
    TARGET static void NAME##_1(const Step *step) { NAME(step, 1); } \
    TARGET static void NAME##_2(const Step *step) { NAME(step, 2); } \
    TARGET static void NAME##_3(const Step *step) { NAME(step, 3); } \
    TARGET static void NAME##_4(const Step *step) { NAME(step, 4); } \
    TARGET static void NAME##_5(const Step *step) { NAME(step, 5); }
#define STEPS_OF(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5}

#define QUICK_STEPS(NAME, TARGET) \
    TARGET static uint8_t NAME##_1(const QuickStep *s) { return NAME(s, 1, 0); } \
    TARGET static uint8_t NAME##_2(const QuickStep *s) { return NAME(s, 2, 0); } \
    TARGET static uint8_t NAME##_3(const QuickStep *s) { return NAME(s, 3, 0); } \
    TARGET static uint8_t NAME##_4(const QuickStep *s) { return NAME(s, 4, 0); } \
    TARGET static uint8_t NAME##_5(const QuickStep *s) { return NAME(s, 5, 0); } \
    TARGET static uint8_t NAME##_more_1(const QuickStep *s) { return NAME(s, 1, 1); } \
    TARGET static uint8_t NAME##_more_2(const QuickStep *s) { return NAME(s, 2, 1); } \
    TARGET static uint8_t NAME##_more_3(const QuickStep *s) { return NAME(s, 3, 1); } \
    TARGET static uint8_t NAME##_more_4(const QuickStep *s) { return NAME(s, 4, 1); } \
    TARGET static uint8_t NAME##_more_5(const QuickStep *s) { return NAME(s, 5, 1); }
#define QUICK_STEPS_OF(NAME) \
    {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, \
     NAME##_more_1, NAME##_more_2, NAME##_more_3, NAME##_more_4, NAME##_more_5}

/* levels: in ascending order, `count` of them; places: by state. */
void mc_quick_init(Quick *q, const float *levels, int count, const uint8_t *places, const SearchPath *path);

/* Costs of a first weight. */
void mc_quick_begin(Quick *q, float target, float weight);

/* Costs at weight n from those at weight n - 1, `bits` further on. from [STATES >> bits]: which state before was
 * best. */
void mc_quick_advance(Quick *q, int n, int bits, float target, float weight, uint8_t *from);

/* The first of the cheapest states at weight n, of those that lie `apart` from `first` on. */
int mc_quick_cheapest(const Quick *q, int n, int apart, int first);

#endif
